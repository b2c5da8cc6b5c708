"""The tables of the user store. A change here needs a migration: a test compares the two."""

from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)


class Moment(TypeDecorator[datetime]):
    """A time in UTC with its zone; SQLite, which knows no zones, holds it without."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# In order of code points in both databases, whatever the locale: pages of ids are cut by this order.
ID = String(128).with_variant(String(128, collation="C"), "postgresql")
NUMBER = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only what is called INTEGER

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _person() -> Column[int]:
    return Column("person_id", NUMBER, ForeignKey("people.id", ondelete="CASCADE"), primary_key=True)


# Above `floor` start the versions of a tenant's new people, so that nobody who is deleted and comes back gets a
# version a second time, and nothing about them has to stay behind for that.
tenants = Table(
    "tenants",
    metadata,
    Column("tenant", ID, primary_key=True),
    Column("floor", NUMBER, nullable=False),
)
# Ids are never given twice (AUTOINCREMENT), so a number that somebody holds never comes to mean another person.
people = Table(
    "people",
    metadata,
    Column("id", NUMBER, primary_key=True),
    Column("tenant", ID, nullable=False),
    Column("user_id", ID, nullable=False),
    Column("version", NUMBER, nullable=False),
    Column("created", Moment, nullable=False),
    Column("updated", Moment, nullable=False),
    Index("ix_people_tenant_user_id", "tenant", "user_id", unique=True),
    sqlite_autoincrement=True,
)
texts = Table(
    "texts",
    metadata,
    _person(),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("input", Text, nullable=False),
    Column("output", Text, nullable=False),
    Column("date", Text),
)
vectors = Table(
    "vectors",
    metadata,
    _person(),
    Column("head", ID, primary_key=True),
    Column("version", NUMBER, nullable=False),
    Column("cluster", Integer, nullable=False),
    Column("texts", Integer, nullable=False),
    Column("vector", LargeBinary, nullable=False),  # float32, little-endian
    Index("ix_vectors_head", "head", "person_id", "version"),  # who is out of date, without reading any vector
)
leases = Table(
    "leases",
    metadata,
    _person(),
    Column("head", ID, primary_key=True),
    Column("version", NUMBER, nullable=False),
    Column("owner", Text, nullable=False),
    Column("until", Double, nullable=False),  # seconds since 1970 by the database's clock
)
feedback = Table(
    "feedback",
    metadata,
    Column("id", NUMBER, primary_key=True),
    Column("person_id", NUMBER, ForeignKey("people.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("prompt", Text, nullable=False),
    Column("answer", Text, nullable=False),
    Column("edited", Text, nullable=False),
    Column("created", Moment, nullable=False),
    sqlite_autoincrement=True,
)
# People's rankings of images. The tenant is the person's, once more, so that an id is used once in a tenant.
rankings = Table(
    "rankings",
    metadata,
    Column("id", NUMBER, primary_key=True),
    Column("person_id", NUMBER, ForeignKey("people.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("tenant", ID, nullable=False),
    Column("name", ID, nullable=False),  # the id that clients know
    Column("prompt", Text, nullable=False),
    Column("model", ID),
    Column("created", Moment, nullable=False),
    Index("ix_rankings_tenant_name", "tenant", "name", unique=True),
    sqlite_autoincrement=True,
)
ranked_images = Table(
    "ranked_images",
    metadata,
    Column("ranking_id", NUMBER, ForeignKey("rankings.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),  # 0 is the best
    Column("digest", String(64), nullable=False, index=True),
)
# Images that no ranking may name: of deleted rankings, and of some that are just being stored. Their files are removed
# by whoever knows where they are, unless a ranking names them by then.
dropped_images = Table(
    "dropped_images",
    metadata,
    Column("tenant", ID, primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("due", Double, nullable=False),  # seconds since 1970 by the database's clock
)
keys = Table(
    "keys",
    metadata,
    Column("id", ID, primary_key=True),
    Column("tenant", ID, nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),  # SHA-256 of the secret
    Column("created", Moment, nullable=False),
    Column("revoked", Moment),
)
runs = Table(
    "runs",
    metadata,
    Column("id", NUMBER, primary_key=True),
    Column("name", ID, nullable=False),
    Column("url", Text, nullable=False),
    Column("head", ID, nullable=False),
    Column("base", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("added", Moment, nullable=False),
    Column("promoted", Moment),
    Index("ix_runs_name", "name", unique=True),
    sqlite_autoincrement=True,
)
promotions = Table(
    "promotions",
    metadata,
    Column("id", NUMBER, primary_key=True),
    Column("run_id", NUMBER, ForeignKey("runs.id", ondelete="SET NULL"), index=True),
    Column("name", ID, nullable=False),  # stays when the run is removed
    Column("promoted", Moment, nullable=False),
    Column("rolled_back", Moment),
    sqlite_autoincrement=True,
)
