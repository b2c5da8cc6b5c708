"""Opening, migrating, refusing; and that the fixtures run a real PostgreSQL as somebody other than root."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import event, inspect, text
from sqlalchemy.exc import DBAPIError

from palate.users import database, schema
from palate.users.database import VERSION_TABLE, Database, DatabaseUnavailable, NewerDatabase, connect
from palate.users.store import PastText, open_store

LATER = '''
"""A version that this Palate does not have."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("people", sa.Column("nickname", sa.Text, server_default="none"))
'''


def migrate_to(url: str, revision: str) -> None:
    """Bring an empty database to a version of the past, by alembic itself."""
    config = Config()
    config.set_main_option("script_location", str(database.SCRIPTS))
    old = Database(connect(url))
    with old.write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    old.close()


def scripts_with_a_later_version(folder: Path) -> Path:
    copy = folder / "migrations of the future 100%"
    shutil.copytree(database.SCRIPTS, copy)
    (copy / "versions" / "0003_later.py").write_text(LATER)
    return copy


def revision_of(store) -> str | None:
    with store.read() as connection:
        return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one()


def test_metadata_and_migrations_agree(empty_url):
    with open_store(empty_url) as store, store.read() as connection:
        options = {"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, schema.metadata) == []
        found = inspect(connection)
        # Alembic compares neither of these.
        for table in schema.metadata.tables.values():
            assert found.get_pk_constraint(table.name)["constrained_columns"] == [c.name for c in table.primary_key]
            rules = {key["constrained_columns"][0]: key["options"] for key in found.get_foreign_keys(table.name)}
            assert rules == {
                column.name: {"ondelete": key.ondelete} for column in table.columns for key in column.foreign_keys
            }


def test_the_comparison_would_find_a_difference(empty_url):
    with open_store(empty_url) as store:
        with store.write() as connection:
            connection.execute(text("ALTER TABLE people ADD COLUMN nickname TEXT"))
            connection.execute(text("DROP INDEX ix_people_tenant_user_id"))
        with store.read() as connection:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            kinds = {change[0] for change in compare_metadata(context, schema.metadata)}
    assert kinds == {"remove_column", "add_index"}


def test_a_database_of_the_first_version_is_upgraded_with_its_content(empty_url):
    migrate_to(empty_url, "0001")
    old = connect(empty_url)
    with Database(old).write() as connection:
        values = "'acme', 'ann', 7, '2026-01-02 03:04:05.000006', '2026-01-02 03:04:05.000006'"
        connection.execute(text(f"INSERT INTO people (tenant, user_id, version, created, updated) VALUES ({values})"))
        connection.execute(text("INSERT INTO texts SELECT id, 0, 'in', 'out', NULL FROM people"))
        connection.execute(text("INSERT INTO vectors SELECT id, 'head', 7, 1, 2, :v FROM people"), {"v": bytes(8)})
    old.dispose()
    with open_store(empty_url) as store:
        person = store.person("acme", "ann")
        assert (person.version, person.texts) == (7, (PastText("in", "out"),))
        assert store.fitted("acme", "ann", "head").vector_J.tolist() == [0.0, 0.0]
        assert store.put_history("acme", "ann", [])[0].version == 8


def test_the_next_version_upgrades_and_this_one_then_refuses(empty_url, tmp_path, monkeypatch):
    with open_store(empty_url) as store:
        store.put_history("acme", "ann", [PastText("a", "b")])
        assert revision_of(store) == "0002"
    with monkeypatch.context() as later:
        later.setattr(database, "SCRIPTS", scripts_with_a_later_version(tmp_path))
        with open_store(empty_url) as store:
            assert revision_of(store) == "0003"
            assert store.person("acme", "ann").texts == (PastText("a", "b"),)
            with store.read() as connection:
                assert connection.execute(text("SELECT nickname FROM people")).scalar_one() == "none"
    with pytest.raises(NewerDatabase, match=r"has schema 0003, this Palate knows none after 0002.*newer Palate"):
        open_store(empty_url)


def test_a_migration_that_fails_leaves_the_database_as_it_was(empty_url, tmp_path, monkeypatch):
    open_store(empty_url).close()
    scripts = scripts_with_a_later_version(tmp_path)
    with (scripts / "versions" / "0003_later.py").open("a") as file:
        file.write("    op.execute('INSERT INTO nowhere VALUES (1)')\n")
    with monkeypatch.context() as later:
        later.setattr(database, "SCRIPTS", scripts)
        with pytest.raises(Exception, match="nowhere"):
            open_store(empty_url)
    with open_store(empty_url) as store:
        assert revision_of(store) == "0002"
        assert "nickname" not in {column["name"] for column in inspect(store.engine).get_columns("people")}


def test_replicas_that_start_at_once_open_one_database(empty_url):
    start = threading.Barrier(8)

    def replica(number):
        start.wait(timeout=30)
        with open_store(empty_url) as store:
            return store.put_history("acme", f"u{number}", [PastText("a", "b")])[0].version

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(replica, range(8))) == [1] * 8
    with open_store(empty_url) as store:
        assert store.count("acme") == 8


def test_threads_that_open_databases_of_their_own_at_once_do_not_mix_them_up(tmp_path):
    start = threading.Barrier(6)

    def program(number):
        start.wait(timeout=30)
        with open_store(f"sqlite:///{tmp_path}/{number}.db") as store:
            store.put_history("acme", f"u{number}", [PastText("a", "b")])
            return store.people("acme")

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(program, range(6))) == [[f"u{number}"] for number in range(6)]


def test_processes_that_start_at_once_open_one_database(empty_url):
    code = "import sys; from palate.users.store import *; s = open_store(sys.argv[1]); "
    code += "print(s.put_history('acme', sys.argv[2], [PastText('a', 'b')])[0].version)"
    platform = str(Path(database.__file__).parents[2])
    replicas = [
        subprocess.Popen(
            [sys.executable, "-c", code, empty_url, f"u{number}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": platform},
        )
        for number in range(3)
    ]
    done = [replica.communicate(timeout=120) for replica in replicas]
    assert [output for output, _ in done] == ["1\n"] * 3, done


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://root:hunter2@localhost/x", r"mysql://root:\*\*\*@localhost/x"),
        ("postgresql+asyncpg://localhost/x", r"postgresql\+asyncpg"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("palate.db", "cannot be read"),
    ],
)
def test_a_url_of_another_kind_is_refused_without_its_password(url, message):
    with pytest.raises(ValueError, match=message) as error:
        open_store(url)
    assert "expected sqlite:///FILE or postgresql" in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+pg8000"])
def test_postgresql_by_each_of_its_names(scheme):
    engine = connect(f"{scheme}://ann:hunter2@localhost:1/palate?sslmode=require")
    assert engine.url.drivername == "postgresql+pg8000"
    assert engine.url.password == "hunter2"
    with pytest.raises(ValueError, match="has sslmode=maybe; expected sslmode=disable"):
        connect(f"{scheme}://ann:hunter2@localhost:1/palate?sslmode=maybe")


def test_postgresqls_password_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "from/the environment")
    assert connect("postgresql://ann@localhost:1/palate").url.password == "from/the environment"
    assert connect("postgresql://ann:hunter2@localhost:1/palate").url.password == "hunter2"
    monkeypatch.delenv("PGPASSWORD")
    assert connect("postgresql://ann@localhost:1/palate").url.password is None


def test_a_sqlite_file_in_a_new_folder(tmp_path):
    with open_store(f"sqlite:///{tmp_path}/new folder/palate.db") as store:
        assert store.count("acme") == 0
    assert (tmp_path / "new folder" / "palate.db").is_file()


def test_sqlite_is_set_up_on_every_connection(tmp_path):
    with open_store(f"sqlite:///{tmp_path}/palate.db") as store, contextlib.ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(store.read())
            found = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                for name in ("journal_mode", "foreign_keys", "busy_timeout", "secure_delete")
            }
            assert found == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 30000, "secure_delete": 1}


def test_a_sqlite_reader_does_not_wait_for_a_writer(tmp_path):
    with open_store(f"sqlite:///{tmp_path}/palate.db") as store:
        store.put_history("acme", "ann", [PastText("a", "b")])
        with store.write() as connection:
            connection.execute(text("UPDATE people SET version = 9"))
            assert store.person("acme", "ann").version == 1
        assert store.person("acme", "ann").version == 9


def test_deletion_does_not_wait_for_a_sqlite_reader(tmp_path):
    """The log cannot be emptied while somebody reads an older state; the next deletion does it."""
    with open_store(f"sqlite:///{tmp_path}/palate.db") as store:
        for name in ("ann", "bob"):
            store.put_history("acme", name, [PastText("a", f"Zebras of {name}")])
        with store.read() as connection:
            assert connection.execute(text("SELECT count(*) FROM people")).scalar_one() == 2
            assert store.delete("acme", "ann")
            assert connection.execute(text("SELECT count(*) FROM people")).scalar_one() == 2
        assert store.delete("acme", "bob")
    assert b"Zebras" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_a_checkpoint_that_fails_leaves_the_connection_as_it_was(tmp_path):
    def deny(action, name, *_):
        refused = action == sqlite3.SQLITE_PRAGMA and name == "wal_checkpoint"
        return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK

    with open_store(f"sqlite:///{tmp_path}/palate.db") as store:
        with store.read() as connection:
            driver = connection.connection.driver_connection
        driver.set_authorizer(deny)
        with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
            store.clean_log()
        driver.set_authorizer(None)
        with store.read() as connection:
            assert connection.connection.driver_connection is driver  # the pool gives out the same one
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 30_000


def test_errors_of_the_database_name_no_parameters(store, caplog):
    """They end in logs, where nobody's texts belong; one row and many, by SQL and by the store."""
    secret = "Zebras at quarter past nine"
    row = {"person_id": 99, "position": 0, "input": secret, "output": secret}
    for rows in (row, [row, {**row, "position": 1}]):
        with pytest.raises(DBAPIError) as error, store.write() as connection:
            connection.execute(schema.texts.insert(), rows)
        assert "INSERT INTO texts" in str(error.value)
        assert "Zebras" not in str(error.value) + repr(error.value) + caplog.text
    with store.write() as connection:
        connection.execute(text("DROP TABLE texts"))
    with pytest.raises(DBAPIError) as error:
        store.put_history("acme", "ann", [PastText(secret, secret)])
    assert "Zebras" not in str(error.value) + repr(error.value) + caplog.text


def test_a_failed_transaction_is_undone(store):
    def fail():
        with store.write() as connection:
            connection.execute(schema.tenants.insert().values(tenant="acme", floor=1))
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    with store.read() as connection:
        assert connection.execute(schema.tenants.select()).all() == []


def test_foreign_keys_hold_in_both_databases(store):
    with pytest.raises(DBAPIError), store.write() as connection:
        connection.execute(schema.texts.insert().values(person_id=99, position=0, input="", output=""))


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_reader_cannot_write_on_postgresql(store):
    with pytest.raises(Exception, match="read-only"), store.read() as connection:
        connection.execute(schema.tenants.insert().values(tenant="acme", floor=1))


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_ids_are_ordered_by_code_point_whatever_postgresqls_locale(store):
    query = "SELECT collation_name FROM information_schema.columns WHERE table_name = 'people' AND column_name = :name"
    with store.read() as connection:
        for name in ("tenant", "user_id"):
            assert connection.execute(text(query), {"name": name}).scalar_one() == "C"


def test_a_database_that_cannot_be_opened_says_so(tmp_path):
    (tmp_path / "file").write_text("no database, but long enough to be read as the header of one" * 20)
    with pytest.raises(Exception, match="not a database"):
        open_store(f"sqlite:///{tmp_path}/file")
    with pytest.raises(DatabaseUnavailable, match=r"(?i)connection"):
        open_store("postgresql://palate@127.0.0.1:1/palate")


def test_a_database_without_room_is_told_from_a_wrong_statement_and_keeps_nothing_of_the_transaction(tmp_path):
    with open_store(f"sqlite:///{tmp_path}/palate.db") as store:
        store.put_history("acme", "ann", [PastText("", "kept")])

        @event.listens_for(store.engine, "connect")
        def fill(connection, record):
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {pages + 2}")

        store.engine.dispose()
        with pytest.raises(DatabaseUnavailable, match="full"):
            store.put_history("acme", "ann", [PastText("", "x" * 100_000)])
        assert store.export("acme", "ann")["texts"][0]["output"] == "kept"


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_connection_that_the_server_ends_is_said_to_be_away_and_the_next_one_works(store):
    with pytest.raises(DatabaseUnavailable), store.write() as connection:
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    store.put_history("acme", "ann", [PastText("", "here")])


def test_the_server_does_not_run_as_root(postgres_server):
    assert Path(postgres_server, "data").stat().st_uid != 0
