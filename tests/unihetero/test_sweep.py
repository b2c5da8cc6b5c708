"""The experiment in small: runs of arms on the same data, resumed, compared, refused."""

import contextlib
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from palate import artifacts
from palate.artifacts import ArtifactMismatch
from palate.corpora.worlds import scenes
from palate.evaluation import claims
from palate.unihetero import sweep as sweeping
from palate.unihetero.parts import PartsConfig, make_parts
from palate.unihetero.runs import RunConfig
from palate.unihetero.sweep import SweepConfig, check_same_data, read_runs, tasks

ARMS = ("understanding", "embedding", "encoder", "decoder")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("experiment")
    corpus = scenes.prepare(
        scenes.ScenesConfig(out=f"{root}/scenes", encoder=64, train=96, validation=4, test=24, per_shard=64)
    )
    parts = make_parts(
        PartsConfig(
            corpus=corpus.url, out=f"{root}/parts", encoder_steps=25, autoencoder_steps=25, patch=8, width=16, layers=1
        )
    )
    assert set(parts.read_json("report.json")) == {"features", "random", "vae"}
    runs = RunConfig(
        samples=48, stops=(16, 32, 48), width=32, layers=3, batch=8, warmup=2, branch_from=1, monitor_every=2
    )
    return SweepConfig(
        corpus=corpus.url,
        parts=parts.url,
        out=f"{root}/out",
        runs=runs,
        arms=ARMS,
        controls=("capacity", "random:embedding"),
        seeds=2,
        control_seeds=1,
        baseline_extra=0.5,
        calibration_samples=48,
        workers=1,
    )


@pytest.fixture(scope="module")
def finished(settings):
    sweeping.sweep(settings)
    return read_runs(settings.out)


def test_what_is_run(settings):
    found = [(task.arm, task.seed, task.samples) for task in tasks(settings)]
    assert found[0] == ("understanding", 0, 72)  # goes on, to be compared at equal FLOPs
    assert found[1] == ("embedding", 0, 48)
    assert len(found) == 2 * 4 + 2
    assert {arm for arm, seed, _ in found if seed == 1} == set(ARMS)
    later = [(task.arm, task.seed, task.samples) for task in tasks(replace(settings, first_seed=5))]
    assert later == [(arm, seed + 5, samples) for arm, seed, samples in found]


def test_settings_that_cannot_be_compared_are_refused(settings):
    twice = replace(settings, controls=("capacity", "understanding"))
    assert len({(task.arm, task.seed) for task in tasks(twice)}) == len(tasks(twice))
    with pytest.raises(ValueError, match=r"whole batches of 8, found \[50, 20\]"):
        replace(settings.runs, samples=50, stops=(16, 20, 48))
    with pytest.raises(ValueError, match="two sizes below 48 samples"):
        replace(settings.runs, stops=(16, 48))


def test_arms_see_the_same_data_and_are_measured_at_every_stop(finished):
    by_arm = {(one["arm"], one["seed"]): one for one in finished}
    assert len(by_arm) == 10
    for (arm, _), one in by_arm.items():
        stops = [16, 32, 48, 72] if arm == "understanding" else [16, 32, 48]
        assert [point["samples"] for point in one["points"]] == stops
        assert set(one["points"][0]["accuracy"]) == {"all", *scenes.KINDS}
        assert one["fingerprints"]["48"] == by_arm["understanding", one["seed"]]["fingerprints"]["48"]
    assert by_arm["understanding", 0]["fingerprints"]["48"] != by_arm["understanding", 1]["fingerprints"]["48"]
    assert by_arm["embedding", 0]["points"][-1]["final"]["free_run"]["k"] == [1, 4, 16]
    assert by_arm["decoder", 0]["flops_per_sample"] > by_arm["understanding", 0]["flops_per_sample"]


def test_weights_give_the_gradients_the_ratio_that_was_asked_for(settings, finished):
    objectives = json.loads((Path(settings.out) / "experiment.json").read_text())["objectives"]
    assert set(objectives) == {"embedding", "encoder", "decoder"}
    assert all(one["semantic_weight"] > 0 for one in objectives.values())


def test_free_running_is_measured_in_one_space(finished):
    for one in finished:
        if one["arm"] in ("embedding", "encoder"):
            free = one["points"][-1]["final"]["free_run"]
            assert len(free["explained"]) == len(free["caption_loss"]) == 3
            assert free["explained_of_true"] > max(free["explained"])
            assert free["explained_of_true"] > 0.8


def test_a_longer_run_goes_on_from_a_shorter_one(settings, finished, tmp_path):
    """The baseline of 72 samples is, after 48, the one of 48: it may stand for one that was continued."""
    shorter = replace(
        settings, out=f"{tmp_path}/short", arms=("understanding",), controls=(), baseline_extra=0.0, seeds=1
    )
    sweeping.sweep(shorter)
    (one,) = read_runs(shorter.out)
    long = next(run for run in finished if run["arm"] == "understanding" and run["seed"] == 0)
    for short_point, long_point in zip(one["points"], long["points"], strict=False):
        assert {**short_point, "of": ""} == {**long_point, "of": ""}  # all but the name of the run's settings


