"""What clients see while replicas are killed and changed: a steady mixed load on Ray Serve, with faults in it.

    python benchmarks/serve_faults.py --minutes 10 --out benchmarks/out/serve-faults.json

Starts a Ray of its own with a token of its own, two replicas of serve/text.py over a tiny run, and Locust's users
(serve_faults_users.py) in a process of theirs: answers streamed and whole, for people and for nobody, histories,
feedback, looks at people and models, and OpenAI's client as it comes. With --server images it is serve/images.py over a
tiny diffusion model, and images, streamed and whole, rankings and OpenAI's client (serve_faults_image_users.py). Then
faults, one after another, each when service has been whole for a while:

    kill      SIGKILL to a replica
    settings  another setting in the config, put as `serve deploy` does: all replicas are replaced, one by one
    run       another run goes live, by serve/admin.py
    proxy     SIGKILL to Serve's proxy, through which all connections go: not among the faults unless asked for

A request may fail only if it was under way when a replica was killed, and then with an error that says to try again;
without a proxy there is nobody to say so, and connections break off or are refused.
What was answered to a write must be in the database at the end.
"""

import itertools
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import httpx

from palate import config as configs
from palate.card import stages
from palate.card.adaptation import AdaptConfig
from palate.card.contrast import ContrastConfig
from palate.card.heads import PreferConfig
from palate.card.stages import CardConfig, ClusterConfig, PromptConfig
from palate.config import scale
from palate.corpora.worlds import personas
from palate.serving.answers import sample_answers
from palate.training.parallel import World
from palate.users.keys import create_key
from palate.users.store import open_store

ROOT = Path(__file__).resolve().parents[1]
RUNS = ("first", "second")
RANKED = "ranked"
PERSON = {"texts": [{"input": f"Describe thing {n}.", "output": f"Well!!! thing {n} is grand."} for n in range(6)]}
ANSWERS = ("chat", "stream", "image", "image stream")  # of a server alike in length, so that one quantile is of both
START_SECONDS = 300.0
RECOVERY_SECONDS = 300.0
# docs/serving.md: the proxy's own answers for a replica that has died, and another proxy soon; without them, as Ray is.
PROXY = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "palate.serving.proxy:middlewares",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}


@dataclass(frozen=True)
class FaultsBenchmark:
    """How much load, and for how long."""

    out: str = scale("benchmarks/out/serve-faults.json")
    """Where the figures go."""
    minutes: float = 2.0
    """Of load; longer only if not all of --faults have had a turn."""
    server: Literal["text", "images"] = "text"
    """What is served; images have no run to promote, so their --faults must not name it."""
    faults: tuple[Literal["kill", "settings", "run", "proxy"], ...] = ("kill", "kill", "settings", "run")
    """In turns, while there is time for another."""
    users: int = 10
    """Of Locust: one writes, two use OpenAI's client, the others read."""
    pace: float = 0.5
    """Seconds from one request of a user to the next, if it is answered sooner."""
    replicas: int = 2
    """Of the server."""
    calm: float = 8.0
    """Seconds of whole service before each fault."""
    seed: int = 0
    """Which replica is killed."""
    plain: bool = False
    """Leave Serve's proxy as Ray has it, without palate.serving.proxy and with Ray's health checks."""

    def __post_init__(self) -> None:
        if self.server == "images" and "run" in self.faults:
            raise ValueError("--server images promotes no runs: choose --faults among kill, settings and proxy")


@dataclass(frozen=True)
class Fault:
    """What was done, when, and how long service took to be whole again: in seconds since the epoch, and from there."""

    kind: str
    at: float
    whole_after: float


@dataclass(frozen=True)
class Request:
    """A line of the users' log."""

    kind: str
    began: float
    ended: float
    outcome: str
    found: str
    person: str = ""
    text: str = ""

    def under_way(self, moments: Sequence[float]) -> bool:
        return any(self.began <= moment <= self.ended for moment in moments)

    def meets(self, fault: Fault) -> bool:
        """Whether it was under way at any time from the fault until service was whole."""
        return self.began <= fault.at + fault.whole_after and self.ended >= fault.at


