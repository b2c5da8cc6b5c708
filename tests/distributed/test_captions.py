"""Image-text shards curated by Ray Data, against the plain loop."""

import dataclasses
import os
import runpy
import sys
from pathlib import Path

import pytest

from palate import artifacts
from palate.corpora import captions
from palate.corpora.captions import IMAGE_TEXT_INDEX, CaptionsConfig, prepare
from palate.corpora.streams import CorpusError
from toy_captions import jpeg, mixed, sample, write_tar

JOB = Path(__file__).parents[2] / "jobs" / "prepare.py"


@pytest.fixture(scope="module")
def run_with_ray(ray_cluster):
    from palate.distributed.prepare import run_with_ray

    return run_with_ray


@pytest.mark.slow
def test_ray_and_the_plain_loop_write_equal_files_though_a_worker_dies(run_with_ray, tmp_path, monkeypatch):
    mixed(tmp_path / "in")
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "3.jpg").write_bytes(jpeg(3))
    config = CaptionsConfig(
        input=(str(tmp_path / "in" / "*"),), out=str(tmp_path / "plain"), evaluation=(str(evaluation),)
    )
    plain = prepare(config)
    monkeypatch.setattr(captions, "LEAST_IN_PART", 10)
    died = tmp_path / "died"

    def dying(step):
        def run(task):
            if step.label == "scan" and task == 1 and not died.exists():
                died.touch()
                os._exit(1)
            return step.run(task)

        return run_with_ray(dataclasses.replace(step, run=run))

    remote = prepare(dataclasses.replace(config, out=str(tmp_path / "ray"), group_samples=1), dying)
    assert died.exists()
    assert [(one.path, one.sha256) for one in remote.files] == [(one.path, one.sha256) for one in plain.files]


@pytest.mark.slow
def test_the_job_with_the_ray_launcher(run_with_ray, tmp_path, monkeypatch, capsys):
    mixed(tmp_path / "in", shards=2)
    arguments = ["--input", str(tmp_path / "in" / "*"), "--out", str(tmp_path / "out"), "--rewrite"]
    monkeypatch.setattr(sys, "argv", [str(JOB), "captions", *arguments, "--launcher", "ray"])
    runpy.run_path(str(JOB), run_name="__main__")
    assert "seen: 24" in capsys.readouterr().out
    assert artifacts.open_artifact(tmp_path / "out", IMAGE_TEXT_INDEX).verify()


@pytest.mark.slow
def test_what_is_wrong_is_said_as_by_the_plain_loop(run_with_ray, tmp_path):
    write_tar(tmp_path / "0.tar", [sample("a", jpeg(0), "one", {"x": 1})])
    config = CaptionsConfig(input=(str(tmp_path / "0.tar"),), out=str(tmp_path / "out"), min_similarity=0.2)
    with pytest.raises(CorpusError, match=r"filter on similarity found no column"):
        prepare(config, run_with_ray)
