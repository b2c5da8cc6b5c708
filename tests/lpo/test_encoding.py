"""Latents and texts on disk against the encoders themselves; bad images; resumption."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import toy_lists
from palate import artifacts
from palate.corpora.schema import IMAGES, RANKED_LISTS
from palate.lpo import encoding
from palate.lpo.encoding import EncodeConfig, Encoded, encode, read_picture
from palate.models.diffusion import encode_images, encode_text, load_diffusion

CONFIG = EncodeConfig(resolution=16, latent_dtype="float32", encode_batch=5)


def test_what_is_read_is_what_the_encoders_give(tmp_path: Path) -> None:
    lists = toy_lists.lists(tmp_path / "lists", 8)
    encoded = encode(lists, "shapes", str(tmp_path / "encoded"), CONFIG)
    loaded = load_diffusion("shapes")
    rows = [row for path in lists.paths("images/") for row in pq.read_table(lists.local(path)).to_pylist()]
    for row in (rows[0], rows[-1]):
        mean, deviation = encode_images(loaded, read_picture(row["bytes"], 16).pixels[None])
        found = encoded.latents(row["image_uid"])
        torch.testing.assert_close(found.mean, mean[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(found.deviation, deviation[0], rtol=1e-5, atol=1e-9)
        assert (found.original, found.crop) == ((16, 16), (0, 0))
    for caption in ("", toy_lists.CAPTIONS[0]):
        expected = encode_text(loaded, [caption])["prompt_embeds"][0]
        torch.testing.assert_close(encoded.text(caption).text, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError, match="nowhere"):
        encoded.latents("nowhere")


def test_half_precision_takes_half_the_space_and_keeps_three_digits(tmp_path: Path) -> None:
    lists = toy_lists.lists(tmp_path / "lists", 4)
    whole = encode(lists, "shapes", str(tmp_path / "whole"), CONFIG)
    half = encode(lists, "shapes", str(tmp_path / "half"), EncodeConfig(resolution=16, latent_dtype="float16"))
    assert half.artifact.summary["bytes"] * 2 == whole.artifact.summary["bytes"]
    torch.testing.assert_close(half.latents("i0-0").mean, whole.latents("i0-0").mean, rtol=1e-3, atol=1e-3)


def picture(width: int, height: int) -> bytes:
    """Columns count in red, rows in green."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width)[None], np.arange(height)[:, None]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_pictures_are_cropped_at_the_centre() -> None:
    wide = read_picture(picture(64, 32), 32)
    assert (wide.original, wide.crop) == ((32, 64), (0, 16))
    assert ((wide.pixels[0, 0] + 1) * 127.5).round().tolist() == list(range(16, 48))
    tall = read_picture(picture(20, 50), 40)
    assert (tall.original, tall.crop) == ((50, 20), (30, 0))
    assert tall.pixels.shape == (3, 40, 40)
    odd = read_picture(picture(33, 31), 16)
    assert odd.pixels.shape == (3, 16, 16)


def test_bytes_that_are_no_picture() -> None:
    with pytest.raises(ValueError, match="not an image"):
        read_picture(b"GIF89a, not really", 16)
    cut = picture(64, 64)
    with pytest.raises(ValueError, match="not an image"):
        read_picture(cut[: len(cut) // 2], 16)


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    lists = toy_lists.lists(tmp_path / "lists", 4)
    table = pq.read_table(lists.local("images/part-00001.parquet")).to_pylist()
    table[1]["bytes"] = b"broken"

    def produce(writer: artifacts.Writer) -> None:
        (writer.folder / "images").mkdir()
        (writer.folder / "lists").mkdir()
        pq.write_table(pa.Table.from_pylist(table, schema=IMAGES), writer.folder / "images/part-00000.parquet")
        pq.write_table(pq.read_table(lists.local("lists/part-00000.parquet")), writer.folder / "lists/part.parquet")

    broken = artifacts.ensure(tmp_path / "broken", produce, kind=RANKED_LISTS, config={})
    with pytest.raises(ValueError, match=f"image {table[1]['image_uid']}: not an image"):
        encode(broken, "shapes", str(tmp_path / "out"), CONFIG)


def test_a_killed_encoding_goes_on_with_the_next_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = toy_lists.lists(tmp_path / "lists", 12)
    out = str(tmp_path / "encoded")
    encoder, calls = encoding.encode_images, []

    def dying(loaded: Any, images: torch.Tensor) -> Any:
        calls.append(len(images))
        if len(calls) == 6:  # the first call asks for a shape, and a shard has 18 images in four batches
            raise KeyboardInterrupt
        return encoder(loaded, images)

    monkeypatch.setattr(encoding, "encode_images", dying)
    with pytest.raises(KeyboardInterrupt):
        encode(lists, "shapes", out, CONFIG)
    with pytest.raises(artifacts.ArtifactMissing):
        Encoded(out)
    calls.clear()
    monkeypatch.setattr(
        encoding, "encode_images", lambda loaded, images: calls.append(len(images)) or encoder(loaded, images)
    )
    encoded = encode(lists, "shapes", out, CONFIG)
    assert sum(calls) == 1 + 18  # the shape again, and the shard that was cut off
    assert all(f"i{n}-{place}" in encoded for n in range(12) for place in range(2 + n % 3))
    calls.clear()
    encode(lists, "shapes", out, CONFIG)
    assert not calls


def test_what_would_not_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    lists = toy_lists.lists(tmp_path / "lists", 4)
    with pytest.raises(ValueError, match=r"would take .* GiB, and 0\.0 GiB are allowed"):
        encode(lists, "shapes", str(tmp_path / "out"), EncodeConfig(resolution=16, max_disk_gb=1e-9))


def test_only_so_much_is_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = toy_lists.lists(tmp_path / "lists", 24)
    encode(lists, "shapes", str(tmp_path / "out"), CONFIG)
    group = encoding.ROW_GROUP * 2 * 3 * 16 * 16 * 4  # bytes of mean and deviation in float32
    uids = sorted({f"i{n}-{place}" for n in range(24) for place in range(2)})
    for memory, reads in ((group, "many"), (100 * group, "each once")):
        encoded = Encoded(str(tmp_path / "out"), memory=memory)
        groups = {encoded._places["latents"][uid][:2] for uid in uids}
        for _ in range(2):
            for uid in uids:
                encoded.latents(uid)
        found = encoded._group["latents"].cache_info()  # type: ignore[attr-defined]
        assert found.currsize <= memory // group
        assert (found.misses == len(groups)) == (reads == "each once")