class Cluster:
    """Ray Serve through its dashboard's API, as `serve deploy` and `serve status` use it."""

    def __init__(self, dashboard: str, token: str, port: int, server: str, args: dict[str, Any]) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(base_url=dashboard, headers=headers, timeout=60, trust_env=False)
        self._port, self._server, self._args = port, server, args
        self.url = f"http://127.0.0.1:{port}"

    def deploy(self, **changes: Any) -> None:
        """Put the config, with these settings changed."""
        self._args |= changes
        application = {"name": "faults", "route_prefix": "/", "args": self._args}
        application["import_path"] = f"serve.{self._server}:app"
        http = {"host": "127.0.0.1", "port": self._port}
        config = {"proxy_location": "HeadOnly", "http_options": http, "applications": [application]}
        self._http.put("/api/serve/applications/", json=config).raise_for_status()

    def replicas(self) -> set[int]:
        """Process ids of the replicas that Serve says are running."""
        found = self._http.get("/api/serve/applications/").raise_for_status().json()["applications"].get("faults", {})
        if found.get("status") == "DEPLOY_FAILED":
            raise RuntimeError(f"Serve cannot deploy the application: {found['message']}")
        deployment = found.get("deployments", {}).get(self._server, {})
        return {one["pid"] for one in deployment.get("replicas", []) if one["state"] == "RUNNING"}

    def proxy(self) -> int | None:
        """Process id of the proxy, if there is one."""
        from ray.util.state import list_actors

        living = [("class_name", "=", "ProxyActor"), ("state", "=", "ALIVE")]
        found = list_actors(str(self._http.base_url).rstrip("/"), filters=living, detail=True)
        return found[0].pid if found else None

    def wait_for_proxy(self, gone: int | None) -> None:
        """Until another one than ``gone`` answers.

        Raises:
            TimeoutError: none does.
        """
        deadline = time.monotonic() + RECOVERY_SECONDS
        while time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                if self.proxy() not in (None, gone) and httpx.get(f"{self.url}/-/healthz").status_code == 200:
                    return
            time.sleep(0.1)
        raise TimeoutError(f"no other proxy answered within {RECOVERY_SECONDS:.0f} s")

    def wait(self, count: int, without: Set[int] = frozenset(), seconds: float = RECOVERY_SECONDS) -> set[int]:
        """The replicas, once ``count`` are running and none of ``without`` is.

        Raises:
            TimeoutError: they are not, after so many seconds.
        """
        deadline = time.monotonic() + seconds
        while len(found := self.replicas()) != count or found & without:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{count} replicas were to be running after {seconds:.0f} s, found {len(found)}")
            time.sleep(0.25)
        return found


@contextmanager
def serving(config: FaultsBenchmark, folder: Path) -> Iterator[tuple[Cluster, str]]:
    """Ray, Serve and the replicas; the cluster and a key."""
    database = f"sqlite:///{folder}/palate.db"
    served = (text_settings if config.server == "text" else image_settings)(config, folder)
    with open_store(database) as store:
        key = create_key(store, "acme", "benchmark")
    token = secrets.token_hex(32)
    # Before Ray is imported, for all of its processes.
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        **({} if config.plain else PROXY),
    }
    import ray

    http, dashboard = free_port(), free_port()
    ray.init(
        address="local",
        num_cpus=config.replicas + 2,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=dashboard,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
    )
    try:
        args = {**served, "database": database, "threads": 1, "replicas": config.replicas, "max_waiting": 64}
        cluster = Cluster(f"http://127.0.0.1:{dashboard}", token, http, config.server, args)
        cluster.deploy()
        cluster.wait(config.replicas, seconds=START_SECONDS)
        yield cluster, key
    finally:
        ray.shutdown()


