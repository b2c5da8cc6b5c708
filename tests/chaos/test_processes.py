"""Faults injected into the three pipelines, each run whole in one process.

After each: what was committed is there and unchanged, whatever a reader finds is whole, and the run that went on ends
with the same bits as one that was not broken. Random moments and places are drawn from a seed, which is printed.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cut_uploads import Proxy
from faulted import Kept, Run, bytes_below, fill, small_disk, steps_beyond
from recoveries import record, wait_for
from strikes import POINTS, Strike
from toy_pipelines import LPO, PIPELINES, Pipeline, outcome

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
each_pipeline = pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda pipeline: pipeline.name)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Pipeline], Path]:
    """The folder of a pipeline's unbroken run, in one process."""
    made: dict[str, Path] = {}

    def run(pipeline: Pipeline) -> Path:
        if pipeline.name not in made:
            out = tmp_path_factory.mktemp("whole") / pipeline.name
            with Run(pipeline.job(inputs, out), out.with_suffix(".txt")) as process:
                assert process.wait() == 0, process.words()
            made[pipeline.name] = out
        return made[pipeline.name]

    return run


@each_pipeline
def test_killed_again_and_again(
    pipeline: Pipeline, inputs: Path, whole: Callable[[Pipeline], Path], tmp_path: Path, chance: random.Random
) -> None:
    """Alternately at a random moment and at a random fault point of a random artifact, checkpoints among them."""
    expected, out = whole(pipeline), tmp_path / "run"
    job, kept, kills = pipeline.job(inputs, out), Kept(out), 0

    def start_and_kill(*strikes: Strike) -> bool:
        """Whether it was killed, before its end."""
        goes_on = steps_beyond(pipeline, out)
        with Run(job, tmp_path / "words.txt", *strikes) as run:
            # A kill may come after the last manifest: then the next start has nothing to do, and ends.
            def stands_or_ended() -> bool:
                return any(one.reached() for one in strikes) or run.wait(0) == 0

            seconds = wait_for(lambda: goes_on() or stands_or_ended(), "progress", run.ended)
            if kills and goes_on():
                record("process killed", pipeline.name, seconds)
            if strikes:
                wait_for(stands_or_ended, "the strike", run.ended)
            else:
                run.wait(chance.uniform(0, 0.5))
            return run.kill_or_end()

    for start in range(7):
        strike = Strike(str(tmp_path / f"strike-{start}"), chance.randint(1, 3), point=chance.choice(POINTS))
        if not start_and_kill(*([strike] if start % 2 else [])):
            break
        kept.check()
        kills += 1
    print(f"{kills} kills")
    assert kills >= 4
    with Run(job, tmp_path / "words.txt") as run:
        assert run.wait() == 0, run.words()
    kept.check()
    assert outcome(pipeline, out) == outcome(pipeline, expected)


@each_pipeline
def test_the_disk_is_full(
    pipeline: Pipeline, inputs: Path, whole: Callable[[Pipeline], Path], tmp_path: Path, chance: random.Random
) -> None:
    """Twice, at random amounts of what the run takes in the end; then somebody makes room."""
    expected = whole(pipeline)
    needed = bytes_below(expected)
    with small_disk(tmp_path / "disk", 4 * needed + (8 << 20)) as disk:
        out, ballast = disk / "run", disk / "ballast"
        job, kept = pipeline.job(inputs, out), Kept(out)
        shares = sorted(chance.uniform(0.05, 0.9) for _ in range(2))
        for share in shares:
            ballast.unlink(missing_ok=True)
            fill(disk, ballast, leave=max(0, int(share * needed) - bytes_below(disk)))
            words = tmp_path / f"full-{share:.3f}.txt"
            with Run(job, words) as run:
                assert run.wait() == 1, f"at {share:.0%} of {needed} bytes: {run.words()}"
            assert "No space left on device" in words.read_text().splitlines()[-1], words.read_text()[-3000:]
            kept.check()
        ballast.unlink()
        goes_on = steps_beyond(pipeline, out)
        with Run(job, tmp_path / "words.txt") as run:
            record("disk full, room made, started again", pipeline.name, wait_for(goes_on, "progress", run.ended))
            assert run.wait() == 0, run.words()
        kept.check()
        assert outcome(pipeline, out) == outcome(pipeline, expected)


@each_pipeline
def test_uploads_are_cut(
    pipeline: Pipeline,
    inputs: Path,
    whole: Callable[[Pipeline], Path],
    s3_url: str,
    s3_endpoint: str,
    tmp_path: Path,
    chance: random.Random,
) -> None:
    """A connection that breaks in the middle of a body, a process killed there, and storage that does not answer."""
    out = f"{s3_url}/run"
    job, kept = pipeline.job(inputs, out), Kept(out)
    with Proxy(s3_endpoint) as proxy:
        environment = {"AWS_ENDPOINT_URL": proxy.endpoint, "PALATE_CACHE": str(tmp_path / "cache")}
        first = chance.randint(1, 3)
        proxy.break_upload(first, "cut")
        proxy.break_upload(first + chance.randint(3, 8), "hold")
        with Run(job, tmp_path / "words.txt", **environment) as run:
            wait_for(proxy.holding.is_set, "an upload that is held", run.ended)
            assert proxy.cut == 2  # the first did not stop it
            run.kill()
        kept.check()

        proxy.heal()
        proxy.break_upload(chance.randint(2, 5), "refuse")
        with Run(job, tmp_path / "away.txt", **environment) as run:
            assert run.wait() == 1, run.words()
        assert proxy.refused >= 1
        last = (tmp_path / "away.txt").read_text().splitlines()[-1]
        assert last.startswith(f"{pipeline.name}: object storage failed: "), (
            last
        )  # refused, or closed before it answered
        kept.check()

        proxy.heal()
        goes_on = steps_beyond(pipeline, out)
        with Run(job, tmp_path / "words.txt", **environment) as run:
            record("storage away, started again", pipeline.name, wait_for(goes_on, "progress", run.ended))
            assert run.wait() == 0, run.words()
    kept.check()
    assert outcome(pipeline, out) == outcome(pipeline, whole(pipeline))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_storage_never_answers(
    inputs: Path,
    whole: Callable[[Pipeline], Path],
    s3_url: str,
    s3_endpoint: str,
    tmp_path: Path,
    chance: random.Random,
) -> None:
    """It takes connections and requests, and is silent: after minutes the job says so, and goes on another time."""
    pipeline, out = LPO, f"{s3_url}/run"
    job, kept, words = pipeline.job(inputs, out), Kept(out), tmp_path / "silent.txt"
    with Proxy(s3_endpoint) as proxy:
        environment = {"AWS_ENDPOINT_URL": proxy.endpoint, "PALATE_CACHE": str(tmp_path / "cache")}
        proxy.break_upload(chance.randint(2, 5), "ignore")
        with Run(job, words, **environment) as run:
            wait_for(lambda: proxy.refused, "silence", run.ended)
            began = time.monotonic()
            assert run.wait(1500) == 1, run.words()
            record("storage that never answers, until the job says so", pipeline.name, time.monotonic() - began)
        last = words.read_text().splitlines()[-1]
        assert last.startswith(f"{pipeline.name}: object storage failed: "), last
        kept.check()

        proxy.heal()
        with Run(job, tmp_path / "words.txt", **environment) as run:
            assert run.wait() == 0, run.words()
    kept.check()
    assert outcome(pipeline, out) == outcome(pipeline, whole(pipeline))
