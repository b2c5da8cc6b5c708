"""Whether an image shows the shape and the colour that a caption asks for, by a small network trained on scenes.

It shares nothing with the annotators' utilities (``corpora/worlds/shapes.py``), so it can tell when a model that was
tuned to please them no longer draws what is asked. Images without a shape are among what it learns from.

Symbols: N images, S shapes and C colours, each with one more for "nothing".
"""

import hashlib
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate, relu

from palate.artifacts import cache_folder
from palate.corpora.worlds import shapes

SHAPES, COLOURS = shapes.SHAPES, tuple(shapes.HUES)
NOTHING = 0.1  # share of images without a shape
_SCENES = 6000  # drawn once, or as many as there are turns, then disturbed anew in every step


class ShapeClassifier(nn.Module):
    """Four convolutions and the maximum over places, 0.1M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(3, 16, 3, padding=1),
                nn.Conv2d(16, 24, 4, stride=2, padding=1),
                nn.Conv2d(24, 48, 3, padding=1),
                nn.Conv2d(48, 64, 4, stride=2, padding=1),
            ]
        )
        self.shape = nn.Linear(64, len(SHAPES) + 1)
        self.colour = nn.Linear(64, len(COLOURS) + 1)

    def forward(self, images_N3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of shapes (N, S + 1) and colours (N, C + 1); the last of each is "nothing"."""
        hidden = images_N3HW * 2 - 1
        for layer in self.layers:
            hidden = relu(layer(hidden))
        found = hidden.amax(dim=(2, 3))
        return self.shape(found), self.colour(found)


@cache
def trained_classifier() -> ShapeClassifier:
    """``train_classifier()``, which takes most of a minute: done once, and kept in Palate's cache."""
    written = b"".join(Path(file).read_bytes() for file in (__file__, shapes.__file__))
    key = hashlib.sha256(written + torch.__version__.encode()).hexdigest()[:16]
    file = cache_folder() / "models" / f"shape-classifier-{key}.safetensors"
    model = ShapeClassifier()
    try:
        model.load_state_dict(load_file(file))
    except (FileNotFoundError, SafetensorError):  # none, or one that was cut off
        model = train_classifier()
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".training-") as folder:
            unfinished = Path(folder, file.name)
            save_file(model.state_dict(), unfinished)
            unfinished.replace(file)
    return model.eval()


def train_classifier(seed: int = 0, steps: int = 700, batch: int = 128) -> ShapeClassifier:
    """A classifier in eval mode, a function of the arguments; torch's own random state is left alone."""
    random = np.random.default_rng(seed)
    scenes = [shapes.draw_scene(_any(random), random) for _ in range(min(_SCENES, steps * batch))]
    images = torch.from_numpy(shapes.paint(scenes)).float()
    shape_N = torch.tensor([SHAPES.index(scene.asked.shape) for scene in scenes])
    colour_N = torch.tensor([COLOURS.index(scene.asked.colour) for scene in scenes])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ShapeClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(scenes), (batch,), generator=generator)
        empty = torch.rand(batch, generator=generator) < NOTHING
        shown = torch.where(empty[:, None, None, None], _nothing(batch, generator), images[chosen])
        shape, colour = model(_disturbed(shown, generator))
        loss = cross_entropy(shape, torch.where(empty, len(SHAPES), shape_N[chosen]))
        loss = loss + cross_entropy(colour, torch.where(empty, len(COLOURS), colour_N[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def sees(classifier: ShapeClassifier, images_N3HW: Tensor, captions: Sequence[str]) -> Tensor:
    """Whether each image, pixels in [0, 1], shows the shape and colour that its caption asks for, (N,) booleans.

    Raises:
        ValueError: a caption that is not one of this world's.
    """
    unknown = [caption for caption in captions if caption not in shapes.BY_CAPTION]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no caption of this world; one is {next(iter(shapes.BY_CAPTION))!r}")
    asked = [shapes.BY_CAPTION[caption] for caption in captions]
    shape, colour = classifier(images_N3HW.float().clamp(0, 1))
    shape_N = torch.tensor([SHAPES.index(one.shape) for one in asked], device=shape.device)
    colour_N = torch.tensor([COLOURS.index(one.colour) for one in asked], device=colour.device)
    return (shape.argmax(1) == shape_N) & (colour.argmax(1) == colour_N)


def _any(random: np.random.Generator) -> shapes.Asked:
    return shapes.ASKED[random.integers(len(shapes.ASKED))]


def _nothing(count: int, generator: torch.Generator) -> Tensor:
    """Plain backgrounds, with clouds of any colour in half of them."""
    light = torch.rand(count, 1, 1, 1, generator=generator).expand(-1, 3, -1, -1)
    clouds = interpolate(torch.rand(count, 3, 4, 4, generator=generator), size=shapes.SIDE, mode="bilinear")
    share = torch.rand(count, 1, 1, 1, generator=generator) * (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    return light + share * (clouds - light)


def _disturbed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blurred and with noise, each image to a degree of its own, as a model's may be."""
    count = len(images)
    blur = torch.rand(count, 1, 1, 1, generator=generator) * 0.5
    noise = torch.rand(count, 1, 1, 1, generator=generator) * 0.06
    blurred = avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return images + blur * (blurred - images) + noise * torch.randn(images.shape, generator=generator)
