"""One Ray cluster for all tests that need one: starting it takes seconds."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before ray is imported anywhere.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_DEDUP_LOGS"] = "0"
# A loaded machine takes longer than the 60 s that Ray Train gives its workers to start.
os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "300"
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"  # and than the 5 s of Serve's proxy
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # how soon Ray Train sees that a worker ended
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "palate.serving.proxy:middlewares"  # docs/serving.md
# Ray's workers and other subprocesses find the tests' own modules as pytest does.
TESTS = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent / "platform"), str(TESTS.parent)])


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local cluster of four logical CPUs, whatever else runs on the machine."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=150 * 2**20)
    yield
    ray.shutdown()
