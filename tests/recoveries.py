"""How long a run takes to go on after a fault: printed, and kept where ``PALATE_CHAOS_RECORD`` names a file."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path


def record(fault: str, pipeline: str, seconds: float) -> None:
    """Add a measurement to the file, a JSON line."""
    line = json.dumps({"fault": fault, "pipeline": pipeline, "seconds": round(seconds, 2)})
    print(f"recovered: {line}", flush=True)
    if file := os.environ.get("PALATE_CHAOS_RECORD"):
        with Path(file).open("a") as stream:
            stream.write(line + "\n")


def wait_for(condition: Callable[[], bool], what: str, ended: Callable[[], str | None], seconds: float = 600) -> float:
    """Wait until something holds; how long that took.

    Args:
        ended: why it cannot come any more, if so.
    """
    began = time.monotonic()
    while not condition():
        if why := ended():
            assert condition(), f"{what}: not seen, and {why}"  # it may have come in between
        assert time.monotonic() < began + seconds, f"{what}: not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - began
