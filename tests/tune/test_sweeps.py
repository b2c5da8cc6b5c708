"""The sweeps as commands, on tiny models: what they write is what the jobs take."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from palate import artifacts
from palate.card.stages import ADAPTERS
from palate.corpora.worlds import personas, shapes
from palate.distributed import tuning
from palate.models.diffusion import load_diffusion

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def call(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}",
    }
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sweeps")
    personas.prepare(personas.PersonasConfig(out=f"{root}/corpus", people=16, items=6, questions=1))
    return root


@pytest.fixture(scope="module")
def clusters(folder) -> str:
    """What the sweep of clusters printed; its artifacts are in ``sweep``."""
    flags = [
        "--corpus",
        "corpus",
        "--model",
        "tiny",
        "--try-clusters",
        "1",
        "2",
        "--epochs",
        "2",
        "--compare-at",
        "1",
        "--max-answer-tokens",
        "8",
    ]
    done = call("tune/clusters.py", *flags, "--concurrent", "1", "--out", "sweep", folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_clusters_are_compared_and_the_job_takes_the_best_unchanged(folder, clusters):
    assert "watch: tensorboard --logdir sweep" in clusters
    assert "<- chosen" in clusters
    report = json.loads((folder / "sweep/report/report.json").read_text())
    reached = {(point["values"]["clusters"], point["budget"]) for point in report["points"]}
    assert reached >= {(1, 1), (2, 1)}
    assert {epochs for _, epochs in reached} == {1, 2}
    for point in report["points"]:
        assert point["metric"]["low"] < point["metric"]["value"] < point["metric"]["high"]
    assert list((folder / "sweep").glob("tune-*/*/events.out.tfevents.*"))
    best = json.loads((folder / "sweep/best.json").read_text())
    assert best["cluster"]["clusters"] == report["best"]["clusters"]
    before = artifacts.open_artifact(f"{folder}/{best['out']}/adapters", ADAPTERS).digest
    again = call("jobs/card.py", "--config", "sweep/best.json", folder=folder)
    assert again.returncode == 0, again.stderr[-3000:]
    assert artifacts.open_artifact(f"{folder}/{best['out']}/adapters", ADAPTERS).digest == before
    anew = call("jobs/card.py", "--config", "sweep/best.json", "--out", "anew", folder=folder)
    assert anew.returncode == 0, anew.stderr[-3000:]
    made = artifacts.open_artifact(f"{folder}/anew/adapters", ADAPTERS)
    assert (
        made.local("cluster-000/adapter_model.safetensors").read_bytes()
        == (folder / best["out"] / "adapters/cluster-000/adapter_model.safetensors").read_bytes()
    )


def test_decoding_is_swept_without_training_again(folder, clusters):
    run = json.loads((folder / "sweep/best.json").read_text())["out"]
    flags = (
        f"decoding --run {run} --corpus corpus --try-betas 0 1 --try-top-k 5 50 --concurrent 1 --out decoding".split()
    )
    before = {path: path.stat().st_mtime_ns for path in (folder / run).rglob("*") if path.is_file()}
    done = call("tune/betas.py", *flags, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in (folder / run).rglob("*") if path.is_file()} == before
    points = json.loads((folder / "decoding/report/report.json").read_text())["points"]
    bits = {(point["values"]["beta"], point["values"]["top_k"]): point["metric"]["value"] for point in points}
    assert bits[0, 5] == bits[0, 50]  # the cluster's model, whatever the number of candidates
    assert len({bits[0, 5], bits[1, 5], bits[1, 50]}) == 3
    assert len(list((folder / "decoding/evaluation/likelihoods").iterdir())) == 1
    best = json.loads((folder / "decoding/best.json").read_text())
    assert best["users"] == "test"
    assert (best["decoding_beta"], best["decoding_top_k"]) == min(bits, key=bits.get)


def test_kl_betas_are_compared_over_seeds_and_the_job_takes_the_best(folder):
    shapes.prepare(
        shapes.ShapesConfig(out=f"{folder}/lists", scenes=40, pool=8, lists=12, examples=1, tests=1, users=4)
    )
    load_diffusion("shapes").pipeline.save_pretrained(folder / "base")
    flags = ["lpo", "--lists", "lists", "--model", "base", "--resolution", "16", "--steps", "2", "--max-prompts", "4"]
    flags += [
        "--batch",
        "4",
        "--learning-rate",
        "1e-3",
        "--sampler-steps",
        "2",
        "--grid",
        "0",
        "--captions-of",
        "examples",
    ]
    flags += ["--try-kl-betas", "500", "5000", "--try-seeds", "2", "--images-per-prompt", "1", "--concurrent", "1"]
    done = call("tune/betas.py", *flags, "--out", "kl", folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    points = json.loads((folder / "kl/report/report.json").read_text())["points"]
    assert [(point["values"]["kl_beta"], point["budget"], point["runs"]) for point in points] == [
        (500, 2, 2),
        (5000, 2, 2),
    ]
    for point in points:
        assert 0 <= point["metric"]["value"] <= 1
        assert "drift" in point["others"]
    (worse,) = (point for point in points if "win rate against the best" in point["others"])
    assert worse["metric"]["value"] == min(point["metric"]["value"] for point in points)
    metrics = json.loads(next((folder / "kl/evaluation").glob("*/report/report.json")).read_text())["metrics"]
    both = metrics["utility win rate/kl-beta-5000 against kl-beta-500"]["value"]
    found = worse["others"]["win rate against the best"]["value"]
    assert found == pytest.approx(both if worse["values"]["kl_beta"] == 5000 else 1 - both)
    best = json.loads((folder / "kl/best.json").read_text())
    assert best["learn"]["kl_beta"] in (500.0, 5000.0)
    assert best["tune"]["steps"] == 2
    again = call("jobs/lpo.py", "--config", "kl/best.json", "--out", "tuned", folder=folder)
    assert again.returncode == 0, again.stderr[-3000:]
    assert list((folder / "tuned/tuned/lora").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "betas.py decoding --run RUN --corpus corpus --choose-by taste --out x",
            "--choose-by taste: there are ['bits",
        ),
        ("clusters.py --corpus corpus --model tiny --fresh --out sweep", "--fresh would discard trials"),
        ("betas.py lpo --lists none --out y", "no finished artifact at "),
    ],
)
def test_what_cannot_be_swept_is_said_before_ray_starts(folder, clusters, monkeypatch, command, said):
    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ray was to start")

    script, *flags = command.replace("RUN", json.loads((folder / "sweep/best.json").read_text())["out"]).split()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.setattr(tuning, "search", started)
    with pytest.raises(SystemExit, match=f"{script.removesuffix('.py')}: {re.escape(said)}"):
        runpy.run_path(str(ROOT / "tune" / script), run_name="__main__")
