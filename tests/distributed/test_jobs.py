"""Jobs as `ray job submit` runs them: on a real head with its dashboard, in token mode, sent from this checkout."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import toy_lists
from palate import artifacts
from palate.artifacts import Artifact
from palate.models.diffusion import load_diffusion
from palate.training import logging as run_logs
from toy_cluster import Head, ray_head, status
from toy_unihetero import build_parts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CARD = """
    --launcher ray --workers 2 --model tiny --clusters 2 --max-prompt-tokens 200 --max-answer-tokens 12 --rank 2
    --batch 8 --checkpoint-every 5 --epochs 60 --people-per-shard 3 --top-k 10 --cluster-texts 0 --other-texts 1
    --width 4 --head-epochs 2 --head-precision 60 --vector-deviation 1
"""
LPO = """
    --launcher ray --resolution 16 --latent-dtype float32 --kl-beta 50 --steps 3 --batch 4 --checkpoint-every 2
    --sampler-steps 2 --grid 2 --personal examples
"""
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


def test_who_has_no_token_or_another_is_refused(head: Head) -> None:
    for path in ("/api/version", "/api/jobs/"):
        assert [status(head, path, token) for token in (None, "", "f" * 64)] == [200, 401, 403]


def test_the_checkout_reaches_the_workers(head: Head) -> None:
    said = succeed(head, "python", "-c", WHERE)
    (found,) = (line for line in said.splitlines() if line.startswith("found: "))
    _, package, system, worker, driver = found.split()
    assert package == "platform/palate/__init__.py"  # below the folder that was sent
    assert system
    assert worker == driver


def test_a_job_that_fails_is_a_command_that_fails(head: Head, tmp_path: Path) -> None:
    command = ["python", "jobs/card.py", "--corpus", f"{tmp_path}/none", "--out", f"{tmp_path}/run"]
    done = head.submit(*command)
    assert done.returncode == 1
    assert f"card: no finished artifact at {tmp_path}/none" in done.stdout


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

    out = run / "evaluation"
    flags = [
        "--users",
        "all",
        "--max-users",
        "4",
        "--systems",
        "base",
        "card",
        "--max-new-tokens",
        "4",
        "--resamples",
        "200",
    ]
    evaluate = ["python", "jobs/evaluate.py", "text", "--run", str(run), "--corpus", corpus.url, "--out", str(out)]
    assert f"report: {out}/report/report.md" in succeed(head, *evaluate, *flags)
    assert json.loads((out / "report" / "report.json").read_text())["metrics"]


def test_lists_are_encoded_by_actors_tuned_and_get_newcomers(head: Head, tmp_path: Path) -> None:
    rows = [toy_lists.row(number, 3, split="train", user_id="ann") for number in range(6)]
    rows += [toy_lists.row(6 + n, 3, split="examples", user_id=user) for n, user in enumerate(("ann", "bob"))]
    lists = toy_lists.write(tmp_path / "lists", rows)
    later = toy_lists.write(tmp_path / "later", [toy_lists.row(9, 3, split="train", user_id="eve")])
    load_diffusion("shapes").pipeline.save_pretrained(tmp_path / "base")
    given = ["--lists", lists.url, "--model", f"{tmp_path}/base", "--out", f"{tmp_path}/run"]
    succeed(head, "python", "jobs/lpo.py", *given, *LPO.split())
    given = ["--run", f"{tmp_path}/run", "--lists", later.url, "--out", f"{tmp_path}/with"]
    assert "3 people, 1 of them new" in succeed(head, "python", "jobs/newcomers.py", *given)


def test_a_unified_model_is_pretrained(head: Head, tmp_path: Path) -> None:
    parts = build_parts(tmp_path / "parts")
    given = ["--corpus", f"{parts}/index", "--language", f"{parts}/language", "--vision", f"{parts}/vision"]
    given += ["--arm", "embedding", "--cache", f"{tmp_path}/cache", "--out", f"{tmp_path}/run", "--launcher", "ray"]
    given += ["--steps", "4", "--batch", "6", "--checkpoint-every", "2"]
    said = succeed(head, "python", "jobs/unihetero.py", "train", *given)
    assert f"model: {tmp_path}/run/model" in said
    assert artifacts.exists(tmp_path / "run" / "model")
