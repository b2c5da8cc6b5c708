"""What a representation knows: linear probes for objects, places, shapes and colours of scenes.

    local    the visual token where an object's centre is -> its shape, its colour; where a place is -> something or not
    pooled   the mean of an image's visual tokens -> which shapes, colours, and pairs of shape and colour there are;
        where there is one object, its place

Ridge regression to one-hot targets (scikit-learn); accuracies on held-out scenes, those of what there is averaged over
labels, balanced: 0.5 is chance.

Symbols: N scenes, P visual tokens, z width, L labels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palate.corpora.worlds.scenes import GRID, PLACES, SIDE, Described, Object
from palate.corpora.worlds.shapes import HUES, SHAPES

Floats = NDArray[np.floating]
Labels = NDArray[Any]
ALPHA = 10.0  # of the ridge, on standardized features

CHANCE = {
    "local shape": 1 / len(SHAPES),
    "local colour": 1 / len(HUES),
    "local object": 0.5,
    "pooled shape": 0.5,
    "pooled colour": 0.5,
    "pooled object": 0.5,
    "pooled place": 1 / len(PLACES),
}


def probe(
    train_NPz: Floats, train_scenes: Sequence[Described], test_NPz: Floats, test_scenes: Sequence[Described]
) -> dict[str, float]:
    """Held-out accuracies of all probes by name."""
    found = {}
    for name, read in (("shape", lambda one: one.shape), ("colour", lambda one: one.colour)):
        found[f"local {name}"] = _accuracy(
            *_at_objects(train_NPz, train_scenes, read), *_at_objects(test_NPz, test_scenes, read)
        )
    found["local object"] = _accuracy(*_at_places(train_NPz, train_scenes), *_at_places(test_NPz, test_scenes))
    pooled = train_NPz.mean(1), test_NPz.mean(1)
    for name, labels in _presence().items():
        pair = [np.array([labels(scene) for scene in scenes]) for scenes in (train_scenes, test_scenes)]
        found[f"pooled {name}"] = _balanced(pooled[0], pair[0], pooled[1], pair[1])
    found["pooled place"] = _accuracy(*_of_one(pooled[0], train_scenes), *_of_one(pooled[1], test_scenes))
    return found


def token_of(x: float, y: float, tokens: int) -> int:
    """The visual token over a point of the image, in pixels."""
    side = round(tokens**0.5)
    row, column = (min(side - 1, int(value / SIDE * side)) for value in (y, x))
    return row * side + column


def _at_objects(
    features_NPz: Floats, scenes: Sequence[Described], read: Callable[[Object], str]
) -> tuple[Floats, NDArray[np.str_]]:
    rows, labels = [], []
    for features_Pz, scene in zip(features_NPz, scenes, strict=True):
        for one in scene.objects:
            rows.append(features_Pz[token_of(one.x, one.y, len(features_Pz))])
            labels.append(read(one))
    return np.array(rows), np.array(labels)


def _at_places(features_NPz: Floats, scenes: Sequence[Described]) -> tuple[Floats, NDArray[np.bool_]]:
    """As many empty places as filled ones."""
    rows, labels = [], []
    for features_Pz, scene in zip(features_NPz, scenes, strict=True):
        filled = {one.place: (one.x, one.y) for one in scene.objects}
        empty = [place for place in PLACES if place not in filled]
        for place in (*list(filled)[: len(empty)], *empty[: len(filled)]):
            row, column = divmod(PLACES.index(place), GRID)
            x, y = filled.get(place, ((column + 0.5) * SIDE / GRID, (row + 0.5) * SIDE / GRID))
            rows.append(features_Pz[token_of(x, y, len(features_Pz))])
            labels.append(place in filled)
    return np.array(rows), np.array(labels)


def _of_one(pooled_Nz: Floats, scenes: Sequence[Described]) -> tuple[Floats, Labels]:
    """The scenes of one object, and its place. How many objects there are would tell much of whether a place is
    filled."""
    one = [number for number, scene in enumerate(scenes) if len(scene.objects) == 1]
    return pooled_Nz[one], np.array([scenes[number].objects[0].place for number in one])


def _presence() -> dict[str, Callable[[Described], list[bool]]]:
    return {
        "shape": lambda scene: [any(one.shape == shape for one in scene.objects) for shape in SHAPES],
        "colour": lambda scene: [any(one.colour == colour for one in scene.objects) for colour in HUES],
        "object": lambda scene: [
            any((one.shape, one.colour) == (shape, colour) for one in scene.objects)
            for shape in SHAPES
            for colour in HUES
        ],
    }


def _accuracy(train_Nz: Floats, train: Labels, test_Nz: Floats, test: Labels) -> float:
    from sklearn.linear_model import RidgeClassifier
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_Nz)
    model = RidgeClassifier(alpha=ALPHA).fit(scaler.transform(train_Nz), train)
    return float(model.score(scaler.transform(test_Nz), test))


def _balanced(train_Nz: Floats, train_NL: Labels, test_Nz: Floats, test_NL: Labels) -> float:
    """The mean over labels of the mean of the shares of positives and of negatives that are recognised.

    One regression for all labels; a label is told where its score is nearer to that of positives than to that of
    others. Labels that all, or none, of the images have in either part are left out; nan where none is left.
    """
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_Nz)
    model = Ridge(alpha=ALPHA).fit(scaler.transform(train_Nz), train_NL.astype(float))
    scores_NL, told_NL = (
        model.predict(scaler.transform(values)).reshape(len(values), -1) for values in (train_Nz, test_Nz)
    )
    shares = []
    for label in range(train_NL.shape[1]):
        with_it, truth = train_NL[:, label], test_NL[:, label]
        if any(values.all() or not values.any() for values in (with_it, truth)):
            continue  # nothing to tell apart
        middle = (scores_NL[with_it, label].mean() + scores_NL[~with_it, label].mean()) / 2
        told = told_NL[:, label] > middle
        shares.append((told[truth].mean() + 1 - told[~truth].mean()) / 2)
    return float(np.mean(shares)) if shares else float("nan")
