"""Faults injected into the three pipelines, each run whole.

After each: what was committed is there and unchanged, whatever a reader finds is whole, and the run that went on ends
with the same bits as one that was not broken. Random moments and places are drawn from a seed, which is printed.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import struck
from cut_uploads import Proxy
from palate import artifacts
from recoveries import record, wait_for
from strikes import POINTS, Strike, done_again
from toy_cluster import free_ports
from toy_nodes import Nodes, command_line, ray_nodes
from toy_pipelines import (
    PIPELINES,
    TWO_RANKS,
    Pipeline,
    build_inputs,
    committed,
    contents,
    last_step,
    newest,
    outcome,
    stages,
)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
each_pipeline = pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda pipeline: pipeline.name)

SEED = int(os.environ.get("PALATE_CHAOS_SEED", "0"))


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """What a test draws from; its seed is shown where the test fails."""
    seed = f"{SEED} {request.node.name}"
    print(f"drawn from {seed!r}; PALATE_CHAOS_SEED=N draws others")
    return random.Random(seed)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Pipeline], Path]:
    """The folder of a pipeline's unbroken run, in one process."""
    made: dict[str, Path] = {}

    def run(pipeline: Pipeline) -> Path:
        if pipeline.name not in made:
            out = tmp_path_factory.mktemp("whole") / pipeline.name
            with Run(pipeline.job(inputs, out), out.with_suffix(".txt")) as process:
                assert process.wait() == 0, process.words()
            made[pipeline.name] = out
        return made[pipeline.name]

    return run


class Run:
    """A job in a forked process: to be waited for, or killed."""

    def __init__(self, job: list[str], output: Path, *armed: Strike, **environment: str) -> None:
        self.output = output
        self._process = struck.start(armed, job, output, **environment)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.join()

    def wait(self, seconds: float = 300) -> int | None:
        """The exit status; None while it runs."""
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL, which must be what ends it."""
        assert self.kill_or_end(), f"it had ended:\n{self.words()}"

    def kill_or_end(self) -> bool:
        """SIGKILL; whether that ended it, and not its own end."""
        self._process.kill()
        self._process.join()
        assert self._process.exitcode in (0, -signal.SIGKILL), self.words()
        return self._process.exitcode != 0

    def ended(self) -> str | None:
        code = self._process.exitcode
        return None if code is None else f"the job ended with {code}:\n{self.words()}"

    def words(self) -> str:
        return self.output.read_text()[-4000:]


class Kept:
    """What a run has committed, fault after fault."""

    def __init__(self, out: str | Path) -> None:
        self.out = out
        self._stages: dict[str, tuple[str, str]] = {}
        self._newest: dict[str, str] = {}

    def check(self) -> None:
        """All that was finished before is there as it was, and all that is finished is whole."""
        found = committed(self.out)
        present, latest = stages(found), newest(found)
        assert self._stages.items() <= present.items(), "a finished stage was lost or made again"
        for training, step in self._newest.items():
            assert latest[training] >= step, f"{training} lost the checkpoint {step}"
        self._stages, self._newest = present, latest


def steps_beyond(pipeline: Pipeline, out: str | Path) -> Callable[[], bool]:
    """Whether there is progress beyond what there is now: a later step of the training, or a stage more."""
    log, before = artifacts.join(out, pipeline.log), last_step(artifacts.join(out, pipeline.log))
    there = set(stages(committed(out)))
    return lambda: last_step(log) > before or bool(finished_places(out) - there)


def finished_places(out: str | Path) -> set[str]:
    filesystem, root = artifacts.locate(out)
    found = (path.removeprefix(f"{root}/") for path in filesystem.find(root))
    ends = f"/{artifacts.MANIFEST}"
    return {path.removesuffix(ends) for path in found if path.endswith(ends) and "/checkpoints/" not in path}


@each_pipeline
def test_killed_again_and_again(
    pipeline: Pipeline, inputs: Path, whole: Callable[[Pipeline], Path], tmp_path: Path, chance: random.Random
) -> None:
    """Alternately at a random moment and at a random fault point of a random artifact, checkpoints among them."""
    expected, out = whole(pipeline), tmp_path / "run"
    job, kept, kills = pipeline.job(inputs, out), Kept(out), 0

    def start_and_kill(*strikes: Strike) -> bool:
        """Whether it was killed, before its end."""
        goes_on = steps_beyond(pipeline, out)
        with Run(job, tmp_path / "words.txt", *strikes) as run:
            # A kill may come after the last manifest: then the next start has nothing to do, and ends.
            def stands_or_ended() -> bool:
                return any(one.reached() for one in strikes) or run.wait(0) == 0

            seconds = wait_for(lambda: goes_on() or stands_or_ended(), "progress", run.ended)
            if kills and goes_on():
                record("process killed", pipeline.name, seconds)
            if strikes:
                wait_for(stands_or_ended, "the strike", run.ended)
            else:
                run.wait(chance.uniform(0, 0.5))
            return run.kill_or_end()

    for start in range(7):
        strike = Strike(str(tmp_path / f"strike-{start}"), chance.randint(1, 3), point=chance.choice(POINTS))
        if not start_and_kill(*([strike] if start % 2 else [])):
            break
        kept.check()
        kills += 1
    print(f"{kills} kills")
    assert kills >= 4
    with Run(job, tmp_path / "words.txt") as run:
        assert run.wait() == 0, run.words()
    kept.check()
    assert outcome(pipeline, out) == outcome(pipeline, expected)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """One cluster for all: a head without work on it, and two nodes that may be lost."""
    with ray_nodes() as started:
        yield started


class Driver:
    """A job that runs on the cluster; its process is the driver, which joins from outside."""

    def __init__(self, nodes: Nodes, job: list[str], output: Path, *armed: Strike) -> None:
        self.output = output
        with output.open("ab") as words:
            self.process = subprocess.Popen(
                struck.command(armed, job), env=nodes.environment, stdout=words, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL, self.words()

    def ended(self) -> str | None:
        code = self.process.poll()
        return None if code is None else f"the driver ended with {code}:\n{self.words()}"

    def words(self) -> str:
        return self.output.read_text()[-6000:]


def stopped(strike: Strike) -> int:
    """The process that waits where the strike says."""
    return strike.announced()["pid"]


def kill(pid: int) -> None:
    """SIGKILL, and the process must be gone."""
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)


def lose_node_of(pid: int, nodes: Nodes) -> None:
    """The node goes that a process is on, and the process with it; another node comes."""
    assert nodes.end(pid) == 1
    wait_for_end(pid)
    assert nodes.add() == 2


def wait_for_end(pid: int) -> None:
    wait_for(lambda: not command_line(pid), f"the end of process {pid}", lambda: None, 60)


def train_on_two_ranks(job: list[str], folder: Path) -> None:
    """The job as torchrun would start it, in two forked processes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": "2"}
    with ExitStack() as stack:
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        runs = [Run(job, folder / f"rank-{rank['RANK']}.txt", **place, **rank) for rank in ranks]
        for run in runs:
            stack.enter_context(run)
        for run in runs:
            assert run.wait() == 0, run.words()


