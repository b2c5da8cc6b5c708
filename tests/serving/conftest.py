"""A run and a server for the tests of the HTTP side."""

from collections.abc import Iterator

import pytest

from palate.corpora.worlds import personas
from palate.serving.service import Service
from palate.users.keys import create_key
from toy_serving import make_run, serving, settings


@pytest.fixture(scope="session")
def corpus_url(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("serving") / "personas"
    return personas.prepare(personas.PersonasConfig(out=str(out), people=8, items=8, questions=1)).url


@pytest.fixture(scope="session")
def run_url(corpus_url, tmp_path_factory) -> str:
    return make_run(str(tmp_path_factory.mktemp("serving") / "first"), corpus_url)


@pytest.fixture(scope="session")
def second_run_url(corpus_url, tmp_path_factory) -> str:
    """Another head over another training of the adapters."""
    return make_run(str(tmp_path_factory.mktemp("serving") / "second"), corpus_url, seed=1)


@pytest.fixture(scope="module")
def server(run_url, tmp_path_factory) -> Iterator[tuple[str, Service]]:
    with serving(settings(tmp_path_factory.mktemp("store")), run_url) as made:
        yield made


@pytest.fixture(scope="module")
def key(server) -> str:
    return create_key(server[1].store, "acme", "tests")
