"""Finished runs of small unified models with drawn weights, and pictures to ask about."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import ViTImageProcessor

from palate import artifacts
from palate.artifacts import Writer
from palate.unihetero.processing import UniHeteroProcessor
from palate.unihetero.stages import KIND
from toy_unihetero import LATENT, PLACES, model, tokenizer

SIDE = 16


def unified_run(folder: Path, arm: str = "embedding", seed: int = 0, loss: str = "cosine") -> str:
    """A run of an arm with drawn weights, also of its heads, whose images move what it says."""
    network = model(arm, loss, seed).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for name, weight in network.named_parameters():
            # Large enough that what is said hangs on the image, and not on ties.
            if weight.ndim > 1 and not name.startswith("vision."):
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
        network.projector.scale.fill_(0.2)
    images = ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = UniHeteroProcessor(images, tokenizer(), image_tokens=PLACES)

    def produce(writer: Writer) -> None:
        network.save_pretrained(writer.folder)
        processor.save_pretrained(writer.folder)

    artifacts.ensure(folder / "model", produce, kind=KIND, config={"arm": arm, "seed": seed})
    return str(folder)


def vae(folder: Path, channels: int = LATENT) -> str:
    """An autoencoder with a stride of 2: the toy model's grid of 2 x 2 latents becomes images of 4 x 4."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    ).save_pretrained(folder)
    return str(folder)


def photo(seed: int, size: tuple[int, int] = (20, 12), kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    """The file of a picture of noise."""
    stream = io.BytesIO()
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(levels).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def refuse_blue(image: Image.Image) -> str | None:
    """A safety hook: a plain blue image is refused."""
    return "it is too blue" if image.getpixel((0, 0)) == (0, 0, 255) else None


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
