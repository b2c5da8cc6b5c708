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


def claims(folder: Path) -> list[dict]:
    return json.loads((folder / "claims/report.json").read_text())["claims"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_claims_of_one_paper_and_a_second_run_says_the_same(tmp_path):
    done = reproduce("--papers", "card", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = claims(tmp_path)
    check(found, tmp_path)
    assert [claim["paper"] for claim in found] == ["CARD"] * 5
    assert "less is better, n = 6" in found[0]["result"]
    assert "| CARD | the vector adds to the cluster's adapter | bits per token/card - cluster |" in (
        (tmp_path / "claims/report.md").read_text()
    )
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "claims").rglob("manifest.json")}
    again = reproduce("--papers", "card", folder=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert claims(tmp_path) == found
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "claims").rglob("manifest.json")} == made


@pytest.mark.long
@pytest.mark.timeout(1800)  # three pipelines, on a machine that may be busy
def test_every_claim_of_the_three_papers_is_tested(tmp_path):
    done = reproduce(folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = claims(tmp_path)
    check(found, tmp_path)
    assert [claim["paper"] for claim in found] == ["CARD"] * 5 + ["Diffusion-LPO"] * 4 + ["UniHetero"] * 3


def check(found: list[dict], folder: Path) -> None:
    assert {claim["outcome"] for claim in found} <= {"supported", "refuted", "undecided"}
    for claim in found:
        assert (folder / claim["report"]).is_file()
