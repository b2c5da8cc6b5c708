"""Images that are equal or nearly so: perceptual hashes, and the search for near hashes in parts that fit in memory.

The hash is the widespread pHash: the signs, against their median, of the 8 x 8 lowest frequencies of the image in grey
at 32 x 32 pixels. Two hashes within distance d (bits that differ) are equal in at least one of d + 1 bands of their
bits, so rows are spread by band, and near ones meet in the same part.

A sample is dropped if it is within d of *any* earlier one, kept or not. So what is dropped is decided pair by pair,
whatever the parts, and of a chain of small changes only the first is left.
"""

import io
import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from palate.corpora.pictures import DECODED, as_seen

BITS = 64
SIDE, FREQUENCIES = 32, 8
# A pixel is rounded to 1/255, so a coefficient of the unnormalized DCT is off by about 4 * sqrt(32 * 32 / 4 / 12) = 18.
NOISE = 40.0
INFORMATIVE = 32
"""Frequencies that must stand out of the noise. Of a flat image, or a plain gradient, none or a few do: the other bits
are those of nothing at all, the same in all such images."""

FEW = 32  # hashes that are equal in a band and compared with those of all other such runs at once
EACH_WITH_EACH = 2048  # hashes that are compared each with each; more are spread over bands again
LAST = np.iinfo(np.int64).max

Hashes = np.ndarray  # (N,) uint64
Positions = np.ndarray  # (N,) int64: the order of the samples
Interval = tuple[int, int]  # of bits: the lowest, and how many

_ANGLES = np.pi * np.outer(np.arange(FREQUENCIES), 2 * np.arange(SIDE) + 1) / (2 * SIDE)
_COSINES = 2 * np.cos(_ANGLES)  # (8, 32): the type-II DCT's lowest frequencies


class TooManyPixels(ValueError):
    """A small file that would be a large image."""


@dataclass(frozen=True)
class Look:
    """What an encoded image is: its size as people see it, its format and its pHash."""

    width: int
    height: int
    format: str
    hash: int | None


def look_at(content: bytes, max_pixels: int) -> Look:
    """Decode an image whole.

    Raises:
        TooManyPixels: there are more, by the image's header; nothing was decoded.
        ValueError: the bytes are no image that can be decoded whole.
    """
    try:
        with Image.open(io.BytesIO(content), formats=DECODED) as image:
            if image.width * image.height > max_pixels:
                raise TooManyPixels(f"{image.width} x {image.height} pixels, --max-pixels {max_pixels}")
            seen = as_seen(image)
            return Look(seen.width, seen.height, image.format or "", perceptual_hash(seen))
    except Image.DecompressionBombError as error:
        raise TooManyPixels(str(error)) from None
    except TooManyPixels:
        raise
    except Exception as error:  # on broken bytes Pillow's decoders raise almost anything
        raise ValueError(f"{type(error).__name__}: {error}") from None


def perceptual_hash(image: Image.Image) -> int | None:
    """The pHash of an image, its first bit highest; None where the image has too little in it to be told by that."""
    grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    frequencies = _COSINES @ np.asarray(grey, dtype=np.float64) @ _COSINES.T
    above = frequencies - np.median(frequencies)
    if np.count_nonzero(np.abs(above) > NOISE) < INFORMATIVE:
        return None
    return int.from_bytes(np.packbits(above > 0).tobytes(), "big")


