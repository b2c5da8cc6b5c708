import os
import subprocess
from collections import Counter

import pytest

from palate.corpora import git, preparation, schema
from palate.corpora.streams import CorpusError

BODY = "The old code waited for the lock. Now it does not."


class Repository:
    """A real repository whose commits have set authors and dates."""

    def __init__(self, path):
        self.path, self.seconds = path, 1_600_000_000
        path.mkdir()
        self.run("init", "--quiet", "--initial-branch=main")

    def run(self, *arguments, **variables):
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.path.parent),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_COMMITTER_NAME": "Committer",
            "GIT_COMMITTER_EMAIL": "committer@example.org",
            **variables,
        }
        return subprocess.run(
            ["git", "-C", str(self.path), *arguments], env=environment, check=True, capture_output=True, text=True
        ).stdout

    def commit(self, author, message, seconds=None):
        name, address = author.rstrip(">").split(" <")
        self.seconds += 60
        date = f"{seconds or self.seconds} +0200"
        who = {"GIT_AUTHOR_NAME": name, "GIT_AUTHOR_EMAIL": address}
        self.run(
            "commit", "--quiet", "--allow-empty", "--cleanup=verbatim", "-m", message, **who, GIT_AUTHOR_DATE=date,
            GIT_COMMITTER_DATE=f"{self.seconds} +0000",
        )  # fmt: skip


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "repository")


def prepared(repository, tmp_path, **options):
    options = {"min_texts": 1, "questions_per_user": 1, **options}
    config = git.GitConfig(repository=str(repository.path), out=str(tmp_path / "corpus"), **options)
    return preparation.prepare(git.recipe(config), config)


def test_a_whole_history(repository, tmp_path):
    (repository.path / ".mailmap").write_text("Ann Lee <ann@work.example> <al@old.example>\n")
    repository.run("add", ".mailmap")
    repository.commit(
        "Ann Lee <ann@work.example>", f"lock: wait less\n\n{BODY}\n\nSigned-off-by: Ann Lee <a@b.example>"
    )
    repository.commit("A. L. <al@old.example>", f"lock: do not wait\n\n{BODY} Ask ann@work.example why.\n\nFixes #12")
    repository.commit(
        "Bob Ray <bob@x.example>", f"docs: more\n\n{BODY}\nSee also.\n\nCo-authored-by: Ann <ann@work.example>"
    )
    repository.commit("dependabot[bot] <49699333+dependabot[bot]@users.noreply.github.com>", f"bump it\n\n{BODY}")
    repository.commit("Bob Ray <bob@x.example>", "no body")
    repository.commit("Bob Ray <bob@x.example>", f'Revert "docs: more"\n\n{BODY}')
    repository.run("switch", "--quiet", "-c", "side")
    repository.commit("Bob Ray <bob@x.example>", f"side: work\n\n{BODY} Twice.")
    repository.run("switch", "--quiet", "main")
    repository.run("merge", "--quiet", "--no-ff", "-m", f"Merge it\n\n{BODY}", "side",
                   GIT_AUTHOR_NAME="Bob Ray", GIT_AUTHOR_EMAIL="bob@x.example")  # fmt: skip
    corpus = prepared(repository, tmp_path)
    report = corpus.read_json("report.json")
    assert {name: report[name] for name in report if name.startswith(("commits", "trailers", "addresses"))} == {
        "commits": 8,
        "commits_by_bots": 1,
        "commits_merges": 1,
        "commits_with_generated_subject": 1,
        "commits_without_body": 1,
        "trailers_removed": 3,
        "addresses_removed": 1,
    }
    texts = schema.read_items(corpus), schema.read_questions(corpus)
    users = {text.output: text.user_id for text in [*texts[0], *texts[1]]}
    assert set(users) == {"lock: wait less", "lock: do not wait", "docs: more", "side: work"}
    assert users["lock: wait less"] == users["lock: do not wait"] != users["docs: more"] == users["side: work"]
    sources = {text.output: text.source for text in [*texts[0], *texts[1]]}
    assert sources["lock: wait less"] == BODY
    assert sources["lock: do not wait"] == f"{BODY} Ask why."
    assert sources["docs: more"] == f"{BODY} See also."
    assert {question.output for question in texts[1]} == {"lock: do not wait", "side: work"}
    whole = " ".join(text.source + text.input + text.output + text.user_id for text in [*texts[0], *texts[1]])
    assert "@" not in whole
    assert "Ann" not in whole


def test_questions_are_the_latest_by_author_date(repository, tmp_path):
    times = [50, 20, 30, 40, 10]
    for number, time in enumerate(times):
        repository.commit("Ann Lee <ann@x.example>", f"subject {number}\n\nbody {number}", seconds=1_600_000_000 + time)
    corpus = prepared(repository, tmp_path, questions_per_user=2, max_texts=4)
    assert [item.output for item in schema.read_items(corpus)] == ["subject 1", "subject 2"]
    assert {question.output for question in schema.read_questions(corpus)} == {"subject 3", "subject 0"}
    assert [item.date for item in schema.read_items(corpus)] == ["2020-09-13T12:27:00Z", "2020-09-13T12:27:10Z"]


