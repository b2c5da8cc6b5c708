"""People: what they wrote (history), their vector for each model head, their feedback.

A history has a version, and a vector carries the version that it was fitted to: a vector whose version is smaller than
the history's is out of date and still served until a new one is fitted. A version never stands for two histories of
one person, so replicas may cache by it. Every method is one transaction (``claim_stale``: one for each lease), may be
called from any thread, and waits for the database: an event loop calls it through a thread.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from sqlalchemy import Connection, Row, Table, and_, delete, func, insert, or_, select, update

from palate.users.checks import MOST_CHARACTERS, MOST_TEXTS, require_id, require_text
from palate.users.database import Database, connect, upgrade
from palate.users.records import (
    ExportedPerson,
    Feedback,
    Fitted,
    Known,
    PastText,
    Person,
    Ranking,
    from_json,
    require_past_text,
    require_vector,
    to_json,
)
from palate.users.schema import (
    dropped_images,
    feedback,
    leases,
    people,
    ranked_images,
    rankings,
    tenants,
    texts,
    vectors,
)

_LESS = "delete the person, and store the texts that are still theirs"
ANNOUNCED_SECONDS = 3600.0  # longest that images are written before their ranking is stored


# What of a person is as long as clients make it.
_WRITTEN = {
    texts: (texts.c.input, texts.c.output, texts.c.date),
    feedback: (feedback.c.prompt, feedback.c.answer, feedback.c.edited),
    rankings: (rankings.c.prompt,),
}


class OtherRanking(ValueError):
    """The tenant has a ranking of this id that says something else."""


def open_store(url: str, *, patient: bool = False) -> "Store":
    """The store at ``sqlite:///FILE`` or ``postgresql://...``, ready for use.

    The schema is made or brought up to date first; any number of processes may open the same database at once.
    ``patient`` is for an operator's work, which may take a database longer than an answer may (``connect``).

    Raises:
        ValueError: the URL is of neither kind.
        NewerDatabase: a newer version of Palate has upgraded the database.
        DatabaseUnavailable: it cannot work just now.
    """
    upgrade(url)
    return Store(connect(url, patient=patient))


class Store(Database):
    """People by tenant and user id. Ids that ``require_id`` refuses raise ValueError in every method that writes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # Where the last search for people to fit ended, by head and tenant. Only saves looking at the same people
        # again: who may fit them is decided in the database.
        self._searched: dict[tuple[str, str | None], int] = {}

    def put_history(self, tenant: str, user_id: str, history: Sequence[PastText]) -> tuple[Known, bool]:
        """Replace a person's history; the person is created if new. Equal texts write nothing and keep the version.

        Returns the person, and whether anything changed. Versions grow by one; those of a person who was deleted and
        comes back go on above any that the tenant's deleted people had.

        Raises:
            ValueError: an id or a text that cannot be stored, by name; or more than is kept of one person.
        """
        given = tuple(history)
        for number, one in enumerate(given):
            require_past_text(one, f"texts[{number}]")
        with self.write() as connection:
            row = self._locked_or_new(connection, tenant, user_id)
            if (
                row.version
                and _count(connection, texts, row.id) == len(given)
                and _history(connection, row.id) == given
            ):
                return _known(row, len(given)), False
            connection.execute(delete(texts).where(texts.c.person_id == row.id))
            _insert_texts(connection, row.id, given)
            return _known(self._changed(connection, row), len(given)), True

    def add_feedback(self, tenant: str, user_id: str, prompt: str, answer: str, edited: str) -> Known:
        """Store feedback and append (prompt, edited) to the history; the person is created if new.

        Raises:
            ValueError: an id or a text that cannot be stored, by name; or more than is kept of one person.
        """
        for name, value in (("prompt", prompt), ("answer", answer), ("edited", edited)):
            require_text(value, name)
        with self.write() as connection:
            row = self._locked_or_new(connection, tenant, user_id)
            count = _count(connection, texts, row.id)
            for found, what in ((count, "texts"), (_count(connection, feedback, row.id), "edited answers")):
                if found >= MOST_TEXTS:
                    raise ValueError(
                        f"{user_id} has {MOST_TEXTS} {what}, the most that are kept of one person: {_LESS}"
                    )
            _insert_feedback(connection, row.id, prompt, answer, edited, _utc())
            last = connection.scalar(select(func.max(texts.c.position)).where(texts.c.person_id == row.id))
            _insert_texts(connection, row.id, [PastText(prompt, edited)], start=0 if last is None else last + 1)
            return _known(self._changed(connection, row), count + 1)

    def announce_images(self, tenant: str, digests: Sequence[str]) -> None:
        """Say that images are about to be written for a ranking. If that is not stored, ``remove_images`` removes them
        once ``ANNOUNCED_SECONDS`` have passed."""
        require_id(tenant, "tenant")
        with self.write() as connection:
            self._lock_images(connection, tenant)
            due = self.now() + ANNOUNCED_SECONDS
            same = and_(dropped_images.c.tenant == tenant, dropped_images.c.digest.in_(digests))
            connection.execute(update(dropped_images).where(same).values(due=due))
            for digest in digests:
                connection.execute(self.insert_new(dropped_images).values(tenant=tenant, digest=digest, due=due))

    def add_ranking(self, tenant: str, ranking: Ranking, keep: Callable[[], None]) -> Ranking:
        """Store a ranking; the person is created if new. One that is there already, by id and content, stays as it is.

        ``keep`` puts the images where they are not yet. It is called before the row is written, and while it runs no
        image of the tenant is removed: a ranking in the database never names an image that is not there.

        Raises:
            OtherRanking: the id is another ranking's.
            ValueError: an id or a text that cannot be stored, by name; or a person who has as many as are kept.
        """
        require_id(ranking.id, "id")
        require_text(ranking.prompt, "prompt")
        with self.write() as connection:
            row = self._locked_or_new(connection, tenant, ranking.user_id)
            self._lock_images(connection, tenant)
            query = _rankings().where(rankings.c.tenant == tenant, rankings.c.name == ranking.id)
            if found := _read_rankings(connection, query):
                if found[0].content == ranking.content:
                    return found[0]
                raise OtherRanking(f"{ranking.id!r} is the id of another ranking: give a new one, or the same content")
            if _count(connection, rankings, row.id) >= MOST_TEXTS:
                raise ValueError(f"{ranking.user_id} has {MOST_TEXTS} rankings, the most that are kept of one person")
            _require_room(connection, row, more=len(ranking.prompt))
            keep()
            stored = replace(ranking, created=_utc())
            values = {"name": stored.id, "prompt": stored.prompt, "model": stored.model, "created": stored.created}
            new = insert(rankings).values(person_id=row.id, tenant=tenant, **values).returning(rankings.c.id)
            number = connection.execute(new).scalar_one()
            images = [
                {"ranking_id": number, "position": place, "digest": one} for place, one in enumerate(stored.images)
            ]
            connection.execute(insert(ranked_images), images)
            named = and_(dropped_images.c.tenant == tenant, dropped_images.c.digest.in_(stored.images))
            connection.execute(delete(dropped_images).where(named))
            if not row.version:  # somebody of whom no text is known
                self._changed(connection, row)
            return replace(stored, number=number)

    def rankings(self, tenant: str, after: int = 0, limit: int = 1000) -> list[Ranking]:
        """Rankings of all people of a tenant in the order in which they came, from behind number ``after``."""
        query = _rankings().where(rankings.c.tenant == tenant, rankings.c.id > after)
        with self.read() as connection:
            return _read_rankings(connection, query.order_by(rankings.c.id).limit(limit))

    def remove_images(self, remove: Callable[[str, str], None], limit: int = 100) -> int:
        """Call ``remove`` with tenant and digest of images whose rankings were deleted, or never came, and that no
        ranking of the tenant names; how many were looked at. One that fails is tried again at the next call."""
        query = select(dropped_images.c.tenant, dropped_images.c.digest).order_by(*dropped_images.primary_key)
        with self.read() as connection:
            waiting = connection.execute(query.where(dropped_images.c.due <= self.now()).limit(limit)).all()
        for tenant in dict.fromkeys(row.tenant for row in waiting):
            some = [row.digest for row in waiting if row.tenant == tenant]
            with self.write() as connection:
                self._lock_images(connection, tenant)
                mine = and_(dropped_images.c.tenant == tenant, dropped_images.c.digest.in_(some))
                mine = and_(mine, dropped_images.c.due <= self.now())
                due = list(connection.scalars(select(dropped_images.c.digest).where(mine)))
                named = select(ranked_images.c.digest).join(rankings).where(rankings.c.tenant == tenant)
                used = set(connection.scalars(named.where(ranked_images.c.digest.in_(due))))
                for digest in due:
                    if digest not in used:
                        remove(tenant, digest)
                gone = and_(dropped_images.c.tenant == tenant, dropped_images.c.digest.in_(due))
                connection.execute(delete(dropped_images).where(gone))
        return len(waiting)

    def person(self, tenant: str, user_id: str) -> Person | None:
        with self.read() as connection:
            row = connection.execute(_by_id(tenant, user_id)).one_or_none()
            return None if row is None else _person(connection, row)

    def known(self, tenant: str, user_id: str) -> Known | None:
        """A person without the texts, which are counted and not read."""
        with self.read() as connection:
            row = connection.execute(_by_id(tenant, user_id)).one_or_none()
            return None if row is None else _known(row, _count(connection, texts, row.id))

    def feedback(self, tenant: str, user_id: str) -> list[Feedback]:
        """A person's feedback, oldest first; empty for someone unknown."""
        with self.read() as connection:
            return _feedback(connection, tenant, user_id)

    def people(self, tenant: str, after: str = "", limit: int = 100) -> list[str]:
        """User ids of a tenant in order, at most ``limit``, from the first one greater than ``after``."""
        query = select(people.c.user_id).where(people.c.tenant == tenant, people.c.user_id > after)
        with self.read() as connection:
            return list(connection.scalars(query.order_by(people.c.user_id).limit(limit)))

    def count(self, tenant: str) -> int:
        """How many people a tenant has."""
        with self.read() as connection:
            query = select(func.count()).select_from(people).where(people.c.tenant == tenant)
            return connection.execute(query).scalar_one()

    def delete(self, tenant: str, user_id: str) -> bool:
        """Delete everything about a person: history, vectors, feedback, rankings, leases. False if there is nobody.

        Images that they ranked are noted by their digests, until ``remove_images`` has removed those that no other
        ranking of the tenant names.

        No row about the person stays, not even a hash of the id: what keeps versions apart is one number per tenant.
        As to the bytes in the database's files: SQLite overwrites what it deletes with zeros, and the write-ahead log
        is emptied unless a reader is at work (then by the next deletion); PostgreSQL frees deleted rows when it
        vacuums. Either may keep copies from when it moved rows, which ``compact`` removes. Backups, and PostgreSQL's
        own log, are the operator's.
        """
        with self.write() as connection:
            row = connection.execute(_by_id(tenant, user_id).with_for_update()).one_or_none()
            if row is None:
                return False
            self._lock_images(connection, tenant)
            named = select(rankings.c.tenant, ranked_images.c.digest, self.now()).join(ranked_images)
            images = named.where(rankings.c.person_id == row.id).distinct()
            connection.execute(self.insert_new(dropped_images).from_select(["tenant", "digest", "due"], images))
            connection.execute(
                update(tenants)
                .where(tenants.c.tenant == tenant, tenants.c.floor < row.version)
                .values(floor=row.version)
            )
            connection.execute(delete(people).where(people.c.id == row.id))  # and, by ON DELETE CASCADE, the rest
        self.clean_log()
        return True

    def save_fitted(self, tenant: str, user_id: str, fitted: Fitted) -> bool:
        """Store a vector and end the lease on fitting it.

        False, and no vector is written, if the person is gone or has another version by now; a lease on fitting that
        outdated version ends too, so that the new one can be claimed at once.

        Raises:
            ValueError: the vector is not one-dimensional or has a number that is not finite.
        """
        require_vector(fitted)
        with self.write() as connection:
            row = connection.execute(_locked(tenant, user_id)).one_or_none()
            if row is None:
                return False
            if row.version != fitted.version:
                connection.execute(
                    delete(leases).where(
                        leases.c.person_id == row.id,
                        leases.c.head == fitted.head,
                        leases.c.version == fitted.version,
                    )
                )
                return False
            for table in (vectors, leases):
                connection.execute(delete(table).where(table.c.person_id == row.id, table.c.head == fitted.head))
            _insert_vector(connection, row.id, fitted)
            return True

    def fitted(self, tenant: str, user_id: str, head: str) -> Fitted | None:
        """The person's vector for a head, be it out of date or not. The array is read-only."""
        query = select(vectors).join(people).where(people.c.tenant == tenant, people.c.user_id == user_id)
        with self.read() as connection:
            row = connection.execute(query.where(vectors.c.head == head)).one_or_none()
        return None if row is None else _fitted(row)

    def current(self, tenant: str, user_id: str, head: str) -> tuple[int | None, int | None]:
        """Version of the history and version of the vector for a head; None for what is not there. One light query."""
        query = (
            select(people.c.version, vectors.c.version.label("fitted"))
            .outerjoin(vectors, and_(vectors.c.person_id == people.c.id, vectors.c.head == head))
            .where(people.c.tenant == tenant, people.c.user_id == user_id)
        )
        with self.read() as connection:
            row = connection.execute(query).one_or_none()
        return (None, None) if row is None else (row.version, row.fitted)

    def claim_stale(
        self, head: str, owner: str, *, seconds: float, limit: int = 1, tenant: str | None = None
    ) -> list[Person]:
        """People whose vector for ``head`` is missing or older than their history, leased to ``owner``.

        While a lease lives nobody else gets the person for that head, nor does the same owner again. It ends after
        ``seconds``, when a vector is saved, or by ``release`` or ``release_one``. A fit that fails may leave it to run
        out, which keeps others from trying the same at once. People whom somebody is writing to just now are passed
        over.

        To find that nobody is left takes a look at everybody (measured: 50 ms in 100,000 people, in both databases),
        so who asks again and again should wait in proportion to how long the last answer took.
        """
        if limit < 1:
            raise ValueError(f"limit is {limit}; expected at least 1")
        claimed: list[Person] = []
        start = self._searched.get((head, tenant), 0)
        place, end = start, None
        while len(claimed) < limit:
            found = self._find_stale(head, tenant, place, end, limit - len(claimed))
            if found:
                claimed += self._lease(found, head, owner, seconds)
                place = found[-1]
            elif end is None and start:
                place, end = 0, start  # once more from the beginning to where this search began
            else:
                break
        self._searched[head, tenant] = place
        return claimed

    def release(self, owner: str) -> int:
        """End all leases of an owner that stops; returns how many."""
        with self.write() as connection:
            return _drop_leases(connection, leases.c.owner == owner)

    def release_one(self, tenant: str, user_id: str, head: str, owner: str) -> bool:
        """End the lease on one person early, so that another may fit them; False if the owner has none."""
        person = select(people.c.id).where(people.c.tenant == tenant, people.c.user_id == user_id).scalar_subquery()
        condition = and_(leases.c.person_id == person, leases.c.head == head, leases.c.owner == owner)
        with self.write() as connection:
            return _drop_leases(connection, condition) > 0

    def missing(self, head: str, *, known_before: datetime | None = None) -> int:
        """How many people have no vector at all for a head; those who came after ``known_before`` are not counted."""
        query = select(func.count()).select_from(_with_vectors(head)).where(vectors.c.version.is_(None))
        if known_before is not None:
            query = query.where(people.c.created < known_before)
        with self.read() as connection:
            return connection.execute(query).scalar_one()

    def stale(self, head: str, tenant: str | None = None) -> int:
        """How many people's vectors for a head are missing or older than the history, leased or not."""
        query = select(func.count()).select_from(_with_vectors(head)).where(_is_stale())
        with self.read() as connection:
            return connection.execute(query if tenant is None else query.where(people.c.tenant == tenant)).scalar_one()

    def drop_head(self, head: str) -> int:
        """Delete the vectors of a head that is no longer served; returns how many."""
        with self.write() as connection:
            _drop_leases(connection, leases.c.head == head)
            return connection.execute(delete(vectors).where(vectors.c.head == head)).rowcount

    def export(self, tenant: str, user_id: str) -> dict[str, Any] | None:
        """Everything about a person as JSON values, for ``restore`` and for the person; None for someone unknown.

        Vectors are base64 of little-endian float32.
        """
        with self.read() as connection:
            row = connection.execute(_by_id(tenant, user_id)).one_or_none()
            if row is None:
                return None
            fits = connection.execute(select(vectors).where(vectors.c.person_id == row.id).order_by(vectors.c.head))
            said = _read_rankings(connection, _rankings().where(rankings.c.person_id == row.id).order_by(rankings.c.id))
            notes = _feedback(connection, tenant, user_id)
            return to_json(_person(connection, row), notes, [_fitted(one) for one in fits], said)

    def restore(self, tenant: str, exported: ExportedPerson | Mapping[str, Any]) -> Known:
        """Put back the texts and feedback that ``export`` gave, in this database or another, in place of those here.

        Version and times are this store's own, whatever the exported ones were, and the vectors are fitted anew: no
        import can hold up anybody else. Rankings stay as they are here: the images of others are not in an export.

        Raises:
            ValueError: something in ``exported`` is not as ``export`` writes it, by name; or it is more than is kept
                of one person.
        """
        person, notes = from_json(tenant, exported)
        with self.write() as connection:
            row = self._locked_or_new(connection, tenant, person.user_id)
            for table in (texts, feedback):
                connection.execute(delete(table).where(table.c.person_id == row.id))
            _insert_texts(connection, row.id, person.texts)
            for note in notes:
                _insert_feedback(connection, row.id, note.prompt, note.answer, note.edited, note.created)
            return _known(self._changed(connection, row), len(person.texts))

    def _locked_or_new(self, connection: Connection, tenant: str, user_id: str) -> Row[Any]:
        """The person's row, locked until the transaction ends; a new one has version 0, which nobody else sees."""
        require_id(tenant, "tenant")
        require_id(user_id, "user id")
        while True:
            row = connection.execute(_locked(tenant, user_id)).one_or_none()
            if row is not None:
                return row
            now = _utc()
            values = {"tenant": tenant, "user_id": user_id, "version": 0, "created": now, "updated": now}
            # Another may insert it first, or delete it before it is locked here: then look again.
            connection.execute(self.insert_new(people).values(**values))

    def _lock_images(self, connection: Connection, tenant: str) -> None:
        """Wait for whoever stores or removes images of the tenant, or deletes people, and have others wait for this
        transaction. After a person's row, never before: all take the two in this order."""
        connection.execute(self.insert_new(tenants).values(tenant=tenant, floor=0))
        connection.execute(select(tenants.c.tenant).where(tenants.c.tenant == tenant).with_for_update())

    def _next_version(self, connection: Connection, row: Row[Any]) -> int:
        if row.version:
            return int(row.version) + 1
        # Read after the row is there: whoever was deleting this person has then raised the floor.
        floor = connection.scalar(select(tenants.c.floor).where(tenants.c.tenant == row.tenant))
        return (floor or 0) + 1

    def _changed(self, connection: Connection, row: Row[Any]) -> Row[Any]:
        """Give a person whose texts were changed in this transaction the next version; their row afterwards.

        Raises:
            ValueError: more is there now than is kept of one person.
        """
        _require_room(connection, row)
        values = {"version": self._next_version(connection, row), "updated": _utc()}
        connection.execute(update(people).where(people.c.id == row.id).values(**values))
        return connection.execute(_by_id(row.tenant, row.user_id)).one()

    def _find_stale(self, head: str, tenant: str | None, after: int, end: int | None, limit: int) -> list[int]:
        """Row ids of people to fit whom nobody has leased, in order, as far as a reader sees."""
        query = self._unclaimed(head).where(people.c.id > after)
        if end is not None:
            query = query.where(people.c.id <= end)
        if tenant is not None:
            query = query.where(people.c.tenant == tenant)
        with self.read() as connection:
            return list(connection.scalars(query.order_by(people.c.id).limit(limit)))

    def _lease(self, found: list[int], head: str, owner: str, seconds: float) -> list[Person]:
        """Lease those people who are still to be fitted and whom nobody else has taken since they were found."""
        with self.write() as connection:
            lock = select(people.c.id).where(people.c.id.in_(found)).order_by(people.c.id)
            mine = list(connection.scalars(lock.with_for_update(skip_locked=True, key_share=True)))
            # A second statement, for it sees what was committed before the locks were had; no one can change it now.
            free = list(connection.scalars(self._unclaimed(head).where(people.c.id.in_(mine))))
            connection.execute(delete(leases).where(leases.c.person_id.in_(free), leases.c.head == head))
            rows = connection.execute(select(people).where(people.c.id.in_(free)).order_by(people.c.id)).all()
            for row in rows:
                values = {"person_id": row.id, "head": head, "version": row.version, "owner": owner}
                connection.execute(insert(leases).values(**values, until=self.now() + seconds))
            return [_person(connection, row) for row in rows]

    def _unclaimed(self, head: str) -> Any:
        live = and_(leases.c.person_id == people.c.id, leases.c.head == head, leases.c.until > self.now())
        source = _with_vectors(head).outerjoin(leases, live)
        return select(people.c.id).select_from(source).where(_is_stale(), leases.c.person_id.is_(None))


