"""Noto emoji (Apache-2.0) with their Unicode names: real images for small checks.

    git clone https://github.com/googlefonts/noto-emoji

or a Parquet file with columns key, caption and image.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def read_emoji(place: str) -> list[dict[str, Any]]:
    """Key, caption and image of each emoji. Of Noto's files those of up to three code points, without flags and with
    one skin tone."""
    if not Path(place).is_dir():
        return list(pq.read_table(place).to_pylist())
    rows = []
    for file in sorted(Path(place).glob("emoji_u*.png")):
        codes = [int(code, 16) for code in file.stem.removeprefix("emoji_u").split("_")]
        flags, tones = range(0x1F1E6, 0x1F200), {0x1F3FB, 0x1F3FC, 0x1F3FE, 0x1F3FF}
        if len(codes) <= 3 and not any(code in flags or code in tones for code in codes):
            rows.append({"key": file.stem, "caption": caption_of(codes), "image": file.read_bytes()})
    return rows


def caption_of(codes: Sequence[int]) -> str:
    """The Unicode names of code points, but for the joiner that makes one image of several."""
    return " with ".join(unicodedata.name(chr(code), "").lower() for code in codes if code != 0x200D)


def split_of(key: str) -> str:
    """By the first code point, so that variants of one emoji are on one side."""
    base = key.removeprefix("emoji_u").split("_")[0]
    return "test" if hashlib.blake2b(base.encode(), digest_size=1).digest()[0] < 51 else "train"