@pytest.mark.parametrize(
    "pipeline",
    [pytest.param(one, id=one.name, marks=[pytest.mark.long] * (one is not PIPELINES[0])) for one in PIPELINES],
)
def test_workers_a_node_and_the_driver_are_lost_in_one_training(
    pipeline: Pipeline, inputs: Path, nodes: Nodes, tmp_path: Path, chance: random.Random
) -> None:
    """Two ranks on two nodes; against two ranks that nothing happened to, which need no cluster."""
    expected, out = tmp_path / "whole", tmp_path / "run"
    train_on_two_ranks(pipeline.job(inputs, expected, "--launcher", "torchrun"), tmp_path)
    log, kept = out / pipeline.log, Kept(out)
    at_a_save = Strike(
        str(tmp_path / "at-a-save"), chance.randint(1, 2), point=chance.choice(POINTS), after=str(tmp_path / "first")
    )

    def train_to(step: int, driver: Driver) -> None:
        wait_for(lambda: last_step(log) >= step, f"step {step}", driver.ended)
        assert not artifacts.exists(out / pipeline.last), "the run ended before its fault"

    def workers() -> list[int]:
        found = nodes.workers("ray::RayTrainWorker")
        assert len(found) == 2, found
        return found

    def strike(fault: str, act: Callable[[], object], driver: Driver) -> None:
        began = time.monotonic()
        act()
        goes_on = steps_beyond(pipeline, out)
        kept.check()
        wait_for(goes_on, f"progress after: {fault}", driver.ended)
        record(fault, pipeline.name, time.monotonic() - began)

    job = pipeline.job(inputs, out, *TWO_RANKS)
    with Driver(nodes, job, tmp_path / "run.txt", at_a_save) as driver:
        train_to(chance.randint(3, pipeline.steps // 4), driver)
        strike("Train worker killed", lambda: kill(chance.choice(workers())), driver)

        (tmp_path / "first").touch()
        wait_for(at_a_save.reached, "the strike in a checkpoint", driver.ended)
        strike("Train worker killed in a checkpoint", lambda: kill(stopped(at_a_save)), driver)

        train_to(last_step(log) + chance.randint(2, pipeline.steps // 8), driver)

        strike("node lost, another added", lambda: lose_node_of(chance.choice(workers()), nodes), driver)
        train_to(last_step(log) + chance.randint(2, pipeline.steps // 8), driver)
        driver.kill()
    wait_for(lambda: not nodes.workers("ray::RayTrainWorker"), "the end of its workers", lambda: None, 60)
    kept.check()
    goes_on = steps_beyond(pipeline, out)
    with Driver(nodes, job, tmp_path / "run.txt") as driver:
        record("driver killed, started again", pipeline.name, wait_for(goes_on, "progress", driver.ended))
        assert driver.process.wait(300) == 0, driver.words()
    kept.check()
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


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of its own with so many bytes."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        assert not os.environ.get("PALATE_REQUIRE_MOUNT"), mounted.stderr
        pytest.skip(f"needs the right to mount: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@each_pipeline
def test_the_disk_is_full(
    pipeline: Pipeline, inputs: Path, whole: Callable[[Pipeline], Path], tmp_path: Path, chance: random.Random
) -> None:
    """Twice, at random amounts of what the run takes in the end; then somebody makes room."""
    expected = whole(pipeline)
    needed = bytes_below(expected)
    with small_disk(tmp_path / "disk", 4 * needed + (8 << 20)) as disk:
        out, ballast = disk / "run", disk / "ballast"
        job, kept = pipeline.job(inputs, out), Kept(out)
        shares = sorted(chance.uniform(0.05, 0.9) for _ in range(2))
        for share in shares:
            ballast.unlink(missing_ok=True)
            taken = bytes_below(disk)
            status = os.statvfs(disk)
            free = status.f_bavail * status.f_frsize - max(0, int(share * needed) - taken)
            with ballast.open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, free)
            words = tmp_path / f"full-{share:.3f}.txt"
            with Run(job, words) as run:
                assert run.wait() == 1, f"at {share:.0%} of {needed} bytes: {run.words()}"
            assert "No space left on device" in words.read_text().splitlines()[-1], words.read_text()[-3000:]
            kept.check()
        ballast.unlink()
        goes_on = steps_beyond(pipeline, out)
        with Run(job, tmp_path / "words.txt") as run:
            record("disk full, room made, started again", pipeline.name, wait_for(goes_on, "progress", run.ended))
            assert run.wait() == 0, run.words()
        kept.check()
        assert outcome(pipeline, out) == outcome(pipeline, expected)


@each_pipeline
def test_uploads_are_cut(
    pipeline: Pipeline,
    inputs: Path,
    whole: Callable[[Pipeline], Path],
    s3_url: str,
    s3_endpoint: str,
    tmp_path: Path,
    chance: random.Random,
) -> None:
    """A connection that breaks in the middle of a body, a process killed there, and storage that does not answer."""
    out = f"{s3_url}/run"
    job, kept = pipeline.job(inputs, out), Kept(out)
    with Proxy(s3_endpoint) as proxy:
        environment = {"AWS_ENDPOINT_URL": proxy.endpoint, "PALATE_CACHE": str(tmp_path / "cache")}
        first = chance.randint(1, 3)
        proxy.break_upload(first, "cut")
        proxy.break_upload(first + chance.randint(3, 8), "hold")
        with Run(job, tmp_path / "words.txt", **environment) as run:
            wait_for(proxy.holding.is_set, "an upload that is held", run.ended)
            assert proxy.cut == 2  # the first did not stop it
            run.kill()
        kept.check()

        proxy.heal()
        proxy.break_upload(chance.randint(2, 5), "refuse")
        with Run(job, tmp_path / "away.txt", **environment) as run:
            assert run.wait() == 1, run.words()
        assert proxy.refused >= 1
        last = (tmp_path / "away.txt").read_text().splitlines()[-1]
        assert last.startswith(f"{pipeline.name}: object storage failed: "), (
            last
        )  # refused, or closed before it answered
        kept.check()

        proxy.heal()
        goes_on = steps_beyond(pipeline, out)
        with Run(job, tmp_path / "words.txt", **environment) as run:
            record("storage away, started again", pipeline.name, wait_for(goes_on, "progress", run.ended))
            assert run.wait() == 0, run.words()
    kept.check()
    assert outcome(pipeline, out) == outcome(pipeline, whole(pipeline))
