"""A run as ``jobs/card.py`` leaves it, read for evaluation and evaluated by the job."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from palate import artifacts
from palate.card import stages
from palate.card.adaptation import AdaptConfig
from palate.card.contrast import ContrastConfig
from palate.card.heads import PreferConfig
from palate.corpora.worlds import personas
from palate.evaluation.subject import read_run
from palate.serving.answers import sample_answers
from palate.training.parallel import World

JOB = Path(__file__).parents[2] / "jobs" / "evaluate.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> artifacts.Artifact:
    place = tmp_path_factory.mktemp("corpus")
    return personas.prepare(personas.PersonasConfig(out=str(place), people=8, items=6, questions=1))


@pytest.fixture(scope="module")
def run(corpus: artifacts.Artifact, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("run"))
    config = stages.CardConfig(
        corpus=corpus.url,
        out=url,
        model="tiny",
        cluster=stages.ClusterConfig(clusters=2),
        prompt=stages.PromptConfig(max_prompt_tokens=180, max_answer_tokens=16),
        adapt=AdaptConfig(rank=2, targets=("q_proj", "v_proj"), max_steps=2),
        contrast=ContrastConfig(cluster_texts=0, other_texts=1, top_k=10),
        prefer=PreferConfig(width=4, head_precision=(60.0,), vector_deviation=(0.5,), head_epochs=2),
    )
    stages.pipeline(config, World(), sampler=sample_answers)
    return url


def test_a_run_is_read_as_it_was_made(run: str, corpus: artifacts.Artifact) -> None:
    found = read_run(run, corpus)
    assert len(found.adapters) == 2
    assert all((folder / "adapter_config.json").exists() for folder in found.adapters)
    assert found.vectors.keys() == found.clusters.keys() == found.learned_from
    assert all(vector.shape == (4,) and torch.isfinite(vector).all() for vector in found.vectors.values())
    assert (found.head.width, found.head.top_k) == (4, 10)
    assert (found.history_k, found.max_prompt_tokens, found.max_answer_tokens) == (0, 180, 16)
    assert (found.adapt.rank, found.adapt.targets, found.adapt.max_steps) == (2, ("q_proj", "v_proj"), 2)
    assert found.beta == 1.0


def test_another_corpus_or_an_unfinished_run_is_refused(run: str, corpus: artifacts.Artifact, tmp_path: Path) -> None:
    other = personas.prepare(personas.PersonasConfig(out=str(tmp_path / "other"), people=4, items=2, questions=1))
    with pytest.raises(artifacts.ArtifactMismatch, match="another corpus"):
        read_run(run, other)
    with pytest.raises(artifacts.ArtifactMissing, match="style"):
        read_run(str(tmp_path / "nothing"), corpus)


@pytest.mark.parametrize("file", ["head/head.safetensors", "head/vectors.parquet", "clusters/assignment.parquet"])
def test_a_run_with_damaged_bytes_is_refused(run: str, corpus: artifacts.Artifact, tmp_path: Path, file: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    content = bytearray((tmp_path / "run" / file).read_bytes())
    content[200] ^= 1  # as long as before, and often still readable
    (tmp_path / "run" / file).write_bytes(content)
    with pytest.raises(artifacts.ArtifactCorrupt, match=file):
        read_run(str(tmp_path / "run"), corpus)


def test_the_job_writes_the_report(
    run: str, corpus: artifacts.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    flags = {"run": run, "corpus": corpus.url, "out": str(tmp_path / "out"), "users": "all", "max-new-tokens": "4"}
    flags |= {"per-user-sample": "1", "generation-draws": "1", "draws": "2", "resamples": "100", "negatives": "1"}
    arguments = [part for flag, value in flags.items() for part in (f"--{flag}", value)]
    arguments += ["--systems", "cluster", "card", "card-permuted"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "text", *arguments])
    runpy.run_path(str(JOB), run_name="__main__")
    report = artifacts.open_artifact(tmp_path / "out" / "report", "text-report")
    metrics = report.read_json("report.json")["metrics"]
    assert metrics["bits per token/card - card-permuted"]["n"] == 8
    assert str(report.url) in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "text", *arguments, "nothing"])
    with pytest.raises(SystemExit, match="evaluate: --systems nothing"):
        runpy.run_path(str(JOB), run_name="__main__")
    for flag, value in (("draws", "0"), ("resamples", "0"), ("retrieval-k", "0")):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "text", *arguments, f"--{flag}", value])
        with pytest.raises(SystemExit, match=f"evaluate: --{flag} "):
            runpy.run_path(str(JOB), run_name="__main__")
