"""Pretraining on two ranks, under torchrun, sharded, and under Ray, against one process; killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import toy_runs
from palate.distributed.launch import launch
from palate.training import logging as run_logs
from palate.training.parallel import World
from palate.unihetero.stages import pipeline
from toy_unihetero import build_parts, killed_once

JOB = Path(__file__).parents[2] / "jobs" / "unihetero.py"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return build_parts(tmp_path_factory.mktemp("parts"))


def command(parts, out: Path, *flags: str, steps: int = 6) -> list[str]:
    given = ["--corpus", f"{parts}/index", "--language", f"{parts}/language", "--vision", f"{parts}/vision"]
    given += ["--vae", f"{parts}/vae", "--arm", "decoder", "--cache", f"{parts}/cache", "--out", str(out)]
    given += ["--steps", str(steps), "--batch", "6", "--micro-batch", "2", "--checkpoint-every", "2"]
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


@pytest.mark.slow
def test_two_workers_of_ray_end_as_one_process(parts, alone, tmp_path, ray_cluster):
    config = toy_runs.unihetero(parts, tmp_path / "run")
    launch(pipeline, config, launcher="ray", workers=2, folder=config.out)
    assert_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_killed_worker_of_ray_is_started_again_and_nothing_changes(parts, tmp_path, ray_cluster):
    whole, config = (
        toy_runs.unihetero(parts, tmp_path / "whole", steps=40),
        toy_runs.unihetero(parts, tmp_path / "run", steps=40),
    )
    pipeline(whole, World())
    launch(killed_once, config, launcher="ray", workers=2, folder=config.out)
    assert (tmp_path / "run" / "killed").exists()
    assert [row["step"] for row in run_logs.read(tmp_path / "run" / "training")] == list(range(1, 41))
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_process_goes_on_with_the_same_bits(parts, tmp_path):
    # The unbroken run is a process like the killed one: sums over two threads differ from sums over one in the last
    # bits.
    whole, out = tmp_path / "whole", tmp_path / "run"
    subprocess.run([sys.executable, *command(parts, whole, steps=40)], env=environment(), check=True)
    expected = run_logs.read(whole / "training")
    log = out / "training" / "training.jsonl"
    process = subprocess.Popen([sys.executable, *command(parts, out, steps=40)], env=environment())
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 7):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert log.read_text().count("\n") < 40
    done = subprocess.run([sys.executable, *command(parts, out, steps=40)], env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = run_logs.read(out / "training")
    assert [row["step"] for row in found] == list(range(1, 41))
    for row, other in zip(found, expected, strict=True):
        assert (row["fingerprint"], row["loss"]) == (other["fingerprint"], other["loss"])
    files = [(run / "model" / "model.safetensors").read_bytes() for run in (out, whole)]
    assert files[0] == files[1]


def test_the_job_says_what_is_wrong_in_one_line(tmp_path):
    given = [str(JOB), "train", "--corpus", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *given], capture_output=True, text=True, env=environment())
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("unihetero: no finished artifact at")
    assert json.dumps(str(tmp_path))[1:-1] in done.stderr
