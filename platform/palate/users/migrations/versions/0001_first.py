"""The first schema. Frozen: it does not follow palate/users/schema.py."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

ID = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")
NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
MOMENT = sa.DateTime(timezone=True)


def _person() -> sa.Column[int]:
    return sa.Column("person_id", NUMBER, sa.ForeignKey("people.id", ondelete="CASCADE"), primary_key=True)


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("tenant", ID, primary_key=True),
        sa.Column("floor", NUMBER, nullable=False),
    )
    op.create_table(
        "people",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("tenant", ID, nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("version", NUMBER, nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.Column("updated", MOMENT, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_people_tenant_user_id", "people", ["tenant", "user_id"], unique=True)
    op.create_table(
        "texts",
        _person(),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("input", sa.Text, nullable=False),
        sa.Column("output", sa.Text, nullable=False),
        sa.Column("date", sa.Text),
    )
    op.create_table(
        "vectors",
        _person(),
        sa.Column("head", ID, primary_key=True),
        sa.Column("version", NUMBER, nullable=False),
        sa.Column("cluster", sa.Integer, nullable=False),
        sa.Column("texts", sa.Integer, nullable=False),
        sa.Column("vector", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_vectors_head", "vectors", ["head", "person_id", "version"])
    op.create_table(
        "leases",
        _person(),
        sa.Column("head", ID, primary_key=True),
        sa.Column("version", NUMBER, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("until", sa.Double, nullable=False),
    )
    op.create_table(
        "feedback",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("person_id", NUMBER, sa.ForeignKey("people.id", ondelete="CASCADE"), nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("edited", sa.Text, nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_feedback_person_id", "feedback", ["person_id"])
    op.create_table(
        "keys",
        sa.Column("id", ID, primary_key=True),
        sa.Column("tenant", ID, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.Column("revoked", MOMENT),
    )
    op.create_index("ix_keys_tenant", "keys", ["tenant"])
    op.create_table(
        "runs",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("name", ID, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("head", ID, nullable=False),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("added", MOMENT, nullable=False),
        sa.Column("promoted", MOMENT),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_runs_name", "runs", ["name"], unique=True)
    op.create_table(
        "promotions",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("run_id", NUMBER, sa.ForeignKey("runs.id", ondelete="SET NULL")),
        sa.Column("name", ID, nullable=False),
        sa.Column("promoted", MOMENT, nullable=False),
        sa.Column("rolled_back", MOMENT),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_promotions_run_id", "promotions", ["run_id"])
