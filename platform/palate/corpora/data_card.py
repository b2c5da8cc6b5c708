"""The data card of an image-text index: what was seen, what became of it, and what is left."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from palate.corpora.caption_filters import (
    AESTHETIC,
    BROKEN,
    CONTAMINATED,
    EQUAL,
    LANGUAGE,
    LONG,
    NARROW,
    NEAR,
    SHORT,
    SIMILARITY,
    SMALL,
    UNSAFE,
    WATERMARK,
    in_order,
)

OTHER = "(other)"
MOST = 1000  # values of the licence column that are counted each
LISTED = 20  # inputs that the Markdown lists

# The settings, and the column, behind a reason.
_BEHIND: dict[str, tuple[tuple[str, ...], str]] = {
    LANGUAGE: (("language",), "language"),
    UNSAFE: (("max_unsafe",), "unsafe"),
    WATERMARK: (("max_watermark",), "watermark"),
    SIMILARITY: (("min_similarity",), "similarity"),
    AESTHETIC: (("min_aesthetic",), "aesthetic"),
    SHORT: (("min_caption",), ""),
    LONG: (("max_caption",), ""),
    SMALL: (("min_side",), ""),
    NARROW: (("max_aspect",), ""),
    CONTAMINATED: (("evaluation_distance",), ""),
    NEAR: (("duplicate_distance",), ""),
}


def bin_of(value: int) -> str:
    """The bin of a histogram: from a power of two to the next one."""
    if value < 1:
        return "0"
    low = 1 << (value.bit_length() - 1)
    return f"{low}-{2 * low - 1}" if low > 1 else "1"


def most(counts: Counter[str]) -> dict[str, int]:
    """The ``MOST`` frequent values, the others together."""
    listed = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST])
    rest = counts.total() - sum(listed.values())
    return {**listed, **({OTHER: rest} if rest else {})}


def card(
    *,
    settings: Mapping[str, Any],
    shards: Sequence[Mapping[str, Any]],
    evaluation: Sequence[Mapping[str, Any]],
    counts: Mapping[str, Counter[str]],
    columns: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """The card as JSON values.

    Args:
        shards: of each input url, format, bytes, sha256, samples seen and kept, and damage.
        evaluation: of each file of evaluation images url, sha256, images and those that are broken.
        counts: reasons, and of the kept samples shorter sides, caption lengths, image formats and licences.
        columns: names of the columns that each filter found, with the samples that had them.
    """
    seen, kept = (sum(shard[name] for shard in shards) for name in ("seen", "kept"))
    reasons, left = [], seen
    for reason, count in in_order(counts["reasons"]):
        left -= count
        names, role = _BEHIND.get(reason, ((), ""))
        reasons.append(
            {
                "reason": reason,
                "dropped": count,
                "left": left,
                "broken": reason in BROKEN,
                "settings": {name: settings[name] for name in names},
                "columns": sorted(columns.get(role, {})),
            }
        )
    formats: dict[str, Counter[str]] = {}
    for shard in shards:
        one = formats.setdefault(shard["format"], Counter())
        one.update(shards=1, **{name: shard[name] for name in ("seen", "kept", "bytes")})
    found = counts["reasons"]
    return {
        "summary": {
            "shards": len(shards),
            "damaged_shards": sum(bool(shard["damage"]) for shard in shards),
            "seen": seen,
            "kept": kept,
            "broken": sum(found[reason] for reason in BROKEN),
            "decontaminated": found[CONTAMINATED],
            "equal_duplicates": found[EQUAL],
            "near_duplicates": found[NEAR],
            "filtered": seen - kept - sum(found[reason] for reason in (*BROKEN, CONTAMINATED, EQUAL, NEAR)),
        },
        "settings": dict(settings),
        "reasons": reasons,
        "formats": {name: dict(one) for name, one in sorted(formats.items())},
        "shorter_side": _sorted(counts["sides"]),
        "caption_characters": _sorted(counts["lengths"]),
        "image_formats": dict(sorted(counts["image_formats"].items())),
        "licences": most(counts["licences"]),
        "inputs": [dict(shard) for shard in shards],
        "evaluation": [dict(one) for one in evaluation],
    }


def _sorted(bins: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(bins.items(), key=lambda item: int(item[0].partition("-")[0])))


def markdown(card: Mapping[str, Any]) -> str:
    """The card for people."""
    summary = card["summary"]
    reasons = [
        (
            one["reason"],
            f"{one['dropped']:,}",
            f"{one['left']:,}",
            _settings(one["settings"]),
            ", ".join(one["columns"]),
        )
        for one in card["reasons"]
    ]
    formats = [
        (name, *(f"{one.get(key, 0):,}" for key in ("shards", "seen", "kept", "bytes")))
        for name, one in card["formats"].items()
    ]
    inputs = [
        (one["url"], one["sha256"][:12], f"{one['seen']:,}", f"{one['kept']:,}", one["damage"])
        for one in card["inputs"][:LISTED]
    ]
    parts = [
        "# Data card",
        f"{summary['kept']:,} of {summary['seen']:,} samples are kept, of {summary['shards']:,} shards "
        f"({summary['damaged_shards']} of them damaged).",
        "## What was dropped, in this order",
        _table(("reason", "dropped", "left", "settings", "columns"), reasons),
        "## Formats",
        _table(("format", "shards", "seen", "kept", "bytes"), formats),
    ]
    for title, name in (
        ("Shorter side of the kept images, pixels", "shorter_side"),
        ("Captions kept, characters", "caption_characters"),
        ("Encoding of the kept images", "image_formats"),
        ("Licences of the kept samples", "licences"),
    ):
        if card[name]:
            rows = [(key, f"{count:,}") for key, count in list(card[name].items())[: 2 * LISTED]]
            parts += [f"## {title}", _table(("value", "samples"), rows)]
    if card["evaluation"]:
        files = [(one["url"], one["sha256"][:12], one["images"], one["broken"]) for one in card["evaluation"][:LISTED]]
        parts += [
            "## Evaluation images that were kept out",
            f"{summary['decontaminated']:,} samples showed one: decontaminated.jsonl lists them. "
            f"{len(card['evaluation']):,} files:",
            _table(("file", "sha256", "images", "not decoded"), files),
        ]
    parts += [
        "## Inputs",
        f"{len(card['inputs']):,} shards; data_card.json lists all of them, dropped/ what became of every sample "
        "that is not kept.",
        _table(("shard", "sha256", "seen", "kept", "damage"), inputs),
    ]
    return "\n\n".join(parts) + "\n"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in settings.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
