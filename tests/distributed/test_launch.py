"""Training workers under the three launchers."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

import toy_training as toy
from palate import artifacts
from palate.distributed.launch import FINAL, launch, run_ray
from palate.training.guards import NonFinite, Preempted
from palate.training.logging import read
from palate.training.parallel import World

WITHOUT_RAY = """
import sys
import toy_training as toy
from palate.distributed.launch import launch
settings = toy.ToyConfig(sys.argv[1], steps=2)
summary = launch(toy.run, settings, launcher="local", folder=settings.folder)
assert summary["steps"] == 2
assert not [name for name in sys.modules if name == "ray" or name.startswith("ray.")]
"""


def test_local_never_imports_ray(tmp_path):
    command = [sys.executable, "-c", WITHOUT_RAY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read(tmp_path)) == 2


def test_launchers_say_what_they_need(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"--workers is 2: start the script by `torchrun --nproc-per-node 2`"):
        launch(toy.run, toy.ToyConfig(str(tmp_path)), launcher="local", workers=2, folder=tmp_path)
    with pytest.raises(ValueError, match="--cpus-per-worker is 0: expected more than 0"):
        launch(toy.run, toy.ToyConfig(str(tmp_path)), launcher="ray", cpus_per_worker=0, folder=tmp_path)
    with pytest.raises(ValueError, match="needs torchrun's environment"):
        launch(toy.run, toy.ToyConfig(str(tmp_path)), launcher="torchrun", folder=tmp_path)


def test_what_is_done_once_is_not_done_again_when_torchrun_restarts(tmp_path, monkeypatch):
    settings, done = toy.ToyConfig(str(tmp_path), steps=1), []
    launch(toy.run, settings, launcher="local", folder=tmp_path, once=done.append)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    for restarts in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        launch(toy.run, settings, launcher="torchrun", folder=tmp_path, once=done.append)
    assert done == [settings, settings]


def test_sigterm_ends_the_script_with_its_exit_status_and_the_next_goes_on(tmp_path, caplog):
    settings = toy.ToyConfig(str(tmp_path), kill_step=7, kill_signal="SIGTERM")
    with pytest.raises(SystemExit) as ended:
        launch(toy.run, settings, launcher="local", folder=tmp_path)
    assert ended.value.code == 143
    assert "SIGTERM ended the run after step 7 of 12" in caplog.text
    assert launch(toy.run, settings, launcher="local", folder=tmp_path)["resumed"] == 7


def test_preemption_is_no_error_that_would_come_again():
    assert not issubclass(Preempted, FINAL)


def stopping(settings: toy.ToyConfig, world: World) -> None:
    raise NonFinite("step 3: the loss is nan; samples: s/1; groups: a.")


@pytest.mark.slow
def test_ray_trains_the_same_and_returns_the_summary(tmp_path, ray_cluster):
    settings = toy.ToyConfig(str(tmp_path / "ray"))
    summary = launch(toy.run, settings, launcher="ray", workers=1, folder=settings.folder)
    assert (summary["steps"], summary["resumed"]) == (12, 0)
    plain = replace(settings, folder=str(tmp_path / "plain"))
    launch(toy.run, plain, launcher="local", folder=plain.folder)
    assert toy.trace(settings.folder) == toy.trace(plain.folder)


def test_an_error_that_would_come_again_is_raised_as_it_is(tmp_path, ray_cluster):
    with pytest.raises(NonFinite, match="samples: s/1"):
        launch(stopping, toy.ToyConfig(str(tmp_path)), launcher="ray", folder=tmp_path)


@pytest.mark.parametrize(
    ("gpu", "cpus", "asked", "resources"),
    [
        (None, None, False, {"CPU": 1}),
        (None, 4.0, False, {"CPU": 4}),
        (True, None, True, {"GPU": 1}),
        (True, 4.0, True, {"CPU": 4, "GPU": 1}),
        (False, None, False, {"CPU": 1}),
    ],
)
def test_gpus_are_asked_for_though_no_machine_has_started_yet(
    tmp_path, ray_cluster, monkeypatch, gpu, cpus, asked, resources
):
    import ray.train.torch

    settings = []

    class Trainer:
        def __init__(self, worker, **given):
            settings.append(given)

        def fit(self):
            return SimpleNamespace(return_value="done")

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    config = toy.ToyConfig(str(tmp_path))
    made = launch(toy.run, config, launcher="ray", workers=2, cpus_per_worker=cpus, folder=tmp_path, gpu=gpu)
    assert made == "done"
    (given,) = settings
    assert given["scaling_config"].use_gpu is asked
    assert given["scaling_config"]._resources_per_worker_not_none == resources
    assert given["torch_config"].backend == ("cpu:gloo,cuda:nccl" if asked else "gloo")


@pytest.mark.parametrize(("cause", "raised"), [(OSError(28, "no space"), OSError), (RuntimeError("gone"), Exception)])
def test_what_the_disk_refuses_again_and_again_is_raised_as_it_is(tmp_path, ray_cluster, monkeypatch, cause, raised):
    import ray.train.torch

    tries = []

    class Trainer:
        def __init__(self, worker, **given): ...

        def fit(self):
            tries.append(1)
            raise ray.train.WorkerGroupError("the group failed", {0: cause})

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    with pytest.raises(raised) as caught:
        run_ray(toy.run, toy.ToyConfig(str(tmp_path)), workers=2, folder=tmp_path, failures=2)
    assert len(tries) == 3
    assert (caught.value is cause) == isinstance(cause, OSError)


@pytest.mark.parametrize("away", [True, False])
def test_a_controller_of_rays_that_dies_is_started_again(tmp_path, ray_cluster, monkeypatch, away):
    """Storage that is away ends it before any worker: then that is what is said. For real: tests/chaos."""
    import ray.exceptions
    import ray.train.torch

    tries = []

    class Trainer:
        def __init__(self, worker, **given): ...

        def fit(self):
            tries.append(1)
            raise ray.exceptions.ActorDiedError

    def exists(folder):
        if away:
            raise OSError("object storage failed")
        return False

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    monkeypatch.setattr(artifacts, "exists", exists)
    with pytest.raises(OSError if away else ray.exceptions.ActorDiedError):
        run_ray(toy.run, toy.ToyConfig(str(tmp_path)), workers=2, folder=tmp_path, failures=2)
    assert len(tries) == 3


@pytest.mark.long
def test_a_killed_worker_is_started_again_and_nothing_changes(tmp_path, ray_cluster):
    """One worker; two, on nodes that go and come: tests/chaos."""
    whole = toy.ToyConfig(str(tmp_path / "whole"))
    launch(toy.run, whole, launcher="local", folder=whole.folder)
    killed = toy.ToyConfig(str(tmp_path / "killed"), kill_fault="before manifest")
    summary = run_ray(toy.run, killed, workers=1, folder=killed.folder, failures=1)
    assert (tmp_path / "killed" / "killed").exists()
    assert summary["resumed"] == 4
    assert toy.trace(killed.folder) == toy.trace(whole.folder)


@pytest.mark.slow
def test_a_failed_run_goes_on_with_another_number_of_workers(tmp_path, ray_cluster):
    import ray.train

    settings = toy.ToyConfig(str(tmp_path / "killed"), dropout=0.0, kill_step=7, background_saves=False)
    with pytest.raises(ray.train.TrainingFailedError):
        run_ray(toy.run, settings, workers=2, folder=settings.folder, failures=0)
    summary = run_ray(toy.run, settings, workers=1, folder=settings.folder)
    assert summary["resumed"] == 4
    plain = toy.ToyConfig(str(tmp_path / "plain"), dropout=0.0)
    toy.run(plain, World())
    assert [row["fingerprint"] for row in read(settings.folder)] == [row["fingerprint"] for row in read(plain.folder)]
    expected = [row["loss"] for row in read(plain.folder)]
    assert [row["loss"] for row in read(settings.folder)] == pytest.approx(expected, rel=1e-5)
