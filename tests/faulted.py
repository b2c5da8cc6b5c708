"""The three pipelines under faults: their jobs as processes that a test ends, and what must be left of them."""

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import struck
from palate import artifacts
from recoveries import wait_for
from strikes import Strike
from toy_cluster import free_ports
from toy_nodes import Nodes, command_line
from toy_pipelines import Pipeline, committed, last_step, newest, stages

SEED = int(os.environ.get("PALATE_CHAOS_SEED", "0"))


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

    def last_line(self) -> str:
        """What the job itself said last; Ray adds lines of its actors, in colour, at any time."""
        return [line for line in self.output.read_text().splitlines() if line and not line.startswith("\x1b[36m(")][-1]


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


def fill(disk: Path, ballast: Path, leave: int = 0) -> None:
    """Take all that is free on a file system but for so many bytes, by a file."""
    with ballast.open("wb") as stream:
        while True:
            status = os.statvfs(disk)
            try:
                os.posix_fallocate(stream.fileno(), 0, status.f_bavail * status.f_frsize - leave)
            except OSError as error:
                if error.errno != errno.ENOSPC:  # else a job that runs took some meanwhile
                    raise
            else:
                return


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
