"""What stands around the language model: the projector, the heads, and the per-token diffusion head (MAR).

Symbols: N tokens (positions), P visual tokens of an image, d width of the language model, d_s width of the vision
encoder, z width of what a head predicts, c condition width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

TRAIN_STEPS = 1000  # of the diffusion that a head denoises


class Projector(nn.Module):
    """From what the vision encoder puts out to what the language model takes in: (…, d_s) -> (…, d).

    All outputs have the root mean square ``scale``, that of the language model's token embeddings. So images and text
    are alike in size, what a head predicts needs no size of its own, and cosine and squared distance are the same loss.
    """

    scale: Tensor

    def __init__(self, width_in: int, width: int, scale: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width_in)
        self.up = nn.Linear(width_in, width)
        self.down = nn.Linear(width, width)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, features: Tensor) -> Tensor:
        return to_scale(self.down(F.gelu(self.up(self.norm(features)))), self.scale)


def to_scale(values: Tensor, scale: Tensor | float) -> Tensor:
    """Vectors with the root mean square ``scale``."""
    return F.rms_norm(values.float(), values.shape[-1:], eps=1e-12).to(values.dtype) * scale


class MlpHead(nn.Module):
    """Predicts a vector from a hidden state: (…, d) -> (…, z)."""

    def __init__(self, width: int, width_out: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width_out)

    def forward(self, states: Tensor) -> Tensor:
        return cast(Tensor, self.down(F.gelu(self.up(states))))


class DiffusionHead(nn.Module):
    """The per-token diffusion head of MAR (Li et al. 2024, arXiv 2406.11838, section 3.3): an MLP of residual blocks,
    modulated by the condition and the time (AdaLN), that tells the noise of a token.

    Cosine noise schedule; the variance is fixed, not learned as in MAR. Targets should have unit variance.
    """

    def __init__(self, width_out: int, condition: int, width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.width_out = width_out
        self.inward = nn.Linear(width_out, width)
        self.condition = nn.Linear(condition, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.modulate = nn.Sequential(nn.SiLU(), _zeros(width, 2 * width))
        self.outward = _zeros(width, width_out)
        self.nobody = nn.Parameter(torch.zeros(condition))  # in the condition's place where it is left out

    def forward(self, noisy_Nz: Tensor, times_N: Tensor, condition_Nc: Tensor) -> Tensor:
        """The noise in ``noisy_Nz``, (N, z); times count from 0 to ``TRAIN_STEPS`` - 1."""
        embedded_Nw = self.time(_sinusoids(times_N, self.inward.out_features).to(noisy_Nz.dtype))
        embedded_Nw = embedded_Nw + self.condition(condition_Nc)
        hidden_Nw = self.inward(noisy_Nz)
        for block in self.blocks:
            hidden_Nw = block(hidden_Nw, embedded_Nw)
        shift, gain = self.modulate(embedded_Nw).chunk(2, dim=-1)
        return cast(Tensor, self.outward(_normed(hidden_Nw) * (1 + gain) + shift))

    def loss(self, targets_Nz: Tensor, condition_Nc: Tensor, noise: "Noise") -> Tensor:
        """Squared error of the told noise, the mean over draws and elements: (N,)."""
        scheduler = noise_scheduler()
        draws = noise.times_RN.shape[0]
        targets = targets_Nz.repeat(draws, 1)
        condition = condition_Nc.repeat(draws, 1)
        condition = torch.where(noise.dropped_N.repeat(draws)[:, None], self.nobody.to(condition.dtype), condition)
        epsilon, times = noise.epsilon_RNz.flatten(0, 1).to(targets.dtype), noise.times_RN.flatten()
        noisy = scheduler.add_noise(targets, epsilon, times)
        told = self(noisy, times, condition)
        return ((told.float() - epsilon.float()) ** 2).mean(-1).view(draws, -1).mean(0)

    @torch.no_grad()
    def sample(
        self, condition_Nc: Tensor, generator: torch.Generator | None, steps: int = 50, guidance: float = 1.0
    ) -> Tensor:
        """Tokens (N, z) drawn given the conditions, by DDPM's ancestral steps with classifier-free guidance."""
        scheduler = noise_scheduler()
        scheduler.set_timesteps(steps)
        rows = len(condition_Nc)
        device = condition_Nc.device
        # On the CPU, so that a seed gives the same draw on every device.
        draw = torch.randn(rows, self.width_out, generator=generator).to(device)
        nobody = self.nobody.to(condition_Nc.dtype).expand_as(condition_Nc)
        for time in scheduler.timesteps:
            times = torch.full((rows,), int(time), device=device)
            told = self(draw.to(condition_Nc.dtype), times, condition_Nc)
            if guidance != 1:
                without = self(draw.to(condition_Nc.dtype), times, nobody)
                told = without + guidance * (told - without)
            draw = scheduler.step(told.float(), int(time), draw, generator=generator).prev_sample
        return cast(Tensor, draw)


