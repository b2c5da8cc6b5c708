"""Checkpoints: a run that is killed anywhere and started again is, to the last bit, the run that never was."""

import dataclasses
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import toy_training as toy
from palate import artifacts
from palate.training import checkpoints
from palate.training.parallel import World


class Killed(BaseException):
    """Stands for SIGKILL where a process of its own would take seconds; test_kill.py sends the real one."""


def settings(folder, **changes) -> toy.ToyConfig:
    return dataclasses.replace(toy.ToyConfig(str(folder)), **changes)


def final_state(folder, step=12) -> dict[str, torch.Tensor]:
    """Weights, moments and random states of the last checkpoint, read without the library."""
    return load_file(Path(folder) / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    toy.run(settings(folder), World())
    return folder


def assert_same_run(folder, whole):
    assert toy.trace(folder) == toy.trace(whole)
    found, expected = final_state(folder), final_state(whole)
    assert found.keys() == expected.keys()
    assert any(name.startswith("optimizer.") for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert (folder / "corrupt.jsonl").read_text() == (whole / "corrupt.jsonl").read_text()


def run_until_killed(folder, step=0, fault=("", 0)):
    """Run until the first loss of ``step``, or the fault point ``fault[0]`` of the ``fault[1]``-th checkpoint."""
    batches, points, original = [], [], toy.loss

    def loss(model, samples, totals):
        if not batches or batches[-1] is not totals:
            batches.append(totals)
        if len(batches) == step:
            raise Killed
        return original(model, samples, totals)

    def hook(point):
        points.append(point)
        if (point, points.count(point)) == fault:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "loss", loss)
        patch.setattr(artifacts, "fault_hook", hook)
        with pytest.raises(Killed):
            toy.run(settings(folder), World())


@pytest.mark.parametrize("step", [1, 2, 4, 5, 8, 9, 12])
def test_killed_in_any_step_then_started_again(tmp_path, whole, step):
    run_until_killed(tmp_path, step=step)
    summary = toy.run(settings(tmp_path), World())
    assert summary["resumed"] == (step - 1) // 4 * 4
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("point", ["before data", "after data", "before manifest", "after manifest"])
def test_killed_inside_a_checkpoint_then_started_again(tmp_path, whole, point, number):
    run_until_killed(tmp_path, fault=(point, number))
    summary = toy.run(settings(tmp_path), World())
    assert summary["resumed"] == 4 * (number if point == "after manifest" else number - 1)
    assert_same_run(tmp_path, whole)


def test_on_object_storage(s3_url, tmp_path, whole):
    url = f"{s3_url}/run"
    run_until_killed(url, step=7)
    summary = toy.run(settings(url, tensorboard=True), World())
    assert summary["resumed"] == 4
    assert toy.trace(url) == toy.trace(whole)
    filesystem, root = artifacts.locate(url)
    assert filesystem.glob(f"{root}/tensorboard/events*")
    filesystem.get_file(f"{root}/checkpoints/step-00000012/rank-00000.safetensors", str(tmp_path / "last"))
    for name, tensor in load_file(tmp_path / "last").items():
        assert torch.equal(tensor, final_state(whole)[name])
    ledger = filesystem.cat_file(f"{root}/corrupt.jsonl").decode()
    assert ledger == (whole / "corrupt.jsonl").read_text()


def _truncate(folder: Path) -> None:
    file = folder / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _flip_a_bit(folder: Path) -> None:
    file = folder / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def _lose_the_index(folder: Path) -> None:
    (folder / "index.json").unlink()


def _cut_the_manifest(folder: Path) -> None:
    file = folder / artifacts.MANIFEST
    file.write_text(file.read_text()[:50])


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, _lose_the_index, _cut_the_manifest])
def test_a_broken_checkpoint_falls_back_to_the_one_before(tmp_path, whole, caplog, damage):
    run_until_killed(tmp_path, step=10)
    damage(tmp_path / "checkpoints" / "step-00000008")
    with caplog.at_level(logging.WARNING):
        summary = toy.run(settings(tmp_path), World())
    assert summary["resumed"] == 4
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "palate.training.checkpoints"]
    assert "step-00000008" in warning
    assert "going back to the one before" in warning
    assert_same_run(tmp_path, whole)


def test_when_every_checkpoint_is_broken_the_run_says_so_and_fresh_starts_anew(tmp_path, whole):
    toy.run(settings(tmp_path), World())
    for folder in (tmp_path / "checkpoints").iterdir():
        _flip_a_bit(folder)
    with pytest.raises(artifacts.ArtifactCorrupt, match=r"every checkpoint under .* is broken.*--fresh"):
        toy.run(settings(tmp_path), World())
    summary = toy.run(settings(tmp_path, fresh=True), World())
    assert summary["resumed"] == 0
    assert_same_run(tmp_path, whole)


def test_a_finished_run_does_nothing(tmp_path, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    summary = toy.run(settings(whole), World())
    assert (summary["steps"], summary["resumed"]) == (12, 12)
    assert summary["updates"]["cluster-0"] == 12
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 0.1}, r"'groups\.cluster-0\.learning_rate' was 0\.05, is now 0\.1"),
        ({"steps": 20}, r"'loop\.steps' was 12, is now 20"),
        ({"global_batch": 6}, r"'stream\.global_batch' was 5, is now 6"),
        ({"seed": 1}, r"'loop\.seed' was 0, is now 1"),
    ],
)
def test_another_identity_is_refused_by_name(whole, change, named):
    with pytest.raises(artifacts.ArtifactMismatch, match=named):
        toy.run(settings(whole, **change), World())


def test_scale_fields_may_change_between_starts(tmp_path, whole):
    run_until_killed(tmp_path, step=6)
    summary = toy.run(settings(tmp_path, micro_batch=5, checkpoint_every=3), World())
    assert summary["resumed"] == 4
    assert [row[2] for row in toy.trace(tmp_path)] == [row[2] for row in toy.trace(whole)]
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["step-00000009", "step-00000012"]  # the last two


def test_a_checkpoint_is_safetensors_and_json_alone(whole):
    files = list((whole / "checkpoints" / "step-00000012").iterdir())
    assert sorted(path.name for path in files) == ["index.json", "manifest.json", "rank-00000.safetensors"]
    index = json.loads((whole / "checkpoints" / "step-00000012" / "index.json").read_text())
    assert index["step"] == index["counters"]["step"] == 12
    state = final_state(whole)
    updates = index["counters"]["updates"]
    assert state["optimizer.heads.1.weight.step"].item() == updates["cluster-1"] < 12
    assert state["random.torch"].dtype == torch.uint8


def test_random_states_come_back():
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random(), random.gauss(0, 1)]

    random.gauss(0, 1)  # leaves a second number in the generator's state
    np.random.standard_normal()
    state = checkpoints.random_state(torch.device("cpu"))
    assert all(tensor.dtype == torch.uint8 for tensor in state.values())
    first = draw()
    assert draw() != first
    checkpoints.set_random_state(state)
    assert draw() == first
