"""Checkpoints: a run that is killed anywhere and started again is, to the last bit, the run that never was."""

import dataclasses
import json
import logging
import math
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import toy_training as toy
from palate import artifacts
from palate.training import checkpoints
from palate.training.guards import NonFinite
from palate.training.loop import LoopConfig, LossOutput, train
from palate.training.parallel import World
from palate.training.stream import Stream


class Killed(BaseException):
    """Stands for SIGKILL where a process of its own would take seconds; test_kill.py sends the real one."""


def settings(folder, **changes) -> toy.ToyConfig:
    return dataclasses.replace(toy.ToyConfig(str(folder)), **changes)


def final_state(folder, step=12) -> dict[str, torch.Tensor]:
    """Weights, moments and random states of the last checkpoint, read without the library."""
    return load_file(Path(folder) / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody kills, and that stands still while it saves; the others do not."""
    folder = tmp_path_factory.mktemp("whole")
    toy.run(settings(folder, background_saves=False), World())
    return folder


def assert_same_run(folder, whole):
    assert toy.trace(folder) == toy.trace(whole)
    found, expected = final_state(folder), final_state(whole)
    assert found.keys() == expected.keys()
    assert any(name.startswith("optimizer.") for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert (folder / "corrupt.jsonl").read_text() == (whole / "corrupt.jsonl").read_text()


def run_until_killed(folder, step=0, fault=("", 0), **changes):
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
            toy.run(settings(folder, **changes), World())


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


def test_an_unfinished_checkpoint_does_not_take_the_place_of_a_whole_one(tmp_path):
    run_until_killed(tmp_path, fault=("before manifest", 2))
    assert (tmp_path / "checkpoints" / "step-00000008").exists()
    run_until_killed(tmp_path, step=8, checkpoint_every=3)  # from step 4; the 8th of this start
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["step-00000006", "step-00000009"]


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


def on_write(monkeypatch, before):
    """Call ``before(number)`` in the thread that is about to write the ``number``-th checkpoint, from 1."""
    write, count = checkpoints._write, []

    def delayed(*arguments):
        count.append(1)
        before(len(count))
        write(*arguments)

    monkeypatch.setattr(checkpoints, "_write", delayed)


def on_step(monkeypatch, before):
    """Call ``before(step)`` ahead of each step's first loss."""
    loss, batches = toy.loss, []

    def watched(model, samples, totals):
        if not batches or batches[-1] is not totals:
            batches.append(totals)
            before(len(batches))
        return loss(model, samples, totals)

    monkeypatch.setattr(toy, "loss", watched)


def test_a_checkpoint_holds_its_own_step_however_late_it_is_written(tmp_path, whole, monkeypatch):
    eleventh, seen = threading.Event(), []

    def before_write(number):
        if number == 2:
            assert eleventh.wait(60)
            seen.append((tmp_path / "checkpoints" / "step-00000008" / artifacts.MANIFEST).exists())

    on_write(monkeypatch, before_write)
    on_step(monkeypatch, lambda step: eleventh.set() if step == 11 else None)
    toy.run(settings(tmp_path), World())
    assert seen == [False]
    for step in (8, 12):
        found, expected = final_state(tmp_path, step), final_state(whole, step)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        index, other = (
            json.loads((folder / "checkpoints" / f"step-{step:08d}" / "index.json").read_text())
            for folder in (tmp_path, whole)
        )
        assert index == other
    assert_same_run(tmp_path, whole)


def test_one_checkpoint_is_on_its_way_at_a_time(tmp_path, whole, monkeypatch):
    events = []

    def hook(point):
        events.append(point)

    on_write(monkeypatch, lambda number: (time.sleep(0.02), events.append(number)))
    monkeypatch.setattr(artifacts, "fault_hook", hook)
    toy.run(settings(tmp_path, checkpoint_every=1), World())
    one = ["after data", "before manifest", "after manifest"]
    assert events == [event for number in range(1, 13) for event in ["before data", number, *one]]
    assert [row[:2] for row in toy.trace(tmp_path)] == [row[:2] for row in toy.trace(whole)]


def test_what_goes_wrong_in_writing_stops_the_run_at_a_later_step(tmp_path, whole, monkeypatch):
    failed = threading.Event()

    def before_write(number):
        if number == 2:
            failed.set()
            raise OSError("no space left on device")

    def before_step(step):
        if step == 9:
            failed.wait(60)
            time.sleep(0.2)  # the thread has only its exception left to raise

    with monkeypatch.context() as patch:
        on_write(patch, before_write)
        on_step(patch, before_step)
        with pytest.raises(OSError, match="no space left") as caught:
            toy.run(settings(tmp_path), World())
    assert "checkpoint of step 8" in caught.value.__notes__[0]
    assert 8 <= len(toy.trace(tmp_path)) < 11
    summary = toy.run(settings(tmp_path), World())
    assert summary["resumed"] == 4
    assert_same_run(tmp_path, whole)


def test_what_goes_wrong_with_the_last_checkpoint_stops_the_run_too(tmp_path, monkeypatch):
    def before_write(number):
        if number == 3:
            raise OSError("no space left on device")

    on_write(monkeypatch, before_write)
    with pytest.raises(OSError, match="no space left"):
        toy.run(settings(tmp_path), World())


def test_a_guard_lets_the_checkpoint_on_its_way_be_finished(tmp_path, monkeypatch):
    stopping = threading.Event()

    def before_write(number):
        assert stopping.wait(60)
        time.sleep(0.1)  # now the main thread waits, if it does

    def loss(model, samples, totals):
        output = toy.loss(model, samples, totals)
        if steps[-1] == 6:
            stopping.set()
            return LossOutput(output.loss * math.nan)
        return output

    on_write(monkeypatch, before_write)
    steps, model = [], toy.Toy(0.0)
    options = LoopConfig(12, micro_batch=5, checkpoint_every=4, tensorboard=False)
    with pytest.raises(NonFinite):
        train(
            model,
            toy.groups(model),
            Stream([toy.source()], 5),
            toy.weigh,
            loss,
            options,
            tmp_path,
            before_step=steps.append,
        )
    assert artifacts.open_artifact(tmp_path / "checkpoints" / "step-00000004").verify()


class Exchange:
    """What ranks that are threads of this process gather."""

    def __init__(self, size):
        self.barrier, self.values = threading.Barrier(size, timeout=60), [None] * size

    def gather(self, rank, value):
        self.values[rank] = json.loads(json.dumps(value))
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


@dataclasses.dataclass(frozen=True)
class ThreadWorld(World):
    exchange: Exchange | None = None

    def gather(self, value):
        return self.exchange.gather(self.rank, value)


def on_two_ranks(work):
    """``work(world)`` on two ranks at once; what each returned or raised."""
    exchange = Exchange(2)
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(work, ThreadWorld(rank, 2, exchange=exchange)) for rank in range(2)]
    return [job.exception() or job.result() for job in done]


