"""Run a training worker in this process, as one of torchrun's, or on a Ray cluster by Ray Train.

Checkpoints and logs are the train loop's own, in the run folder: a worker group that Ray starts again, here or on other
machines, goes on from them. What Ray Train keeps (under ``FOLDER/ray``) holds no state; its reports only show
progress. The run folder must be storage that all workers see, a shared folder or a URL, and the workers must have
palate installed, or on their PYTHONPATH.

SIGTERM ends a training as ``guards.Preempted`` says: the script exits with 143, as if it had died of the signal, and
torchrun may start it again. Ray's workers end as those of a machine that is gone, and are started again.

On retry: starting the same command again goes on where the last one stopped.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from palate import artifacts
from palate.training.guards import Preempted, TrainingStopped
from palate.training.parallel import WAIT_SECONDS, World, backend, run_local, run_torchrun
from palate.training.shards import Unreachable

Launcher = Literal["local", "torchrun", "ray"]
Config = TypeVar("Config")
Result = TypeVar("Result")

# Errors that the same data and configuration would bring again; but see ``is_final``.
FINAL = (TrainingStopped, artifacts.ArtifactError, ValueError, TypeError, ImportError)

log = logging.getLogger(__name__)


def is_final(error: BaseException) -> bool:
    """Whether starting again would only bring the error again. Storage that does not answer may do so later."""
    return isinstance(error, FINAL) and not isinstance(error, Unreachable)


def launch(
    worker: Callable[[Config, World], Result],
    config: Config,
    *,
    launcher: Launcher,
    workers: int = 1,
    cpus_per_worker: float | None = None,
    folder: str | Path,
    gpu: bool | None = None,
    once: Callable[[Config], None] | None = None,
) -> Result:
    """Run ``worker(config, world)``, a module-level function, on every rank; returns what rank 0's returned.

    Only ``ray`` imports Ray, and only it starts the ``workers``: ``local`` is one process, and torchrun has started
    its own before this is called.

    Args:
        cpus_per_worker, gpu: of ``run_ray``.
        once: done before any rank's work, and not again when ranks are started again after a fault.

    Raises:
        ValueError: ``local`` with more than one worker; workers without a CPU.
        OSError: the disk is full, or object storage does not answer.
        SystemExit: SIGTERM ended the training, and what was done is saved.
    """
    try:
        with artifacts.os_errors():
            if cpus_per_worker is not None and cpus_per_worker <= 0:
                raise ValueError(f"--cpus-per-worker is {cpus_per_worker:g}: expected more than 0")
            if launcher == "torchrun":
                return run_torchrun(worker, config, once)
            if launcher == "local" and workers > 1:
                raise ValueError(
                    f"--launcher local is one process, but --workers is {workers}: start the script by `torchrun "
                    f"--nproc-per-node {workers}` with --launcher torchrun, or use --launcher ray"
                )
            if once:
                once(config)
            if launcher == "local":
                return run_local(worker, config)
            return run_ray(worker, config, workers=workers, cpus_per_worker=cpus_per_worker, folder=folder, gpu=gpu)
    except Preempted as notice:
        log.warning("%s", notice)
        raise SystemExit(128 + signal.SIGTERM) from None


class Job(Protocol):
    """What a job's config says of where it runs."""

    @property
    def out(self) -> str: ...
    @property
    def launcher(self) -> Launcher: ...
    @property
    def workers(self) -> int: ...
    @property
    def cpus_per_worker(self) -> float | None: ...
    @property
    def gpu(self) -> bool | None: ...


AnyJob = TypeVar("AnyJob", bound=Job)


def launch_job(
    worker: Callable[[AnyJob, World], Result], config: AnyJob, once: Callable[[AnyJob], None] | None = None
) -> Result:
    """``launch`` where the config says."""
    return launch(
        worker,
        config,
        launcher=config.launcher,
        workers=config.workers,
        cpus_per_worker=config.cpus_per_worker,
        folder=config.out,
        gpu=config.gpu,
        once=once,
    )


def run_ray(
    worker: Callable[[Config, World], Result],
    config: Config,
    *,
    workers: int,
    cpus_per_worker: float | None = None,
    folder: str | Path,
    gpu: bool | None = None,
    failures: int = 3,
) -> Result:
    """Run ``worker`` on ``workers`` ranks of the Ray cluster that is there, or of one started on this machine.

    Args:
        cpus_per_worker: which Ray keeps for each, and sets OMP_NUM_THREADS to where nobody else does. By default one,
            or none where it has a GPU.
        gpu: a GPU for each worker; by default if the cluster has as many now. A cluster that starts machines when they
            are asked for may have none yet.
        failures: how often a group whose worker died is started again. An error that would come again is raised at
            once, as the worker raised it; preempted nodes are waited for without a limit.

    Raises:
        OSError: the disk or object storage refused more often than ``failures``.
        ray.train.TrainingFailedError, ray.exceptions.ActorDiedError: workers, or Ray's controller, died more often.
    """
    import ray
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.exceptions import ActorDiedError
    from ray.train import ControllerError, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    if not ray.is_initialized():
        ray.init()
    use_gpu = ray.cluster_resources().get("GPU", 0) >= workers if gpu is None else gpu
    filesystem, root = artifacts.locate(folder)
    # By reference: Ray's controller holds the settings, and would import all that they need of models, for nothing.
    work = ray.put((worker, config, os.getcwd()))  # noqa: PTH109
    for attempt in range(failures + 1):
        trainer = TorchTrainer(
            _work,
            train_loop_config={"work": work},
            torch_config=TorchConfig(backend=backend("cuda" if use_gpu else "cpu"), timeout_s=WAIT_SECONDS),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": cpus_per_worker} if cpus_per_worker else None,
            ),
            run_config=RunConfig(
                # Ray silently resumes a run whose name it has seen; there is nothing of Ray's to resume.
                name=f"{Path(root).name}-{time.time_ns():x}",
                storage_path=f"{root}/ray",
                storage_filesystem=PyFileSystem(FSSpecHandler(filesystem)),
            ),
        )
        try:
            return trainer.fit().return_value
        except WorkerGroupError as error:
            causes = [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]
            if final := next((cause for cause in causes if is_final(cause)), None):
                raise final from error
            if attempt == failures:
                if refused := next((cause for cause in causes if isinstance(cause, OSError)), None):
                    raise refused from error  # by the disk or the storage, all the time
                raise
            log.warning("a worker died; starting the group again, %d of %d: %s", attempt + 1, failures, error)
        except (ActorDiedError, ControllerError) as error:
            # Ray's own controller, which keeps files of its own in the run folder and does not say what failed.
            if attempt == failures:
                artifacts.exists(folder)  # raises what the storage refuses, which the job says in one line
                raise
            log.warning("Ray's controller died; starting again, %d of %d: %s", attempt + 1, failures, error)
    raise AssertionError  # the last attempt returned or raised


def _work(settings: dict[str, Any]) -> Any:
    """What each Ray Train worker runs."""
    import ray.train.torch

    worker, config, cwd = ray.get(settings["work"])
    # Ray Train moves its workers into a folder of their own; relative paths are meant from where the driver stands.
    if Path(cwd).is_dir():
        os.chdir(cwd)
    world = replace(World.current(ray.train.torch.get_device()), report=_report)
    return worker(config, world)


def _report(figures: Mapping[str, float]) -> None:
    import ray.train

    ray.train.report(dict(figures))  # a barrier: every rank comes here equally often
