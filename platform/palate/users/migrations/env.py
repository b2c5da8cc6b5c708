"""What alembic runs to migrate: the connection comes from ``palate.users.database.upgrade``, in its transaction."""

from alembic import context

from palate.users.database import VERSION_TABLE
from palate.users.schema import metadata


def migrate() -> None:
    context.configure(
        connection=context.config.attributes["connection"], target_metadata=metadata, version_table=VERSION_TABLE
    )
    with context.begin_transaction():
        context.run_migrations()


if __name__ == "env_py":  # alembic's name for this file; to import it by its own does nothing
    migrate()
