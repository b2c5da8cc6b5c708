"""How long a run takes to go on after a fault: printed, and kept where ``PALATE_CHAOS_RECORD`` names a file.

python tests/recoveries.py FILE     the medians of such a file
"""

import json
import os
import statistics
import sys
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


def main(file: Path) -> None:
    """Print a line of each fault and pipeline: the median seconds, and of how many."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in file.read_text().splitlines():
        one = json.loads(line)
        found.setdefault((one["fault"], one["pipeline"]), []).append(one["seconds"])
    for (fault, pipeline), seconds in sorted(found.items()):
        print(f"{fault:<45} {pipeline:<10} {statistics.median(seconds):6.1f} s  of {len(seconds)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
