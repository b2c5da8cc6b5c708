"""PostgreSQL is restarted, in order and as in a crash, under a server that answers all the while."""

import signal
import threading
import time

import httpx
import pytest

from palate.corpora.worlds import personas
from palate.users.keys import create_key
from toy_postgres import Server, admin, postgres_url
from toy_serving import make_run, serving, settings

TEXTS = [{"input": f"Describe thing {n}.", "output": f"Well!!! thing {n} is grand."} for n in range(4)]


@pytest.fixture
def database():
    own = Server()
    yield own
    own.close()


@pytest.mark.chaos
def test_a_server_says_that_its_database_is_away_and_goes_on_by_itself_when_it_is_back(database, tmp_path):
    admin(str(database.folder), "CREATE DATABASE people")
    corpus = personas.prepare(personas.PersonasConfig(out=str(tmp_path / "personas"), people=8, items=8, questions=1))
    changes = {"database": postgres_url(str(database.folder), "people")}
    config = settings(tmp_path).model_copy(update=changes)
    with serving(config, make_run(str(tmp_path / "run"), corpus.url)) as (url, service):
        headers = {"Authorization": f"Bearer {create_key(service.store, 'acme', 'tests')}"}
        found: dict[str, list[httpx.Response]] = {"put": [], "chat": []}
        stop, errors = threading.Event(), []

        def put(http: httpx.Client, number: int) -> httpx.Response:
            return http.put(f"/v1/users/user-{number}", json={"texts": TEXTS})

        def chat(http: httpx.Client, number: int) -> httpx.Response:
            asked = [{"role": "user", "content": f"Describe thing {number}."}]
            body = {"model": "palate", "user": "user-0", "messages": asked, "max_completion_tokens": 4}
            return http.post("/v1/chat/completions", json=body)

        def ask(kind: str) -> None:
            try:
                with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as http:
                    while not stop.is_set():
                        found[kind].append({"put": put, "chat": chat}[kind](http, len(found[kind])))
                        time.sleep(0.02)
            except BaseException as error:
                errors.append(error)

        def wait_for(well: bool, more: int) -> None:
            had = {kind: len(answers) for kind, answers in found.items()}
            end = time.monotonic() + 120
            while any(sum(one.is_success == well for one in found[k][had[k] :]) < more for k in found):
                assert not errors, repr(errors[0])
                assert time.monotonic() < end, {k: [one.status_code for one in found[k][had[k] :]] for k in found}
                time.sleep(0.01)

        threads = [threading.Thread(target=ask, args=(kind,)) for kind in found]
        for thread in threads:
            thread.start()
        try:
            for ending in (signal.SIGINT, signal.SIGQUIT):
                wait_for(True, 5)
                database.stop(ending)
                wait_for(False, 5)
                database.start()
            wait_for(True, 5)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        with httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False) as http:
            for number, answer in enumerate(found["put"]):
                there = http.get(f"/v1/users/user-{number}")
                assert there.is_success or not answer.is_success, number
                assert there.status_code == 404 or there.json()["texts"] == len(TEXTS)
            # What works in the background went on too: somebody new gets a vector.
            assert http.put("/v1/users/new?wait=true", json={"texts": TEXTS}).json()["status"] == "personal"
    for answer in (one for answers in found.values() for one in answers):
        if not answer.is_success:
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "database_unavailable"
            assert answer.headers["Retry-After"]
