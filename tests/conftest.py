"""Fixtures for all tests. Nothing here reaches the network: object storage is a moto server on the loopback."""

import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# Examples are the same on every run, so that a red test means a change; shared machines are no place for deadlines.
settings.register_profile("palate", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("palate")

# Before anything imports transformers: tests load what is installed, or nothing.
os.environ["HF_HUB_OFFLINE"] = "1"


# Tests of Ray's clusters. Commands of Ray look for a cluster on the machine, and refuse where they find two.
CLUSTERS = (
    "tests/distributed/",
    "tests/tune/",
    "tests/chaos/test_nodes",
    "tests/chaos/test_serve.py",
    "tests/acceptance/test_readme.py::test_the_commands_for_a_cluster",
    "tests/test_cluster.py",
    "tests/test_layout.py::test_platform_survives_on_a_ray_worker",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes (``--numprocesses``), one gets all tests of clusters; the others get whole files.

    Groups by mark (``xdist_group``) have no effect with pytest 9.2 and pytest-xdist 3.8.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "clusters" if nodeid.startswith(CLUSTERS) else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 server in this process, with the environment set so that s3:// URLs lead to it, in subprocesses too."""
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield endpoint
    server.stop()


@pytest.fixture
def s3_url(s3_endpoint: str, tmp_path, monkeypatch) -> str:
    """A new, empty bucket as a URL; fetched files go to a cache of this test's own."""
    from palate import artifacts

    monkeypatch.setenv("PALATE_CACHE", str(tmp_path / "palate-cache"))
    url = f"s3://test-{uuid.uuid4().hex[:12]}"
    filesystem, bucket = artifacts.locate(url)
    filesystem.mkdir(bucket)
    return url


@pytest.fixture(params=["local", "s3"])
def any_url(request, tmp_path) -> str:
    """A place for artifacts: a local folder, then object storage."""
    return str(tmp_path / "place") if request.param == "local" else request.getfixturevalue("s3_url")
