"""A head of Ray with a dashboard on this machine, and jobs submitted to it as a user would."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What belongs to the cluster, or the paths, of the process that runs the tests.
FOREIGN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "PYTHONPATH")

# Ray gives its own daemon 30 s to start, which a busy machine may exceed.
ATTEMPTS = 3


@dataclass(frozen=True)
class Head:
    """A running head: where it is, the environment of its clients, and the folder of its sessions and logs."""

    gcs: str
    dashboard: str
    environment: Mapping[str, str]
    folder: Path

    def submit(self, *entrypoint: str, flags: Sequence[str] = (), timeout: float = 600) -> subprocess.CompletedProcess:
        """``ray job submit FLAGS -- ENTRYPOINT`` from the repository's folder, as docs/clusters.md says."""
        command = [ray_command(), "job", "submit", "--runtime-env", "jobs/runtime_env.yaml", *flags, "--", *entrypoint]
        return self.run(command, timeout)

    def run(self, command: Sequence[str], timeout: float = 600) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False, timeout=timeout
        )


def ray_command() -> str:
    return str(Path(sys.executable).with_name("ray"))


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on; all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def ray_head(
    cpus: int, *, dashboard: bool = True, autoscaling: Mapping[str, Any] | None = None, **settings: str
) -> Iterator[Head]:
    """A head in token mode with a token of its own, on ports and in a folder of its own; ended with all it started.

    Args:
        cpus: logical CPUs that the head offers.
        autoscaling: a cluster's configuration whose provider is Ray's fake one, which makes nodes of this machine.
        settings: more variables of its environment.
    """
    gcs, http, client, agent = free_ports(4)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: sockets' paths must fit into 107 bytes
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **settings,
    }
    start = [ray_command(), "start", "--head", "--block", f"--temp-dir={folder}", f"--num-cpus={cpus}"]
    start += ["--node-ip-address=127.0.0.1", f"--port={gcs}", f"--ray-client-server-port={client}"]
    start += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={150 * 2**20}"]
    start += [f"--include-dashboard={dashboard}", "--dashboard-host=127.0.0.1", f"--dashboard-port={http}"]
    start += [f"--dashboard-agent-listen-port={agent}"]
    if autoscaling is not None:
        provider = {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{gcs}", "disable_launch_config_check": True}
        provider |= {
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
        }  # nodes share an address, and need no setup
        (folder / "autoscaling.json").write_text(json.dumps({**autoscaling, "provider": provider}))
        start += [f"--autoscaling-config={folder}/autoscaling.json"]
        environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    url = f"http://127.0.0.1:{http}"
    clients = {**environment, "RAY_ADDRESS": url if dashboard else f"127.0.0.1:{gcs}"}
    head = Head(f"127.0.0.1:{gcs}", url, clients, folder)
    try:
        for _ in range(ATTEMPTS):
            process = _start(start, environment, folder)
            if _answers(process, head, dashboard):
                break
            end_all(environment["RAY_AUTH_TOKEN"])
            process.wait(60)
        else:
            raise AssertionError(f"no head after {ATTEMPTS} attempts:\n{(folder / 'head.log').read_text()}")
        yield head
    finally:
        end_all(environment["RAY_AUTH_TOKEN"])
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _start(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> subprocess.Popen:
    with (folder / "head.log").open("wb") as output:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def _answers(process: subprocess.Popen, head: Head, dashboard: bool) -> bool:
    """Whether the head has started; waits until it has, or its process has ended."""
    log = head.folder / "head.log"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if "Ray runtime started" in log.read_text() and (not dashboard or status(head, "/api/version") == 200):
            return True
        time.sleep(0.2)
    return False


def status(head: Head, path: str, token: str | None = None, method: str = "GET") -> int:
    """The HTTP status of a page of the dashboard: with the head's own token, another, or none if it is empty."""
    token = head.environment["RAY_AUTH_TOKEN"] if token is None else token
    request = urllib.request.Request(head.dashboard + path, method=method)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def end_all(token: str) -> None:
    """Kill whatever was started with this token in its environment, as no other process was, and wait for its end."""
    deadline = time.monotonic() + 60
    while (found := _with_token(token)) and time.monotonic() < deadline:
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
    assert not found, f"processes {found} do not end"


def _with_token(token: str) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile
            if token.encode() in (place / "environ").read_bytes():
                found.append(int(place.name))
    return found