def save_on(world, folder, between):
    """Save a parameter, change it, and call ``between(store)`` before the wait."""
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))
    store = checkpoints.Store(str(folder), {"seed": 0}, 2, world, background=True)
    optimizer = torch.optim.AdamW([parameter])
    store.save(4, [("w", parameter)], optimizer, {"step": 4})
    with torch.no_grad():
        parameter.zero_()
    try:
        between(store)
        store.wait()
    finally:
        store.close()
    return True


def test_the_manifest_is_there_only_after_every_ranks_file(tmp_path, monkeypatch):
    write, go_on = checkpoints._write, threading.Event()
    manifest = tmp_path / "checkpoints" / "step-00000004" / artifacts.MANIFEST

    def late(tensors, name, *others):
        if name == "rank-00001.safetensors":
            assert go_on.wait(60)
            assert not manifest.exists()
        write(tensors, name, *others)

    def between(store):
        for _ in range(20):  # steps that go on meanwhile
            store.advance(store.world.gather(store.status()))
        assert not manifest.exists()
        store.world.gather(None)
        go_on.set()

    monkeypatch.setattr(checkpoints, "_write", late)
    assert on_two_ranks(lambda world: save_on(world, tmp_path, between)) == [True, True]
    found = artifacts.open_artifact(manifest.parent, checkpoints.KIND).verify()
    assert found.paths("rank-") == ["rank-00000.safetensors", "rank-00001.safetensors"]
    saved = load_file(found.local("rank-00000.safetensors"))
    assert saved["model.w"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_every_rank_hears_of_a_rank_that_cannot_write(tmp_path, monkeypatch):
    write = checkpoints._write

    def full(tensors, name, *others):
        if name == "rank-00001.safetensors":
            raise OSError("no space left on device")
        write(tensors, name, *others)

    monkeypatch.setattr(checkpoints, "_write", full)
    first, second = on_two_ranks(lambda world: save_on(world, tmp_path, lambda store: None))
    assert isinstance(first, checkpoints.SaveFailed)
    assert "rank 1 could not write its part of" in str(first)
    assert "OSError: no space left on device" in str(first)
    assert isinstance(second, OSError)
    assert not artifacts.exists(tmp_path / "checkpoints" / "step-00000004")


def test_ranks_without_common_storage_are_told_so_before_there_is_a_manifest(tmp_path):
    def work(world):
        folder = tmp_path / f"machine-{world.rank}"
        (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
        return save_on(world, folder, lambda store: None)

    first, second = on_two_ranks(work)
    assert isinstance(first, artifacts.ArtifactMissing)
    assert "holds the files of 1 ranks of 2" in str(first)
    assert isinstance(second, checkpoints.SaveFailed)
    assert not artifacts.exists(tmp_path / "machine-0" / "checkpoints" / "step-00000004")


def test_what_is_kept_without_being_trained_is_exact_too(tmp_path):
    """An average of the weights, against the recursion over the weights of every step's checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    every = {"average": True, "checkpoint_every": 1, "keep": 12}
    toy.run(settings(whole, **every, background_saves=False), World())
    average = toy.Toy(0.0).heads[0].weight.detach()
    weights = average
    for step in range(1, 13):
        average = average.lerp(weights, 0.25)  # before the step
        saved = final_state(whole, step)
        assert torch.equal(saved["model.average"], average)
        weights = saved["model.heads.0.weight"]
    assert not any(name.startswith("optimizer.average") for name in saved)

    for step in (7, 5):  # of each start, so the 7th and, from the 4th on, the 9th of the run
        run_until_killed(cut, step=step, average=True)
    assert toy.run(settings(cut, average=True), World())["resumed"] == 8
    assert_same_run(cut, whole)
