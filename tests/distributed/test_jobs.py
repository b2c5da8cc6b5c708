"""Jobs as `ray job submit` runs them: on a real head with its dashboard, in token mode, sent from this checkout."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import toy_lists
from palate import artifacts
from palate.artifacts import Artifact
from palate.corpora.worlds import scenes
from palate.models.diffusion import load_diffusion
from palate.training import logging as run_logs
from palate.unihetero.parts import PartsConfig, make_parts
from toy_cluster import Head, ray_head, status
from toy_unihetero import build_parts

pytestmark = pytest.mark.timeout(1200)

CARD = """
    --launcher ray --workers 2 --model tiny --clusters 2 --max-prompt-tokens 200 --max-answer-tokens 12 --rank 2
    --batch 8 --checkpoint-every 5 --epochs 60 --people-per-shard 3 --top-k 10 --cluster-texts 0 --other-texts 1
    --width 4 --head-epochs 2 --head-precision 60 --vector-deviation 1
"""
LPO = """
    --launcher ray --resolution 16 --latent-dtype float32 --kl-beta 50 --steps 3 --batch 4 --checkpoint-every 2
    --sampler-steps 2 --grid 2 --personal examples
"""
IMAGES = "--split examples --people --images 1 --sampler-steps 2 --drift-images 0 --resamples 200"
EXPERIMENT = """
    --samples 24 --stops 8 16 --width 32 --layers 2 --branch-from 1 --batch 8 --warmup 2 --calibration-samples 16
    --arms understanding --controls capacity --seeds 1 --control-seeds 1 --baseline-extra 0 --workers 1
"""
DEMO = "--model tiny --people 8 --items 6 --asked 1 --no-images --no-scenes"  # with the server
# Prints where a task of a submitted script finds the library and the standard library's `platform`.
WHERE = """
import ray
ray.init(log_to_driver=False)

@ray.remote
def where():
    import os, platform, palate
    return os.path.relpath(palate.__file__), platform.system(), os.getcwd()

import os
print("found:", *ray.get(where.remote()), os.getcwd())
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(2) as started:
        yield started


