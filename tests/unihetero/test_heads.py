"""Projector, diffusion head, latents: against formulas, diffusers' scheduler, and themselves cut in parts."""

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import ViTImageProcessor

from palate.unihetero import latents
from palate.unihetero.heads import (
    DiffusionHead,
    PixelDecoder,
    Projector,
    draw_noise,
    noise_scheduler,
    to_scale,
)

CPU = torch.device("cpu")


def test_a_projector_sees_directions_only_and_gives_one_size():
    torch.manual_seed(0)
    projector = Projector(6, 8, 0.3)
    features = torch.randn(5, 6)
    torch.testing.assert_close(projector(features), projector(7 * features), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(projector(features).square().mean(-1).sqrt(), torch.full((5,), 0.3))


def test_a_diffusion_head_tells_no_noise_at_first():
    head = DiffusionHead(4, 6, width=16)
    assert not head(torch.randn(3, 4), torch.tensor([0, 500, 999]), torch.randn(3, 6)).any()
    noise = draw_noise([1], 3, 4, 2, 0.0, CPU)
    expected = noise.epsilon_RNz.square().mean((0, 2))
    torch.testing.assert_close(head.loss(torch.randn(3, 4), torch.randn(3, 6), noise), expected)


def test_the_loss_is_of_diffusers_noise():
    torch.manual_seed(0)
    head = DiffusionHead(4, 6, width=16)
    torch.nn.init.normal_(head.outward.weight)
    targets, condition = torch.randn(3, 4), torch.randn(3, 6)
    noise = draw_noise([5], 3, 4, 2, 0.0, CPU)
    scheduler = noise_scheduler()
    total = 0.0
    for draw in range(2):
        noisy = scheduler.add_noise(targets, noise.epsilon_RNz[draw], noise.times_RN[draw])
        total = total + (head(noisy, noise.times_RN[draw], condition) - noise.epsilon_RNz[draw]).square().mean(-1) / 2
    torch.testing.assert_close(head.loss(targets, condition, noise), total)


def test_noise_depends_on_the_image_alone():
    together = draw_noise([3, 4], 5, 2, 3, 0.5, CPU)
    alone = draw_noise([4], 5, 2, 3, 0.5, CPU)
    assert torch.equal(together.epsilon_RNz[:, 5:], alone.epsilon_RNz)
    assert torch.equal(together.times_RN[:, 5:], alone.times_RN)
    assert torch.equal(together.dropped_N[5:], alone.dropped_N)
    dropped = draw_noise(list(range(400)), 2, 1, 1, 0.25, CPU).dropped_N.view(400, 2)
    assert torch.equal(dropped[:, 0], dropped[:, 1])  # an image's condition is dropped as a whole
    assert dropped[:, 0].float().mean() == pytest.approx(0.25, abs=0.07)


def test_what_is_dropped_is_replaced_by_nobody():
    torch.manual_seed(0)
    head = DiffusionHead(4, 6, width=16)
    torch.nn.init.normal_(head.outward.weight)
    noise = draw_noise([1], 3, 4, 2, 1.0, CPU)
    targets = torch.randn(3, 4)
    first, second = (head.loss(targets, torch.randn(3, 6), noise) for _ in range(2))
    assert torch.equal(first, second)


def test_draws_find_what_was_learned():
    torch.manual_seed(0)
    head = DiffusionHead(2, 3, width=64, blocks=2)
    conditions = torch.eye(3)
    targets = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]])
    optimizer = torch.optim.AdamW(head.parameters(), 3e-3)
    for step in range(400):
        noise = draw_noise([step], 48, 2, 1, 0.1, CPU)
        head.loss(targets.repeat(16, 1), conditions.repeat(16, 1), noise).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    drawn = head.sample(conditions.repeat(20, 1), torch.Generator().manual_seed(0), steps=25)
    assert (drawn.view(20, 3, 2).mean(0) - targets).abs().max() < 0.3
    again = head.sample(conditions.repeat(20, 1), torch.Generator().manual_seed(0), steps=25)
    assert torch.equal(drawn, again)
    guided = head.sample(conditions.repeat(20, 1), torch.Generator().manual_seed(0), steps=25, guidance=3.0)
    assert not torch.equal(drawn, guided)


def test_a_pixel_decoder_sees_whole_images_and_no_others():
    torch.manual_seed(0)
    decoder = PixelDecoder(16, 4, 6, 8, 1)
    embeddings = torch.randn(2, 4, 16)
    before = decoder.conditions(embeddings).view(2, 4, 16)
    changed = embeddings.clone()
    changed[0, 3] = torch.randn(16)
    after = decoder.conditions(changed).view(2, 4, 16)
    assert not torch.allclose(before[0, 0], after[0, 0])  # the last token tells the first
    torch.testing.assert_close(before[1], after[1])


# Latents


def test_latents_are_cut_and_put_together():
    grid = torch.randn(2, 3, 8, 8)
    tokens = latents.to_tokens(grid, 16)
    assert tokens.shape == (2, 16, 12)
    assert torch.equal(latents.from_tokens(tokens, 3), grid)
    torch.testing.assert_close(tokens[1, 5].view(3, 2, 2), grid[1, :, 2:4, 2:4])  # row 1, column 1 of four
    with pytest.raises(ValueError, match="latents of 8 x 8 cannot be cut into 9"):
        latents.to_tokens(grid, 9)


def vae():
    torch.manual_seed(0)
    made = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    ).eval()
    made.register_to_config(scaling_factor=0.5, shift_factor=0.1)
    return made


@torch.no_grad()
def test_latents_have_the_autoencoders_scale():
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    mean = vae().encode(pixels).latent_dist.mean
    torch.testing.assert_close(latents.encode(vae(), pixels), (mean - 0.1) * 0.5)
    shown = vae().decode(mean).sample / 2 + 0.5
    torch.testing.assert_close(latents.decode(vae(), (mean - 0.1) * 0.5), shown.clamp(0, 1), rtol=1e-4, atol=1e-5)


class Processor:
    image_processor = ViTImageProcessor(image_mean=[0.2, 0.3, 0.4], image_std=[0.5, 0.6, 0.7])


def test_latents_of_pixels_as_the_encoder_wants_them():
    maker = latents.LatentMaker(vae(), Processor, 4)
    assert maker.width == 4
    shown = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.2, 0.3, 0.4], [0.5, 0.6, 0.7]))
    found = maker((shown - mean) / std)  # a grid of 2 x 2 latents of stride 2: images of 4 pixels, as they are
    torch.testing.assert_close(found, latents.to_tokens(latents.encode(vae(), shown * 2 - 1), 4), rtol=1e-3, atol=1e-4)
    assert not found.requires_grad
    assert to_scale(found, 1.0).square().mean() == pytest.approx(1.0, rel=1e-4)
