"""CARD on two ranks under torchrun against one process; under Ray, test_two_nodes.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import toy_runs
from palate import artifacts
from palate.card import stages
from palate.corpora.worlds import personas
from palate.serving.answers import sample_answers
from palate.training.parallel import World

JOB = Path(__file__).parents[2] / "jobs" / "card.py"
FLAGS = """
    --model tiny --clusters 2 --max-prompt-tokens 200 --max-answer-tokens 12 --rank 2 --epochs 1 --batch 8
    --people-per-shard 3 --top-k 10 --cluster-texts 0 --other-texts 1 --width 4 --head-epochs 2
    --head-precision 60 --vector-deviation 1
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "personas"
    return personas.prepare(personas.PersonasConfig(out=str(out), people=8, items=6, questions=1)).url


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    stages.pipeline(toy_runs.card(corpus, out), World(), sampler=sample_answers)
    return out


def assert_same(out: Path, expected: Path) -> None:
    for cluster in ("cluster-000", "cluster-001"):
        tensors = [load_file(run / "adapters" / cluster / "adapter_model.safetensors") for run in (out, expected)]
        for name, tensor in tensors[0].items():
            torch.testing.assert_close(tensor, tensors[1][name], atol=1e-5, rtol=1e-3)
    vectors = [stages.read_vectors(artifacts.open_artifact(run / "head", stages.HEAD)) for run in (out, expected)]
    assert vectors[0].keys() == vectors[1].keys()
    for user, vector in vectors[0].items():
        torch.testing.assert_close(vector, vectors[1][user], atol=1e-2, rtol=1e-2)


@pytest.mark.slow
def test_two_ranks_of_torchrun_end_as_one_process(corpus, alone, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(JOB)]
    command += ["--launcher", "torchrun", "--corpus", corpus, "--out", str(tmp_path / "run"), *FLAGS.split()]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path / "run", alone)


def test_the_job_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, str(JOB), "--corpus", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("card: no finished artifact at")
