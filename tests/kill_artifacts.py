"""SIGKILLs the writer of an artifact wherever that can matter and checks what is left. Run by test_artifacts.py.

    python tests/kill_artifacts.py fault|operations|moments URL

Every writer is a forked child, so that hundreds of kills cost seconds. ``fault`` kills at the four fault points,
``operations`` before every file or S3 operation, ``moments`` after random times. Prints how many writers were killed.
"""

import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from palate import artifacts

FILES = {"old": ["a.bin", "deep/er/b.bin", "old-only.bin"], "new": ["a.bin", "deep/c.bin", "empty.bin"]}


def produce(version: str) -> Callable[[artifacts.Writer], None]:
    def write(writer: artifacts.Writer) -> None:
        for path in FILES[version]:
            file = writer.folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"" if path == "empty.bin" else f"{version} {path} ".encode() * 1000)

    return write


def make(url: str, version: str, fresh: bool = False) -> artifacts.Artifact:
    return artifacts.ensure(url, produce(version), kind="sample", config={"version": version}, fresh=fresh)


def files_below(url: str) -> set[str]:
    filesystem, root = artifacts.locate(url)
    return {path.removeprefix(f"{root}/") for path in filesystem.find(root)}


def check_and_finish(url: str) -> None:
    """After a kill while "new" replaced "old", readers see one of them whole, or none; running again ends it."""
    try:
        seen = artifacts.open_artifact(url, "sample").verify()
    except artifacts.ArtifactMissing:
        seen = None
    if seen is not None:
        assert seen.paths() == FILES[seen.config["version"]], seen
    unchanged = seen is not None and seen.config["version"] == "old"
    if unchanged:
        with pytest.raises(artifacts.ArtifactMismatch, match="version"):
            make(url, "new")
    finished = make(url, "new", fresh=unchanged)
    assert finished.verify().paths() == FILES["new"]
    assert files_below(url) == {*FILES["new"], artifacts.MANIFEST}, files_below(url)
    make(url, "old", fresh=True)  # for the next kill
    assert files_below(url) == {*FILES["old"], artifacts.MANIFEST}, files_below(url)


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked process; its wait status (9: killed)."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """Kills at the n-th call."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            die()


def kill_at_fault_point(point: str) -> None:
    artifacts.fault_hook = lambda name: die() if name == point else None


def kill_at_local_operation(root: str, number: int) -> None:
    count = Countdown(number)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.truncate"):
            path = arguments[0]
            if isinstance(path, str | Path) and str(path).startswith(root):
                count()

    sys.addaudithook(hook)


def kill_at_s3_operation(filesystem: Any, number: int) -> None:
    count, call = Countdown(number), filesystem._call_s3

    async def counted(*arguments: Any, **keywords: Any) -> Any:
        count()
        answer = await call(*arguments, **keywords)
        count()
        return answer

    filesystem._call_s3 = counted


def kill_at_operation(url: str, number: int) -> None:
    filesystem, root = artifacts.locate(url)
    if artifacts.is_local(filesystem):
        kill_at_local_operation(root, number)
    else:
        kill_at_s3_operation(filesystem, number)


def replaced_under(url: str, prepare: Callable[[], object]) -> bool:
    """One writer replaces "old", which is there, by "new" and is killed as ``prepare`` arranges; whether it was."""

    def work() -> None:
        prepare()
        make(url, "new", fresh=True)

    status = in_child(work)
    assert status in (0, -signal.SIGKILL), status
    assert in_child(lambda: check_and_finish(url)) == 0, "see the traceback above"
    return status != 0


def fault(url: str) -> int:
    killed = []
    for point in ("before data", "after data", "before manifest", "after manifest"):
        killed.append(replaced_under(url, partial(kill_at_fault_point, point)))
    assert all(killed), "a fault point was not reached"
    return len(killed)


def operations(url: str) -> int:
    number = 0
    while replaced_under(url, partial(kill_at_operation, url, number)):
        number += 1
    return number


def moments(url: str) -> int:
    generator = random.Random(0)
    killed = 0
    for _ in range(12):
        seconds = generator.uniform(0.0, 0.03 if "://" not in url else 0.15)
        killed += replaced_under(url, threading.Timer(seconds, die).start)
    return killed


if __name__ == "__main__":
    assert in_child(lambda: make(sys.argv[2], "old")) == 0
    print({"fault": fault, "operations": operations, "moments": moments}[sys.argv[1]](sys.argv[2]))
