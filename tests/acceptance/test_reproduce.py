"""``jobs/reproduce.py`` at its smallest size, from nothing to the report of all claims."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def reproduce(*flags: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, str(ROOT / "jobs/reproduce.py"), "--size", "smoke", "--out", "claims", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_claim_is_tested_and_a_second_run_says_the_same(tmp_path):
    first = reproduce("--papers", "lpo", "unihetero", folder=tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    claims = json.loads((tmp_path / "claims/report.json").read_text())["claims"]
    assert [claim["paper"] for claim in claims] == ["Diffusion-LPO"] * 4 + ["UniHetero"] * 3
    assert {claim["outcome"] for claim in claims} <= {"supported", "refuted", "undecided"}
    for claim in claims:
        assert (tmp_path / claim["report"]).is_file()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "claims").rglob("manifest.json")}
    second = reproduce("--papers", "lpo", "unihetero", folder=tmp_path)
    assert second.returncode == 0, second.stderr[-3000:]
    assert json.loads((tmp_path / "claims/report.json").read_text())["claims"] == claims
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "claims").rglob("manifest.json")} == made


@pytest.mark.slow
def test_card_at_the_smallest_size(tmp_path):
    done = reproduce("--papers", "card", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    claims = json.loads((tmp_path / "claims/report.json").read_text())["claims"]
    assert len(claims) == 5
    assert "less is better, n = 6" in claims[0]["result"]
    assert "| CARD | the vector adds to the cluster's adapter | bits per token/card - cluster |" in (
        (tmp_path / "claims/report.md").read_text()
    )