def test_an_experiment_may_lie_in_object_storage(settings, s3_url, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    there = replace(
        settings, out=f"{s3_url}/experiment", arms=("understanding",), controls=(), baseline_extra=0.0, seeds=1
    )
    (made,) = sweeping.sweep(there)
    claims.write(claims.analyse(read_runs(there.out)), f"{there.out}/report")
    filesystem, root = artifacts.locate(there.out)
    assert json.loads(filesystem.cat_file(f"{root}/experiment.json"))["settings"]["runs"]["samples"] == 48
    assert json.loads(filesystem.cat_file(f"{root}/report/report.json"))["verdicts"]
    assert filesystem.size(f"{root}/report/curves.png") > 10_000
    monkeypatch.setattr("palate.unihetero.runs.pretrain", None)  # would fail if it were called
    assert sweeping.sweep(there) == [made]
    with pytest.raises(ArtifactMismatch, match="other settings \\(runs\\)"):
        sweeping.sweep(replace(there, runs=replace(there.runs, learning_rate=5e-3)))
    assert [path.name for path in tmp_path.iterdir()] == ["palate-cache"]  # no folder that is called s3:


def test_what_is_finished_is_not_run_again(settings, finished, monkeypatch):
    monkeypatch.setattr("palate.unihetero.runs.pretrain", None)  # would fail if it were called
    assert len(sweeping.sweep(settings)) == len(finished)


def test_other_settings_are_refused(settings, finished):
    with pytest.raises(ArtifactMismatch, match="other settings \\(runs\\)"):
        sweeping.sweep(replace(settings, runs=replace(settings.runs, learning_rate=5e-3)))
    with pytest.raises(ValueError, match="there is no arm 'emdedding'"):
        replace(settings, arms=("understanding", "emdedding"))
    with pytest.raises(ValueError, match="--arms must hold understanding"):
        replace(settings, arms=("embedding",))


def test_runs_of_other_data_are_not_compared(finished):
    other = json.loads(json.dumps(finished[1]))
    other["arm"], other["fingerprints"]["16"] = "intruder", "0" * 16
    with pytest.raises(ArtifactMismatch, match="did not see the same data in their first 16 samples"):
        check_same_data([*finished, other])


def test_the_report(finished, tmp_path):
    found = claims.analyse(finished)
    claims.write(found, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    text = (tmp_path / "report.md").read_text()
    assert [one["claim"] for one in report["verdicts"]] == [1, 2, 3]
    assert report["verdicts"][0]["outcome"] == "undecided"  # there is no pixel arm, no shuffled control
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    embedding = {one["seed"]: one for one in finished if one["arm"] == "embedding"}
    base = {one["seed"]: one for one in finished if one["arm"] == "understanding"}
    gains = [
        embedding[seed]["points"][2]["accuracy"]["all"] - base[seed]["points"][2]["accuracy"]["all"] for seed in (0, 1)
    ]
    assert report["differences"]["embedding"]["all"]["value"] == pytest.approx(sum(gains) / 2)
    assert "| embedding | 2 |" in text
    assert set(report["equal_flops"]) >= {"embedding", "encoder"}
    with pytest.raises(ValueError, match="no run of understanding"):
        claims.analyse([one for one in finished if one["arm"] != "understanding"])


def test_an_unfinished_run_is_not_read(settings, finished):
    folder = Path(settings.out) / "runs" / "half-0"
    folder.mkdir()
    assert len(read_runs(settings.out)) == len(finished)
    assert not artifacts.exists(f"{folder}/done")


@pytest.mark.slow
def test_a_killed_sweep_takes_its_processes_with_it_and_goes_on(settings, tmp_path):
    less = replace(settings, arms=("understanding", "embedding"), controls=(), seeds=1, workers=2)
    whole, again = replace(less, out=str(tmp_path / "whole")), replace(less, out=str(tmp_path / "out"))
    done = Path(again.out) / "runs"
    driver = multiprocessing.get_context("spawn").Process(target=sweeping.sweep, args=(again,))
    driver.start()
    while driver.is_alive() and not list(done.glob("*/points/*.json")):
        time.sleep(0.01)
    of_it = children(driver.pid)
    os.kill(driver.pid, signal.SIGKILL)
    driver.join()
    assert len(of_it) >= 2
    deadline = time.monotonic() + 30
    while any(map(goes_on, of_it)):
        assert time.monotonic() < deadline, "a process of a killed sweep goes on"
        time.sleep(0.1)
    sweeping.sweep(again)
    sweeping.sweep(whole)
    for one, other in zip(read_runs(again.out), read_runs(whole.out), strict=True):
        for name in ("arm", "fingerprints", "points", "objective"):
            assert one[name] == other[name], (one["arm"], name)


def goes_on(pid):
    """A process that has ended may be listed for good: in a container, nobody may wait for orphans."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def children(pid):
    """Processes that this one started, but for those that only look after resources."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            parent = next(line for line in status.read_text().splitlines() if line.startswith("PPid:"))
            command = (status.parent / "cmdline").read_bytes()
            if int(parent.split()[1]) == pid and b"resource_tracker" not in command:
                found.append(int(status.parent.name))
    return found
