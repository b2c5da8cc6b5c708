"""Ranked lists made by Ray Data, against the plain loop."""

import dataclasses
import os
import runpy
import sys
from pathlib import Path

import pytest

from palate import artifacts
from palate.corpora.schema import RANKED_LISTS
from palate.corpora.streams import CorpusError
from palate.lpo.preparation import RankingsConfig, prepare
from toy_rankings import comparisons, config_of

JOB = Path(__file__).parents[2] / "jobs" / "prepare.py"


@pytest.fixture(scope="module")
def run_with_ray(ray_cluster):
    from palate.distributed.prepare import run_with_ray

    return run_with_ray


def test_ray_and_the_plain_loop_write_equal_files(run_with_ray, tmp_path):
    config = config_of(tmp_path, comparisons(200, images=True), parts=3, group_by="caption-user")
    plain = prepare(config)
    remote = prepare(dataclasses.replace(config, out=str(tmp_path / "ray")), run_with_ray)
    assert remote.digest == plain.digest
    assert remote.paths("images/")


def test_a_task_whose_worker_dies_is_run_again(run_with_ray, tmp_path, monkeypatch):
    config = config_of(tmp_path, comparisons(200), parts=3)
    died = tmp_path / "died"

    def dying(step):
        def run(task):
            if step.label == "finish" and not died.exists():
                died.touch()
                os._exit(1)
            return step.run(task)

        return run_with_ray(dataclasses.replace(step, run=run))

    made = prepare(config, dying)
    assert died.exists()
    assert made.digest == prepare(dataclasses.replace(config, out=str(tmp_path / "plain"))).digest


def test_what_is_wrong_is_said_as_by_the_plain_loop(run_with_ray, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no")
    config = RankingsConfig(input=(str(tmp_path / "x.parquet"),), out=str(tmp_path / "out"), format="hpdv3")
    with pytest.raises(CorpusError, match="no Parquet file that can be read"):
        prepare(config, run_with_ray)


def test_the_job_with_the_ray_launcher(run_with_ray, tmp_path, monkeypatch, capsys):
    config = config_of(tmp_path, comparisons(100))
    arguments = ["--input", *config.input, "--out", config.out, "--max-quarantined", "0.2", "--max-component", "1"]
    monkeypatch.setattr(sys, "argv", [str(JOB), "rankings", *arguments, "--launcher", "ray"])
    runpy.run_path(str(JOB), run_name="__main__")
    assert "annotations: 100" in capsys.readouterr().out
    assert artifacts.open_artifact(config.out, RANKED_LISTS).verify()
