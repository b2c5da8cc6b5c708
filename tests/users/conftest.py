"""Both databases, by ``store`` and ``url``; PostgreSQL as ``toy_postgres.py`` starts it."""

import uuid
from collections.abc import Iterator

import pytest

from palate.users.store import Store, open_store
from toy_postgres import Server, admin, postgres_url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The folder of the socket of a running server; user palate is its superuser."""
    server = Server()
    yield str(server.folder)
    server.close()


@pytest.fixture(scope="session")
def postgres_template(postgres_server) -> str:
    """A migrated database to copy from."""
    admin(postgres_server, "CREATE DATABASE ready")
    open_store(postgres_url(postgres_server, "ready")).close()
    return "ready"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request, tmp_path) -> Iterator[str]:
    """A new database without any table, on SQLite, then on PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/palate.db"
        return
    folder, name = request.getfixturevalue("postgres_server"), f"empty_{uuid.uuid4().hex[:12]}"
    admin(folder, f"CREATE DATABASE {name}")
    yield postgres_url(folder, name)
    admin(folder, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path) -> Iterator[str]:
    """A new database with the current schema."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/palate.db"
        return
    folder, name = request.getfixturevalue("postgres_server"), f"test_{uuid.uuid4().hex[:12]}"
    admin(folder, f"CREATE DATABASE {name} TEMPLATE {request.getfixturevalue('postgres_template')}")
    yield postgres_url(folder, name)
    admin(folder, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def store(url) -> Iterator[Store]:
    with open_store(url) as opened:
        yield opened
