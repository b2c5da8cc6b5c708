"""Latents of images as tokens, one for each visual token.

A KL autoencoder (diffusers' AutoencoderKL; MAR's has 16 channels and a stride of 16) gives a grid of latents, which is
cut into as many square patches as the image has visual tokens, so that token i of one is token i of the other.
"""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


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


class LatentMaker:
    """Latent tokens (I, P, c) of images as the vision encoder is given them.

    Args:
        processor: says how pixels were normalized.
        tokens: P; images are resized so that the grid of latents can be cut into as many patches.
    """

    def __init__(self, vae: AutoencoderKL, processor: Any, tokens: int) -> None:
        self.vae, self.tokens = vae.eval().requires_grad_(False), tokens
        given = processor.image_processor
        self.mean = torch.tensor(given.image_mean).view(3, 1, 1)
        self.std = torch.tensor(given.image_std).view(3, 1, 1)
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)
        self.side = round(tokens**0.5)

    @property
    def width(self) -> int:
        """Values of a latent token, at the smallest resolution that fits: one latent each."""
        return int(self.vae.config.latent_channels)

    @cached_property
    def flops(self) -> float:
        """Of making an image's latents, counted once."""
        device = next(self.vae.parameters()).device
        with FlopCounterMode(display=False) as counter:
            self(torch.zeros(1, 3, self.side * self.stride, self.side * self.stride, device=device))
        return float(counter.get_total_flops())

    @torch.no_grad()
    def __call__(self, pixel_values_I3HW: Tensor) -> Tensor:
        shown = pixel_values_I3HW * self.std.to(pixel_values_I3HW) + self.mean.to(pixel_values_I3HW)
        size = self.side * self.stride
        resized = F.interpolate(shown, (size, size), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
        return to_tokens(encode(self.vae, resized.to(self.vae.dtype)), self.tokens).float()
