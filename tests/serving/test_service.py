"""One replica and several: fits, the registry, what is shared by the database, and load."""

import asyncio
import random
import shutil
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch

from palate import artifacts
from palate.card import stages
from palate.card.prompts import Retriever, prompt_ids
from palate.card.runs import open_run
from palate.models.causal_lm import render_chat
from palate.serving.engine import Engine, Request
from palate.serving.http import PERSONALIZATION
from palate.serving.served_run import ServedRun, Written, chat_prompt, fit_person, load_run, prepare_fit
from palate.users import runs
from palate.users.keys import create_key
from palate.users.records import PastText, Ranking
from palate.users.store import open_store
from toy_runs import with_objects
from toy_serving import serving, settings

TEXTS = [{"input": f"Describe thing {n}.", "output": f"Well!!! thing {n} is grand, grand, grand."} for n in range(6)]


@pytest.fixture(scope="module")
def loaded(run_url):
    return load_run(run_url)


def finish(job):
    """What a generator returns."""
    while True:
        try:
            next(job)
        except StopIteration as done:
            return done.value


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def client(url: str, key: str = "") -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=60)


def ask(http: httpx.Client, user: str | None = None, **changes) -> httpx.Response:
    body = {"model": "palate", "messages": [{"role": "user", "content": "Describe it."}], "max_tokens": 8}
    body |= {"temperature": 0, **({"user": user} if user else {}), **changes}
    return http.post("/v1/chat/completions", json=body)


def answer_of(run: ServedRun) -> str:
    """What ``ask`` gets from a run for nobody in particular, by the engine alone."""
    prompt = render_chat(run.loaded, [("user", "Describe it.")])
    personal = run.population
    request = Request(prompt, personal.cluster, personal.vector_J, run.beta, max_new_tokens=8)
    return Engine(run.loaded, run.rows, run.head, slots=1, max_length=400).generate([request])[0].text


def test_a_new_persons_fit_is_the_trainings_own(run_url, corpus_url, loaded):
    """The texts that the run fitted somebody's vector to, given as a new person's, lead to the same vector."""
    people = stages.read_people(artifacts.open_artifact(corpus_url))
    fitted = stages.read_vectors(open_run(run_url).fitted)
    assigned = stages.read_assignment(open_run(run_url).clusters)
    compared = 0
    for user in people.histories:
        kept = people.for_vectors(user, 0.5, 64)
        texts = [Written(item.input, item.output) for item in kept]
        personal = finish(fit_person(loaded, prepare_fit(loaded, texts)))
        if personal.cluster == assigned[user]:  # half of the texts may look nearer to another cluster
            compared += 1
            torch.testing.assert_close(personal.vector_J, fitted[user], atol=2e-3, rtol=2e-3)
    assert compared >= 4


def test_prompts_quote_the_history_only_where_the_run_was_trained_so(loaded):
    history = [Written(f"about {thing}", f"{thing} is nice") for thing in ("cats", "dogs", "tea")]
    turns = [("user", "Write about dogs")]
    assert chat_prompt(loaded, turns, history) == render_chat(loaded.loaded, turns)
    quoting = loaded.__class__(**{**vars(loaded), "history_k": 1})
    found = Retriever(loaded.task, [])
    ids = chat_prompt(quoting, turns, history)
    assert "dogs is nice" in loaded.loaded.tokenizer.decode(ids)
    assert "tea is nice" not in loaded.loaded.tokenizer.decode(ids)
    assert chat_prompt(quoting, turns, ()) == prompt_ids(
        loaded.loaded, loaded.task, turns[0][1], found.retrieve("", 0), loaded.max_prompt_tokens
    )
    longer = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", "Write about dogs")]
    text = loaded.loaded.tokenizer.decode(chat_prompt(quoting, longer, history))
    assert text.index("Be brief.") < text.index("Hello") < text.index("dogs is nice") < text.index("Write about dogs")


def test_replicas_that_share_a_database_see_one_anothers_people(run_url, tmp_path):
    config = settings(tmp_path)
    with serving(config, run_url) as (one, service), serving(config, run_url) as (two, _):
        key = create_key(service.store, "acme", "tests")
        here, there = client(one, key), client(two, key)
        assert ask(there, "ann").headers[PERSONALIZATION] == "population"
        assert here.put("/v1/users/ann", params={"wait": True}, json={"texts": TEXTS}).status_code == 200
        until(lambda: ask(there, "ann").headers[PERSONALIZATION] == "personal", 5)
        assert ask(there, "ann").json()["choices"] == ask(here, "ann").json()["choices"]
        assert here.delete("/v1/users/ann").status_code == 200
        until(lambda: ask(there, "ann").headers[PERSONALIZATION] == "population", 5)


def test_what_a_dead_replica_had_begun_is_fitted_by_another(run_url, tmp_path):
    config = settings(tmp_path, require_keys=False)
    with open_store(config.database) as store:
        person, _ = store.put_history("default", "bob", [PastText(**one) for one in TEXTS])
        (claimed,) = store.claim_stale(open_run(run_url).version, "dead", seconds=2.0)
        assert (claimed.user_id, claimed.version, len(claimed.texts)) == ("bob", person.version, person.count)
    with serving(config, run_url) as (url, service):
        until(lambda: service.fitted_version("default", "bob")[1] == person.version)
        assert ask(client(url), "bob").headers[PERSONALIZATION] == "personal"


