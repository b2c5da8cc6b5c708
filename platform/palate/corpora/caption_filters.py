"""Filters of image-text samples: on the columns that published data sets have, on captions and on images.

A column is called differently in each data set: a filter takes the first of ``COLUMNS`` that a sample has. A sample
without a value does not pass; a shard in which no sample has the column is an error.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from palate import config as configs
from palate.corpora import image_text
from palate.corpora.streams import CorpusError

COLUMNS: dict[str, tuple[str, ...]] = {
    "status": ("status",),
    "language": ("LANGUAGE", "language", "lang"),
    "unsafe": ("punsafe", "nsfw_score", "nsfw_score_opennsfw2", "nsfw_score_gantman", "NSFW", "nsfw"),
    "watermark": ("pwatermark", "watermark_score", "watermark"),
    "similarity": (
        "similarity",
        "clip_similarity",
        "clip_score",
        "clip_similarity_vitl14",
        "clip_l14_similarity_score",
        "clip_similarity_vitb32",
        "clip_b32_similarity_score",
    ),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2", "AESTHETIC_SCORE"),
    "licence": ("LICENSE", "license", "licence"),
}
NSFW_WORDS = {"UNLIKELY": 0.0, "UNSURE": 0.5, "NSFW": 1.0}  # LAION-400M's column
PATIENCE = 100  # samples of a shard after which a column that none had is missed

BOMB = "an image of too many pixels"
CORRUPT = "an image that cannot be decoded"
STATUS = "status is not success"
LANGUAGE, UNSAFE, WATERMARK, SIMILARITY, AESTHETIC = "language", "unsafe", "watermark", "similarity", "aesthetic score"
SHORT, LONG = "a short caption", "a long caption"
SMALL, NARROW = "a small image", "a narrow image"
CONTAMINATED = "near an evaluation image"
EQUAL, NEAR = "equal to an earlier image", "near an earlier image"

BROKEN = (
    image_text.CUT_OFF,
    image_text.RECORD,
    image_text.MEMBERS,
    image_text.TOO_LARGE,
    image_text.NO_IMAGE,
    image_text.NOT_UTF8,
    image_text.NO_CAPTION,
    image_text.FORM,
    BOMB,
    CORRUPT,
)
# In the order in which they are looked for: a sample has the first that holds.
REASONS = (
    STATUS,
    *BROKEN[:-2],
    image_text.NOT_ONE_IMAGE,
    LANGUAGE,
    UNSAFE,
    WATERMARK,
    SIMILARITY,
    AESTHETIC,
    SHORT,
    LONG,
    *BROKEN[-2:],
    SMALL,
    NARROW,
    CONTAMINATED,
    EQUAL,
    NEAR,
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a sample must be like. None: not looked at."""

    language: tuple[str, ...] = ()
    """Values of the language column, such as en."""
    max_unsafe: float | None = None
    """Of punsafe, nsfw_score… ; LAION's words count as UNLIKELY 0, UNSURE 0.5, NSFW 1."""
    max_watermark: float | None = None
    """Of pwatermark or watermark_score."""
    min_similarity: float | None = None
    """Of similarity, clip_score… between image and caption."""
    min_aesthetic: float | None = None
    """Of aesthetic or aesthetic_score."""
    column: tuple[str, ...] = ()
    """Where a filter's column has another name, or several are there: similarity=clip_similarity_vitb32."""
    min_caption: int = 1
    """Characters."""
    max_caption: int | None = None
    """Characters."""
    min_side: int = 1
    """Pixels of the shorter side, as decoded."""
    max_aspect: float | None = None
    """Longer over shorter side."""
    max_pixels: int = 89_478_485
    """Larger images are not decoded; the default is Pillow's warning level."""

    def __post_init__(self) -> None:
        configs.require_at_least(self, 1, "max_pixels", "min_side")
        configs.require_at_least(self, 0, "min_caption")
        bounds = ("max_unsafe", "max_watermark", "min_similarity", "min_aesthetic", "max_caption")
        configs.require(self, lambda value: value is None or math.isfinite(value), "a number", *bounds)
        configs.require(self, lambda value: value is None or value >= 1, "at least 1", "max_aspect")
        self.columns()

    def columns(self) -> dict[str, tuple[str, ...]]:
        """The names that each filter's column may have.

        Raises:
            ValueError: ``column`` is not of the form.
        """
        given = {}
        for text in self.column:
            role, _, name = text.partition("=")
            if role not in COLUMNS or not name:
                raise ValueError(f"--column is FILTER=COLUMN with a filter of {', '.join(COLUMNS)}; got {text!r}")
            given[role] = (name,)
        return {**COLUMNS, **given}

    def filters(self) -> dict[str, tuple[str, float, float]]:
        """Of each filter on a number that is asked for: reason, least and greatest value."""
        found: dict[str, tuple[str, float, float]] = {}
        for role, reason, greatest in (
            ("unsafe", UNSAFE, self.max_unsafe),
            ("watermark", WATERMARK, self.max_watermark),
        ):
            if greatest is not None:
                found[role] = (reason, -math.inf, greatest)
        for role, reason, least in (
            ("similarity", SIMILARITY, self.min_similarity),
            ("aesthetic", AESTHETIC, self.min_aesthetic),
        ):
            if least is not None:
                found[role] = (reason, least, math.inf)
        return found


