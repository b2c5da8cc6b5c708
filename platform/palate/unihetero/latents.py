"""Latents of images as tokens, one for each visual token.

A KL autoencoder (diffusers' AutoencoderKL; MAR's has 16 channels and a stride of 16) gives a grid of latents, which is
cut into as many square patches as the image has visual tokens, so that token i of one is token i of the other.
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor


def to_tokens(latents_NCHW: Tensor, tokens: int) -> Tensor:
    """Latents as ``tokens`` patches in reading order: (N, tokens, C · patch²).

    Raises:
        ValueError: the grid of latents cannot be cut so.
    """
    count, channels, height, width = latents_NCHW.shape
    side = round(tokens**0.5)
    if side * side != tokens or height % side or width % side:
        raise ValueError(
            f"latents of {height} x {width} cannot be cut into {tokens} equal patches: choose a resolution at which "
            "the latents' side is a multiple of the visual tokens' side"
        )
    high, wide = height // side, width // side
    cut = latents_NCHW.view(count, channels, side, high, side, wide).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(count, tokens, channels * high * wide)


def from_tokens(tokens_NPc: Tensor, channels: int) -> Tensor:
    """The latents (N, C, H, W) that ``to_tokens`` cut."""
    count, tokens, values = tokens_NPc.shape
    side = round(tokens**0.5)
    patch = round((values // channels) ** 0.5)
    cut = tokens_NPc.view(count, side, side, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(count, channels, side * patch, side * patch)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels_N3HW: Tensor) -> Tensor:
    """Means of the posterior, at the autoencoder's scale: (N, C, H / stride, W / stride); pixels in [-1, 1]."""
    mean: Tensor = vae.encode(pixels_N3HW).latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (mean - shift) * float(vae.config.scaling_factor)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents_NCHW: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1]."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    pixels: Tensor = vae.decode(latents_NCHW / float(vae.config.scaling_factor) + shift).sample
    return (pixels / 2 + 0.5).clamp(0, 1)
