"""The registry of runs: which trained runs are served, and which one is live.

A run is added, loaded by the replicas and served by name beside the live one; people's vectors are fitted for its head
("refitting"); it is promoted ("live"), and the one before it is "retired", to which ``roll_back`` can return.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, text, update

from palate.users.checks import require_id, require_text
from palate.users.database import Database
from palate.users.schema import promotions
from palate.users.schema import runs as runs_table

# Any number that others are unlikely to choose: who holds it changes the registry.
_REGISTRY_LOCK = 7_252_835_283_002


class RunState(StrEnum):
    ADDED = "added"
    REFITTING = "refitting"
    LIVE = "live"
    RETIRED = "retired"


class RunError(ValueError):
    """A run is not known, or not in a state for what was asked; the message says which and what to do."""


@dataclass(frozen=True)
class Run:
    """A trained run: where it is, the head that vectors are fitted for, the base model, and how far it has come.

    ``promoted``: when it was last promoted, if ever; rolling back to it does not count.
    """

    name: str
    url: str
    head: str
    base: str
    added: datetime
    promoted: datetime | None
    state: RunState


def add_run(database: Database, name: str, url: str, head: str, base: str) -> Run:
    """Add a run. To add the same once more changes nothing, so every replica may add what its configuration names.

    Raises:
        RunError: another run has this name.
        ValueError: a name or head that cannot be an id, a URL or base that cannot be stored.
    """
    require_id(name, "name of the run")
    require_id(head, "head of the run")
    require_text(url, "URL of the run")
    require_text(base, "base model of the run")
    with database.write() as connection:
        _lock(connection)
        row = connection.execute(select(runs_table).where(runs_table.c.name == name)).one_or_none()
        if row is None:
            values = {"name": name, "url": url, "head": head, "base": base, "added": datetime.now(UTC)}
            connection.execute(insert(runs_table).values(state=RunState.ADDED, **values))
        elif (row.url, row.head, row.base) != (url, head, base):
            raise RunError(
                f"run {name!r} is {row.url} (head {row.head}, base {row.base}); {url} (head {head}, base {base}) needs "
                "another name, or remove that run first"
            )
        return _run(_row(connection, name))


def runs(database: Database) -> list[Run]:
    """All runs, in the order in which they were added."""
    with database.read() as connection:
        return [_run(row) for row in connection.execute(select(runs_table).order_by(runs_table.c.id))]


def live_run(database: Database) -> Run | None:
    """The run that answers requests which name none; None before the first promotion."""
    with database.read() as connection:
        row = connection.execute(select(runs_table).where(runs_table.c.state == RunState.LIVE)).one_or_none()
        return None if row is None else _run(row)


def start_refit(database: Database, name: str) -> Run:
    """Note that people's vectors are being fitted for a run that is not live. A live run stays live.

    Raises:
        RunError: there is no such run.
    """
    with database.write() as connection:
        _lock(connection)
        if _row(connection, name).state != RunState.LIVE:
            _set_state(connection, name, RunState.REFITTING)
        return _run(_row(connection, name))


def promote(database: Database, name: str) -> Run:
    """Make a run the live one and retire the one that was. To promote the live run changes nothing.

    Raises:
        RunError: there is no such run.
    """
    with database.write() as connection:
        _lock(connection)
        row = _row(connection, name)
        if row.state != RunState.LIVE:
            now = datetime.now(UTC)
            connection.execute(insert(promotions).values(run_id=row.id, name=name, promoted=now))
            connection.execute(update(runs_table).where(runs_table.c.id == row.id).values(promoted=now))
            _make_live(connection, name)
        return _run(_row(connection, name))


def roll_back(database: Database) -> Run:
    """Return to the run that was live before the live one; called again, to the one before that.

    Promotions are kept and marked as rolled back, so a run that was rolled back from is not returned to unless it is
    promoted anew. Runs that were removed since are passed over.

    Raises:
        RunError: no run is live, or none was before.
    """
    with database.write() as connection:
        _lock(connection)
        query = (
            select(promotions.c.id, runs_table.c.name)
            .join(runs_table, runs_table.c.id == promotions.c.run_id)
            .where(promotions.c.rolled_back.is_(None))
            .order_by(promotions.c.id.desc())
        )
        standing = connection.execute(query).all()
        before = next((one for one in standing if one.name != standing[0].name), None)
        if before is None:
            live = f"{standing[0].name!r} is live and no other run was before it" if standing else "no run is live"
            raise RunError(f"cannot roll back: {live}; promote a run by name instead")
        undone = update(promotions).where(promotions.c.id > before.id, promotions.c.rolled_back.is_(None))
        connection.execute(undone.values(rolled_back=datetime.now(UTC)))
        _make_live(connection, before.name)
        return _run(_row(connection, before.name))


def remove_run(database: Database, name: str) -> None:
    """Forget a run that is not live. Its vectors stay, as another run may share the head: see ``Store.drop_head``.

    Raises:
        RunError: there is no such run, or it is live.
    """
    with database.write() as connection:
        _lock(connection)
        if _row(connection, name).state == RunState.LIVE:
            raise RunError(f"run {name!r} is live and cannot be removed; promote another run first, or roll back")
        connection.execute(delete(runs_table).where(runs_table.c.name == name))


def _lock(connection: Connection) -> None:
    """One change of the registry at a time; on SQLite every writer has that already."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _REGISTRY_LOCK})


def _row(connection: Connection, name: str) -> Row[Any]:
    row = connection.execute(select(runs_table).where(runs_table.c.name == name)).one_or_none()
    if row is None:
        known = list(connection.scalars(select(runs_table.c.name).order_by(runs_table.c.id)))
        raise RunError(f"there is no run {name!r}; there are {known}")
    return row


def _make_live(connection: Connection, name: str) -> None:
    connection.execute(update(runs_table).where(runs_table.c.state == RunState.LIVE).values(state=RunState.RETIRED))
    _set_state(connection, name, RunState.LIVE)


def _set_state(connection: Connection, name: str, state: RunState) -> None:
    connection.execute(update(runs_table).where(runs_table.c.name == name).values(state=state))


def _run(row: Row[Any]) -> Run:
    return Run(row.name, row.url, row.head, row.base, row.added, row.promoted, RunState(row.state))
