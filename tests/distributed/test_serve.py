"""The Ray Serve application: replicas over one database, and one of them killed under load."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from palate.corpora.worlds import personas
from palate.users.keys import create_key
from palate.users.store import open_store
from toy_serving import make_run

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [{"input": f"Describe thing {n}.", "output": f"Well!!! thing {n} is grand, grand, grand."} for n in range(6)]
BODY = {"model": "palate", "messages": [{"role": "user", "content": "Describe it."}], "max_tokens": 16}


@pytest.fixture(scope="module")
def served(ray_cluster, tmp_path_factory) -> Iterator[tuple[str, str]]:
    """Two replicas behind Serve's proxy: URL and key."""
    from ray import serve

    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from serve.text import TextSettings, app

    folder = tmp_path_factory.mktemp("serve")
    corpus = personas.prepare(personas.PersonasConfig(out=str(folder / "corpus"), people=8, items=8, questions=1))
    database = f"sqlite:///{folder}/palate.db"
    with open_store(database) as store:
        key = create_key(store, "acme", "tests")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = TextSettings(
        database=database,
        run=make_run(str(folder / "run"), corpus.url),
        slots=4,
        max_length=400,
        threads=1,
        replicas=2,
        cpus_per_replica=1,
    )
    serve.run(app(settings), name="text", route_prefix="/")
    yield f"http://127.0.0.1:{port}", key
    serve.shutdown()


def replicas() -> list[int]:
    """Process ids of the replicas of this machine."""
    found = subprocess.run(["pgrep", "-f", "ServeReplica:text"], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
def test_the_openai_client_and_both_replicas(served):
    url, key = served
    http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
    assert http.put("/v1/users/ann", params={"wait": True}, json={"texts": TEXTS}).status_code == 200
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
    time.sleep(1.1)  # a change is seen by all replicas within a second
    messages = [{"role": "user", "content": "Describe it."}]
    texts = set()
    for _ in range(8):  # whichever replica it goes to
        answer = client.chat.completions.with_raw_response.create(
            model="palate", user="ann", messages=messages, temperature=0, max_completion_tokens=12
        )
        assert answer.headers["x-palate-personalization"] == "personal"
        texts.add(answer.parse().choices[0].message.content)
    assert len(texts) == 1
    stream = client.chat.completions.create(
        model="palate", user="ann", messages=messages, temperature=0, max_completion_tokens=12, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) in texts
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert "<title>Palate</title>" in httpx.get(f"{url}/").text
    assert http.get("/healthz").json()["status"] == "ok"


@pytest.mark.slow
def test_a_killed_replica_fails_only_its_own_requests_and_comes_back(served):
    url, key = served
    before = set(replicas())
    assert len(before) == 2
    victim = min(before)

    async def load() -> list[httpx.Response]:
        answers = []
        async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:

            async def one_client(number: int) -> None:
                for turn in range(30):
                    if number == 0 and turn == 5:
                        os.kill(victim, signal.SIGKILL)
                    answers.append(await http.post("/v1/chat/completions", json=BODY))

            await asyncio.gather(*(one_client(number) for number in range(6)))
        return answers

    answers = asyncio.run(load())
    statuses = [answer.status_code for answer in answers]
    assert len(statuses) == 180
    failed = [status for status in statuses if status != 200]
    assert len(failed) <= 6  # at most what was under way: one of each client
    assert all(status in (500, 502, 503) for status in failed)  # which the OpenAI client sends again
    started = time.monotonic()
    while len(set(replicas()) - {victim}) < 2:
        assert time.monotonic() - started < 60
        time.sleep(0.2)
    assert (
        httpx.post(f"{url}/v1/chat/completions", json=BODY, headers={"Authorization": f"Bearer {key}"}).status_code
        == 200
    )
