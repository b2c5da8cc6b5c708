"""Faults injected into the three pipelines on a cluster of Ray whose nodes come and go.

The promises are those of ``test_processes.py``. Random moments and places are drawn from a seed, which is printed.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from faulted import (
    SEED,
    Driver,
    Kept,
    Run,
    bytes_below,
    fill,
    kill,
    lose_node_of,
    small_disk,
    steps_beyond,
    stopped,
    train_on_two_ranks,
    wait_for_end,
)
from palate import artifacts
from recoveries import record, wait_for
from strikes import POINTS, Strike, done_again
from toy_nodes import Nodes, ray_nodes
from toy_pipelines import LPO, PIPELINES, TWO_RANKS, Pipeline, contents, last_step, outcome

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
each_pipeline = pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda pipeline: pipeline.name)
FAULTS = WORKER, NODE, DRIVER = "Train worker killed", "node lost, another added", "driver killed, started again"
# One of the three comes in the middle of a checkpoint's write, for each pipeline another.
AT_A_SAVE = {one: FAULTS[(place + SEED) % 3] for place, one in enumerate(PIPELINES)}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """One cluster for all: a head without work on it, and two nodes that may be lost."""
    with ray_nodes() as started:
        yield started


@pytest.mark.parametrize(
    ("pipeline", "faults"),
    [
        *(pytest.param(one, [AT_A_SAVE[one]], id=f"{one.name}-one") for one in PIPELINES),
        *(pytest.param(one, FAULTS, id=f"{one.name}-all", marks=pytest.mark.long) for one in PIPELINES),
    ],
)
def test_a_worker_a_node_or_the_driver_is_lost_in_a_training(
    pipeline: Pipeline, faults: Sequence[str], inputs: Path, nodes: Nodes, tmp_path: Path, chance: random.Random
) -> None:
    """Two ranks on two nodes; against two ranks that nothing happened to, which need no cluster."""
    expected, out = tmp_path / "whole", tmp_path / "run"
    train_on_two_ranks(pipeline.job(inputs, expected, "--launcher", "torchrun"), tmp_path)
    log, kept = out / pipeline.log, Kept(out)
    now = tmp_path / "now"
    save = Strike(str(tmp_path / "save"), chance.randint(1, 2), point=chance.choice(POINTS), after=str(now))

    def victim(fault: str, driver: Driver) -> int:
        """The worker that a fault is for, once its moment has come."""
        step = last_step(log) + chance.randint(2, pipeline.steps // 8)
        wait_for(lambda: last_step(log) >= step, f"step {step}", driver.ended)
        if fault == AT_A_SAVE[pipeline]:
            now.touch()
            wait_for(save.reached, "the strike in a checkpoint", driver.ended)
            return stopped(save)
        found = nodes.workers("ray::RayTrainWorker")
        assert len(found) == 2, found
        return chance.choice(found)

    def struck(fault: str) -> str:
        return fault + (" in a checkpoint" if fault == AT_A_SAVE[pipeline] else "")

    def strike(fault: str, act: Callable[[int], object], driver: Driver) -> None:
        pid = victim(fault, driver)
        assert not artifacts.exists(out / pipeline.last), "the run ended before its fault"
        began = time.monotonic()
        act(pid)
        goes_on = steps_beyond(pipeline, out)
        kept.check()
        wait_for(goes_on, f"progress after: {struck(fault)}", driver.ended)
        record(struck(fault), pipeline.name, time.monotonic() - began)

    job = pipeline.job(inputs, out, *TWO_RANKS)
    with Driver(nodes, job, tmp_path / "run.txt", save) as driver:
        if WORKER in faults:
            strike(WORKER, kill, driver)
        if NODE in faults:
            strike(NODE, partial(lose_node_of, nodes=nodes), driver)
        if DRIVER in faults:
            victim(DRIVER, driver)
            driver.kill()
        else:
            assert driver.process.wait(300) == 0, driver.words()
    wait_for(lambda: not nodes.workers("ray::RayTrainWorker"), "the end of its workers", lambda: None, 60)
    kept.check()
    if DRIVER in faults:
        goes_on = steps_beyond(pipeline, out)
        with Driver(nodes, job, tmp_path / "run.txt") as driver:
            seconds = wait_for(goes_on, "progress", driver.ended)
            record(struck(DRIVER), pipeline.name, seconds)
            assert driver.process.wait(300) == 0, driver.words()
    kept.check()
    assert save.reached()
    assert outcome(pipeline, out) == outcome(pipeline, expected)


@each_pipeline
def test_tasks_of_a_preparation_lose_their_driver_their_worker_and_their_node(
    pipeline: Pipeline, inputs: Path, nodes: Nodes, tmp_path: Path, chance: random.Random
) -> None:
    """Each in the middle of another task, before a random one of its file operations."""
    expected, out = tmp_path / "whole", tmp_path / "out"
    with Run(pipeline.prepare(inputs, expected), tmp_path / "whole.txt") as run:
        assert run.wait() == 0, run.words()
    strikes = under_driver, in_worker, on_node = [
        Strike(str(tmp_path / f"strike-{place}"), chance.randint(1, 8), label=label, task=task, folder=str(out))
        for place, (label, task) in enumerate(pipeline.tasks)
    ]
    kept, job = Kept(out), pipeline.prepare(inputs, out, "--launcher", "ray")

    def goes_on(fault: str, after: Strike, following: Strike | None, began: float, driver: Driver) -> None:
        """Wait until the task is done after all, or one that came later is under way."""
        kept.check()
        signs = [done_again(after), *([Path(following.marker)] if following else [])]
        wait_for(lambda: any(sign.exists() for sign in signs), f"the task after: {fault}", driver.ended)
        record(fault, pipeline.name, min(sign.stat().st_mtime for sign in signs if sign.exists()) - began)

    with Driver(nodes, job, tmp_path / "run.txt", *strikes) as driver:
        wait_for(under_driver.reached, "the first place", driver.ended)
        driver.kill()
    wait_for_end(stopped(under_driver))
    began = time.time()
    with Driver(nodes, job, tmp_path / "run.txt", *strikes) as driver:
        goes_on("driver killed in a task, started again", under_driver, in_worker, began, driver)
        wait_for(in_worker.reached, "the second place", driver.ended)
        began = time.time()
        kill(stopped(in_worker))
        goes_on("Data worker killed in a task", in_worker, on_node, began, driver)
        wait_for(on_node.reached, "the third place", driver.ended)
        began = time.time()
        lose_node_of(stopped(on_node), nodes)
        goes_on("node lost in a task, another added", on_node, None, began, driver)
        assert driver.process.wait(300) == 0, driver.words()
    assert all(done_again(strike).exists() for strike in strikes)
    kept.check()
    assert contents(out) == contents(expected)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_disk_is_full_under_ray(inputs: Path, nodes: Nodes, tmp_path: Path, chance: random.Random) -> None:
    """The group starts again three times, in vain; then the job says so in one line. It goes on when there is room."""
    pipeline, expected = LPO, tmp_path / "whole"
    train_on_two_ranks(pipeline.job(inputs, expected, "--launcher", "torchrun"), tmp_path)
    needed = bytes_below(expected)
    with small_disk(tmp_path / "disk", 4 * needed + (16 << 20)) as disk:
        out, ballast = disk / "run", disk / "ballast"
        job, kept, words = pipeline.job(inputs, out, *TWO_RANKS), Kept(out), tmp_path / "full.txt"
        with Driver(nodes, job, words) as driver:
            step = chance.randint(3, pipeline.steps // 2)
            wait_for(lambda: last_step(out / pipeline.log) >= step, f"step {step}", driver.ended)
            fill(disk, ballast)
            assert driver.process.wait(900) == 1, driver.words()
        assert driver.last_line() == f"{pipeline.name}: [Errno 28] No space left on device", driver.words()
        kept.check()
        ballast.unlink()
        goes_on = steps_beyond(pipeline, out)
        with Driver(nodes, job, tmp_path / "run.txt") as driver:
            seconds = wait_for(goes_on, "progress", driver.ended)
            record("disk full under Ray, room made, started again", pipeline.name, seconds)
            assert driver.process.wait(300) == 0, driver.words()
        kept.check()
        assert outcome(pipeline, out) == outcome(pipeline, expected)
