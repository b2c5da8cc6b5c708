"""Two replicas of the server over one database, on SQLite and PostgreSQL."""

import time

import httpx
import pytest

from palate.corpora.worlds import personas
from palate.serving.http import PERSONALIZATION
from palate.users.keys import create_key
from toy_serving import make_run, serving, settings

TEXTS = [{"input": f"Describe thing {n}.", "output": f"Well!!! thing {n} is grand, grand, grand."} for n in range(6)]
BODY = {"model": "palate", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "user": "ann"}


@pytest.fixture(scope="module")
def run_url(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("replicas")
    corpus = personas.prepare(personas.PersonasConfig(out=str(folder / "corpus"), people=6, items=6, questions=1))
    return make_run(str(folder / "run"), corpus.url)


def test_what_one_replica_writes_the_other_serves(empty_url, run_url, tmp_path):
    config = settings(tmp_path).model_copy(update={"database": empty_url})
    with serving(config, run_url) as (one, service), serving(config) as (two, _):
        headers = {"Authorization": f"Bearer {create_key(service.store, 'acme', 'tests')}"}

        def state() -> str:
            return httpx.post(f"{two}/v1/chat/completions", json=BODY, headers=headers).headers[PERSONALIZATION]

        def becomes(expected: str) -> bool:
            deadline = time.monotonic() + 10
            while state() != expected and time.monotonic() < deadline:
                time.sleep(0.05)
            return state() == expected

        assert state() == "population"
        put = httpx.put(f"{one}/v1/users/ann", params={"wait": True}, json={"texts": TEXTS}, headers=headers)
        assert put.status_code == 200, put.text
        assert becomes("personal")
        assert httpx.delete(f"{one}/v1/users/ann", headers=headers).status_code == 200
        assert becomes("population")
