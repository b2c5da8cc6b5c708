"""One Ray cluster for all tests that need one: starting it takes seconds."""

import os
from collections.abc import Iterator

import pytest

# Before ray is imported anywhere.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_DEDUP_LOGS"] = "0"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local cluster of four logical CPUs, whatever else runs on the machine."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=150 * 2**20)
    yield
    ray.shutdown()
