"""Connections to the database, its transactions, and its schema brought up to date.

SQLite for one machine, PostgreSQL for several. Both give the same: a reader sees one state of the database, writers of
one person wait for each other. On SQLite all writers wait for each other (``BEGIN IMMEDIATE``); on PostgreSQL those of
one person do, by a lock on the person's row.
"""

import os
import sqlite3
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self

import pg8000.exceptions
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import ColumnElement, Connection, Double, Engine, Table, cast, create_engine, event, func, literal, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from palate.users.schema import metadata

SCRIPTS = Path(__file__).with_name("migrations")
VERSION_TABLE = "palate_version"  # not alembic's own name: the database may be another program's too
WAIT_S = 30.0  # how long a writer waits for others on SQLite, and anybody for an answer of PostgreSQL

# https://www.postgresql.org/docs/current/errcodes-appendix.html: connection, resources, an operator's intervention.
_POSTGRESQL_PASSING = frozenset({"08", "53", "57"})
_DROPPED = "57P04"  # the database is gone for good
_PG8000_PASSING = ("network error", "communication error", "connection is closed", "Can't create a connection")
_SQLITE_PASSING = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR})

_AWAY = "the database of people cannot work just now"

# Any number that others are unlikely to choose: who holds it upgrades the schema.
_UPGRADE_LOCK = 7_252_835_283_001
# Alembic keeps the migration that is under way in global variables, so a process can do one at a time.
_upgrading = threading.Lock()


class NewerDatabase(Exception):
    """The database was upgraded by a version of Palate that is newer than this one."""


class DatabaseUnavailable(ConnectionError):
    """The database is away, is starting or ending, or is out of room. What was not answered may be tried again."""


@contextmanager
def unavailable_said() -> Iterator[None]:
    """Turn what says that a database cannot work just now into ``DatabaseUnavailable``; other errors stay as they are.

    If it goes while a transaction is being committed, nobody knows whether it was.
    """
    try:
        yield
    except DBAPIError as error:
        if not (error.connection_invalidated or _is_passing(error.orig)):
            raise
        raise DatabaseUnavailable(f"{_AWAY} ({error.orig})") from error
    except (ConnectionError, TimeoutError, ssl.SSLError) as error:  # pg8000 lets some of its socket's errors through
        raise DatabaseUnavailable(f"{_AWAY} ({error})") from error


def _is_passing(error: BaseException | None) -> bool:
    """Whether a driver's error is of the connection, of the server's state or of its room, not of what was asked."""
    match error:
        case pg8000.exceptions.InterfaceError():
            return str(error).startswith(_PG8000_PASSING)
        case sqlite3.OperationalError():  # those that the module itself raises have no code
            return getattr(error, "sqlite_errorcode", 0) & 0xFF in _SQLITE_PASSING
        case pg8000.exceptions.DatabaseError(args=[{"C": str(code)}, *_]):
            return code[:2] in _POSTGRESQL_PASSING and code != _DROPPED
    return False


