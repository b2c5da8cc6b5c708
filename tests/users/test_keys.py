"""API keys: shown once, hashed, compared, revoked."""

import hashlib
import re
import secrets

import pytest
from sqlalchemy import select

from palate.users import keys, schema
from palate.users.keys import authenticate, create_key, list_keys, revoke


def test_a_key_belongs_to_its_tenant(store):
    first, second = create_key(store, "acme", "laptop"), create_key(store, "other", "CI, nightly")
    assert re.fullmatch(r"palate-[0-9a-f]{16}-[0-9a-f]{64}", first)
    key = authenticate(store, first)
    assert (key.tenant, key.name, key.revoked) == ("acme", "laptop", None)
    assert first.split("-")[1] == key.id
    assert authenticate(store, second).tenant == "other"
    assert [one.name for one in list_keys(store)] == ["laptop", "CI, nightly"]
    assert list_keys(store, "acme") == [key]


def test_the_database_holds_a_hash_and_not_the_secret(store):
    _, key_id, secret = create_key(store, "acme", "laptop").split("-")
    with store.read() as connection:
        row = connection.execute(select(schema.keys)).one()
    assert row.id == key_id
    assert row.digest == hashlib.sha256(secret.encode()).digest()
    assert secret not in str(row)
    assert bytes.fromhex(secret) not in row.digest


def test_wrong_keys_are_nobodys(store):
    key = create_key(store, "acme", "laptop")
    other = create_key(store, "acme", "phone")
    _, key_id, secret = key.split("-")
    _, other_id, _ = other.split("-")
    flipped = secret[:-1] + ("0" if secret[-1] != "0" else "1")
    wrong = [
        *("", "palate", "palate--", "Bearer " + key, key + "\n", key + "0", key[:-1], " " + key, key.upper()),
        *("palate-" + key_id, f"palate-{key_id}-", f"palate-{key_id}-{flipped}", f"palate-{other_id}-{secret}"),
        *(f"palate-{'0' * 16}-{secret}", f"palate-{key_id}-{hashlib.sha256(secret.encode()).hexdigest()}"),
        *(key.replace("palate", "palatf"), "é" * 88, "\0" * 88, "palate-" + "0" * 16 + "-" + "0" * 64),
    ]
    assert [one for one in wrong if authenticate(store, one) is not None] == []
    assert authenticate(store, key) is not None


@pytest.mark.parametrize("known", [True, False])
def test_digests_are_compared_in_constant_time_whether_the_id_is_known_or_not(store, known, monkeypatch):
    key = create_key(store, "acme", "laptop")
    compared = []

    def compare(one, other):
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    assert (authenticate(store, key if known else f"palate-{'0' * 16}-{'0' * 64}") is not None) is known
    assert authenticate(store, "nonsense") is None
    assert compared == [(32, 32)] * 2


def test_a_revoked_key_ends_and_stays_listed(store):
    key, other = create_key(store, "acme", "laptop"), create_key(store, "acme", "phone")
    key_id = key.split("-")[1]
    assert revoke(store, key_id)
    assert authenticate(store, key) is None
    assert authenticate(store, other) is not None
    ended = {one.name: one.revoked for one in list_keys(store, "acme")}
    assert ended["laptop"] is not None
    assert ended["phone"] is None
    assert not revoke(store, key_id)
    assert list_keys(store, "acme")[0].revoked == ended["laptop"]  # the first time counts
    assert not revoke(store, "nobody")


def test_keys_are_random(store, monkeypatch):
    asked = []
    real = secrets.token_hex

    def token_hex(size):
        asked.append(size)
        return real(size)

    monkeypatch.setattr(keys.secrets, "token_hex", token_hex)
    made = {create_key(store, "acme", "laptop") for _ in range(20)}
    assert len({key.split("-")[1] for key in made}) == len({key.split("-")[2] for key in made}) == 20
    assert asked.count(32) == 20  # 256 bits


def test_a_tenant_that_is_no_id_gets_no_key(store):
    with pytest.raises(ValueError, match="tenant is 'a/b'"):
        create_key(store, "a/b", "laptop")
    with pytest.raises(ValueError, match="name of the key"):
        create_key(store, "acme", "\0")
    assert list_keys(store) == []
