"""Splits that nothing crosses: captions and images that hang together are in one split.

A caption and an image are joined by any annotation of them, over the whole table. A connected component draws its split
by a hash of its smallest id, so the splits depend on neither the order nor the partitioning of the input.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

Hashes = NDArray[np.uint64]

SPLITS = ("train", "validation", "test")
MANY_CAPTIONS = 20  # with fewer, one component may well hold most of the data


def hash64(texts: pa.Array | pa.ChunkedArray, salt: str) -> Hashes:
    """A 64-bit hash (BLAKE2b) of each text, equal everywhere; of null as of "". Each distinct text is hashed once."""
    encoded = pc.fill_null(texts, "").dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    person = salt.encode()
    digests = b"".join(
        hashlib.blake2b(text.encode(), digest_size=8, person=person).digest() for text in encoded.dictionary.to_pylist()
    )
    return np.frombuffer(digests, "<u8")[encoded.indices.to_numpy(zero_copy_only=False)]


def mix(values: Hashes) -> Hashes:
    """A bijection of 64-bit numbers that spreads every bit (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def combine(first: Hashes, *others: Hashes) -> Hashes:
    """One hash for a tuple of hashes."""
    for other in others:
        first = mix(first + np.uint64(0x9E3779B97F4A7C15)) ^ other
    return mix(first)


@dataclass(frozen=True)
class Components:
    """Which captions hang together: ``captions`` (C,) sorted, and the component of each by its smallest caption's
    hash (C,). Of the largest that has several captions: its share of all annotations, and the images that join the
    most captions in it."""

    captions: Hashes
    component: Hashes
    count: int
    largest_share: float
    linking_images: Hashes

    def splits(self, validation: float, test: float, seed: int) -> NDArray[np.int8]:
        """The split of each caption, as a place in ``SPLITS``; ``validation`` and ``test`` are shares."""
        drawn = combine(np.full(len(self.component), seed, np.uint64), self.component) / 2.0**64
        return np.where(drawn < test, 2, np.where(drawn < test + validation, 1, 0)).astype(np.int8)


def components(caption: Hashes, image: Hashes, annotations: NDArray[np.int64]) -> Components:
    """Components of captions and images from their links (N,); ``annotations`` is how many stand behind each link."""
    captions, left = np.unique(caption, return_inverse=True)
    images, right = np.unique(image, return_inverse=True)
    size = len(captions) + len(images)
    matrix = csr_matrix((np.ones(len(left), np.int8), (left, right + len(captions))), shape=(size, size))
    count, labels = connected_components(matrix, directed=False)
    labels = labels[: len(captions)]
    # Captions are sorted, so the first of a component is its smallest.
    _, first, members = np.unique(labels, return_index=True, return_inverse=True)
    weight = np.bincount(members[left], annotations, minlength=count)
    weight[np.bincount(members, minlength=count) < 2] = 0
    share, linking = 0.0, np.array([], dtype=np.uint64)
    if weight.size and weight.max() > 0:
        largest = int(weight.argmax())
        share = float(weight[largest] / annotations.sum())
        pairs = np.unique(np.stack([right, left])[:, members[left] == largest], axis=1)
        degree = np.bincount(pairs[0], minlength=len(images))
        linking = images[np.argsort(-degree, kind="stable")[:5]]
    return Components(captions, captions[first][members], count, share, linking)
