"""Tasks of a preparation (``palate.corpora.preparation``, ``palate.lpo.encoding``) on a Ray cluster, by Ray Data.

On retry: Ray may run a task twice, on another node too. Every task writes an artifact of its own under a name that
depends on the task alone, so the second run finds it or writes the same files again. ``--out`` must be storage that
all nodes see: a shared folder or a URL.
"""

import json
from collections.abc import Callable
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from palate.corpora.preparation import Step
from palate.corpora.streams import CorpusError
from palate.progress import track


def run_with_ray(step: Step) -> list[dict[str, Any]]:
    """The results of the tasks in their order, a Ray task each; starts or joins a cluster where none is joined.

    Raises:
        CorpusError: a task found that the input is not what the command says.
    """
    return _run(step, compute=None, gpus=0)


def run_with_actors(step: Step, gpu: bool | None = None, at_least: int = 1) -> list[dict[str, Any]]:
    """The same in actors that stay, for tasks that keep a model in memory: one for each GPU of the cluster, or where
    there is none, for every second CPU.

    Args:
        gpu: whether an actor needs a GPU; by default if there is one now.
        at_least: so many actors, if there are as many tasks: a cluster that starts machines when they are asked for
            may have none yet.

    Raises:
        CorpusError: a task found that the input is not what the command says.
    """
    _join()
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    gpu = gpus > 0 if gpu is None else gpu
    count = min(len(step.tasks), max(at_least, gpus if gpu else int(resources.get("CPU", 1)) // 2))
    return _run(step, compute=ActorPoolStrategy(size=max(1, count)), gpus=1 if gpu else 0)


class _Task:
    """What an actor, or a task, does with a row."""

    def __init__(self, run: Callable[[Any], dict[str, Any]]) -> None:
        self._run = run

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"position": row["position"], "result": json.dumps(self._run(row["task"])), "error": ""}
        except CorpusError as error:  # a finding about the input, not a failure to retry
            return {"position": row["position"], "result": "", "error": str(error)}


def _join() -> None:
    if not ray.is_initialized():
        ray.init()


def _run(step: Step, compute: ActorPoolStrategy | None, gpus: int) -> list[dict[str, Any]]:
    if not step.tasks:
        return []
    _join()
    DataContext.get_current().enable_progress_bars = False
    rows = [{"position": position, "task": task} for position, task in enumerate(step.tasks)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    if compute is None:
        dataset = dataset.map(_Task(step.run).__call__)
    else:
        dataset = dataset.map(_Task, fn_constructor_args=(step.run,), compute=compute, num_gpus=gpus)
    finished = sorted(track(dataset.iter_rows(), step.label, len(rows)), key=lambda row: row["position"])
    for row in finished:
        if row["error"]:
            raise CorpusError(row["error"])
    return [json.loads(row["result"]) for row in finished]
