"""Runs in processes of their own that get a real SIGKILL, on one rank and on two, and are started again."""

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import toy_training as toy
from palate import artifacts
from palate.training.logging import read

POINTS = ["before data", "after data", "before manifest", "after manifest"]


def run(folder, ranks=1, check=True, **options) -> bool:
    """One run in processes of its own. Returns whether all ended well."""
    well = not any(exit_codes(folder, ranks, **options))
    assert well or not check
    return well


def exit_codes(folder, ranks=1, **options) -> list[int | None]:
    """How the processes of a run ended, which are started as torchrun would start them."""
    settings = toy.ToyConfig(str(folder), launcher="torchrun" if ranks > 1 else "local", **options)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(toy.FORKS.Process(target=toy.process, args=(settings, environment)))
        processes[-1].start()
    for process in processes:
        process.join(timeout=100)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def kill(folder, ranks=1, **options) -> None:
    """A run that is killed on the way, before its last checkpoint."""
    assert not run(folder, ranks, check=False, **options)
    assert (Path(folder) / "killed").exists()
    assert not artifacts.exists(Path(folder) / "checkpoints" / "step-00000012")
    (Path(folder) / "killed").unlink()


def terminate(folder, step, ranks=1, **options) -> None:
    """A run that gets SIGTERM in a step; it saves that step as its last and ends with an error of Python's."""
    ended = exit_codes(folder, ranks, kill_step=step, kill_signal="SIGTERM", **options)
    assert ended == [1] * ranks
    (Path(folder) / "killed").unlink()
    assert [row["step"] for row in read(folder)] == list(range(1, step + 1))
    newest = max(path.name for path in (Path(folder) / "checkpoints").iterdir())
    assert newest == f"step-{step:08d}"
    artifacts.open_artifact(Path(folder) / "checkpoints" / newest).verify()


def state(folder, ranks=1) -> list[dict]:
    last = Path(folder) / "checkpoints" / "step-00000012"
    return [load_file(last / f"rank-{rank:05d}.safetensors") for rank in range(ranks)]


def assert_bit_equal(folder, whole, ranks=1) -> None:
    assert toy.trace(folder) == toy.trace(whole)
    for found, expected in zip(state(folder, ranks), state(whole, ranks), strict=True):
        assert found.keys() == expected.keys()
        assert all(found[name].equal(tensor) for name, tensor in expected.items())


def assert_equal_within_rounding(folder, other) -> None:
    """Equal batches, and losses and weights that differ by the order of float32 sums alone: 1e-5 relative."""
    assert [row["fingerprint"] for row in read(folder)] == [row["fingerprint"] for row in read(other)]
    assert [row["loss"] for row in read(folder)] == pytest.approx([row["loss"] for row in read(other)], rel=1e-5)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(folder)
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run(folder, ranks=2)
    return folder


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """One rank without dropout, whose numbers would depend on the rank."""
    folder = tmp_path_factory.mktemp("exact")
    run(folder, dropout=0.0)
    return folder


@pytest.mark.parametrize("step", [1, 7, 12])
def test_sigkill_in_a_step_on_one_rank(tmp_path, one_rank, step):
    kill(tmp_path, kill_step=step)
    run(tmp_path)
    assert_bit_equal(tmp_path, one_rank)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("point", POINTS)
def test_sigkill_inside_a_checkpoint_on_one_rank(tmp_path, one_rank, point, background):
    kill(tmp_path, kill_fault=point, background_saves=background)
    run(tmp_path)
    assert_bit_equal(tmp_path, one_rank)


@pytest.mark.parametrize("point", POINTS[1:])  # the first is passed before training goes on
def test_sigkill_in_a_later_step_while_a_checkpoint_is_written(tmp_path, one_rank, point):
    kill(tmp_path, kill_fault=point, kill_step=11, read_ahead=2)
    assert len(read(tmp_path)) >= 10
    assert artifacts.exists(tmp_path / "checkpoints" / "step-00000008") == (point == "after manifest")
    run(tmp_path, read_ahead=2)
    assert_bit_equal(tmp_path, one_rank)