def test_the_same_body_as_a_questions_is_no_history(repository, tmp_path):
    for number in range(3):
        repository.commit("Ann Lee <ann@x.example>", f"subject {number}\n\n{'Same' if number else 'Other'} body")
    corpus = prepared(repository, tmp_path)
    assert [item.output for item in schema.read_items(corpus)] == ["subject 0"]
    assert corpus.read_json("report.json")["leaked_items_same_source"] == 1


def test_an_edited_mailmap_or_a_new_commit_is_another_input(repository):
    repository.commit("Ann Lee <ann@x.example>", "subject\n\nbody")
    config = git.GitConfig(repository=str(repository.path), out="unused")
    before = git.recipe(config).inputs
    (repository.path / ".mailmap").write_text("Ann <ann@x.example>\n")
    edited = git.recipe(config).inputs
    repository.commit("Ann Lee <ann@x.example>", "subject 2\n\nbody")
    after = git.recipe(config).inputs
    assert before["commit"] == edited["commit"] != after["commit"]
    assert before["mailmap"] != edited["mailmap"]


def test_no_repository_and_no_revision(repository, tmp_path):
    with pytest.raises(CorpusError, match="not a git repository"):
        git.recipe(git.GitConfig(repository=str(tmp_path), out="unused"))
    repository.commit("Ann Lee <ann@x.example>", "subject\n\nbody")
    with pytest.raises(CorpusError, match="no commit 'v9'"):
        git.recipe(git.GitConfig(repository=str(repository.path), revision="v9", out="unused"))


def test_a_damaged_history_stops_with_gits_words(repository, tmp_path):
    for number in range(3):
        repository.commit("Ann Lee <ann@x.example>", f"subject {number}\n\nbody {number}")
    first = repository.run("rev-list", "--max-parents=0", "HEAD").strip()
    (repository.path / ".git" / "objects" / first[:2] / first[2:]).unlink()
    with pytest.raises(CorpusError, match="git log stopped"):
        prepared(repository, tmp_path)


def test_a_history_of_bots_says_what_was_left_out(repository, tmp_path):
    repository.commit("renovate[bot] <x@y.example>", "bump\n\nbody")
    with pytest.raises(CorpusError, match=r"found no usable record.*commits_by_bots"):
        prepared(repository, tmp_path)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("Ann Lee", "ann@a.example"), ("ann  LEE", "lee@b.example"), True),  # name
        (("Ann Lee", "alee@a.example"), ("Ann-Sophie Lee", "alee@b.example"), True),  # local part, a shared word
        (("alee", "alee@a.example"), ("Ann", "7+alee@users.noreply.github.com"), True),  # the login as name
        (("Daniel Lee", "daniel@a.example"), ("Daniel Ray", "daniel@b.example"), False),
        (("Ann Lee", "info@a.example"), ("Bob Lee", "info@b.example"), False),
        (("root", "root@a.example"), ("root", "root@b.example"), False),
        (("root", "ann@a.example"), ("root", "ann@a.example"), True),
        (("Ann Lee", "ann@a.example"), ("Bob Ray", "bob@b.example"), False),
    ],
)
def test_when_two_identities_are_one_person(one, other, same):
    users = git.user_ids([one, other])
    assert (users[one] == users[other]) == same


def test_user_ids_do_not_depend_on_order_and_are_plain_hashes():
    identities = [("Ann Lee", "ann@a.example"), ("Ann Lee", "b@b.example"), ("Bob", "bob@x.example")]
    users = git.user_ids(identities)
    assert users == git.user_ids(identities[::-1])
    import hashlib

    assert users["Bob", "bob@x.example"] == hashlib.sha256(b"bob@x.example").hexdigest()[:12]


@pytest.mark.parametrize(
    ("name", "address", "bot"),
    [
        ("github-actions[bot]", "x@y", True),
        ("Renovate Bot", "x@y", True),
        ("k8s-ci-robot", "x@y", True),
        ("Travis CI", "x@y", True),
        ("x", "release-bot@y", True),
        ("Ann Abbot", "abbot@robotics.example", False),
        ("Botond Lee", "botond@y", False),
    ],
)
def test_bots(name, address, bot):
    assert git.is_bot(name, address) == bot


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("Signed-off-by: A <a@b.example>", False),
        ("Co-authored-by: A <a@b.example>", False),
        ("Change-Id: I123", False),
        ("Cc: A <a@b.example>", False),
        ("Closes #12", False),
        ("Fixes: https://x.example/1", False),
        ("Ref: owner/name#3", False),
        ("See the manual for more.", True),
        ("Fixes the leak in the parser.", True),
        ("Note: this is prose", True),
        ("- list-item: with text", True),
    ],
)
def test_trailers(line, kept):
    commit = git.Commit("1", 1, "Ann", "a@b", "2020", f"subject\n\nbody\n{line}")
    counts = Counter()
    source, _ = git.body_and_subject(commit, counts, 1000)
    assert source == (f"body {line}" if kept else "body")
    assert counts["trailers_removed"] == (not kept)


def test_a_long_body_is_left_out():
    counts = Counter()
    assert git.body_and_subject(git.Commit("1", 1, "Ann", "a@b", "", f"s\n\n{'x' * 11}"), counts, 10) is None
    assert counts["commits_with_long_body"] == 1
