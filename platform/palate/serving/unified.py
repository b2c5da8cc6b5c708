"""A unified vision-language model in memory, ready to answer questions about images and to draw them.

Conversations are put as training puts them (``unihetero.phrasing``): the images first, whichever message brought them,
then questions and answers. What an image gives stands in the prompt's embeddings, and the engine decodes on the
language model as it does for text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from palate import artifacts
from palate.models.causal_lm import LoadedModel, wrap
from palate.serving.answering import NotFinite
from palate.unihetero.generation import check_draws, draw_images
from palate.unihetero.heads import PixelDecoder
from palate.unihetero.model import UniHeteroModel
from palate.unihetero.phrasing import Phrasing
from palate.unihetero.processing import UniHeteroProcessor
from palate.unihetero.stages import KIND

LEAD = " "  # what every answer begins with in training (``Phrasing.question``); it is not the answer's


@dataclass(frozen=True, eq=False)
class ServedUnified:
    """A run of jobs/unihetero.py; ``loaded`` is its language model, which the engine decodes on."""

    version: str
    model: UniHeteroModel
    processor: UniHeteroProcessor
    loaded: LoadedModel

    @property
    def phrasing(self) -> Phrasing:
        return self.processor.phrasing

    @property
    def barred(self) -> tuple[int, ...]:
        """Tokens of images, which say nothing in a text."""
        config = self.model.config
        return config.image_token_id, config.image_start_id, config.image_end_id


def load_unified(url: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ServedUnified:
    """Load the model of the run at ``url``.

    Raises:
        ArtifactError: the run is not finished, or damaged.
        ValueError: the language model names no end token.
    """
    artifact = artifacts.open_artifact(artifacts.join(url, "model"), KIND)
    folder = artifact.local_folder()
    model = UniHeteroModel.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    return ServedUnified(artifact.digest[:16], model, processor, wrap(model.language, processor.tokenizer, url))


def prompt_ids(served: ServedUnified, turns: Sequence[tuple[str, str]], images: int) -> list[int]:
    """Token ids of a conversation of (role, text) turns about so many images; images alone ask for a caption.

    Raises:
        ValueError: the model was not trained on such conversations.
    """
    said = served.phrasing
    roles = [role for role, _ in turns]
    if "system" in roles:
        raise ValueError("this model was trained without system messages: leave them out")
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise ValueError(f"messages must be the user's and the assistant's in turn, the user's last; found {roles}")
    before, asked = turns[:-1], turns[-1][1].strip()
    pictures = said.image() * images
    if not asked:
        if before or not images:
            raise ValueError("the last message has no text: ask something")
        return [*pictures, *said.ids(said.words.caption)]
    return [*pictures, *(said.conversation(before).ids if before else ()), *said.asked(asked)]


@torch.no_grad()
def prompt_embeddings(served: ServedUnified, ids: Sequence[int], images: Sequence[Image.Image]) -> Tensor:
    """What the language model reads of a prompt with images (T, d)."""
    model = served.model
    pixels_I3HW = served.processor.pixels(images).to(model.device, model.dtype)
    ids_1T = torch.tensor([list(ids)], device=model.device)
    return model.embed(ids_1T, model.encode(pixels_I3HW))[0]


@dataclass(frozen=True, eq=False)
class UnifiedImages:
    """A unified model that draws, with the autoencoder of its latents."""

    served: ServedUnified
    vae: AutoencoderKL

    editing = False
    personal = False

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of its images; it draws no others."""
        config, vae = self.served.model.config, self.vae.config
        side = math.isqrt(config.image_tokens) * math.isqrt(config.latent_width // vae.latent_channels)
        side *= 2 ** (len(vae.block_out_channels) - 1)
        return side, side

    @property
    def base(self) -> str:
        """What it is."""
        return str(self.served.model.config.model_type)

    def knows(self, user: str | None) -> bool:
        return False

    def draw(self, prompt: str, seed: int, steps: int, guidance: float) -> Image.Image | NotFinite:
        """The image of a caption at a seed.

        Raises:
            ValueError: the caption is longer than the model reads.
        """
        model, said = self.served.model, self.served.phrasing
        ids = [*said.ids(said.words.caption), *said.ids(" " + prompt)]
        most = getattr(model.config.text_config, "max_position_embeddings", None)
        room = None if most is None else most - model.config.image_tokens - 1
        if room is not None and len(ids) > room:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, and this model reads {room} before an image: shorten it"
            )
        pixels_3HW = draw_images(model, self.vae, ids, [seed], steps, guidance)[0].float().cpu()
        if not pixels_3HW.isfinite().all():
            return NotFinite("the model gave NaN or infinite values for this image")
        levels_HW3 = (255 * pixels_3HW).round().to(torch.uint8).permute(1, 2, 0)
        return Image.fromarray(levels_HW3.numpy())


def load_images(url: str, vae: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> UnifiedImages:
    """Load a run and the autoencoder of its pixel decoder.

    Raises:
        ArtifactError: the run is not finished, or damaged.
        ValueError: it cannot draw, or with another autoencoder only.
    """
    served = load_unified(url, device=device, dtype=dtype)
    model = served.model
    check_draws(model)
    if not isinstance(model.pixel_head, PixelDecoder):
        raise ValueError(f"{url} has no pixel decoder: train --arm decoder, or the stage pixels on it")
    try:
        loaded: Any = AutoencoderKL.from_pretrained(
            artifacts.model_source(vae), torch_dtype=dtype, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"vae {vae!r} cannot be loaded: {error}") from error
    channels, width = int(loaded.config.latent_channels), model.config.latent_width
    if width % channels or math.isqrt(width // channels) ** 2 * channels != width:
        raise ValueError(f"{url} tells latents of {width} values, and {vae} has {channels} channels: it is another's")
    return UnifiedImages(served, loaded.to(device).eval().requires_grad_(False))
