"""Frozen features of images: simple statistics of pixels that need no weights, or a vision model from the hub.

Symbols: N images, D width, H x W pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel

from palate import artifacts

PIXELS = "pixels"  # the name of the built-in statistics
CELLS = 4  # of a side, whose mean colours are among them

Features = Callable[[Sequence[Image.Image]], NDArray[np.float64]]


def image_features(model: str = PIXELS, device: str = "cpu", batch: int = 16) -> Features:
    """A function from images to features (N, D): ``PIXELS``, or a CLIP, DINO or other vision model by folder or hub
    id, whose embeddings have norm one.

    Raises:
        OSError: there is no such model.
        ValueError: a model that has no embedding of images.
    """
    if model == PIXELS:
        return pixel_statistics
    source = artifacts.model_source(model)
    processor = AutoImageProcessor.from_pretrained(source)
    network = AutoModel.from_pretrained(source, use_safetensors=True).to(device).eval()
    if not hasattr(network, "get_image_features") and network.config.model_type.endswith("text_model"):
        raise ValueError(f"{model} is a {network.config.model_type}, which sees no images: name a vision model")

    @torch.inference_mode()
    def features(images: Sequence[Image.Image]) -> NDArray[np.float64]:
        found = []
        for start in range(0, len(images), batch):
            given = processor(images=[image.convert("RGB") for image in images[start : start + batch]])
            pixels_N3HW = torch.as_tensor(np.array(given["pixel_values"])).to(device)
            if hasattr(network, "get_image_features"):  # CLIP and SigLIP
                output = network.get_image_features(pixel_values=pixels_N3HW)
                embedded = getattr(output, "pooler_output", output)
            else:
                output = network(pixel_values=pixels_N3HW)
                pooled = getattr(output, "pooler_output", None)
                embedded = output.last_hidden_state[:, 0] if pooled is None else pooled
            found.append(normalize(embedded.flatten(1), dim=1).double().cpu().numpy())
        return np.concatenate(found)

    return features


def pixel_statistics(images: Sequence[Image.Image]) -> NDArray[np.float64]:
    """Mean colours of 4 x 4 cells, and mean and deviation of luma (Rec. 601) and of the range over the channels:
    (N, 52), pixels in [0, 1]."""
    rows = []
    for image in images:
        colour_HW3 = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
        cells = np.asarray(image.convert("RGB").resize((CELLS, CELLS), Image.Resampling.BOX), dtype=np.float64) / 255
        luma_HW = colour_HW3 @ np.array([0.299, 0.587, 0.114])
        range_HW = colour_HW3.max(axis=2) - colour_HW3.min(axis=2)
        rows.append([*cells.ravel(), luma_HW.mean(), luma_HW.std(), range_HW.mean(), range_HW.std()])
    return np.array(rows)