def test_an_average_and_what_updates_it_are_exact_through_sigkill_and_sigterm(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, average=True)
    kill(cut, average=True, kill_step=6)
    assert exit_codes(cut, average=True, kill_step=2, kill_signal="SIGTERM") == [1]
    assert 2 <= len(read(cut)) < 12
    run(cut, average=True)
    assert_bit_equal(cut, whole)
    assert "model.average" in state(cut)[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_in_any_step(tmp_path, one_rank, two_ranks, ranks):
    """Only the last rank gets it; all save that step, and go on from it."""
    step = random.Random(ranks).randint(1, 11)
    terminate(tmp_path, step, ranks, kill_rank=ranks - 1, read_ahead=2)
    run(tmp_path, ranks)
    assert_bit_equal(tmp_path, {1: one_rank, 2: two_ranks}[ranks], ranks)


@pytest.mark.slow
def test_sigterm_to_torchrun_whenever_it_comes(tmp_path):
    """It hands the signal on to both processes, which may then be in different places of different steps."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, 2, steps=600, checkpoint_every=600)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", toy.__file__]
    command += ["--folder", str(cut), "--launcher", "torchrun", "--steps", "600", "--checkpoint-every", "600"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log, deadline = cut / "training.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < 20:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=120)[1]
    done = len(read(cut))
    assert 20 <= done < 600
    assert f"SIGTERM ended the run after step {done} of 600" in said
    run(cut, 2, steps=600, checkpoint_every=600)
    assert toy.trace(cut) == toy.trace(whole)


@pytest.mark.parametrize(
    "options",
    [
        {"kill_step": 7, "kill_rank": 1},
        {"kill_fault": "before manifest"},
        {"kill_fault": "after data", "kill_step": 11},
    ],
)
def test_sigkill_of_one_of_two_ranks(tmp_path, two_ranks, options):
    kill(tmp_path, ranks=2, **options)
    run(tmp_path, ranks=2)
    assert_bit_equal(tmp_path, two_ranks, ranks=2)


@pytest.mark.slow
def test_sigkill_of_one_of_two_ranks_under_torchrun(tmp_path, two_ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", toy.__file__]
    command += ["--folder", str(tmp_path), "--launcher", "torchrun"]
    killed = subprocess.run([*command, "--kill-step", "7", "--kill-rank", "1"], capture_output=True, text=True)
    assert killed.returncode != 0
    assert (tmp_path / "killed").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert_bit_equal(tmp_path, two_ranks, ranks=2)


def test_two_ranks_equal_one(tmp_path, exact):
    run(tmp_path, ranks=2, dropout=0.0)
    assert_equal_within_rounding(tmp_path, exact)
    found, expected = state(tmp_path)[0], state(exact)[0]
    for name in (name for name in expected if name.startswith("model.")):
        assert found[name].sub(expected[name]).norm() < 1e-5 * expected[name].norm(), name


def test_ranks_checkpoint_to_object_storage_and_go_on(s3_url, tmp_path, exact):
    url = f"{s3_url}/run"
    options = {"dropout": 0.0, "sharded": True, "marker": str(tmp_path)}
    assert not run(url, 2, check=False, kill_step=7, background_saves=False, **options)
    filesystem, root = artifacts.locate(url)
    files = filesystem.glob(f"{root}/checkpoints/step-00000004/rank-*.safetensors")
    assert [file.rpartition("/")[2] for file in files] == ["rank-00000.safetensors", "rank-00001.safetensors"]
    run(url, ranks=2, **options)
    assert_equal_within_rounding(url, exact)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_started_again_on_another_number_of_ranks(tmp_path, exact, before, after):
    kill(tmp_path, before, dropout=0.0, kill_step=7)
    run(tmp_path, after, dropout=0.0)
    assert_equal_within_rounding(tmp_path, exact)


def test_on_two_ranks_then_one_then_three(tmp_path, exact):
    """Killed and preempted on the way, with samples read ahead and checkpoints in the background."""
    options = {"dropout": 0.0, "read_ahead": 3}
    kill(tmp_path, 2, kill_step=7, kill_rank=1, **options)
    run_until_sigterm = exit_codes(tmp_path, 1, kill_step=2, kill_signal="SIGTERM", **options)
    assert run_until_sigterm == [1]
    assert 2 <= len(read(tmp_path)) < 12
    run(tmp_path, 3, **options)
    assert_equal_within_rounding(tmp_path, exact)


@pytest.mark.slow
def test_sharded_ranks_equal_one_and_go_on_sharded_or_not(tmp_path, exact):
    options = {"ranks": 2, "dropout": 0.0, "sharded": True}
    whole, again, plain = tmp_path / "whole", tmp_path / "again", tmp_path / "plain"
    run(whole, **options)
    assert_equal_within_rounding(whole, exact)
    parts = state(whole, ranks=2)
    # 3 rows on 2 ranks: each holds its own rows of weights and moments.
    assert [part["model.heads.0.weight"].shape[0] for part in parts] == [2, 1]
    assert [part["optimizer.heads.0.weight.exp_avg"].shape[0] for part in parts] == [2, 1]

    kill(again, **options, kill_step=7)
    run(again, **options)
    assert_bit_equal(again, whole, ranks=2)

    kill(plain, **options, kill_step=7)
    run(plain, dropout=0.0)
    assert_equal_within_rounding(plain, exact)


@pytest.mark.slow
def test_sharded_ranks_are_preempted_and_go_on_in_another_number(tmp_path, exact):
    options = {"dropout": 0.0, "sharded": True, "read_ahead": 2}
    terminate(tmp_path, 5, ranks=2, kill_rank=1, **options)
    # While the checkpoint of step 8 is written, in step 9, this start's fourth.
    kill(tmp_path, 3, kill_fault="after data", kill_step=4, checkpoint_every=2, **options)
    run(tmp_path, 1, dropout=0.0)
    assert_equal_within_rounding(tmp_path, exact)
