"""A program that a test runs: a cluster of Ray on this machine, whose nodes come and go as the test says.

The head offers no CPU, so that work is on nodes that can be lost; each node offers one. Says ``nodes: ADDRESS`` when it
is ready. Reads lines: ``end PID`` ends, at once, the node that process PID works for, ``add`` adds one; each is
answered by ``nodes: COUNT`` with the number of nodes, less the head.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from toy_cluster import ATTEMPTS, end_all

TESTS = Path(__file__).resolve().parent


class Nodes:
    """The program, as a test sees it."""

    def __init__(self, process: subprocess.Popen, environment: dict[str, str]) -> None:
        self._process = process
        self.address = self._answer()
        # Of the programs that join this cluster.
        self.environment = {**environment, "RAY_ADDRESS": self.address}

    def end(self, pid: int) -> int:
        return int(self._ask(f"end {pid}"))

    def add(self) -> int:
        return int(self._ask("add"))

    def workers(self, title: str) -> list[int]:
        """The processes of the cluster whose title begins so."""
        return [pid for pid in descendants(self._process.pid) if command_line(pid).startswith(title)]

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("nodes: "):
                return line.split()[1]
        raise AssertionError("the cluster ended; its words are above")


@contextmanager
def ray_nodes() -> Iterator[Nodes]:
    """A head and two nodes, in a folder of their own, where nobody else's ``ray.init()`` looks for a cluster."""
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        environment = {
            **os.environ,
            "RAY_TMPDIR": temporary,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_worker_niceness": "0",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "platform")]),
        }
        environment.pop("RAY_ADDRESS", None)
        process, nodes = _start(environment, temporary)
        try:
            yield nodes
        finally:
            # Agents of nodes write their title over the environment that the others are known by.
            agents = [pid for pid in descendants(process.pid) if command_line(pid).startswith("ray::")]
            end_all(temporary)  # only what was started here has that folder in its environment
            process.wait(60)
            for pid in agents:
                if command_line(pid).startswith("ray::"):
                    os.kill(pid, signal.SIGKILL)


def _start(environment: dict[str, str], folder: str) -> tuple[subprocess.Popen, Nodes]:
    """The program, once its nodes are there, at the last of some attempts."""
    for attempt in range(ATTEMPTS):
        process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            return process, Nodes(process, environment)
        except AssertionError:
            end_all(folder)
            process.wait(60)
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    parents: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(place.name))
    found = [*parents.get(pid, [])]
    for child in found:
        found += parents.get(child, [])
    return sorted(found)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
    nodes = []

    def add() -> None:
        nodes.append(cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20))

    def end(pid: int) -> None:
        for node in nodes:
            raylets = [one.process.pid for one in node.all_processes["raylet"]]
            if any(pid in descendants(raylet) for raylet in raylets):
                nodes.remove(node)
                cluster.remove_node(node, allow_graceful=False)
                while alive() > len(nodes):  # until the head knows
                    time.sleep(0.1)
                return
        raise ValueError(f"process {pid} is on none of {len(nodes)} nodes")

    def alive() -> int:
        return sum(node["Alive"] for node in ray.nodes()) - 1

    add()
    add()
    print("nodes:", cluster.address, flush=True)
    for line in sys.stdin:
        name, *arguments = line.split()
        if name == "add":
            add()
        else:
            end(int(arguments[0]))
        print("nodes:", alive(), flush=True)


if __name__ == "__main__":
    main()