def test_promotion_refits_everybody_and_drops_no_request(run_url, second_run_url, tmp_path):
    second = second_run_url.rpartition("/")[2]
    with serving(settings(tmp_path, require_keys=False), run_url) as (url, service):
        first = service.live
        http = client(url)
        for user in ("ann", "bob", "carl"):
            http.put(f"/v1/users/{user}", params={"wait": True}, json={"texts": TEXTS})
        statuses, stop = [], threading.Event()

        def keep_asking() -> None:
            with client(url) as mine:
                while not stop.is_set():
                    answer = ask(mine, "ann")
                    statuses.append((answer.status_code, answer.headers.get(PERSONALIZATION)))

        asking = threading.Thread(target=keep_asking)
        asking.start()
        service.register(second_run_url)
        until(lambda: second in service.hosted)
        assert service.live == first  # beside the live one, by its own name
        assert ask(http, "ann", model=second).status_code == 200
        runs.start_refit(service.store, second)
        until(lambda: service.live == second)
        head = service.hosted[second].run.version
        assert service.store.stale(head) == 0
        assert all(service.store.fitted("default", user, head) is not None for user in ("ann", "bob", "carl"))
        assert {model["id"]: model["live"] for model in http.get("/v1/models").json()["data"]}[second]
        runs.roll_back(service.store)
        until(lambda: service.live == first)
        until(lambda: len(statuses) > 20)
        stop.set()
        asking.join()
    assert set(statuses) == {(200, "personal")}


def test_one_person_who_cannot_be_fitted_holds_up_nobody(run_url, second_run_url, tmp_path, monkeypatch):
    from palate.serving import service as module

    prepare = module.prepare_fit

    def fails_for_ann(run, texts):
        if texts[0].output == "cursed":
            raise RuntimeError("no way")
        return prepare(run, texts)

    monkeypatch.setattr(module, "prepare_fit", fails_for_ann)
    with serving(settings(tmp_path, require_keys=False), run_url) as (url, service):
        http = client(url)
        cursed = http.put("/v1/users/ann", params={"wait": True}, json={"texts": [{"output": "cursed"}]})
        assert cursed.json()["status"] == "population"
        assert ask(http, "ann").headers[PERSONALIZATION] == "population"
        service.register(second_run_url)
        runs.start_refit(service.store, second_run_url.rpartition("/")[2])
        until(lambda: service.live == second_run_url.rpartition("/")[2])


def test_somebody_who_only_ranked_images_is_answered_like_the_population(run_url, tmp_path, caplog):
    with serving(settings(tmp_path, require_keys=False), run_url) as (url, service):
        http = client(url)
        ranking = Ranking("ann", "one", "a red circle", ("a" * 64, "b" * 64))
        service.store.add_ranking("default", ranking, lambda: None)
        until(lambda: http.get("/v1/users/ann").json()["status"] == "population")
        assert http.get("/v1/users/ann").json()["texts"] == 0
        assert ask(http, "ann").headers[PERSONALIZATION] == "population"
        assert http.get("/v1/users/ann/export").json()["rankings"][0]["id"] == "one"
        http.post("/v1/feedback", json={"user": "ann", "prompt": "p", "edited": "hello"}, params={"wait": True})
        assert ask(http, "ann").headers[PERSONALIZATION] == "personal"
        assert http.delete("/v1/users/ann").status_code == 200
        assert service.store.rankings("default") == []
    assert "cannot be fitted" not in caplog.text


def test_a_name_that_is_given_to_another_run_serves_that_run(run_url, second_run_url, tmp_path):
    expected = [answer_of(load_run(run)) for run in (run_url, second_run_url)]
    assert expected[0] != expected[1]
    with serving(settings(tmp_path, require_keys=False), run_url) as (url, service):
        first = open_run(run_url)
        runs.add_run(service.store, "second", run_url, first.version, first.model)
        until(lambda: "second" in service.hosted)
        assert ask(client(url), model="second").json()["choices"][0]["message"]["content"] == expected[0]
        runs.remove_run(service.store, "second")
        second = open_run(second_run_url)
        runs.add_run(service.store, "second", second_run_url, second.version, second.model)
        until(lambda: service.hosted["second"].run.version == second.version)
        assert ask(client(url), model="second").json()["choices"][0]["message"]["content"] == expected[1]


