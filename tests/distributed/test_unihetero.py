"""Pretraining on two ranks under torchrun, sharded too, against one process; under Ray, test_two_nodes.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import toy_runs
from palate.training import logging as run_logs
from palate.training.parallel import World
from palate.unihetero.stages import pipeline
from toy_unihetero import build_parts

JOB = Path(__file__).parents[2] / "jobs" / "unihetero.py"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return build_parts(tmp_path_factory.mktemp("parts"))


def command(parts, out: Path, *flags: str) -> list[str]:
    given = ["--corpus", f"{parts}/index", "--language", f"{parts}/language", "--vision", f"{parts}/vision"]
    given += ["--vae", f"{parts}/vae", "--arm", "decoder", "--cache", f"{parts}/cache", "--out", str(out)]
    given += ["--steps", "6", "--batch", "6", "--micro-batch", "2", "--checkpoint-every", "2"]
    return [str(JOB), "train", *given, *flags]


@pytest.fixture(scope="module")
def alone(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    pipeline(toy_runs.unihetero(parts, out), World())
    return out


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def assert_same(out: Path, expected: Path) -> None:
    rows = [run_logs.read(run / "training") for run in (out, expected)]
    assert [row["fingerprint"] for row in rows[0]] == [row["fingerprint"] for row in rows[1]]
    for mine, theirs in zip(*rows, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    tensors = [load_file(run / "model" / "model.safetensors") for run in (out, expected)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][name], atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--shard", "--checkpoint-activations")], ids=["replicated", "sharded"])
def test_two_ranks_of_torchrun_end_as_one_process(parts, alone, tmp_path, flags):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = command(parts, tmp_path / "run", "--launcher", "torchrun", *flags)
    done = subprocess.run([*launcher, *given], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path / "run", alone)


def test_the_job_says_what_is_wrong_in_one_line(tmp_path):
    given = [str(JOB), "train", "--corpus", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *given], capture_output=True, text=True, env=environment())
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("unihetero: no finished artifact at")
    assert json.dumps(str(tmp_path))[1:-1] in done.stderr