def _by_id(tenant: str, user_id: str) -> Any:
    return select(people).where(people.c.tenant == tenant, people.c.user_id == user_id)


def _locked(tenant: str, user_id: str) -> Any:
    """The person's row, for this transaction to write: others may refer to it but not change it (PostgreSQL)."""
    return _by_id(tenant, user_id).with_for_update(key_share=True)


def _with_vectors(head: str) -> Any:
    return people.outerjoin(vectors, and_(vectors.c.person_id == people.c.id, vectors.c.head == head))


def _is_stale() -> Any:
    return or_(vectors.c.version.is_(None), vectors.c.version < people.c.version)


def _drop_leases(connection: Connection, condition: Any) -> int:
    """Delete leases, except those that another transaction is replacing just now: waiting could end in a deadlock."""
    rows = select(leases.c.person_id, leases.c.head).where(condition).with_for_update(skip_locked=True)
    found = connection.execute(rows).all()
    for row in found:
        connection.execute(delete(leases).where(leases.c.person_id == row.person_id, leases.c.head == row.head))
    return len(found)


def _person(connection: Connection, row: Row[Any]) -> Person:
    history = _history(connection, row.id)
    return Person(row.tenant, row.user_id, row.version, history, row.created, row.updated)


def _known(row: Row[Any], count: int) -> Known:
    return Known(row.tenant, row.user_id, row.version, count, row.created, row.updated)


