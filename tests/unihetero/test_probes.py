"""Linear probes: at chance on noise, right where the features say it."""

import numpy as np
import pytest

from palate.corpora.worlds import scenes
from palate.corpora.worlds.shapes import HUES, SHAPES
from palate.unihetero.probes import CHANCE, _balanced, probe, token_of

TOKENS = 16


@pytest.fixture(scope="module")
def drawn():
    random = np.random.default_rng(0)
    return [[scenes.draw(random) for _ in range(count)] for count in (400, 200)]


def telling(described):
    """Features that say at each token which shape and colour are there."""
    found = np.zeros((len(described), TOKENS, len(SHAPES) + len(HUES)))
    for row, scene in zip(found, described, strict=True):
        for one in scene.objects:
            token = row[token_of(one.x, one.y, TOKENS)]
            token[SHAPES.index(one.shape)] = 1
            token[len(SHAPES) + list(HUES).index(one.colour)] = 1
    return found


def test_features_that_tell_all(drawn):
    train, test = drawn
    found = probe(telling(train), train, telling(test), test)
    assert all(found[name] > 0.97 for name in ("local shape", "local colour", "local object", "pooled shape"))
    assert found["pooled place"] < 0.45  # a mean over places tells none
    assert set(found) == set(CHANCE)


def test_places_are_told_by_tokens_that_know_where_they_are(drawn):
    train, test = drawn
    where = np.eye(TOKENS)[None]
    features = [(telling(part).max(-1, keepdims=True) > 0) * where for part in drawn]
    assert probe(features[0], train, features[1], test)["pooled place"] > 0.97


def test_noise_is_at_chance(drawn):
    train, test = drawn
    random = np.random.default_rng(1)
    found = probe(random.normal(size=(400, TOKENS, 8)), train, random.normal(size=(200, TOKENS, 8)), test)
    for name, value in found.items():
        assert value == pytest.approx(CHANCE[name], abs=0.1), name


def test_labels_that_nobody_has_are_left_out():
    random = np.random.default_rng(0)
    train, test = random.standard_normal((200, 3)), random.standard_normal((100, 3))
    labels = [np.stack([part[:, 0] > 0, np.zeros(len(part), bool)], axis=1) for part in (train, test)]
    found = _balanced(train, labels[0], test, labels[1])
    assert found == _balanced(train, labels[0][:, :1], test, labels[1][:, :1]) > 0.9
    assert np.isnan(_balanced(train, labels[0][:, 1:], test, labels[1][:, 1:]))


def test_the_token_over_a_point():
    assert [token_of(x, y, TOKENS) for x, y in ((0, 0), (31.9, 0), (0, 31.9), (32, 32), (8.1, 7.9))] == [
        0,
        3,
        12,
        15,
        1,
    ]