def succeed(head: Head, *entrypoint: str, **options: object) -> str:
    """Submit, wait, and return what the job printed."""
    done = head.submit(*entrypoint, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def succeed_all(head: Head, *commands: str) -> list[str]:
    """``succeed`` with commands that do not need each other, two at a time: most of a job's time is its start."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda command: succeed(head, *command.split()), commands))


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition: Callable[[], bool], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def corpus(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A corpus that a submitted job prepared, a Ray Data task a file; the second job finds it finished."""
    folder = tmp_path_factory.mktemp("texts")
    for half in range(2):
        rows = [
            {"user_id": f"user-{half}-{user}", "input": f"thing {item}", "output": f"{'well ' * user} it is {item}"}
            for user in range(4)
            for item in range(6)
        ]
        (folder / f"{half}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        "python",
        "jobs/prepare.py",
        "jsonl",
        "--launcher",
        "ray",
        "--input",
        f"{folder}/0.jsonl",
        f"{folder}/1.jsonl",
    ]
    command += ["--questions-per-user", "1", "--out", f"{folder}/corpus"]
    assert "users: 8" in succeed(head, *command)
    return artifacts.open_artifact(folder / "corpus")


@pytest.mark.slow
def test_who_has_no_token_or_another_is_refused(head: Head) -> None:
    for path in ("/api/version", "/api/jobs/"):
        assert [status(head, path, token) for token in (None, "", "f" * 64)] == [200, 401, 403]


@pytest.mark.slow
def test_the_checkout_reaches_the_workers(head: Head) -> None:
    said = succeed(head, "python", "-c", WHERE)
    (found,) = (line for line in said.splitlines() if line.startswith("found: "))
    _, package, system, worker, driver = found.split()
    assert package == "platform/palate/__init__.py"  # below the folder that was sent
    assert system
    assert worker == driver


@pytest.mark.slow
def test_a_job_that_fails_is_a_command_that_fails(head: Head, tmp_path: Path) -> None:
    command = ["python", "jobs/card.py", "--corpus", f"{tmp_path}/none", "--out", f"{tmp_path}/run"]
    done = head.submit(*command)
    assert done.returncode == 1
    assert f"card: no finished artifact at {tmp_path}/none" in done.stdout


@pytest.mark.slow
def test_a_stopped_job_leaves_nothing_half_and_the_next_goes_on(
    head: Head, corpus: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("card")
    command = ["python", "jobs/card.py", "--corpus", corpus.url, "--out", str(run), *CARD.split()]
    log = run / "training" / "adapters" / "training.jsonl"
    succeed(head, *command, flags=("--no-wait", "--submission-id", "stopped"))
    wait_for(lambda: lines(log) >= 12)
    assert status(head, "/api/jobs/stopped/stop", method="POST") == 200  # `ray job stop` takes seconds to start
    wait_for(lambda: "was stopped" in head.run(["ray", "job", "status", "stopped"]).stdout)
    assert not artifacts.exists(run / "adapters")
    finished = {name: artifacts.open_artifact(run / name).created for name in ("style", "clusters")}

    said = succeed(head, *command)
    assert artifacts.exists(run / "adapters")
    assert artifacts.exists(run / "head")
    assert {name: artifacts.open_artifact(run / name).created for name in finished} == finished
    assert "clusters of" not in said  # printed by the stage that was finished
    steps = [row["step"] for row in run_logs.read(log.parent)]
    assert steps == list(range(1, len(steps) + 1))

    sweep = f"decoding --run {run} --corpus {corpus.url} --try-betas 0 1 --concurrent 1 --out {run}/betas"
    assert "<- chosen" in succeed(head, "python", "tune/betas.py", *sweep.split())
    assert [point["values"]["beta"] for point in report(run / "betas" / "report")["points"]] == [0, 1]


@pytest.mark.slow
def test_lists_are_encoded_by_actors_tuned_and_get_newcomers(head: Head, tmp_path: Path) -> None:
    rows = [toy_lists.row(number, 3, split="train", user_id="ann") for number in range(6)]
    rows += [toy_lists.row(6 + n, 3, split="examples", user_id=user) for n, user in enumerate(("ann", "bob"))]
    lists = toy_lists.write(tmp_path / "lists", rows)
    later = toy_lists.write(tmp_path / "later", [toy_lists.row(9, 3, split="train", user_id="eve")])
    load_diffusion("shapes").pipeline.save_pretrained(tmp_path / "base")
    given = ["--lists", lists.url, "--model", f"{tmp_path}/base", "--out", f"{tmp_path}/run"]
    succeed(head, "python", "jobs/lpo.py", *given, *LPO.split())
    made = f"--run {tmp_path}/run"
    added, compared = succeed_all(
        head,
        f"python jobs/newcomers.py {made} --lists {later.url} --out {tmp_path}/with",
        f"python jobs/evaluate.py images {made} --corpus {lists.url} {IMAGES} --out {tmp_path}/evaluation",
    )
    assert "3 people, 1 of them new" in added
    assert f"report: {tmp_path}/evaluation/report/report.md" in compared
    assert "colourfulness win rate/run" in report(tmp_path / "evaluation" / "report")["metrics"]


@pytest.mark.slow
def test_a_unified_model_is_pretrained_and_asked(head: Head, tmp_path: Path) -> None:
    parts = build_parts(tmp_path / "parts")
    given = f"--corpus {parts}/index --language {parts}/language --vision {parts}/vision --cache {tmp_path}/cache"
    flags = "--arm embedding --launcher ray --steps 4 --batch 6 --checkpoint-every 2"
    trained = succeed(head, *f"python jobs/unihetero.py train {given} {flags} --out {tmp_path}/run".split())
    assert f"model: {tmp_path}/run/model" in trained
    assert artifacts.exists(tmp_path / "run" / "model")
    questions = f"--questions {parts}/scenes/questions.tsv --resamples 200"
    vision = f"vision --run {tmp_path}/run {questions} --out {tmp_path}/evaluation"
    asked = succeed(head, "python", "jobs/evaluate.py", *vision.split())
    assert f"report: {tmp_path}/evaluation/report.md" in asked
    assert report(tmp_path / "evaluation")["metrics"]["questions/run"]["n"] == 6  # images


@pytest.mark.long
def test_an_experiment_is_a_job_too(head: Head, tmp_path: Path) -> None:
    small = scenes.prepare(scenes.ScenesConfig(out=f"{tmp_path}/small", encoder=32, train=32, validation=4, test=8))
    frozen = PartsConfig(small.url, f"{tmp_path}/made", encoder_steps=20, autoencoder_steps=20, width=16, layers=1)
    given = f"--corpus {small.url} --parts {make_parts(frozen).url} {EXPERIMENT} --out {tmp_path}/experiment"
    assert "claim 1: undecided" in succeed(head, *f"python jobs/unihetero.py sweep {given}".split())
    again, planned = succeed_all(
        head,
        f"python jobs/unihetero.py report --experiment {tmp_path}/experiment --out {tmp_path}/again",
        "python jobs/unihetero.py plan --samples 1000",
    )
    assert "claim 1: undecided" in again
    assert report(tmp_path / "again") == report(tmp_path / "experiment" / "report")
    assert "| Samples | 1,000, " in planned


@pytest.mark.long  # each is made of jobs that are submitted above
def test_demo_claims_and_a_sweep_that_trains_are_jobs_too(head: Head, corpus: Artifact, tmp_path: Path) -> None:
    card = f"--corpus {corpus.url} {CARD} --workers 1 --epochs 1"
    swept, tested, shown = succeed_all(
        head,
        f"python tune/clusters.py {card} --try-clusters 2 --out {tmp_path}/sweep",
        f"python jobs/reproduce.py --size smoke --papers card --out {tmp_path}/claims",
        f"python jobs/demo.py {DEMO} --out {tmp_path}/demo",
    )
    assert "<- chosen" in swept
    points = report(tmp_path / "sweep" / "report")["points"]
    assert [point["values"]["clusters"] for point in points] == [2]
    assert f"report: {tmp_path}/claims/report.md" in tested
    assert [claim["paper"] for claim in report(tmp_path / "claims")["claims"]] == ["CARD"] * 5
    assert "answered persona-" in shown  # by the server
    assert f"report: {tmp_path}/demo/evaluation/report/report.md" in shown
    # What the cluster serves is not replaced by the demo, nor ended with it.
    assert "Started a local Ray instance" in (tmp_path / "demo" / "serve.log").read_text()
