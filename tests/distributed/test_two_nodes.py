"""The three trainings with their ranks on two nodes end as in one process."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Relative to the largest number of a tensor, and to a step's loss. What differs is the order of sums; AdamW makes of
# small differences in small gradients larger ones in weights. Measured: weights 5.4e-5, vectors 1.2e-7, losses 2.6e-7.
TOLERANCES = {"weights": 5e-4, "vectors": 1e-4, "loss": 1e-5}
PROGRAM = Path(__file__).parents[1] / "two_nodes.py"


@pytest.mark.long  # of each part CI sees: two ranks on nodes against two of torchrun, and these against one process
@pytest.mark.timeout(1200)
def test_trainings_on_two_nodes_end_as_in_one_process(tmp_path: Path) -> None:
    # A short folder for Ray's sockets, where nobody else's `ray.init()` looks for a cluster.
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    environment = {**os.environ, "RAY_TMPDIR": temporary, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(PROGRAM), str(tmp_path)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1100)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"card", "lpo", "unihetero"}
    for name, result in found.items():
        nodes = result.pop("nodes")
        assert len(nodes) == len(set(nodes)) == 2, name
        assert result, name
        for what, difference in result.items():
            assert difference < TOLERANCES[what], f"{name}: {what} differ by {difference}"