def text_settings(config: FaultsBenchmark, folder: Path) -> dict[str, Any]:
    """What serve/text.py is told, once the runs are made."""
    corpus = personas.prepare(personas.PersonasConfig(out=str(folder / "corpus"), people=8, items=8, questions=1))
    for seed, name in enumerate(RUNS if "run" in config.faults else RUNS[:1]):
        make_run(str(folder / name), corpus.url, seed)
    return {"run": str(folder / RUNS[0]), "slots": 4, "max_length": 400}


def image_settings(config: FaultsBenchmark, folder: Path) -> dict[str, Any]:
    """What serve/images.py is told: a built-in model whose images take a second or so."""
    return {"models": {"shapes": {"base": "shapes", "steps": 20, "guidance": 2.0}}, "feedback": str(folder / RANKED)}


def make_run(out: str, corpus: str, seed: int) -> None:
    """A run of a few steps on the tiny model: what it says does not matter here."""
    config = CardConfig(
        corpus=corpus,
        out=out,
        model="tiny",
        seed=seed,
        cluster=ClusterConfig(clusters=2),
        prompt=PromptConfig(max_prompt_tokens=200, max_answer_tokens=12),
        adapt=AdaptConfig(rank=2, epochs=1, batch=8),
        contrast=ContrastConfig(people_per_shard=8, top_k=20),
        prefer=PreferConfig(width=4, head_epochs=2, head_precision=(1.0,), vector_deviation=(3.0,)),
    )
    stages.pipeline(config, World(), sampler=sample_answers)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def load(config: FaultsBenchmark, cluster: Cluster, key: str, log: Path) -> Iterator[subprocess.Popen]:
    """Locust in a process of its own, because it exchanges Python's sockets for its own. Its users end what they are at
    before it ends."""
    command = [sys.executable, "-m", "locust", "--headless", "--only-summary", "--loglevel", "WARNING"]
    users = "serve_faults_users.py" if config.server == "text" else "serve_faults_image_users.py"
    command += ["--locustfile", str(ROOT / "benchmarks" / users), "--host", cluster.url]
    command += ["--users", str(config.users), "--spawn-rate", str(config.users), "--exit-code-on-error", "0"]
    command += ["--stop-timeout", "190"]  # three tries of OpenAI's client, so that every request ends and is noted
    environment = {**os.environ, "FAULTS_KEY": key, "FAULTS_LOG": str(log), "FAULTS_PACE": str(config.pace)}
    log.touch()
    process = subprocess.Popen(command, cwd=log.parent, env=environment, stdout=sys.stderr)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(200)
        finally:
            process.kill()


def inject(config: FaultsBenchmark, cluster: Cluster, key: str, folder: Path, until: float) -> Iterator[Fault]:
    """One fault after another, each in turn once, then while there is time for service to be whole again."""
    chosen, promoted, longest = random.Random(config.seed), 0, 0.0
    for number in itertools.count():
        time.sleep(config.calm)
        if number >= len(config.faults) and time.time() + longest + config.calm > until:
            return
        kind, before = config.faults[number % len(config.faults)], cluster.wait(config.replicas)
        at = time.time()
        if kind == "kill":
            victim = chosen.choice(sorted(before))
            os.kill(victim, signal.SIGKILL)
            cluster.wait(config.replicas, {victim})
        elif kind == "settings":
            cluster.deploy(max_waiting=65 + number)
            cluster.wait(config.replicas, before)
        elif kind == "proxy":
            if (gone := cluster.proxy()) is None:
                raise RuntimeError("Serve has no proxy")
            os.kill(gone, signal.SIGKILL)
            cluster.wait_for_proxy(gone)
        else:
            promoted += 1
            go_live(RUNS[promoted % 2], cluster, key, folder, add=promoted == 1)
        yield Fault(kind, at, time.time() - at)
        longest = max(longest, time.time() - at)


