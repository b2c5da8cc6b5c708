"""A program that tests run: a job of jobs/, as it stands, with strikes armed in its workers (``strikes.py``).

    python tests/struck.py STRIKES jobs/card.py --corpus ...

``STRIKES`` is a JSON list. ``process`` is the same in a forked process, which saves the imports.
"""

import json
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import strikes
from palate.corpora.preparation import Step
from palate.distributed import launch as launching
from strikes import Strike

TESTS = Path(__file__).resolve().parent
PATH = os.pathsep.join([str(TESTS), str(TESTS.parent / "platform")])


@cache
def forks() -> Any:
    """Where processes are forked from: one that has imported what the jobs import in seconds."""
    context = multiprocessing.get_context("forkserver")
    heavy = ["struck", "palate.card.stages", "palate.lpo.stages", "palate.unihetero.stages", "palate.serving.answers"]
    context.set_forkserver_preload([*heavy, "torch._dynamo", "s3fs", "torch.utils.tensorboard"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = PATH  # the server imports as pytest does
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return context


def command(armed: Sequence[Strike], job: Sequence[str]) -> list[str]:
    """The command line of this program."""
    return [sys.executable, __file__, json.dumps([asdict(strike) for strike in armed]), *job]


def run(armed: Sequence[Strike], job: Sequence[str]) -> None:
    launch = launching.launch

    def struck_launch(worker: Any, *arguments: Any, **options: Any) -> Any:
        return launch(partial(strikes.struck_worker, armed, worker), *arguments, **options)

    launching.launch = struck_launch
    if "ray" in job:
        from palate.distributed import prepare

        for name in ("run_with_ray", "run_with_actors"):
            setattr(prepare, name, partial(_struck_runner, getattr(prepare, name), armed))
    sys.argv = list(job)
    runpy.run_path(job[0], run_name="__main__")


def process(armed: Sequence[Strike], job: Sequence[str], environment: Mapping[str, str], output: str) -> None:
    """``run`` in a process that was forked; what it prints goes into the file ``output``."""
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    torch.set_num_threads(1)
    run(armed, job)


def start(armed: Sequence[Strike], job: Sequence[str], output: Path, **environment: str) -> Any:
    """A forked process with this job and this environment, else the caller's; the caller ends it, or waits for it."""
    environment = {**os.environ, **environment}
    started = forks().Process(target=process, args=(list(armed), list(job), environment, str(output)))
    started.start()
    return started


def _struck_runner(runner: Any, armed: Sequence[Strike], step: Step, **options: Any) -> Any:
    return runner(strikes.struck_step(armed, step), **options)


if __name__ == "__main__":
    run([Strike(**one) for one in json.loads(sys.argv[1])], sys.argv[2:])
