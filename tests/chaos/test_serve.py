"""Ray Serve under load while replicas are killed and the config is updated: benchmarks/serve_faults.py, briefly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from toy_cluster import FOREIGN

ROOT = Path(__file__).resolve().parents[2]
USERS = 8


@pytest.mark.chaos
@pytest.mark.timeout(960)
def test_only_what_was_under_way_at_a_kill_fails_and_says_to_try_again(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/serve_faults.py", "--out", str(out), "--minutes", "1.5", "--calm", "5"]
    command += ["--users", str(USERS), "--faults", "kill", "kill", "settings"]
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    environment |= {"PYTHONPATH": str(ROOT / "platform"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(out.read_text())
    whole, faults = found["whole"], found["faults"]
    assert [fault["kind"] for fault in faults[:3]] == ["kill", "kill", "settings"]
    kills = sum(fault["kind"] == "kill" for fault in faults)

    assert whole["answered"] > 50
    assert whole["failed"] == whole["refused"] == 0, whole["seen"]
    assert whole["in_flight"] <= kills * USERS
    assert all(seen.endswith("replica_lost") for seen in whole["seen"]), whole["seen"]
    assert found["calm"]["answered"] == found["calm"]["requests"]
    for fault in faults:
        assert fault["first_answer_after"] is not None
        assert fault["kind"] == "kill" or fault["answered"] == fault["requests"]

    assert set(found["kinds"]) == {"chat", "stream", "person", "models", "history", "feedback", "openai"}
    assert found["openai"]["requests"] == found["openai"]["answered"]
    assert found["kinds"]["history"] + found["kinds"]["feedback"] > 20
    assert found["lost_writes"] == []
