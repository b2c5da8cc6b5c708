"""The classifier that judges whether an image shows what its caption asks for."""

import numpy as np
import pytest
import torch

from palate.corpora.worlds import shapes
from palate.models import shape_classifier
from palate.models.shape_classifier import sees, train_classifier


def scenes(count, seed):
    random = np.random.default_rng(seed)
    drawn = [shapes.draw_scene(shapes.ASKED[random.integers(len(shapes.ASKED))], random) for _ in range(count)]
    return torch.from_numpy(shapes.paint(drawn)), [scene.asked.caption for scene in drawn]


def test_training_is_a_function_of_the_seed_and_leaves_the_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, again, other = (train_classifier(seed, steps=3, batch=8) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert not one.training
    assert torch.equal(one.shape.weight, again.shape.weight)
    assert not torch.equal(one.shape.weight, other.shape.weight)


def test_a_short_training_is_far_above_chance_and_sees_nothing_in_blank_images():
    model = train_classifier(steps=100, batch=64)
    images, captions = scenes(500, seed=1)
    assert sees(model, images, captions).float().mean() > 0.15  # chance: 1/24
    assert not sees(model, torch.full_like(images, 0.5), captions).any()


def test_it_is_trained_once_and_again_where_the_file_was_cut_off(tmp_path, monkeypatch):
    monkeypatch.setenv("PALATE_CACHE", str(tmp_path))
    trainings = []

    def train():
        trainings.append(1)
        return train_classifier(steps=2, batch=4)

    monkeypatch.setattr(shape_classifier, "train_classifier", train)
    fresh = shape_classifier.trained_classifier.__wrapped__
    made, read = fresh(), fresh()
    assert len(trainings) == 1
    (file,) = (tmp_path / "models").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    again = fresh()
    assert len(trainings) == 2
    for model in (read, again):
        assert not model.training
        assert all(map(torch.equal, made.parameters(), model.parameters()))


@pytest.mark.slow
def test_unseen_scenes_are_recognized():
    model = train_classifier()
    images, captions = scenes(4000, seed=1)
    assert sees(model, images, captions).float().mean() > 0.97
    assert sees(model, images, captions[1:] + captions[:1]).float().mean() < 0.1
    assert not sees(model, torch.full_like(images, 0.5), captions).any()


def test_captions_of_other_worlds_are_refused():
    with pytest.raises(ValueError, match="'a cat' is no caption of this world"):
        sees(train_classifier(steps=2, batch=4), torch.zeros(1, 3, 16, 16), ["a cat"])