def test_a_run_that_cannot_be_loaded_is_reported_and_the_live_one_goes_on(
    run_url, second_run_url, tmp_path, monkeypatch
):
    moved = tmp_path / "moved"
    monkeypatch.setattr("palate.serving.service.RETRY_SECONDS", 0.3)
    with serving(settings(tmp_path, require_keys=False), run_url) as (url, service):
        found = open_run(second_run_url)
        runs.add_run(service.store, "moved", str(moved), found.version, found.model)
        until(lambda: "moved" in service.failed)
        with client(url) as http:
            health = http.get("/healthz").json()
            assert health["status"] == "ok"
            assert (health["runs"], health["failed"], health["switching"]) == (1, 1, False)
            assert "moved" not in http.get("/healthz").text
            assert ask(http).status_code == 200
            assert ask(http, model="moved").status_code == 404
            runs.promote(service.store, "moved")
            until(lambda: http.get("/healthz").json()["switching"])
            assert service.live == run_url.rpartition("/")[2]
            assert ask(http).status_code == 200
            shutil.copytree(second_run_url, moved)  # the storage is back
            until(lambda: service.live == "moved")
            assert http.get("/healthz").json()["switching"] is False


def test_load_with_cancels_gives_everyone_their_own_answer(run_url, tmp_path):
    """200 requests of 16 clients, a quarter cancelled: every answer is what its request alone gets."""
    config = settings(tmp_path, max_waiting=32, max_in_flight=64)
    with serving(config, run_url) as (url, service):
        keys = {tenant: create_key(service.store, tenant, "load") for tenant in ("acme", "rival")}
        people = [(tenant, user) for tenant in keys for user in ("ann", "bob")]  # equal ids, other people
        for number, (tenant, user) in enumerate(people):
            texts = [{"input": t["input"], "output": t["output"].replace("grand", f"w{number}")} for t in TEXTS]
            put = client(url, keys[tenant]).put(f"/v1/users/{user}", params={"wait": True}, json={"texts": texts})
            assert put.status_code == 200

        def fields(number: int) -> dict:
            messages = [{"role": "user", "content": f"Describe thing {number % 20}."}]
            return {
                "model": "palate",
                "messages": messages,
                "user": people[number % 4][1],
                "max_completion_tokens": 12,
                "temperature": 0.8,
                "seed": number % 40,
            }

        async def everyone(count: int, clients: int, cancel: bool) -> dict[int, str]:
            draw, answers = random.Random(0), {}
            tenants = {
                tenant: openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
                for tenant, key in keys.items()
            }
            waiting = iter(range(count))

            async def one_client() -> None:
                for number in waiting:
                    openai_client = tenants[people[number % 4][0]]
                    if cancel and draw.random() < 0.25:
                        task = asyncio.create_task(openai_client.chat.completions.create(**fields(number)))
                        await asyncio.sleep(draw.random() * 0.05)
                        task.cancel()
                        continue
                    if number % 2:
                        stream = await openai_client.chat.completions.create(**fields(number), stream=True)
                        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
                        answers[number] = "".join(parts)
                    else:
                        answer = await openai_client.chat.completions.create(**fields(number))
                        answers[number] = answer.choices[0].message.content

            await asyncio.gather(*(one_client() for _ in range(clients)))
            return answers

        alone = asyncio.run(everyone(40, 1, cancel=False))
        together = asyncio.run(everyone(200, 16, cancel=True))
        assert len(together) > 100
        assert len({alone[number] for number in range(4)}) > 1
        assert {number: text for number, text in together.items() if text != alone[number % 40]} == {}
        worker = service.hosted[service.live].worker
        until(lambda: worker.engine.idle)
        assert worker.load.running == worker.load.waiting == 0


def test_a_finished_run_and_its_corpus_hold_no_objects_of_python(run_url, corpus_url, tmp_path):
    assert {file.suffix for file in Path(run_url).rglob("*")} >= {".safetensors", ".parquet", ".json"}
    assert with_objects(run_url, corpus_url) == []
    for number, (name, content) in enumerate((("a.pt", b"x"), ("a.json", b"\x80\x04"), ("a.safetensors", b"PK\3\4"))):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / name).write_bytes(content)
        assert len(with_objects(tmp_path / str(number))) == 1


def test_a_full_queue_answers_503_and_a_greedy_key_429(run_url, tmp_path):
    config = settings(tmp_path, slots=1, max_waiting=1, max_in_flight=2)
    with serving(config, run_url) as (url, service):
        keys = [create_key(service.store, "acme", str(number)) for number in range(4)]

        async def at_once(chosen: list[str]) -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=url, timeout=60) as http:
                body = {"model": "palate", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60}
                return await asyncio.gather(
                    *(
                        http.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})
                        for key in chosen
                    )
                )

        greedy = asyncio.run(at_once([keys[0]] * 4))
        assert sorted(answer.status_code for answer in greedy) == [200, 200, 429, 429]
        crowded = asyncio.run(at_once(keys))
        assert sorted(answer.status_code for answer in crowded) == [200, 200, 503, 503]
        for answer in [*greedy, *crowded]:
            if answer.status_code in (429, 503):
                assert int(answer.headers["Retry-After"]) > 0
                assert answer.json()["error"]["code"] in ("rate_limit_exceeded", "overloaded")
        assert asyncio.run(at_once(keys[:1]))[0].status_code == 200
        body = {"model": "palate", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        for count, status in ((2, 200), (3, 429)):  # a request's place is that of its first answer
            with client(url, keys[0]) as http:
                assert http.post("/v1/chat/completions", json={**body, "n": count}).status_code == status
