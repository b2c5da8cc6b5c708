"""Administration of a server's database, by the commands of docs/serving.md."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from palate.corpora.worlds import personas
from palate.users.keys import authenticate
from palate.users.records import PastText
from palate.users.runs import live_run, promote
from palate.users.store import open_store
from toy_serving import make_run

ADMIN = Path(__file__).resolve().parents[2] / "serve" / "admin.py"


@pytest.fixture
def admin(tmp_path, monkeypatch, capsys):
    """Runs a command on a database of this test's own; what it prints."""

    def run(command: str, *arguments: str) -> str:
        words = [command, "--database", f"sqlite:///{tmp_path}/palate.db", *arguments]
        monkeypatch.setattr(sys, "argv", [str(ADMIN), *words])
        runpy.run_path(str(ADMIN), run_name="__main__")
        return capsys.readouterr().out.strip()

    return run


def test_keys_are_made_listed_and_revoked(admin, tmp_path):
    key = admin("key-create", "--tenant", "acme", "--name", "app")
    with open_store(f"sqlite:///{tmp_path}/palate.db") as store:
        found = authenticate(store, key)
        assert found is not None
        assert found.tenant == "acme"
        listed = admin("key-list")
        assert listed == f"{found.id}  acme  app  valid"
        assert key not in listed
        admin("key-revoke", "--id", found.id)
        assert authenticate(store, key) is None
    assert admin("key-list").endswith("revoked")
    with pytest.raises(SystemExit, match="there is no valid key with this id"):
        admin("key-revoke", "--id", found.id)


def test_an_exported_person_is_imported(admin, tmp_path):
    file = tmp_path / "ann.json"
    with open_store(f"sqlite:///{tmp_path}/palate.db") as store:
        store.put_history("acme", "ann", [PastText("a", "b")])
        store.add_feedback("acme", "ann", "p", "a", "e")
        file.write_text(json.dumps(store.export("acme", "ann")))
        assert admin("person-import", "--tenant", "rival", "--file", str(file)) == "ann: 2 texts"
        assert store.person("rival", "ann").texts == store.person("acme", "ann").texts
        assert len(store.feedback("rival", "ann")) == 1
        for content in ("[]", "{}", "no JSON"):
            file.write_text(content)
            with pytest.raises(SystemExit, match="admin: "):
                admin("person-import", "--tenant", "rival", "--file", str(file))
        assert store.known("rival", "ann").version == 1


def test_runs_are_added_promoted_rolled_back_and_removed(admin, tmp_path):
    corpus = personas.prepare(personas.PersonasConfig(out=str(tmp_path / "corpus"), people=6, items=6, questions=1))
    first, second = (make_run(str(tmp_path / name), corpus.url, seed) for seed, name in enumerate(("first", "second")))
    with open_store(f"sqlite:///{tmp_path}/palate.db") as store:
        store.put_history("acme", "ann", [PastText("a", "b")])
        assert "state=added" in admin("run-add", "--run", first)
        assert "state=live" in admin("run-promote", "--name", "first", "--now")
        admin("run-add", "--run", second, "--name", "better")
        assert "state=refitting" in admin("run-promote", "--name", "better")
        assert admin("run-list").count("people to fit: 1") == 2
        promote(store, "better")  # as a replica does when everybody is fitted
        assert "name=first" in admin("run-roll-back")
        assert live_run(store).name == "first"
        with pytest.raises(SystemExit, match="'first' is live and cannot be removed"):
            admin("run-remove", "--name", "first")
        admin("run-remove", "--name", "better")
    assert "better" not in admin("run-list")
    with pytest.raises(SystemExit, match="no finished artifact"):
        admin("run-add", "--run", str(tmp_path / "nothing"))
    assert admin("compact") == ""