def go_live(name: str, cluster: Cluster, key: str, folder: Path, add: bool) -> None:
    """Promote a run by serve/admin.py, and wait until every replica serves it."""
    commands = [["run-add", "--run", str(folder / name)]] if add else []
    for command in [*commands, ["run-promote", "--name", name]]:
        script = [sys.executable, "serve/admin.py", *command, "--database", f"sqlite:///{folder}/palate.db"]
        subprocess.run(script, cwd=ROOT, check=True, stdout=sys.stderr)
    headers, seen = {"Authorization": f"Bearer {key}"}, 0
    deadline = time.monotonic() + RECOVERY_SECONDS
    while seen < 10:  # answers in a row, from whichever replica
        if time.monotonic() > deadline:
            raise TimeoutError(f"run {name} was to be live after {RECOVERY_SECONDS:.0f} s")
        answer = httpx.get(f"{cluster.url}/v1/models/palate", headers=headers, timeout=60)
        seen = seen + 1 if answer.status_code == 200 and answer.json()["run"] == name else 0
        time.sleep(0.1)


def lost_rankings(requests: Sequence[Request], database: str, ranked: Path) -> list[str]:
    """Prompts of rankings that were answered for and are not in the database once, with their images in the folder,
    or are there without having been sent."""
    sent = {one.text: one for one in requests if one.kind == "ranking"}
    with open_store(database) as store:
        found = store.rankings("acme", limit=100_000)
    whole = Counter(
        one.prompt for one in found if all((ranked / "acme" / f"{image}.png").is_file() for image in one.images)
    )
    lost = [text for text, one in sent.items() if one.outcome == "answered" and whole[text] != 1]
    return lost + sorted({one.prompt for one in found} - sent.keys())


def lost_writes(requests: Sequence[Request], database: str) -> list[str]:
    """Texts that were answered for and are not in the database, or are there without having been sent."""
    histories = [one for one in requests if one.kind == "history"]
    edits = [one for one in requests if one.kind == "feedback"]
    lost = []
    with open_store(database) as store:
        for one in histories:
            put = store.person("acme", one.person)
            found = {text.output.rpartition(" ")[0] for text in put.texts} if put else set()
            # A request that failed may have been stored all the same, but then as it was sent.
            if found != {one.text} and (found or one.outcome == "answered"):
                lost.append(one.text)
        says = store.person("acme", "says")
    stored = Counter(text.output for text in says.texts) if says else Counter()
    lost += [one.text for one in edits if one.outcome == "answered" and stored[one.text] != 1]
    return lost + sorted(stored.keys() - {one.text for one in edits})


