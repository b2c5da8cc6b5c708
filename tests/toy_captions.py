"""Small image-text shards as published, for tests."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Sample = Mapping[str, Any]  # a name in the shard (key.jpg) to content: bytes, text, or a JSON value


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Coarse noise: no two are near."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg(seed: int, size: tuple[int, int] = (48, 40), **options: Any) -> bytes:
    return encoded(picture(seed, size), **options)


def sample(
    key: str, image: bytes, text: str | bytes | None, record: Any = None, suffix: str = "jpg"
) -> dict[str, bytes]:
    """The members of one sample."""
    members = {f"{key}.{suffix}": image}
    if text is not None:
        members[f"{key}.txt"] = text if isinstance(text, bytes) else text.encode()
    if record is not None:
        members[f"{key}.json"] = json.dumps(record).encode()
    return members


def tar_bytes(samples: Sequence[Mapping[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for members in samples:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def write_tar(path: Path, samples: Sequence[Mapping[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(samples, form))
    return path


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]], rows: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, row_group_size=rows)
    return path


def write_llava(path: Path, records: Sequence[Any], lines: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(one, ensure_ascii=False) for one in records) if lines else json.dumps(records, indent=1)
    path.write_text(text)
    return path


def mixed(folder: Path, seed: int = 0, shards: int = 4, size: int = 12) -> Path:
    """Tar and Parquet shards in which images repeat, near and equal, within and across shards, and one is broken."""
    generator = np.random.default_rng(seed)
    for number in range(shards):
        rows = []
        for index in range(size):
            image = int(generator.integers(0, shards * size // 2))
            options = [{}, {"quality": 60}, {"quality": 90}][int(generator.integers(0, 3))]
            content = jpeg(image, **options)
            if (number, index) == (1, 3):
                content = content[: len(content) // 2]
            rows.append((f"{number:03d}{index:03d}", content, f"caption {image} of {number}"))
        if number % 2:
            columns = {"key": [r[0] for r in rows], "jpg": [r[1] for r in rows], "caption": [r[2] for r in rows]}
            write_parquet(folder / f"{number:05d}.parquet", columns)
        else:
            write_tar(folder / f"{number:05d}.tar", [sample(*row, {"key": row[0]}) for row in rows])
    return folder
