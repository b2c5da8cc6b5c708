"""Any git history as a text corpus: the author's subject line for the body of each commit message.

Authors are merged by ``.mailmap`` (git does that), by equal name, and by equal local part of the address where the
names agree with it; a person's id is the beginning of the SHA-256 of the smallest address, without salt, so the same
history gives the same ids everywhere. It hides addresses from readers, not from whoever has the history. Commits by
bots, merges, generated subjects and commits without a body are left out, trailers and addresses are removed from the
texts; all of it is counted.
"""

import hashlib
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO

from palate.config import scale
from palate.corpora.entries import Chunk, chunked, entry
from palate.corpora.people import Rules, connected
from palate.corpora.preparation import PrepareConfig, Recipe
from palate.corpora.schema import Task, normalized
from palate.corpora.streams import CorpusError, absolute
from palate.progress import track

INSTRUCTION = "Write the subject line of the following commit message: {source}"

_FIELD, _COMMIT = "\x1f", b"\0"
_COMMITS = "%H%x1f%P%x1f%aN%x1f%aE%x1f%at%x1f%B"
_AUTHORS = "%aN%x1f%aE"
_BOT = re.compile(
    r"\[bot\]|(?<![a-z])(ro|build)?bot(?![a-z])|\b(dependabot|renovate|greenkeeper|pre-commit-ci|github.actions|"
    r"copybara|jenkins|travis|weblate|transifex|autoroller?|ci.user)\b",
    re.IGNORECASE,
)
_GENERATED = re.compile(r'(Revert "|Reapply "|Merge (branch|pull request|remote|tag|commit)\b|(fixup|squash|amend)! )')
# "Signed-off-by: …" and other hyphenated keys; the short ones only with what trailers hold: a reference or an address.
_TRAILER = re.compile(
    r"\s*(?:[A-Za-z]+(?:-[A-Za-z]+)+:\s|(?:cc|bug|fix|fixes|fixed|close|closes|closed|resolves|ref|refs|issue|link|pr|see)"
    r":?\s+(?:#\d|GH-\d|https?://|[\w.-]+/[\w.-]+#\d|\S+@\S+|.*<\S+@\S+>))",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"<?\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+>?")
_NOREPLY = re.compile(r"(?:\d+\+)?(.+)@users\.noreply\.github\.com")
# Local parts and names that many people have.
_GENERIC = frozenset(
    {"admin", "anonymous", "bugs", "code", "contact", "dev", "developer", "email", "git", "github", "hello", "hi"}
    | {"info", "mail", "me", "no-reply", "nobody", "none", "noreply", "patches", "root", "support", "test", "unknown"}
    | {"user", "webmaster", "work"}
)


@dataclass(frozen=True, kw_only=True)
class GitConfig(PrepareConfig):
    """The history of a git repository: who wrote which subject line."""

    repository: str = scale()  # a local clone, bare or not
    revision: str = "HEAD"  # commits that are reachable from here
    instruction: str = INSTRUCTION  # what the model is asked; {source} stands for the body
    questions_per_user: int = 4  # an author's latest commits, asked as questions instead of kept as history
    min_texts: int = 12  # authors with fewer usable commits are dropped and counted
    max_texts: int = 200  # an author's latest commits that are looked at; 0: all
    max_characters: int = 20_000  # longer bodies (logs, dumps) are left out and counted


@dataclass(frozen=True)
class Commit:
    """One commit as git shows it; name and address are after ``.mailmap``, ``date`` is the author's, in UTC."""

    sha: str
    parents: int
    name: str
    address: str
    date: str
    message: str


def recipe(config: GitConfig) -> Recipe:
    """What to read for ``config``.

    Raises:
        CorpusError: there is no git repository, or no such revision.
    """
    head = resolve(config.repository, config.revision)
    if "{source}" not in config.instruction:
        raise CorpusError(f"--instruction {config.instruction!r} must hold {{source}}, where the body goes")
    mailmap = Path(config.repository) / ".mailmap"
    authors = user_ids(identities(config.repository, head))
    rules = Rules(
        Task("git", "text", title_template='"{output}" is the subject for "{source}"'),
        config.instruction,
        hold_out=config.questions_per_user,
        min_texts=config.min_texts,
        max_texts=config.max_texts,
    )
    return Recipe(
        rules=rules,
        units=[(absolute(config.repository), head)],
        names=[f"{config.repository} at {head[:12]}"],
        read=partial(read, authors=authors, max_characters=config.max_characters),
        inputs={
            "commit": head,
            "mailmap": hashlib.sha256(mailmap.read_bytes() if mailmap.is_file() else b"").hexdigest(),
        },
        counts={"identities": len(authors), "authors": len(set(authors.values()))},
    )