class Database:
    """An open database with the current schema. Safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sqlite = engine.dialect.name == "sqlite"
        self._writes = engine.execution_options(palate_write=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database throughout and writes nothing.

        Raises:
            DatabaseUnavailable: it cannot work just now.
        """
        with unavailable_said(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is committed at the end of the block, or undone by an exception.

        Raises:
            DatabaseUnavailable: it cannot work just now.
        """
        with unavailable_said(), self._writes.begin() as connection:
            yield connection

    def insert_new(self, table: Table) -> Any:
        """An INSERT that leaves an existing row as it is."""
        insert = sqlite.insert(table) if self._sqlite else postgresql.insert(table)
        return insert.on_conflict_do_nothing()

    def now(self) -> ColumnElement[float]:
        """Seconds since 1970, as SQL: by PostgreSQL's clock, because those of its clients may differ."""
        if self._sqlite:
            return literal(time.time(), Double)
        return cast(func.extract("epoch", func.clock_timestamp()), Double)

    def clean_log(self) -> None:
        """On SQLite, bring the write-ahead log into the file and empty it, unless somebody is reading just now."""
        if not self._sqlite:
            return
        with unavailable_said(), closing(self.engine.raw_connection()) as connection:
            cursor = connection.cursor()
            cursor.execute("PRAGMA busy_timeout = 100")
            try:
                cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                cursor.execute(f"PRAGMA busy_timeout = {int(WAIT_S * 1000)}")

    def compact(self) -> None:
        """Rewrite the database's files without what was deleted: for quiet hours, after deletions.

        When SQLite moves rows between pages it may leave copies behind that no deletion finds (measured: of 3 in 700
        deleted people, in a database with many changes). On SQLite writers wait meanwhile, and the file's size is
        needed once more on the disk; on PostgreSQL (``VACUUM FULL``) readers wait too, table by table, and the
        database must have been opened patiently.
        """
        if self._sqlite:
            connection = self.engine.raw_connection()
            try:
                connection.cursor().execute("VACUUM")
            finally:
                connection.close()
            self.clean_log()
            return
        # Outside of any transaction, also of the one that SQLAlchemy's check of a pooled connection begins.
        connection = self.engine.raw_connection()
        driver: Any = connection.driver_connection
        try:
            driver.rollback()
            driver.autocommit = True
            for table in metadata.sorted_tables:
                driver.cursor().execute(f"VACUUM (FULL, ANALYZE) {table.name}")
        finally:
            driver.autocommit = False
            connection.close()

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def connect(url: str, *, patient: bool = False) -> Engine:
    """An engine for a URL; nothing is changed in the database.

    A server of PostgreSQL that is silent for ``WAIT_S`` counts as away, and the connection is dropped. ``patient``
    waits for it without end: for what rewrites tables.

    Raises:
        ValueError: the URL is neither of SQLite with a file nor of PostgreSQL.
    """
    expected = "expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
    try:
        parsed = make_url(url)
    except ArgumentError:
        # The message leaves the URL out: it may hold a password.
        raise ValueError(f"the user store's URL cannot be read; {expected}") from None
    kind = parsed.get_backend_name()
    if kind in ("postgresql", "postgres") and parsed.drivername in (kind, f"{kind}+pg8000"):
        return _postgresql_engine(parsed, timeout_s=None if patient else WAIT_S)
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        return _sqlite_engine(parsed, expected)
    raise ValueError(f"the user store's URL is {parsed.render_as_string()!r}; {expected}")


def upgrade(url: str) -> None:
    """Bring the schema to this version's. Several processes may do so at once: one does it, the others wait.

    Raises:
        NewerDatabase: the schema is of a version that this code does not know.
    """
    script = ScriptDirectory.from_config(_config())
    with Database(connect(url)) as database, database.read() as connection:
        if _is_current(connection, script):
            return
    with _upgrading, Database(connect(url, patient=True)) as database, database.write() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _UPGRADE_LOCK})
        if not _is_current(connection, script):
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _is_current(connection: Connection, script: ScriptDirectory) -> bool:
    found = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
    known = {one.revision for one in script.walk_revisions()}
    if found is not None and found not in known:
        raise NewerDatabase(
            f"{connection.engine.url.render_as_string()} has schema {found}, this Palate knows none after "
            f"{script.get_current_head()}: a newer Palate has upgraded it. Install that version here too, or restore "
            "the database from before the upgrade"
        )
    return found == script.get_current_head()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _postgresql_engine(url: URL, timeout_s: float | None) -> Engine:
    """By pg8000, with libpq's names for what its URLs usually say: ``host`` (a socket's folder) and ``sslmode``; and
    libpq's variable ``PGPASSWORD`` where the URL has no password, so that a configuration need not hold one.

    Raises:
        ValueError: another parameter, or another way to use TLS.
    """
    arguments: dict[str, Any] = {"timeout": timeout_s}
    for name, value in url.query.items():
        if name == "host":
            arguments["unix_sock"] = f"{value}/.s.PGSQL.{url.port or 5432}"
        elif name == "sslmode" and value == "disable":
            arguments["ssl_context"] = False
        elif name == "sslmode" and value in ("require", "verify-full"):
            context = ssl.create_default_context()
            if value == "require":  # encrypted, whoever answers
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            arguments["ssl_context"] = context
        else:
            raise ValueError(
                f"the user store's URL has {name}={value}; expected sslmode=disable, require or verify-full, or "
                "host=FOLDER of a socket"
            )
    password = url.password or os.environ.get("PGPASSWORD")
    plain = url.set(drivername="postgresql+pg8000", query={}, password=password)
    engine = create_engine(plain, pool_pre_ping=True, connect_args=arguments, hide_parameters=True)  # no text in a log

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # Of the transaction rather than of the session, as isolation_level would be, which costs two round trips more.
        write = connection.get_execution_options().get("palate_write")
        level = "READ COMMITTED, READ WRITE" if write else "REPEATABLE READ, READ ONLY"
        connection.exec_driver_sql(f"SET TRANSACTION ISOLATION LEVEL {level}")

    return engine


def _sqlite_engine(url: URL, expected: str) -> Engine:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise ValueError(f"the user store's URL is {url.render_as_string()!r}, which names no file; {expected}")
    Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": WAIT_S}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: object) -> None:
        # The driver would begin transactions by itself, only before some statements and never IMMEDIATE.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")  # zeros over what is deleted

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("palate_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    _use_log(engine)
    return engine


def _use_log(engine: Engine) -> None:
    """Switch the file to a write-ahead log, once and for all: readers and a writer do not wait for each other."""
    end = time.monotonic() + WAIT_S
    while True:
        try:
            # SQLite does not wait for others here, whatever the timeout. Not in a transaction, so not by SQLAlchemy.
            connection = engine.raw_connection()
            try:
                connection.cursor().execute("PRAGMA journal_mode = WAL")
            finally:
                connection.close()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.02)
