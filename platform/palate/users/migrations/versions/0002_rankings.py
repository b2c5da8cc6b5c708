"""Rankings of images, and images whose rankings were deleted. Frozen: it does not follow palate/users/schema.py."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

ID = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")
NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "rankings",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("person_id", NUMBER, sa.ForeignKey("people.id", ondelete="CASCADE"), nullable=False),
        sa.Column("tenant", ID, nullable=False),
        sa.Column("name", ID, nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("model", ID),
        sa.Column("created", MOMENT, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_rankings_person_id", "rankings", ["person_id"])
    op.create_index("ix_rankings_tenant_name", "rankings", ["tenant", "name"], unique=True)
    op.create_table(
        "ranked_images",
        sa.Column("ranking_id", NUMBER, sa.ForeignKey("rankings.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("digest", sa.String(64), nullable=False),
    )
    op.create_index("ix_ranked_images_digest", "ranked_images", ["digest"])
    op.create_table(
        "dropped_images",
        sa.Column("tenant", ID, primary_key=True),
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("due", sa.Double, nullable=False),
    )
