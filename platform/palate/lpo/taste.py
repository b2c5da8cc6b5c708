"""A person's taste as a vector computed from examples: which image features set what they prefer apart from the rest.

Nothing is learned, so somebody whom no training has seen gets a vector from a few ranked lists. For each list, the
features of its images are weighed by rank, from +1 for the best to -1 for the worst; what all images of the list share
cancels. A person's vector is the mean over their lists, in units of the features' spread within lists.

Symbols: U people, D features, M images of a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from palate import progress
from palate.artifacts import Artifact
from palate.corpora.pictures import read_image, stored_images
from palate.lpo.personal import People, save_people
from palate.lpo.samples import read_lists
from palate.models.image_features import Features

Array = NDArray[np.float64]
TASTE = "taste.safetensors"
_BATCH = 64  # images whose features are computed together


def rank_weights(tie_groups: Sequence[int]) -> Array:
    """Weights (M,) of a list's images, from +1 to -1 by rank, of sum 0; images that are tied share theirs.

    >>> rank_weights([0, 1, 1, 2]).tolist()
    [1.0, 0.0, 0.0, -1.0]
    """
    places = np.linspace(1, -1, len(tie_groups))
    groups = np.asarray(tie_groups)
    return np.array([places[groups == group].mean() for group in groups])


@dataclass(frozen=True)
class Tastes:
    """People, sorted, and their vectors (U, D); and what these are measured in: the features' spread within lists (D,),
    infinite where a feature never differs, and the ``size`` that vectors of mean square 1 are divided by."""

    ids: tuple[str, ...]
    vectors_UD: Array
    spreads_D: Array
    size: float


def taste_vectors(
    lists: Artifact, split: str | None, features: Features, measured: tuple[Array, float] | None = None
) -> Tastes:
    """The people who ranked lists of ``split``, of any if None, and their vectors.

    Args:
        measured: spread and size of other people's vectors, for vectors like theirs; None: of these people.

    Raises:
        ValueError: nobody ranked anything there.
    """
    rows = [row for row in read_lists(lists, split).to_pylist() if row["user_id"] is not None]
    rows = [row for row in rows if len({item["tie_group"] for item in row["items"]}) > 1]
    if not rows:
        raise ValueError(
            f"{lists.url} has no ranked list of a person{f' in split {split!r}' if split else ''}: prepare the lists "
            "with --group-by caption-user and --examples or --held-out-people, or name another --examples-split"
        )
    wanted = {item["image_uid"] for row in rows for item in row["items"]}
    table = _features_of(lists, wanted, features)
    people = tuple(sorted({row["user_id"] for row in rows}))
    places = {user: place for place, user in enumerate(people)}
    width = len(next(iter(table.values())))
    sums_UD, counts_U = np.zeros((len(people), width)), np.zeros(len(people))
    squares_D, images = np.zeros(width), 0
    for row in rows:
        found_MD = np.array([table[item["image_uid"]] for item in row["items"]])
        weights_M = rank_weights([item["tie_group"] for item in row["items"]])
        sums_UD[places[row["user_id"]]] += weights_M @ found_MD / np.abs(weights_M).sum()
        counts_U[places[row["user_id"]]] += 1
        squares_D += ((found_MD - found_MD.mean(axis=0)) ** 2).sum(axis=0)
        images += len(found_MD)
    found_D = np.sqrt(squares_D / images)
    # A feature that never differs says nothing.
    spreads_D = np.where(found_D > 1e-8, found_D, np.inf) if measured is None else measured[0]
    if len(spreads_D) != width:
        raise ValueError(f"features of {width} numbers, where {len(spreads_D)} are expected: give the same --features")
    vectors_UD = sums_UD / counts_U[:, None] / spreads_D
    size = max(float(np.sqrt((vectors_UD**2).mean())), 1e-8) if measured is None else measured[1]
    return Tastes(people, vectors_UD / size, spreads_D, size)


def save_tastes(tastes: Tastes, folder: Path) -> None:
    """Write the people's vectors, and in ``TASTE`` what they are measured in."""
    save_people(People(tastes.ids, torch.from_numpy(tastes.vectors_UD), learned=False), folder)
    measured = {"spreads": torch.from_numpy(tastes.spreads_D), "size": torch.tensor(tastes.size, dtype=torch.float64)}
    save_file(measured, folder / TASTE)


def load_measure(folder: Path) -> tuple[Array, float]:
    """Spread and size from ``TASTE``, for ``taste_vectors``."""
    found = load_file(folder / TASTE)
    return found["spreads"].numpy(), float(found["size"])


def _features_of(lists: Artifact, uids: set[str], features: Features) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for rows in progress.track(stored_images(lists, uids, _BATCH), "features of examples", -(-len(uids) // _BATCH)):
        made = features([read_image(row) for row in rows])
        found |= dict(zip((row["image_uid"] for row in rows), made, strict=True))
    return found
