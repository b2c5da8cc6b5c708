"""``jobs/reproduce.py``: which verdicts its arms allow, and all of it at its smallest size, up to the report."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from palate.evaluation import claims as experiment
from palate.evaluation import images, report
from palate.evaluation.statistics import Scores
from palate.evaluation.systems import comparisons
from palate.unihetero.sweep import Task, tasks
from scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
VERDICTS = ("supported", "refuted", "undecided")


@pytest.fixture(scope="module")
def job() -> ModuleType:
    return load_script("jobs/reproduce.py")


# What an arm gains on the baseline, at the smallest size and at the largest: all that a claim asks for, or against it.
GAINS = {
    "supported": {"embedding": (-0.05, 0.05), "encoder": (-0.05, 0.02), "pixel": (-0.05, -0.05)},
    "refuted": {"embedding": (0.05, -0.05), "encoder": (0.0, 0.05), "pixel": (0.0, 0.05)},
    "undecided": {},
}
LOST = {"supported": (0.1, 0.3), "refuted": (0.3, 0.1), "undecided": (0.2, 0.2)}  # free running: embedding, encoder


def ideal(task: Task, config, outcome: str) -> dict:
    """What a run leaves, had it gone as one would wish for a verdict; seeds differ by little."""
    runs, draw = config.runs, np.random.default_rng([task.seed, len(task.arm), ord(task.arm[0])])
    spread = 0.02 if outcome == "undecided" else 1e-4
    first, last = GAINS[outcome].get(task.arm, (0.0, 0.0))
    lost = LOST[outcome][0 if task.arm == "embedding" else 1]

    def point(samples: int) -> dict:
        along = math.log(samples / runs.stops[0]) / math.log(runs.samples / runs.stops[0])
        score = 0.5 + 0.1 * along + first + (last - first) * min(along, 1.0) + spread * draw.normal()
        found = {"samples": samples, "accuracy": {"all": score}, "text_loss": 2.0, "text_only_loss": 2.5}
        if samples in (runs.samples, task.samples):
            free = {"k": [1, 4, 16], "caption_loss": [2.0] * 3, "true_caption_loss": 1.9, "explained_of_true": 0.9}
            free["explained"] = [0.9 - lost + spread * draw.normal() for _ in range(3)]
            found["final"] = {"probes": {"layer 1": {"colour": score}}, "free_run": free}
        return found

    stops = sorted({*runs.stops, runs.samples, task.samples})
    points = [point(samples) for samples in stops if samples <= task.samples]
    return {
        "arm": task.arm,
        "seed": task.seed,
        "points": points,
        "fingerprints": {},
        "flops_per_sample": 1.0,
        "log": [],
    }


@pytest.mark.parametrize("outcome", VERDICTS)
@pytest.mark.parametrize("size", ["small", "full"])
def test_unihetero_can_come_to_each_verdict_with_the_arms_that_are_run(job, size, outcome):
    config = job.experiment("out", job.SIZES[size], "corpus", "parts", 1)
    found = experiment.analyse([ideal(task, config, outcome) for task in tasks(config)])
    lines = job.verdicts(found, "report.md")
    assert [(line.claim, line.outcome) for line in lines] == [(job.UNIHETERO[n], outcome) for n in (1, 2, 3)]
    assert all("not measured" not in line.result for line in lines)
    assert [name in lines[0].result for name in ("embedding - capacity", "embedding - shuffled")] == [True, True]


def test_the_smallest_size_says_what_it_does_not_measure(job):
    config = job.experiment("out", job.SIZES["smoke"], "corpus", "parts", 1)
    found = experiment.analyse([ideal(task, config, "supported") for task in tasks(config)])
    first = job.verdicts(found, "report.md")[0]
    assert first.outcome == "not measured"  # there is no pixel arm: no gain of the others could support the claim
    assert "pixel - understanding: not measured" in first.result
    assert "pixel - decoder: not measured" in first.result
    found = experiment.analyse([ideal(task, config, "refuted") for task in tasks(config)])
    assert job.verdicts(found, "report.md")[0].outcome == "refuted"


# What the first of a comparison has over the second, in units of what people differ by
LEADS = {"supported": 1.0, "refuted": -1.0, "undecided": 0.0}


@pytest.mark.parametrize("outcome", VERDICTS)
def test_card_can_come_to_each_verdict_with_the_systems_that_are_run(job, outcome, tmp_path):
    people = tuple(f"p{number}" for number in range(job.SIZES["small"].asked))
    ranks = ("base", "shared", "cluster", "card-mean", "card-permuted", "card")  # each beats those before it
    assert set(ranks) == set(job.SYSTEMS)
    draw = np.random.default_rng(0)

    def scores(name: str, better: float) -> Scores:
        values = LEADS[outcome] * better * ranks.index(name) + 0.1 * draw.normal(size=len(people))
        return Scores(people, people, values, higher_is_better=better > 0)

    systems = [
        report.System(name, name, {"bits per token": scores(name, -1.0), "trait accuracy": scores(name, 1.0)})
        for name in job.SYSTEMS
    ]
    pairs = [pair for pair in comparisons((1,)) if set(pair) <= set(job.SYSTEMS)]
    report.write(report.compare("CARD", systems, pairs, {}, resamples=500), tmp_path)
    lines = job.read(json.loads((tmp_path / "report.json").read_text()), "CARD", job.CARD, "report.md")
    assert [line.outcome for line in lines] == [outcome] * 5


@pytest.mark.parametrize("outcome", VERDICTS)
def test_lpo_can_come_to_each_verdict_with_the_runs_that_are_made(job, outcome, tmp_path):
    size = job.SIZES["small"]
    config = images.ImagesConfig(run=(), out="out", max_prompts=size.prompts, resamples=500)
    units = np.arange(size.prompts).repeat(config.images)
    draw = np.random.default_rng(0)
    lead = {"lpo": LEADS[outcome]}
    scores = {
        name: lead.get(name, 0.0) + draw.normal(size=(1 if name == images.BASE else size.lpo_seeds, len(units)))
        for name in (images.BASE, *job.OBJECTIVES)
    }
    judge = images.Scorer("utility", lambda drawn: np.zeros(len(drawn)), "of tests")
    cells = list(images._cells(judge, scores, SimpleNamespace(config=config, units=units)))
    rows = tuple(report.System(name, name, {}) for name in dict.fromkeys(cell.system for cell in cells))
    report.write(report.Report("LPO", rows, tuple(cells), {}), tmp_path)
    lines = job.read(json.loads((tmp_path / "report.json").read_text()), "Diffusion-LPO", job.LPO, "report.md", 0.5)
    assert [line.outcome for line in lines] == [outcome] * 4


def reproduce(*flags: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, str(ROOT / "jobs/reproduce.py"), "--size", "smoke", "--out", "claims", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def claims(folder: Path) -> list[dict]:
    return json.loads((folder / "claims/report.json").read_text())["claims"]


@pytest.mark.long  # of one paper, CI sees as much in tests/distributed/test_jobs.py
@pytest.mark.timeout(1800)  # three pipelines, on a machine that may be busy
def test_every_claim_of_the_three_papers_is_tested_and_a_second_run_says_the_same(tmp_path):
    done = reproduce(folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = claims(tmp_path)
    check(found, tmp_path)
    assert [claim["paper"] for claim in found] == ["CARD"] * 5 + ["Diffusion-LPO"] * 4 + ["UniHetero"] * 3
    assert "less is better, n = 6" in found[0]["result"]
    assert "| CARD | the vector adds to the cluster's adapter | bits per token/card - cluster |" in (
        (tmp_path / "claims/report.md").read_text()
    )
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "claims").rglob("manifest.json")}
    again = reproduce(folder=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert claims(tmp_path) == found
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "claims").rglob("manifest.json")} == made


def check(found: list[dict], folder: Path) -> None:
    assert {claim["outcome"] for claim in found} <= {"supported", "refuted", "undecided", "not measured"}
    for claim in found:
        assert (folder / claim["report"]).is_file()