def bands(distance: int, bits: int = BITS) -> list[Interval]:
    """``distance + 1`` bands of near-equal width that cover the bits."""
    edges = [bits * number // (distance + 1) for number in range(distance + 2)]
    return [(low, high - low) for low, high in itertools.pairwise(edges)]


def band_values(hashes: Hashes, band: Interval) -> np.ndarray:
    """The bits of one band, (N,) uint64."""
    shift, width = band
    return (hashes >> np.uint64(shift)) & np.uint64((1 << width) - 1)


def part_of(values: np.ndarray, parts: int) -> np.ndarray:
    """Which of ``parts`` parts each uint64 falls into, (N,) int64, evenly also where values are not."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15)  # wraps around: Fibonacci hashing
    return ((mixed >> np.uint64(32)) % np.uint64(parts)).astype(np.int64)


def earliest_equal(keys: np.ndarray, positions: Positions) -> Positions:
    """For each row of ``keys`` (N, K) the lowest position of an equal row, its own included."""
    if not len(keys):
        return positions.copy()
    _, inverse = np.unique(keys, axis=0, return_inverse=True)
    first = np.full(inverse.max() + 1, LAST)
    np.minimum.at(first, inverse.ravel(), positions)
    return np.asarray(first[inverse.ravel()])


def earliest_near(hashes: Hashes, positions: Positions, distance: int, band: Interval | None = None) -> Positions:
    """For each hash the lowest position of one within ``distance`` bits, its own included.

    Args:
        band: only find pairs that are equal in these bits, as hashes were spread by them.
    """
    unique, inverse = np.unique(hashes, return_inverse=True)
    first = np.full(len(unique), LAST)
    np.minimum.at(first, inverse, positions)
    search = _Search(unique, first, first.copy(), distance)
    if not distance or not len(unique):
        return np.asarray(search.best[inverse])
    if band is not None:
        search.equal_in(band, np.arange(len(unique)), [(0, BITS)])
    else:
        search.among(np.arange(len(unique)), [(0, BITS)])
    return np.asarray(search.best[inverse])


@dataclass(frozen=True)
class _Search:
    """Lowers ``best`` of each hash to the ``first`` position of those near it."""

    hashes: Hashes
    first: Positions
    best: Positions
    distance: int

    def among(self, rows: np.ndarray, free: list[Interval]) -> None:
        """All pairs of ``rows``, which may differ in the ``free`` bits only."""
        low, width = max(free, key=lambda interval: interval[1])
        if len(rows) > EACH_WITH_EACH and width > self.distance:
            split = [(low + shift, size) for shift, size in bands(self.distance, width)]
            # Where many hashes agree in most bits, bands tell too few of them apart to save anything.
            if sum(_pairs(band_values(self.hashes[rows], band)) for band in split) < len(rows) ** 2 / 2:
                for band in split:
                    self.equal_in(band, rows, free)
                return
        self._each_with_each(rows)

    def equal_in(self, band: Interval, rows: np.ndarray, free: list[Interval]) -> None:
        """The pairs of ``rows`` that are equal in ``band``."""
        values = band_values(self.hashes[rows], band)
        order = np.argsort(values, kind="stable")
        rows, values = rows[order], values[order]
        starts = np.flatnonzero(np.diff(values, prepend=~values[:1]))
        lengths = np.diff(starts, append=len(rows))
        few = np.repeat(lengths <= FEW, lengths)
        self._neighbours(rows[few], values[few], int(lengths[lengths <= FEW].max(initial=1)))
        left = [piece for interval in free for piece in _without(interval, band)]
        for start, length in zip(starts[lengths > FEW], lengths[lengths > FEW], strict=True):
            self.among(rows[start : start + length], left)

    def _neighbours(self, rows: np.ndarray, values: np.ndarray, longest: int) -> None:
        """Pairs in runs of equal values, at most ``longest`` long; all runs at once."""
        for lag in range(1, longest):
            pairs = np.flatnonzero(values[lag:] == values[:-lag])
            one, other = rows[pairs], rows[pairs + lag]
            near = np.bitwise_count(self.hashes[one] ^ self.hashes[other]) <= self.distance
            one, other = one[near], other[near]
            # At one lag no row is twice on the same side.
            self.best[one] = np.minimum(self.best[one], self.first[other])
            self.best[other] = np.minimum(self.best[other], self.first[one])

    def _each_with_each(self, rows: np.ndarray) -> None:
        for some in np.array_split(rows, -(-len(rows) // EACH_WITH_EACH)):
            for others in np.array_split(rows, -(-len(rows) // EACH_WITH_EACH)):
                near = hamming(self.hashes[some], self.hashes[others]) <= self.distance
                self.best[some] = np.minimum(self.best[some], np.where(near, self.first[others], LAST).min(axis=1))


def _pairs(values: np.ndarray) -> int:
    """Ordered pairs of equal values."""
    return int((np.unique(values, return_counts=True)[1].astype(np.int64) ** 2).sum())


def hamming(some: Hashes, others: Hashes) -> np.ndarray:
    """Bits that differ, (N, M) uint8."""
    return np.bitwise_count(some[:, None] ^ others[None, :])


def _without(interval: Interval, band: Interval) -> list[Interval]:
    """What is left of the bits of ``interval`` when those of ``band``, inside it or apart, are taken out."""
    (low, width), (start, size) = interval, band
    if not low <= start < low + width:
        return [interval]
    return [(low, start - low), (start + size, low + width - start - size)]
