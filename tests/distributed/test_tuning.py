"""Sweeps under Ray Tune: early ends, failures, going on after a kill, and trials that launch Ray Train."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from palate import artifacts
from palate.distributed.launch import launch
from palate.distributed.tuning import SearchConfig, concurrency, search
from palate.training.parallel import World

HERE = Path(__file__).parent
ONE = SearchConfig(concurrent=1)
GRID = [{"x": x} for x in (4, 3, 2, 1)]


def train(folder: str, values, budget: int) -> None:
    Path(folder, f"{values['x']}-{budget}").touch()


def measure(folder: str, values, budget: int) -> dict[str, float]:
    assert Path(folder, f"{values['x']}-{budget}").exists()
    return {"score": values["x"] + budget / 10, "other": 0.0}


def measure_but_two(folder: str, values, budget: int) -> dict[str, float]:
    if values["x"] == 2 and not Path(folder, "mended").exists():
        raise ValueError("two is refused")
    return measure(folder, values, budget)


def sweep(folder: Path, grid=GRID, budgets=(1, 2), measuring=measure, config=ONE, out=None, **options):
    return search(
        partial(train, str(folder)),
        partial(measuring, str(folder)),
        grid,
        budgets,
        out=out or str(folder / "out"),
        metric="score",
        higher_is_better=True,
        config=config,
        **options,
    )


def test_how_many_trials_run_at_a_time():
    cluster = {"CPU": 16.0, "GPU": 4.0}
    assert concurrency(cluster, SearchConfig(), workers=0) == 16
    assert concurrency(cluster, SearchConfig(trial_cpus=4), workers=0) == 4
    assert concurrency(cluster, SearchConfig(trial_gpus=1), workers=0) == 4
    assert concurrency(cluster, SearchConfig(), workers=2) == 2  # workers take GPUs where there are enough
    assert concurrency({"CPU": 2.0}, SearchConfig(), workers=2) == 1
    assert concurrency(cluster, SearchConfig(), workers=2, cpus_per_worker=6) == 1  # GPUs for two, CPUs for one
    assert concurrency({"CPU": 16.0}, SearchConfig(), workers=2, cpus_per_worker=4) == 2
    assert concurrency({"CPU": 2.0}, SearchConfig(), workers=4) == 1  # nodes may come
    assert concurrency(cluster, SearchConfig(concurrent=3), workers=1) == 3


def test_sweeps_that_cannot_be_are_refused_before_ray_starts(tmp_path):
    for grid, budgets in (([], (1,)), (GRID, ()), (GRID, (2, 1)), (GRID, (1, 1))):
        with pytest.raises(ValueError, match="needs values, and budgets that grow"):
            sweep(tmp_path, grid, budgets)


def plotted(out: str, folder: Path) -> set[tuple[int, int, float]]:
    """What TensorBoard reads of a sweep's trials, copied from where it is: value, budget and score."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    filesystem, root = artifacts.locate(out)
    filesystem.get(f"{root}/", f"{folder}/", recursive=True)
    found = set()
    for path in folder.rglob("events.out.tfevents.*"):
        read = EventAccumulator(str(path)).Reload()
        score, budget = (read.Scalars(f"ray/tune/{name}") for name in ("figures/score", "budget"))
        value = json.loads((path.parent / "params.json").read_text())["values"]["x"]
        found |= {(value, round(b.value), round(s.value, 3)) for b, s in zip(budget, score, strict=True)}
    return found


def test_the_worse_end_early_and_the_same_command_does_nothing_again(tmp_path, any_url, ray_cluster, capsys):
    out = f"{any_url}/out"
    found, failed = sweep(tmp_path, out=out)
    assert not failed
    said = capsys.readouterr().out
    assert f"watch: tensorboard --logdir {out}\n" in said
    shown = {(one.values["x"], one.budget, round(one.figures["score"], 3)) for one in found}
    assert plotted(out, tmp_path / "copy") == shown
    reached = {one.values["x"]: 0 for one in found}
    for one in found:
        reached[one.values["x"]] = max(reached[one.values["x"]], one.budget)
        assert one.figures == pytest.approx({"score": one.values["x"] + one.budget / 10, "other": 0.0})
    assert set(reached) == {1, 2, 3, 4}
    assert reached[4] == 2  # the best, and the first to come
    assert reached[1] == 1
    made = {path.name for path in tmp_path.glob("?-?")}
    assert made == {f"{one.values['x']}-{one.budget}" for one in found}
    for path in tmp_path.glob("?-?"):
        path.unlink()
    again, _ = sweep(tmp_path, out=out)
    assert [(one.values, one.budget, one.figures) for one in again] == [
        (one.values, one.budget, one.figures) for one in found
    ]
    assert not list(tmp_path.glob("?-?"))