def _history(connection: Connection, person: int) -> tuple[PastText, ...]:
    query = select(texts.c.input, texts.c.output, texts.c.date).where(texts.c.person_id == person)
    return tuple(PastText(*one) for one in connection.execute(query.order_by(texts.c.position)))


def _count(connection: Connection, table: Table, person: int) -> int:
    return connection.execute(select(func.count()).where(table.c.person_id == person)).scalar_one()


def _require_room(connection: Connection, row: Row[Any], more: int = 0) -> None:
    """Raises ValueError if a person has more than ``MOST_CHARACTERS`` characters, or would have with ``more``."""
    found = more
    for table, columns in _WRITTEN.items():
        length = sum(func.coalesce(func.length(column), 0) for column in columns)
        found += connection.scalar(select(func.coalesce(func.sum(length), 0)).where(table.c.person_id == row.id))
    if found > MOST_CHARACTERS:
        raise ValueError(
            f"{row.user_id} would have {found} characters of texts, edited answers and rankings; at most "
            f"{MOST_CHARACTERS} are kept of one person: {_LESS}"
        )


def _feedback(connection: Connection, tenant: str, user_id: str) -> list[Feedback]:
    query = select(feedback).join(people).where(people.c.tenant == tenant, people.c.user_id == user_id)
    rows = connection.execute(query.order_by(feedback.c.id))
    return [Feedback(one.id, one.prompt, one.answer, one.edited, one.created) for one in rows]