@dataclass(frozen=True)
class Noise:
    """What is drawn for a diffusion loss on N tokens of z values: R draws of times and noise, and whose condition is
    dropped."""

    times_RN: Tensor
    epsilon_RNz: Tensor
    dropped_N: Tensor


def draw_noise(
    seeds: Sequence[int], tokens: int, width: int, draws: int, dropout: float, device: torch.device
) -> Noise:
    """Noise for ``tokens`` tokens of each image, from the image's seed alone: neither ranks nor micro-batches
    matter."""
    times, epsilon, dropped = [], [], []
    generator = torch.Generator()
    for seed in seeds:
        generator.manual_seed(seed)
        times.append(torch.randint(TRAIN_STEPS, (draws, tokens), generator=generator))
        epsilon.append(torch.randn(draws, tokens, width, generator=generator))
        dropped.append((torch.rand(1, generator=generator) < dropout).expand(tokens))
    return Noise(
        torch.cat(times, dim=1).to(device), torch.cat(epsilon, dim=1).to(device), torch.cat(dropped).to(device)
    )


class PixelDecoder(nn.Module):
    """Latent tokens from the visual embeddings of whole images: a bidirectional transformer over the P embeddings of an
    image, then the per-token diffusion head. It stands outside of the language model, which gets no gradient from
    it."""

    def __init__(self, width: int, tokens: int, channels: int, head_width: int, blocks: int, layers: int = 2) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(tokens, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.context = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = DiffusionHead(channels, width, head_width, blocks)

    def conditions(self, embeddings_IPd: Tensor) -> Tensor:
        """(I, P, d) visual embeddings of unit root mean square -> (I · P, d) conditions of their latent tokens."""
        return cast(Tensor, self.context(embeddings_IPd + self.places)).flatten(0, 1)


def noise_scheduler() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=TRAIN_STEPS, beta_schedule="squaredcos_cap_v2", clip_sample=False)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulate = nn.Sequential(nn.SiLU(), _zeros(width, 3 * width))
        self.inner = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        shift, gain, gate = self.modulate(embedded).chunk(3, dim=-1)
        return hidden + gate * cast(Tensor, self.inner(_normed(hidden) * (1 + gain) + shift))


def _zeros(width_in: int, width_out: int) -> nn.Linear:
    """A layer that begins by giving zeros."""
    layer = nn.Linear(width_in, width_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _normed(values: Tensor) -> Tensor:
    return F.layer_norm(values, values.shape[-1:])


def _sinusoids(times_N: Tensor, width: int) -> Tensor:
    """Transformer position embeddings (Vaswani et al. 2017) of times: (N, width)."""
    frequencies = torch.exp(
        -torch.arange(width // 2, device=times_N.device) * (torch.log(torch.tensor(1e4)) / (width // 2))
    )
    angles = times_N.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, width % 2))