def summary(requests: Sequence[Request], kills: Sequence[float]) -> dict[str, Any]:
    """Counts and quantiles of some of the requests."""
    unanswered = [one for one in requests if one.outcome != "answered"]
    in_flight = [one for one in unanswered if one.under_way(kills) and one.outcome == "retryable"]
    refused = [one for one in unanswered if one.outcome == "retryable" and not one.under_way(kills)]
    failed = [one for one in unanswered if one.outcome == "failed"]
    seconds = sorted(one.ended - one.began for one in requests if one.kind in ANSWERS and one.outcome == "answered")
    return {
        "requests": len(requests),
        "answered": len(requests) - len(unanswered),
        "in_flight": len(in_flight),
        "refused": len(refused),
        "failed": len(failed),
        "seen": dict(Counter(f"{one.kind}: {one.found}" for one in unanswered)),
        "p50": seconds[len(seconds) // 2] if seconds else None,
        "p95": seconds[int(0.95 * len(seconds))] if seconds else None,
    }


def judge(faults: Sequence[Fault], requests: Sequence[Request]) -> dict[str, Any]:
    """All figures: over everything, without faults, during each fault, and each second."""
    kills = [fault.at for fault in faults if fault.kind == "kill"]
    each = []
    for fault in faults:
        met = [one for one in requests if one.meets(fault)]
        after = [one.ended for one in requests if one.began >= fault.at and one.outcome == "answered"]
        first = min(after) - fault.at if after else None
        each.append({**asdict(fault), "first_answer_after": first, **summary(met, kills)})
    start = min(one.began for one in requests)
    seconds: dict[int, Counter[str]] = {}
    for one in requests:
        seconds.setdefault(int(one.ended - start), Counter())[one.outcome] += 1
    return {
        "whole": summary(requests, kills),
        "calm": summary([one for one in requests if not any(one.meets(fault) for fault in faults)], kills),
        "openai": {
            **summary([one for one in requests if one.kind == "openai"], kills),
            "tried_again": sum(one.kind == "openai" and "tried" in one.found for one in requests),
        },
        "faults": each,
        "kinds": dict(Counter(one.kind for one in requests)),
        "seconds": {second: dict(counts) for second, counts in sorted(seconds.items())},
    }


def run(config: FaultsBenchmark) -> dict[str, Any]:
    """Serve, load, break, and judge."""
    with TemporaryDirectory(prefix="faults-") as name:
        folder, log = Path(name), Path(name) / "requests.jsonl"
        with serving(config, folder) as (cluster, key):
            headers = {"Authorization": f"Bearer {key}"}
            for person in ("ann", "bob", "eve") if config.server == "text" else ():
                url = f"{cluster.url}/v1/users/{person}?wait=true"
                httpx.put(url, json=PERSON, headers=headers, timeout=120).raise_for_status()
            with load(config, cluster, key, log) as users:
                deadline = time.monotonic() + START_SECONDS
                while not log.stat().st_size:
                    if users.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"Locust asks for nothing; it ended with {users.poll()}")
                    time.sleep(0.2)
                until = time.time() + 60 * config.minutes
                faults = list(inject(config, cluster, key, folder, until))
                time.sleep(max(0.0, until - time.time()))
        requests = [Request(**json.loads(line)) for line in log.read_text().splitlines()]
        database = f"sqlite:///{folder}/palate.db"
        if config.server == "text":
            lost = lost_writes(requests, database)
        else:
            lost = lost_rankings(requests, database, folder / RANKED)
    return {"config": configs.to_dict(config), **judge(faults, requests), "lost_writes": lost}


def table(found: dict[str, Any]) -> str:
    """What docs/reliability.md shows."""
    head = "| fault | times | requests | failed, under way at a kill | refused | failed otherwise "
    lines = [f"{head}| p95 s | first answer s | whole again s |", "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    rows = [("none", [found["calm"]])]
    kinds = dict.fromkeys(fault["kind"] for fault in found["faults"])
    rows += [(kind, [fault for fault in found["faults"] if fault["kind"] == kind]) for kind in kinds]
    for kind, some in rows:
        counts = [str(sum(one[name] for one in some)) for name in ("requests", "in_flight", "refused", "failed")]
        times = "" if kind == "none" else str(len(some))
        cells = [kind, times, *counts, span([one["p95"] for one in some])]
        cells += [span([one.get(name) for one in some]) for name in ("first_answer_after", "whole_after")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def span(values: Sequence[float | None]) -> str:
    """The least and the most."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    least, most = f"{min(known):.2f}", f"{max(known):.2f}"
    return least if least == most else f"{least} to {most}"


def main() -> None:
    config = configs.parse(FaultsBenchmark, __doc__)
    found = run(config)
    print(table(found))
    for what, count in found["whole"]["seen"].items():
        print(f"{count} times {what}")
    calls = found["openai"]
    print(f"OpenAI's client: {calls['requests']} calls, {calls['tried_again']} tried again, {calls['failed']} failed")
    print(f"answered writes that are lost: {len(found['lost_writes'])}")
    path = Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
