"""Small encoders and autoencoders: what they are trained on, that they learn, and that nothing else moves."""

import numpy as np
import pytest
import torch

from palate.models import small_vision
from palate.models.small_vision import batches, normalized, random_encoder, train_autoencoder, train_encoder, vit_config

CONFIG = vit_config(16, patch=4, width=16, layers=1)


@pytest.fixture(scope="module")
def images():
    """Bars of one colour on black, across or down."""
    random = np.random.default_rng(0)
    found = np.zeros((96, 3, 16, 16), np.uint8)
    for number, image in enumerate(found):
        start = random.integers(2, 11)
        colour = random.integers(60, 256, size=(3, 1, 1))
        if number % 2:
            image[:, start : start + 4] = colour
        else:
            image[:, :, start : start + 4] = colour
    return found


def test_every_epoch_shows_every_image_once(images):
    drawn = torch.cat(list(batches(images, 6, 32, seed=3)))
    for epoch in (drawn[:96], drawn[96:]):
        assert sorted(row.sum().item() for row in epoch) == sorted(row.sum().item() for row in normalized(images))
    assert not torch.equal(drawn[:96], drawn[96:])


def test_nothing_to_learn_from_is_refused(images):
    with pytest.raises(ValueError, match="no image to train on"):
        train_encoder(images[:0], CONFIG, steps=20)
    with pytest.raises(ValueError, match="at least 20 steps train an encoder or an autoencoder, got 10"):
        train_autoencoder(images, steps=10)


def test_masked_patches_are_told_from_those_that_are_seen(monkeypatch):
    """Images of one colour each: the loss falls far below that of knowing the mean colour only."""
    colours = np.random.default_rng(0).integers(0, 256, size=(96, 3, 1, 1))
    images = np.broadcast_to(colours, (96, 3, 16, 16)).astype(np.uint8)
    losses = []
    forward = small_vision.ViTMAEForPreTraining.forward

    def noting(self, *given, **named):
        output = forward(self, *given, **named)
        losses.append(output.loss.item())
        return output

    monkeypatch.setattr(small_vision.ViTMAEForPreTraining, "forward", noting)
    before = torch.random.get_rng_state()
    trained = train_encoder(images, CONFIG, steps=80, batch=32, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    pixels = normalized(images)
    assert np.mean(losses[-20:]) < 0.1 * pixels.var(0).mean().item()
    assert not trained.training
    assert trained(pixel_values=pixels[:2]).last_hidden_state.shape == (2, 17, 16)


def test_latents_have_unit_deviation_and_tell_the_image(images):
    trained = train_autoencoder(images, channels=4, steps=100, batch=16, rate=4e-3)
    pixels = normalized(images)
    with torch.no_grad():
        latents = trained.encode(pixels).latent_dist.mode()
        told = trained.decode(latents).sample
    assert (latents * trained.config.scaling_factor).std().item() == pytest.approx(1, abs=0.02)
    assert latents.shape == (96, 4, 2, 2)
    assert (told - pixels).square().mean() < 0.6 * pixels.var(0).mean()


def test_random_encoders_differ_by_seed_only():
    weights = [random_encoder(CONFIG, seed).embeddings.patch_embeddings.projection.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
