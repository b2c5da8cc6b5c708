import io

import numpy as np
import pytest
import scipy.fft
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from palate.corpora import duplicates
from palate.corpora.duplicates import (
    BITS,
    TooManyPixels,
    band_values,
    bands,
    earliest_equal,
    earliest_near,
    hamming,
    look_at,
    part_of,
    perceptual_hash,
)
from toy_captions import encoded, picture


def reference_hash(image: Image.Image) -> str:
    """pHash from its description, with scipy's DCT, as a string of bits."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)).astype(float)
    low = scipy.fft.dctn(grey, type=2)[:8, :8].ravel()
    middle = sorted(low)[31:33]
    return "".join("1" if value > sum(middle) / 2 else "0" for value in low)


def distance(one: int | None, other: int | None) -> int:
    assert one is not None
    assert other is not None
    return (one ^ other).bit_count()


def test_the_hash_is_phash():
    for seed in range(20):
        assert f"{perceptual_hash(picture(seed)):064b}" == reference_hash(picture(seed))


def test_a_copy_is_near_and_another_image_is_far():
    for seed in range(20):
        image = picture(seed, (256, 256))
        smaller = image.resize((160, 160), Image.Resampling.BICUBIC)
        copies = [Image.open(io.BytesIO(encoded(one, quality=75))) for one in (image, smaller)]
        assert all(distance(perceptual_hash(image), perceptual_hash(copy)) <= 4 for copy in copies)
        assert distance(perceptual_hash(image), perceptual_hash(picture(seed + 1, (256, 256)))) > 12


def test_images_with_nothing_in_them_have_no_hash():
    noise = np.random.default_rng(0).normal(128, 1, (256, 256)).astype(np.uint8)
    plain = [
        Image.new("RGB", (1, 1)),
        Image.new("RGB", (64, 64), "red"),
        Image.linear_gradient("L"),
        Image.radial_gradient("L"),
        Image.fromarray(noise),
        Image.fromarray(np.repeat([[0] * 32 + [255] * 32], 64, axis=0).astype(np.uint8)),
    ]
    assert [perceptual_hash(image) for image in plain] == [None] * len(plain)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_kind_of_image_can_be_looked_at(mode):
    image = picture(0).convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    look = look_at(encoded(image, kind), 10**6)
    assert (look.width, look.height, look.format) == (48, 40, kind)
    if mode != "1":  # dithered, it is another image
        assert distance(look.hash, perceptual_hash(picture(0))) <= 8


def test_a_turned_image_has_the_size_that_people_see():
    exif = Image.Exif()
    exif[0x0112] = 6
    look = look_at(encoded(picture(0), exif=exif), 10**6)
    assert (look.width, look.height) == (40, 48)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_half_an_image_is_refused(kind):
    content = encoded(picture(0), kind)
    with pytest.raises(ValueError, match=r"\w+Error: "):
        look_at(content[: len(content) // 2], 10**6)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"<html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n"])
def test_what_is_no_image_is_refused(content):
    with pytest.raises(ValueError):
        look_at(content, 10**6)


def test_too_many_pixels_are_not_decoded(monkeypatch):
    content = encoded(Image.new("1", (3000, 1000)), "PNG")
    assert len(content) < 2000
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(TooManyPixels, match=r"3000 x 1000 pixels, --max-pixels 2999999"):
        look_at(content, 2_999_999)


def test_pillows_own_limit_is_one_of_pixels(monkeypatch):
    content = encoded(picture(0), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    with pytest.raises(TooManyPixels):
        look_at(content, 10**9)


def clustered(generator: np.random.Generator, count: int) -> np.ndarray:
    """Hashes many of which are near one another, and some equal in most of their bits."""
    centres = generator.integers(0, 2**64, max(1, count // 8), dtype=np.uint64)
    hashes = generator.choice(centres, count)
    for _ in range(4):
        flip = np.uint64(1) << generator.integers(0, BITS, count).astype(np.uint64)
        hashes = np.where(generator.random(count) < 0.4, hashes ^ flip, hashes)
    low = generator.integers(0, 2**9, count, dtype=np.uint64) << np.uint64(17)
    return np.where(generator.random(count) < 0.3, low, hashes)


def brute(hashes: np.ndarray, positions: np.ndarray, most: int) -> np.ndarray:
    return np.array([positions[hamming(hashes[i : i + 1], hashes)[0] <= most].min() for i in range(len(hashes))])


@given(st.integers(0, 2**32), st.integers(0, 300), st.integers(0, 6), st.sampled_from([1, 4, 32]))
def test_near_hashes_are_those_that_a_full_comparison_finds(seed, count, most, few):
    generator = np.random.default_rng(seed)
    hashes, positions = clustered(generator, count), generator.permutation(count).astype(np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "FEW", few)
        patch.setattr(duplicates, "EACH_WITH_EACH", 2 * few)
        found = earliest_near(hashes, positions, most)
    assert found.tolist() == brute(hashes, positions, most).tolist()


@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(0, 6), st.integers(1, 5))
def test_hashes_spread_by_bands_meet_in_some_part(seed, count, most, parts):
    generator = np.random.default_rng(seed)
    hashes, positions = clustered(generator, count), generator.permutation(count).astype(np.int64)
    found = positions.copy()
    for band in bands(most):
        where = part_of(band_values(hashes, band), parts)
        for part in range(parts):
            rows = np.flatnonzero(where == part)
            found[rows] = np.minimum(found[rows], earliest_near(hashes[rows], positions[rows], most, band))
    assert found.tolist() == brute(hashes, positions, most).tolist()


def test_parts_are_even_though_values_are_not():
    counts = np.bincount(part_of(np.arange(0, 1 << 20, 16, dtype=np.uint64), 16), minlength=16)
    assert counts.min() > 0.9 * counts.mean()


def test_bands_cover_every_bit_once():
    for most in range(13):
        assert [bit for low, size in bands(most) for bit in range(low, low + size)] == list(range(BITS))


def test_equal_rows_have_the_first_of_them():
    keys = np.array([[1, 2], [3, 4], [1, 2], [1, 5]], dtype=np.uint64)
    assert earliest_equal(keys, np.array([7, 5, 3, 9])).tolist() == [3, 5, 3, 9]
    assert earliest_equal(keys[:0], np.array([], dtype=np.int64)).tolist() == []


def test_many_hashes_that_agree_in_most_bits_do_not_take_for_ever():
    """Of 6,000 hashes in 2^15, bands of the other bits tell none apart."""
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**15, 6_000, dtype=np.uint64) << np.uint64(30)
    positions = np.arange(len(hashes))
    some = generator.integers(0, len(hashes), 200)
    found = earliest_near(hashes, positions, 4)
    near = hamming(hashes[some], hashes) <= 4
    assert found[some].tolist() == np.where(near, positions, len(positions)).min(axis=1).tolist()