def test_a_failed_trial_is_named_and_tried_again_by_the_same_command(tmp_path, ray_cluster):
    found, failed = sweep(tmp_path, measuring=measure_but_two, budgets=(1,))
    assert {one.values["x"] for one in found} == {1, 3, 4}
    assert len(failed) == 1
    assert "two is refused" in failed[0]
    assert "'x': 2" in failed[0]
    (tmp_path / "mended").touch()
    found, failed = sweep(tmp_path, measuring=measure_but_two, budgets=(1,))
    assert {one.values["x"] for one in found} == {1, 2, 3, 4}
    assert not failed


def launched(config: str, world: World) -> None:
    world.barrier()
    Path(config, f"{world.rank}-of-{world.size}").touch()


def launch_two(folder: str, values, budget: int) -> None:
    out = Path(folder, f"run-{values['x']}")
    out.mkdir(exist_ok=True)
    launch(launched, str(out), launcher="ray", workers=2, folder=str(out))


def nothing(values, budget: int) -> dict[str, float]:
    return {"score": values["x"]}


@pytest.mark.slow
def test_trials_that_launch_workers_on_all_cpus_do_not_wait_for_one_another(tmp_path, ray_cluster):
    import ray

    workers = int(ray.cluster_resources()["CPU"]) // 2
    assert workers >= 2  # two at a time would need all CPUs, and their drivers none
    found, failed = search(
        partial(launch_two, str(tmp_path)),
        nothing,
        [{"x": 1}, {"x": 2}],
        [1],
        out=str(tmp_path / "out"),
        metric="score",
        higher_is_better=True,
        config=SearchConfig(),
        workers=2,
    )
    assert not failed
    assert {one.values["x"] for one in found} == {1, 2}
    assert {path.name for path in tmp_path.glob("run-?/?-of-2")} == {"0-of-2", "1-of-2"}


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
import ray
from test_tuning import SLOW, sweep, measure_slowly
ray.init(address="local", num_cpus=1, include_dashboard=False)
found, failed = sweep(Path({folder!r}), SLOW, (1,), measure_slowly)
assert not failed, failed
print("reported", sorted(one.values["x"] for one in found))
"""
SLOW = [{"x": x} for x in range(6)]


def measure_slowly(folder: str, values, budget: int) -> dict[str, float]:
    """Says each time that it is called, and keeps nothing: what is not measured again, Tune has kept."""
    with Path(folder, "begun").open("a") as file:
        file.write(f"{values['x']}\n")
    time.sleep(1)
    return measure(folder, values, budget)


def finished(folder: Path) -> set[str]:
    """The trials that have ended by what Tune has written so far."""
    found = set()
    for path in folder.glob("out/tune-*/experiment_state-*.json"):
        with contextlib.suppress(ValueError):  # half written
            for trial, _ in json.loads(path.read_text())["trial_data"]:
                state = json.loads(trial)
                if state["status"] == "TERMINATED":
                    found.add(str(state["config"]["values"]["x"]))
    return found


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_what_is_left(tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(SCRIPT.format(here=str(HERE), folder=str(tmp_path)))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "TUNE_GLOBAL_CHECKPOINT_S": "1",  # Tune writes its state every ten seconds else
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    process = subprocess.Popen([sys.executable, str(script)], env=environment)
    while process.poll() is None and len(finished(tmp_path)) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    kept, begun = finished(tmp_path), tmp_path / "begun"
    before = begun.read_text().split()
    assert 2 <= len(kept) < 6
    assert kept <= set(before)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reported [0, 1, 2, 3, 4, 5]" in done.stdout
    after = begun.read_text().split()[len(before) :]
    assert sorted(after) == sorted({"0", "1", "2", "3", "4", "5"} - kept)  # each of the others once, and no other