class ColumnFilters:
    """The filters on columns, for the samples of one shard, whose columns it gets to know."""

    def __init__(self, limits: Limits, url: str) -> None:
        self._limits, self._url, self._columns, self._filters = limits, url, limits.columns(), limits.filters()
        self._asked = [*self._filters, *(["language"] if limits.language else [])]
        self._names: set[str] = set()
        self._samples = 0
        self.used: dict[str, Counter[str]] = {role: Counter() for role in self._columns}

    def value(self, columns: Mapping[str, Any], role: str) -> Any:
        """The value of a filter's column; None where the sample has none."""
        for name in self._columns[role]:
            if name in columns:
                self.used[role][name] += 1
                return columns[name]
        return None

    def failed_status(self, columns: Mapping[str, Any]) -> bool:
        """Whether the sample says that it could not be fetched."""
        status = self.value(columns, "status")
        return status is not None and status != "success"

    def reason(self, columns: Mapping[str, Any]) -> str | None:
        """Why a sample with these columns is dropped.

        Raises:
            CorpusError: no sample has a column that a filter looks at.
        """
        self._samples += 1
        if len(self._names) < 200:
            self._names.update(columns)
        reason = None
        if self._limits.language and self.value(columns, "language") not in self._limits.language:
            reason = LANGUAGE
        for role, (name, least, greatest) in self._filters.items():
            number = _number(self.value(columns, role))
            if number is None or not least <= number <= greatest:
                reason = reason or name
        if self._samples == PATIENCE:
            self.finish()
        return reason

    def finish(self) -> None:
        """Look whether the columns that are asked for were there.

        Raises:
            CorpusError: no sample had one of them.
        """
        for role in self._asked:
            if self._samples and not self.used[role]:
                found = ", ".join(sorted(self._names)) or "none"
                raise CorpusError(
                    f"{self._url}: the filter on {role} found no column {' or '.join(self._columns[role])} in "
                    f"{self._samples} samples; found the columns {found}. Name it, --column {role}=NAME, or leave the "
                    "filter out"
                )


def wanted_columns(limits: Limits) -> list[str]:
    """The columns of a Parquet file that are looked at, where it has them."""
    return [name for names in limits.columns().values() for name in names]


def caption_reason(limits: Limits, length: int) -> str | None:
    """Why a caption of so many characters is dropped."""
    if length < limits.min_caption:
        return SHORT
    return LONG if limits.max_caption is not None and length > limits.max_caption else None


def size_reason(limits: Limits, width: int, height: int) -> str | None:
    """Why an image of this size is dropped."""
    shorter, longer = sorted((width, height))
    if shorter < limits.min_side:
        return SMALL
    return NARROW if limits.max_aspect is not None and longer > limits.max_aspect * shorter else None


def in_order(counts: Mapping[str, int]) -> Iterable[tuple[str, int]]:
    """The reasons that occurred, as they are looked for."""
    return ((reason, counts[reason]) for reason in REASONS if counts.get(reason))


def _number(value: Any) -> float | None:
    """A column's value; None where it is none, or NaN."""
    if isinstance(value, str) and value in NSFW_WORDS:
        return NSFW_WORDS[value]
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) else number
