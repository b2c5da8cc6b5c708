"""From the rankings that people sent to a server to ranked lists: what the next run of jobs/lpo.py learns from.

The rows of one tenant are written down as records, best first, and read like any other rankings
(``palate.lpo.preparation``): an image that was ranked twice is one image, people's votes on a caption meet or stay
apart, captions and images that hang together are in one split. A record's id is the ranking's, so each edge of a list
names the rankings that it comes from.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

from palate import artifacts
from palate.artifacts import Artifact
from palate.config import scale
from palate.corpora.preparation import Runner, run_local
from palate.corpora.streams import CorpusError, absolute
from palate.lpo.preparation import ListsConfig, RankingsConfig
from palate.lpo.preparation import prepare as prepare_rankings
from palate.users.database import NewerDatabase
from palate.users.images import folder_of
from palate.users.records import Ranking
from palate.users.store import Store, open_store

PAGE = 1000  # rankings read at once


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig(ListsConfig):
    """Rankings that people sent to an image server, made into ranked lists."""

    database: str = scale()
    """URL of the server's user store."""
    images: str = scale()
    """What the server's setting `feedback` names: a folder or URL."""
    tenant: str
    """Whose people's rankings."""
    keep: Literal["embed", "reference"] = "embed"
    """Copy the images into the result, or name their files, which go when the person who ranked them is deleted."""


def prepare(config: FeedbackConfig, runner: Runner = run_local) -> Artifact:
    """The ranked lists at ``config.out``, made unless they are there.

    Raises:
        CorpusError: there are no rankings, or too many of their images are not there.
        ArtifactMismatch: something else is there, such as the lists of fewer rankings.
    """
    try:
        folder = folder_of(absolute(config.images), config.tenant)
        store = open_store(config.database)
    except (ValueError, NewerDatabase) as error:
        raise CorpusError(str(error)) from None
    records = f"{absolute(config.out).rstrip('/')}.feedback.jsonl"
    filesystem, path = artifacts.locate(records)
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    with store, filesystem.open(path, "w", encoding="utf-8") as stream:
        count = 0
        for ranking in every(store, config.tenant):
            stream.write(json.dumps(record(ranking), ensure_ascii=False) + "\n")
            count += 1
    try:
        if not count:
            raise CorpusError(f"--tenant {config.tenant} has no rankings in --database: see POST /v1/feedback")
        shared: dict[str, Any] = {one.name: getattr(config, one.name) for one in fields(ListsConfig)}
        how: Any = {"input": (records,), "format": "jsonl", "images": config.keep, "image_root": folder}
        return prepare_rankings(RankingsConfig(**shared, **how), runner)
    finally:
        filesystem.rm_file(path)


def every(store: Store, tenant: str) -> Iterator[Ranking]:
    """All rankings of a tenant, in the order in which they came."""
    last = 0
    while page := store.rankings(tenant, last, PAGE):
        yield from page
        last = page[-1].number


def record(ranking: Ranking) -> dict[str, Any]:
    """A ranking as the format ``jsonl`` of ``palate.corpora.rankings`` has it."""
    return {
        "id": ranking.id,
        "caption": ranking.prompt,
        "user_id": ranking.user_id,
        "date": ranking.created.isoformat(),
        "items": [{"image_uid": digest, "model": ranking.model} for digest in ranking.images],
    }
