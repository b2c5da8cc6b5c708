"""Where a process of a pipeline stops in the middle of its work, once, and waits to be killed from outside.

A strike is armed inside: at a fault point of an artifact (``artifacts.fault_hook``) or at a file operation of a Data
task. There the process leaves a file with its id and goes no further. The test sends the SIGKILL, or ends its node.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from palate import artifacts
from palate.corpora.preparation import Step
from palate.training.parallel import World

POINTS = ("before data", "after data", "before manifest", "after manifest")
OPERATIONS = ("open", "os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.truncate")


@dataclass(frozen=True)
class Strike:
    """One place. ``marker``: the file that says that it was reached; who finds it there is not stopped.

    Either ``point``, the fault point of the ``number``-th artifact that this process writes once ``after`` exists, on
    rank 0; or ``task``, a position among the tasks of the step called ``label``, -1 for whichever comes first: at its
    ``number``-th file operation below ``folder``, or at its end if it has fewer.
    """

    marker: str
    number: int = 1
    point: str = ""
    after: str = ""
    label: str = ""
    task: int = -1
    folder: str = ""

    def reached(self) -> bool:
        return Path(self.marker).exists()

    def announced(self) -> dict[str, int]:
        """The process (``pid``) that waits there, or waited, and the position of its task."""
        return json.loads(Path(self.marker).read_text())

    def stop(self, task: int = -1) -> None:
        """Announce this process, and go no further."""
        if self.reached():
            return
        announcement = Path(f"{self.marker}.{os.getpid()}.{threading.get_native_id()}")
        announcement.write_text(json.dumps({"pid": os.getpid(), "task": task}))
        announcement.rename(self.marker)
        while True:
            time.sleep(60)


def arm(strikes: Sequence[Strike]) -> None:
    """Stop this process at the fault points among the strikes."""
    counts = dict.fromkeys([strike for strike in strikes if strike.point], 0)

    def hook(point: str) -> None:
        for strike in counts:
            if strike.point == point and (not strike.after or Path(strike.after).exists()):
                counts[strike] += 1
                if counts[strike] == strike.number:
                    strike.stop()

    artifacts.fault_hook = hook


def struck_worker(strikes: Sequence[Strike], worker: Callable[[Any, World], Any], config: Any, world: World) -> Any:
    """``worker``, a training's, with the strikes armed on rank 0."""
    if world.main:
        arm(strikes)
    return worker(config, world)


def struck_step(strikes: Sequence[Strike], step: Step) -> Step:
    """``step``, with the strikes on its tasks armed."""
    mine = [strike for strike in strikes if strike.label == step.label]
    return replace(step, run=partial(_run_task, mine, step.run, list(step.tasks))) if mine else step


def done_again(strike: Strike) -> Path:
    """The file that is there when the task of a strike was done after all."""
    return Path(f"{strike.marker}.done")


def _run_task(strikes: Sequence[Strike], run: Callable[[Any], Any], tasks: Sequence[Any], task: Any) -> Any:
    place = tasks.index(task)
    strike = next((one for one in strikes if one.task in (place, -1) and not one.reached()), None)
    if strike is not None:
        left, thread = strike.number, threading.get_native_id()

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in OPERATIONS and left > 0 and threading.get_native_id() == thread:
                path = arguments[0]
                if isinstance(path, str | Path) and str(path).startswith(strike.folder):
                    left -= 1
                    if left == 0:
                        strike.stop(place)

        sys.addaudithook(hook)
        run(task)
        strike.stop(place)
    result = run(task)
    for one in strikes:
        if one.reached() and one.announced()["task"] == place:
            done_again(one).touch()
    return result
