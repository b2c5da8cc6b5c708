"""A training on nodes of Ray whose folder is on object storage: a node goes, then the storage."""

import random
from pathlib import Path

import pytest

from cut_uploads import Proxy
from faulted import Driver, Kept, lose_node_of, steps_beyond, train_on_two_ranks
from recoveries import record, wait_for
from toy_nodes import ray_nodes
from toy_pipelines import TWO_RANKS, UNIHETERO, last_step, outcome


@pytest.mark.chaos
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_storage_is_away_under_ray(
    inputs: Path, s3_url: str, s3_endpoint: str, tmp_path: Path, chance: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on object storage: a node goes, then the storage; the next run begins at the last checkpoint there."""
    pipeline, expected, out = UNIHETERO, tmp_path / "whole", f"{s3_url}/run"
    train_on_two_ranks(pipeline.job(inputs, expected, "--launcher", "torchrun"), tmp_path)
    job, kept, words = pipeline.job(inputs, out, *TWO_RANKS), Kept(out), tmp_path / "away.txt"
    log = f"{out}/{pipeline.log}"
    with Proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with ray_nodes() as nodes:  # whose processes know the proxy
            monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)  # for what this process reads
            with Driver(nodes, job, words) as driver:
                wait_for(lambda: last_step(log) >= 5, "a checkpoint", driver.ended)
                goes_on = steps_beyond(pipeline, out)
                lose_node_of(chance.choice(nodes.workers("ray::RayTrainWorker")), nodes)
                seconds = wait_for(goes_on, "progress", driver.ended)
                record("node lost, on object storage", pipeline.name, seconds)
                proxy.break_upload(chance.randint(1, 3), "refuse")
                assert driver.process.wait(900) == 1, driver.words()
            assert proxy.refused >= 1
            assert driver.last_line().startswith(f"{pipeline.name}: object storage failed: "), driver.words()
            kept.check()
            proxy.heal()
            goes_on = steps_beyond(pipeline, out)
            with Driver(nodes, job, tmp_path / "run.txt") as driver:
                seconds = wait_for(goes_on, "progress", driver.ended)
                record("storage away under Ray, started again", pipeline.name, seconds)
                assert driver.process.wait(300) == 0, driver.words()
    kept.check()
    assert outcome(pipeline, out) == outcome(pipeline, expected)