def resolve(repository: str, revision: str) -> str:
    """The full hash of a revision.

    Raises:
        CorpusError: with git's words.
    """
    command = [
        "git",
        "-C",
        repository,
        "rev-parse",
        "--verify",
        "--quiet",
        "--end-of-options",
        f"{revision}^{{commit}}",
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        reason = found.stderr.strip() or f"it has no commit {revision!r}"
        raise CorpusError(f"--repository {repository} --revision {revision}: {reason}")
    return found.stdout.strip()


def commits(repository: str, revision: str) -> Iterator[Commit]:
    """Every commit, oldest first, parents before children.

    Raises:
        CorpusError: git stopped with an error, for example because objects are missing.
    """
    for record in _log(repository, revision, _COMMITS):
        sha, parents, name, address, seconds, message = record.split(_FIELD, 5)
        date = datetime.fromtimestamp(int(seconds or 0), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        yield Commit(sha.strip(), len(parents.split()), *_identity(name, address), date, message)


def identities(repository: str, revision: str) -> set[tuple[str, str]]:
    """The (name, address) of every author, as in ``commits``."""
    return {_identity(*record.split(_FIELD, 1)) for record in _log(repository, revision, _AUTHORS)}


def read(unit: tuple[str, str], *, authors: Mapping[tuple[str, str], str], max_characters: int) -> Iterator[Chunk]:
    """The entries of one history, in chunks, with what was left out."""
    counts: Counter[str] = Counter()

    def entries() -> Iterator[dict]:
        for row, commit in enumerate(commits(*unit)):
            text = body_and_subject(commit, counts, max_characters)
            if text is not None:
                user = authors[commit.name, commit.address]
                source, output = text
                yield entry(row, 0, commit.sha[:16], source, user_id=user, output=output, date=commit.date)

    return chunked(entries(), counts)


def body_and_subject(commit: Commit, counts: Counter[str], max_characters: int) -> tuple[str, str] | None:
    """The cleaned body and subject, or None for a commit that is left out; ``counts`` says why and what was removed."""
    counts["commits"] += 1
    if commit.parents > 1:
        counts["commits_merges"] += 1
        return None
    if is_bot(commit.name, commit.address):
        counts["commits_by_bots"] += 1
        return None
    subject, _, body = commit.message.replace("\r\n", "\n").strip().partition("\n\n")
    if _GENERATED.match(subject):
        counts["commits_with_generated_subject"] += 1
        return None
    lines = body.splitlines()
    kept = [line for line in lines if not _TRAILER.match(line)]
    body, in_body = _ADDRESS.subn("", " ".join(" ".join(kept).split()))
    subject, in_subject = _ADDRESS.subn("", " ".join(subject.split()))
    source, output = " ".join(body.split()), " ".join(subject.split())
    if not source or not output:
        counts["commits_without_body"] += 1
        return None
    if len(source) > max_characters:
        counts["commits_with_long_body"] += 1
        return None
    counts["trailers_removed"] += len(lines) - len(kept)
    counts["addresses_removed"] += in_body + in_subject
    return source, output


def is_bot(name: str, address: str) -> bool:
    return bool(_BOT.search(name) or _BOT.search(address.partition("@")[0]))


def user_ids(identities: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The person of each (name, address): hashed, equal for identities that are one person's.

    Equal names are one person. Equal local parts are, where the names share a word that is not the local part itself
    (daniel@a and daniel@b may well be two Daniels), or where one of the names is the local part (a login).
    """
    ordered = sorted(set(identities))
    names = [normalized(name) for name, _ in ordered]
    locals_ = [local_part(address) for _, address in ordered]
    edges = []
    by_name, by_local = defaultdict(list), defaultdict(list)
    for index, (name, local) in enumerate(zip(names, locals_, strict=True)):
        by_name[name].append(index)
        by_local[local].append(index)
    for name, members in by_name.items():
        # A name that says nothing is one person's only together with the address.
        groups = [members] if name and name not in _GENERIC else _equal_addresses(members, ordered)
        edges += [(group[0], other) for group in groups for other in group[1:]]
    for local, members in by_local.items():
        if local and local not in _GENERIC:
            edges += [
                (one, other)
                for position, one in enumerate(members)
                for other in members[position + 1 :]
                if _names_agree(names[one], names[other], local)
            ]
    people = connected(len(ordered), edges)
    smallest: dict[int, str] = {}
    for person, (name, address) in zip(people, ordered, strict=True):
        smallest[person] = min(smallest.get(person, address or name), address or name)
    return {
        identity: hashlib.sha256(smallest[person].encode()).hexdigest()[:12]
        for person, identity in zip(people, ordered, strict=True)
    }


def local_part(address: str) -> str:
    """The part before the @, or the login of GitHub's no-reply addresses."""
    login = _NOREPLY.fullmatch(address)
    return (login.group(1) if login else address.partition("@")[0]).lower()


def _equal_addresses(members: list[int], ordered: list[tuple[str, str]]) -> list[list[int]]:
    groups = defaultdict(list)
    for index in members:
        groups[ordered[index][1]].append(index)
    return list(groups.values())


def _names_agree(one: str, other: str, local: str) -> bool:
    return local in (one, other) or bool(set(one.split()) & set(other.split()) - {local})


def _identity(name: str, address: str) -> tuple[str, str]:
    return name.strip(), address.strip().lower()


def _log(repository: str, revision: str, form: str) -> Iterator[str]:
    """What ``git log`` prints for each commit, parents before children."""
    git = ["git", "-C", repository, "-c", "i18n.logOutputEncoding=UTF-8", "-c", "log.showSignature=false"]
    counted = subprocess.run([*git, "rev-list", "--count", revision], capture_output=True, text=True, check=False)
    total = int(counted.stdout) if counted.returncode == 0 else None
    command = [*git, "log", "-z", "--topo-order", "--reverse", f"--format={form}", revision]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for record in track(_records(process.stdout), "git log", total):
                yield record.decode(errors="replace")
        except BaseException:
            process.kill()  # the reader stopped early; git would wait for it
            raise
        message = process.stderr.read().decode(errors="replace").strip()
        if process.wait():
            raise CorpusError(f"--repository {repository}: git log stopped: {message}")


def _records(stream: IO[bytes]) -> Iterator[bytes]:
    """The parts of a stream between NUL bytes."""
    rest = b""
    while block := stream.read(1 << 16):
        *complete, rest = (rest + block).split(_COMMIT)
        yield from complete
    if rest.strip():
        yield rest
