"""A person's taste as a vector computed from examples: which image features set what they prefer apart from the rest.

Nothing is learned, so somebody whom no training has seen gets a vector from a few ranked lists. For each list, the
features of its images are weighed by rank, from +1 for the best to -1 for the worst; what all images of the list share
cancels. A person's vector is the mean over their lists, in units of the features' spread within lists.

Symbols: U people, D features, M images of a list.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from palate import progress
from palate.artifacts import Artifact
from palate.corpora.pictures import decode_image, read_images
from palate.lpo.samples import read_lists
from palate.models.image_features import Features

Array = NDArray[np.float64]
_BATCH = 64  # images whose features are computed together


def rank_weights(tie_groups: Sequence[int]) -> Array:
    """Weights (M,) of a list's images, from +1 to -1 by rank, of sum 0; images that are tied share theirs.

    >>> rank_weights([0, 1, 1, 2]).tolist()
    [1.0, 0.0, 0.0, -1.0]
    """
    places = np.linspace(1, -1, len(tie_groups))
    groups = np.asarray(tie_groups)
    return np.array([places[groups == group].mean() for group in groups])


def taste_vectors(
    lists: Artifact, split: str, features: Features, users: Sequence[str] | None = None
) -> tuple[tuple[str, ...], Array]:
    """The people who ranked lists of ``split``, in order of their ids, and their vectors (U, D), of mean square 1.

    Args:
        users: only these; who has no list there is left out.

    Raises:
        ValueError: nobody ranked anything there.
    """
    rows = [row for row in read_lists(lists, split).to_pylist() if row["user_id"] is not None]
    if users is not None:
        rows = [row for row in rows if row["user_id"] in set(users)]
    rows = [row for row in rows if len({item["tie_group"] for item in row["items"]}) > 1]
    if not rows:
        raise ValueError(
            f"{lists.url} has no ranked list of a person in split {split!r}: prepare the lists with --group-by "
            "caption-user, or name another --examples-split"
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
    spreads_D = np.sqrt(squares_D / images)
    # A feature that never differs says nothing.
    vectors_UD = sums_UD / counts_U[:, None] / np.where(spreads_D > 1e-8, spreads_D, np.inf)
    return people, vectors_UD / max(np.sqrt((vectors_UD**2).mean()), 1e-8)


def _features_of(lists: Artifact, uids: set[str], features: Features) -> dict[str, Array]:
    contents = read_images(lists, uids)
    names = sorted(uids)
    found: dict[str, Array] = {}
    for start in progress.track(range(0, len(names), _BATCH), "features of examples"):
        some = names[start : start + _BATCH]
        rows = features([decode_image(contents[uid]) for uid in some])
        found |= dict(zip(some, rows, strict=True))
    return found