def _rankings() -> Any:
    return select(rankings, people.c.user_id).join(people)


def _read_rankings(connection: Connection, query: Any) -> list[Ranking]:
    """The rankings of a query over ``_rankings()``, with their images."""
    rows = connection.execute(query).all()
    images: dict[int, list[str]] = {row.id: [] for row in rows}
    named = select(ranked_images).where(ranked_images.c.ranking_id.in_(list(images)))
    for one in connection.execute(named.order_by(*ranked_images.primary_key)):
        images[one.ranking_id].append(one.digest)
    return [
        Ranking(row.user_id, row.name, row.prompt, tuple(images[row.id]), row.model, row.created, row.id)
        for row in rows
    ]


def _fitted(row: Row[Any]) -> Fitted:
    vector_J = np.frombuffer(row.vector, dtype="<f4").astype(np.float32, copy=False)
    return Fitted(row.head, row.version, row.cluster, vector_J, row.texts)


def _insert_texts(connection: Connection, person: int, history: Sequence[PastText], start: int = 0) -> None:
    rows = [{"person_id": person, "position": start + place, **asdict(one)} for place, one in enumerate(history)]
    if rows:
        connection.execute(insert(texts), rows)


def _insert_feedback(
    connection: Connection, person: int, prompt: str, answer: str, edited: str, created: datetime
) -> None:
    values = {"prompt": prompt, "answer": answer, "edited": edited, "created": created}
    connection.execute(insert(feedback).values(person_id=person, **values))


def _insert_vector(connection: Connection, person: int, fitted: Fitted) -> None:
    values = {"head": fitted.head, "version": fitted.version, "cluster": int(fitted.cluster)}
    vector = np.asarray(fitted.vector_J).astype("<f4").tobytes()
    connection.execute(insert(vectors).values(person_id=person, **values, texts=int(fitted.texts), vector=vector))


def _utc() -> datetime:
    return datetime.now(UTC)
