"""API keys: each belongs to a tenant and is shown once. The database holds only a hash of its secret.

A secret is 256 random bits, so a plain SHA-256 is enough: there is no password to guess.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row, insert, select, update

from palate.users.checks import require_id, require_text
from palate.users.database import Database
from palate.users.schema import keys

_KEY = re.compile(r"palate-([0-9a-f]{16})-([0-9a-f]{64})")
_NO_DIGEST = bytes(32)  # no secret has it


@dataclass(frozen=True)
class Key:
    """What is known of a key, without its secret."""

    id: str
    tenant: str
    name: str
    created: datetime
    revoked: datetime | None


def create_key(database: Database, tenant: str, name: str) -> str:
    """A new key of a tenant, ``palate-<id>-<secret>``. It cannot be shown again; ``name`` says what it is for.

    Raises:
        ValueError: the tenant cannot be an id, or the name cannot be stored.
    """
    require_id(tenant, "tenant")
    require_text(name, "name of the key")
    key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
    values = {"id": key_id, "tenant": tenant, "name": name, "digest": _digest(secret), "created": datetime.now(UTC)}
    with database.write() as connection:
        connection.execute(insert(keys).values(**values))
    return f"palate-{key_id}-{secret}"


def authenticate(database: Database, key: str) -> Key | None:
    """Whose key it is; None for one that is malformed, unknown, wrong or revoked.

    Each of these takes the same query and the same comparison, whose time does not depend on the digests.
    """
    match = _KEY.fullmatch(key)
    key_id, secret = match.groups() if match else ("", "")
    with database.read() as connection:
        row = connection.execute(select(keys).where(keys.c.id == key_id)).one_or_none()
    equal = hmac.compare_digest(_digest(secret), _NO_DIGEST if row is None else row.digest)
    return _key(row) if equal and row is not None and row.revoked is None else None


def revoke(database: Database, key_id: str) -> bool:
    """End a key by its id, for good. False if there is no such key or it was revoked before."""
    with database.write() as connection:
        query = update(keys).where(keys.c.id == key_id, keys.c.revoked.is_(None)).values(revoked=datetime.now(UTC))
        return connection.execute(query).rowcount > 0


def list_keys(database: Database, tenant: str | None = None) -> list[Key]:
    """All keys, revoked ones too, or those of one tenant; oldest first."""
    query = select(keys).order_by(keys.c.created, keys.c.id)
    with database.read() as connection:
        rows = connection.execute(query if tenant is None else query.where(keys.c.tenant == tenant))
        return [_key(row) for row in rows]


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _key(row: Row[Any]) -> Key:
    return Key(row.id, row.tenant, row.name, row.created, row.revoked)
