"""Images at given seeds, alike whatever else is in the batch, and the grid that shows before and after."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro
from PIL import Image, ImageDraw
from torch import nn

from palate.config import require_at_least, scale
from palate.progress import track


@dataclass(frozen=True)
class SampleConfig:
    """How images are made."""

    sampler_steps: int = 30
    """Denoising steps."""
    guidance: float = 7.5
    """Classifier-free guidance of the text."""
    image_guidance: float = 1.5
    """Editing: guidance of the source image."""
    batch: Annotated[int, tyro.conf.arg(name="sample-batch")] = scale(4)
    """Images made together."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "sampler_steps", "batch")

    def sides(self, editing: bool) -> int:
        """How often the denoiser sees each image at a step: with and without what it is guided by."""
        if self.guidance <= 1 or (editing and self.image_guidance < 1):
            return 1
        return 3 if editing else 2


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: SampleConfig,
    *,
    size: tuple[int, int] | None = None,
    sources: Sequence[Image.Image] | None = None,
    embeddings: torch.Tensor | None = None,
    label: str = "images",
) -> list[Image.Image]:
    """One image for each prompt at its seed.

    Args:
        size: (height, width); the pipeline's own by default.
        sources: the images to edit, one a prompt (InstructPix2Pix).
        embeddings: (prompts, J) of people, for a pipeline with their branch.
    """
    pipeline.set_progress_bar_config(disable=True)
    made: list[Image.Image] = []
    for start in track(range(0, len(prompts), config.batch), label):
        span = slice(start, start + config.batch)
        given: dict[str, Any] = {"prompt": list(prompts[span])}
        if size and sources is None:
            given |= {"height": size[0], "width": size[1]}
        if sources is not None:
            given |= {"image": list(sources[span]), "image_guidance_scale": config.image_guidance}
        with _given_people(pipeline, None if embeddings is None else embeddings[span]):
            made += pipeline(
                **given,
                # A generator of its own for each image, on the CPU: the same noise in any batch, on any device.
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[span]],
                num_inference_steps=config.sampler_steps,
                guidance_scale=config.guidance,
                output_type="pil",
            ).images
    return made


@contextmanager
def _given_people(pipeline: Any, embeddings_NJ: torch.Tensor | None) -> Iterator[None]:
    """Have every pass of the U-Net take the person of each image.

    diffusers' own ``ip_adapter_image_embeds`` gives every image of a batch the people of all its images. All sides of
    the guidance, one after another in a pass, have the person: it is of the text, and of the source image, alone.
    """
    if embeddings_NJ is None:
        yield
        return

    def give(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        sides = len(arguments[0]) // len(embeddings_NJ)
        embeddings = embeddings_NJ.to(arguments[0]).repeat(sides, 1)[:, None]
        added = {**(keywords.get("added_cond_kwargs") or {}), "image_embeds": [embeddings]}
        return arguments, {**keywords, "added_cond_kwargs": added}

    hook = pipeline.unet.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def grid(rows: Sequence[str], columns: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """A picture with a row for each caption and a column for each system, labelled; images at 160 to 320 pixels."""
    side = min(320, max([160, *(image.width for images in columns.values() for image in images)]))
    text, top, gap = 220, 24, 6
    sheet = Image.new("RGB", (text + len(columns) * (side + gap), top + len(rows) * (side + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, name in enumerate(columns):
        pen.text((text + place * (side + gap), 6), name, fill="black")
    for row, caption in enumerate(rows):
        y = top + row * (side + gap)
        pen.multiline_text((8, y + 8), _wrapped(caption, 32), fill="black")
        for place, images in enumerate(columns.values()):
            by = Image.Resampling.NEAREST if images[row].width < side else Image.Resampling.LANCZOS
            sheet.paste(images[row].resize((side, side), by), (text + place * (side + gap), y))
    return sheet


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:8])
