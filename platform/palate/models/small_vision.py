"""A small vision encoder and a small KL autoencoder, trained from nothing on one's own images, without labels.

For worlds that no published encoder knows, and for tests and demonstrations that fetch nothing. Both are what
transformers and diffusers load: a ViTModel trained as a masked autoencoder (He et al. 2022, arXiv 2111.06377), and an
AutoencoderKL. Images are (N, 3, H, W) uint8.
"""

from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from palate.progress import track

MASKED = 0.5  # share of the patches that the encoder does not see
KL_WEIGHT = 1e-4  # of the autoencoder's posterior
LEAST_STEPS = 20  # of either training: the rate rises in the first tenth of them


def vit_config(side: int, patch: int = 8, width: int = 96, layers: int = 3) -> ViTConfig:
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=3 * width,
        image_size=side,
        patch_size=patch,
    )


def random_encoder(config: ViTConfig, seed: int = 0) -> ViTModel:
    """An encoder whose weights are as they were drawn: the control."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTModel(config, add_pooling_layer=False).eval()


def train_encoder(
    images_N3HW: np.ndarray,
    config: ViTConfig,
    *,
    steps: int = 3000,
    batch: int = 64,
    rate: float = 3e-3,
    seed: int = 0,
) -> ViTModel:
    """An encoder that was trained to tell half of the patches from the other half."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shared = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "image_size",
            "patch_size",
        )
        settings = {name: getattr(config, name) for name in shared}
        model = ViTMAEForPreTraining(
            ViTMAEConfig(
                **settings,
                mask_ratio=MASKED,
                decoder_hidden_size=64,
                decoder_num_hidden_layers=1,
                decoder_num_attention_heads=4,
                decoder_intermediate_size=128,
            )
        ).train()
        optimizer, schedule = _optimizer(model, rate, steps, weight_decay=0.05)
        for pixels in track(batches(images_N3HW, steps, batch, seed), "vision encoder", steps):
            model(pixel_values=pixels).loss.backward()
            _update(model, optimizer, schedule)
        encoder = ViTModel(config, add_pooling_layer=False)
    encoder.load_state_dict(model.vit.state_dict())
    return encoder.eval()


def train_autoencoder(
    images_N3HW: np.ndarray,
    *,
    channels: int = 16,
    steps: int = 2000,
    batch: int = 32,
    rate: float = 2e-3,
    seed: int = 0,
) -> AutoencoderKL:
    """An autoencoder of stride 8 whose latents have unit deviation after its ``scaling_factor``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 48, 64),
            latent_channels=channels,
            norm_num_groups=8,
            layers_per_block=1,
            mid_block_add_attention=False,
        ).train()
        optimizer, schedule = _optimizer(vae, rate, steps, weight_decay=0.0)
        for pixels in track(batches(images_N3HW, steps, batch, seed), "autoencoder", steps):
            posterior = vae.encode(pixels).latent_dist
            told = vae.decode(posterior.sample()).sample
            loss = (told - pixels).abs().mean() + (told - pixels).square().mean() + KL_WEIGHT * posterior.kl().mean()
            loss.backward()
            _update(vae, optimizer, schedule)
        vae.eval()
        with torch.no_grad():
            latents = vae.encode(normalized(images_N3HW[:256])).latent_dist.mode()
        vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae


def normalized(images_N3HW: np.ndarray) -> Tensor:
    """Pixels in [-1, 1], as both models take them."""
    return torch.from_numpy(np.ascontiguousarray(images_N3HW)).float() / 127.5 - 1


def batches(images_N3HW: np.ndarray, steps: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Epochs in random order, each batch whole."""
    if not len(images_N3HW):
        raise ValueError("there is no image to train on")
    random = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(order) < batch:
            order = np.concatenate([order, random.permutation(len(images_N3HW))])
        chosen, order = order[:batch], order[batch:]
        yield normalized(images_N3HW[np.sort(chosen)])


def _optimizer(
    model: nn.Module, rate: float, steps: int, weight_decay: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    if steps < LEAST_STEPS:
        raise ValueError(f"at least {LEAST_STEPS} steps train an encoder or an autoencoder, got {steps}")
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
