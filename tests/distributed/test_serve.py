"""The Ray Serve application: replicas over one database, and one of them killed under load."""

import asyncio
import json
import os
import re
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
CHAT = "/v1/chat/completions"
BODY = {"model": "palate", "messages": [{"role": "user", "content": "Describe it."}], "max_tokens": 16}
LONG = {
    **BODY,
    "n": 4,
    "max_tokens": 64,
}  # eight of these fill one key's places in a replica; with four slots they take long


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


def wait_for_replicas(victim: int) -> None:
    """Until there are two again without ``victim``, and Serve knows."""
    started = time.monotonic()
    while len(set(replicas()) - {victim}) < 2 or not running():
        assert time.monotonic() - started < 300
        time.sleep(0.2)


def running() -> bool:
    from ray import serve

    return serve.status().applications["text"].deployments["text"].replica_states == {"RUNNING": 2}


def is_lost(answer: httpx.Response) -> bool:
    """Whether it says, in OpenAI's shape, that its replica has died and when to try again."""
    found = (answer.status_code, answer.headers.get("retry-after"), answer.json()["error"]["code"])
    return found == (503, "1", "replica_lost")


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
def test_a_stream_that_its_client_ends_is_no_failure_of_ours(served):
    """Serve cancels its own task then, at any moment: http.py, ``Counted``."""
    url, key = served
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
        for _ in range(24):
            with http.stream("POST", CHAT, json={**BODY, "max_tokens": 64, "stream": True}) as answer:
                assert answer.status_code == 200
                assert next(answer.iter_lines()).startswith("data:")
        found: dict[str, str] = {}
        end = time.monotonic() + 60
        while len(found) < 2 or any(not re.search(r"^palate_running\S* 0", text, re.M) for text in found.values()):
            assert time.monotonic() < end, found
            text = http.get("/metrics").text
            found[re.search(r'replica="([^"]+)"', text).group(1)] = text
            time.sleep(0.05)
    assert not [line for text in found.values() for line in text.splitlines() if 'status="500"' in line]


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
                    answers.append(await http.post(CHAT, json=BODY))

            await asyncio.gather(*(one_client(number) for number in range(6)))
        return answers

    answers = asyncio.run(load())
    assert len(answers) == 180
    failed = [answer for answer in answers if answer.status_code != 200]
    assert len(failed) <= 6  # at most what was under way: one of each client
    assert all(is_lost(answer) for answer in failed)
    wait_for_replicas(victim)
    assert httpx.post(f"{url}{CHAT}", json=BODY, headers={"Authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.slow
def test_what_was_under_way_on_a_killed_replica_is_told_to_try_again(served):
    """Whole answers by a 503, streams by an error event, which the OpenAI client raises."""
    url, key = served
    victim = min(replicas())
    headers = {"Authorization": f"Bearer {key}"}

    async def whole(http: httpx.AsyncClient) -> bool:
        answer = await http.post(CHAT, json=LONG)
        assert answer.status_code == 200 or is_lost(answer)
        return answer.status_code == 200

    async def stream(http: httpx.AsyncClient, begun: asyncio.Event) -> bool:
        async with http.stream("POST", CHAT, json={**LONG, "stream": True}) as answer:
            if answer.status_code != 200:
                await answer.aread()
                assert is_lost(answer)
                return False
            last = ""
            async for line in answer.aiter_lines():
                begun.set()
                last = line or last
        if last == "data: [DONE]":
            return True
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
        return False

    async def load() -> tuple[list[bool], list[bool]]:
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as http:
            begun = asyncio.Event()
            streams = [asyncio.create_task(stream(http, begun)) for _ in range(4)]
            wholes = [asyncio.create_task(whole(http)) for _ in range(4)]
            await begun.wait()
            os.kill(victim, signal.SIGKILL)
            return await asyncio.gather(*streams), await asyncio.gather(*wholes)

    streams, wholes = asyncio.run(load())
    # Serve gives each replica about half: some were on the one that was killed, and the others are answered.
    assert 0 < [*streams, *wholes].count(False) < 8
    wait_for_replicas(victim)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
    assert client.chat.completions.create(**BODY).choices


@pytest.mark.slow
def test_callers_of_the_openai_client_do_not_notice(served):
    """Which tries again twice by itself, a second later as the answer says."""
    url, key = served
    victim = min(replicas())

    async def load() -> list:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, timeout=120) as client:
            create = client.chat.completions.with_raw_response.create
            calls = []
            for _ in range(8):  # one after another: Serve gives all that come at once to the same replica
                calls.append(asyncio.create_task(create(**LONG)))
                await asyncio.sleep(0.03)
            # Each takes all slots of a replica: when one is answered, others wait on both.
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            os.kill(victim, signal.SIGKILL)
            return await asyncio.gather(*calls)

    answers = asyncio.run(load())
    assert [len(answer.parse().choices) for answer in answers] == [LONG["n"]] * 8
    assert sum(answer.retries_taken for answer in answers) > 0  # some were on the replica that was killed
    wait_for_replicas(victim)


def test_the_configuration_is_read_without_torch():
    """Serve imports the application for each change of the config, and does not go on before."""
    code = "import sys, serve.text; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]
