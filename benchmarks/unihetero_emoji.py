"""The experiment of UniHetero on real images, small: do the signs agree with what scenes say?

    git clone https://github.com/googlefonts/noto-emoji
    python benchmarks/unihetero_emoji.py --emoji noto-emoji/png/128 --out benchmarks/out/unihetero_emoji

Noto emoji at 32 pixels with their Unicode names as captions, split by base code point: a vision encoder, an autoencoder
and the arms are trained on four fifths of the code points, questions are about the others.

    what      face, person, hand, heart, arrow or square, where the name says just one of them
    colour    the hue of the most saturated pixels, measured
    size      the share of the image that is drawn on, measured, in thirds of the training images

The images are few and are seen several times over: this checks signs, and nothing is said about scale.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from emoji import read_emoji, split_of
from numpy.typing import NDArray
from PIL import Image

from palate import artifacts, progress
from palate.artifacts import Artifact, Writer
from palate.config import scale
from palate.corpora import vqa
from palate.corpora.pictures import decode_image
from palate.corpora.worlds.shapes import encode_png
from palate.evaluation import claims
from palate.unihetero.parts import PartsConfig, make_parts
from palate.unihetero.runs import RunConfig
from palate.unihetero.sweep import SweepConfig, read_runs, sweep

SIDE = 32
THINGS = {
    "face": {"face"},
    "person": {"person", "man", "woman", "men", "women", "adult", "baby", "boy", "girl"},
    "hand": {"hand", "hands", "fist", "finger", "fingers"},
    "heart": {"heart", "hearts"},
    "arrow": {"arrow", "arrows"},
    "square": {"square", "squared"},
}
HUES = {"red": -20, "orange": 20, "yellow": 45, "green": 70, "blue": 165, "purple": 255}  # degrees at which it begins
SIZES = ("small", "medium", "large")
QUESTIONS = {"what": "what is it", "colour": "which colour is it", "size": "how large is it"}


@dataclass(frozen=True)
class EmojiExperiment:
    """The experiment on emoji."""

    emoji: str
    """Folder of Noto's PNG files, or a Parquet file with columns key, caption and image."""
    out: str = scale()
    """Folder of everything that is made."""
    encoder_steps: int = 6000
    """Of training the vision encoder."""
    autoencoder_steps: int = 400
    """Of training the autoencoder."""
    runs: RunConfig = field(default_factory=partial(RunConfig, samples=8192, stops=(1024, 2048, 4096, 8192)))
    arms: tuple[str, ...] = ("understanding", "embedding", "encoder", "pixel", "decoder")
    """Over five seeds."""
    controls: tuple[str, ...] = ("shuffled",)
    """Over three."""
    workers: int = scale(2)
    """Processes, of one thread each."""


def drawn_on(pixels_3HW: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where an image on white is not white, (H, W)."""
    found: NDArray[np.bool_] = pixels_3HW.min(0) < 225
    return found


def colour_of(pixels_3HW: NDArray[np.uint8]) -> str:
    """The hue with most saturation among the pixels that are drawn on; grey where few of them have any."""
    hsv = np.asarray(Image.fromarray(pixels_3HW.transpose(1, 2, 0)).convert("HSV")).astype(float) / 255
    drawn = hsv[drawn_on(pixels_3HW)]
    coloured = drawn[drawn[:, 1] * drawn[:, 2] > 0.2]
    if not len(drawn) or 3 * len(coloured) < len(drawn):
        return "grey"
    starts = list(HUES.values())
    hue = (coloured[:, 0] * 360 - starts[0]) % 360 + starts[0]
    shares = np.histogram(hue, [*starts, starts[0] + 360], weights=coloured[:, 1])[0]
    return list(HUES)[int(shares.argmax())]


def thing_of(caption: str) -> str | None:
    said = set(caption.split())
    found = [thing for thing, words in THINGS.items() if words & said]
    return found[0] if len(found) == 1 else None


def corpus(config: EmojiExperiment) -> Artifact:
    """The emoji as captioned images with questions. The encoder is trained on the images that the model learns from."""
    rows = read_emoji(config.emoji)
    images = [thumbnail(row["image"]) for row in rows]
    sizes = np.array([drawn_on(image).mean() for image in images])
    training = [split_of(row["key"]) == "train" for row in rows]
    thirds = np.quantile(sizes[training], [1 / 3, 2 / 3])
    examples: dict[str, list[vqa.Example]] = {"train": [], "test": []}
    for row, image, size in zip(rows, images, sizes, strict=True):
        answers = {"colour": colour_of(image), "size": SIZES[int(np.searchsorted(thirds, size))]}
        if thing := thing_of(row["caption"]):
            answers["what"] = thing
        asked = tuple(vqa.Question(kind, QUESTIONS[kind], answer) for kind, answer in answers.items())
        one = vqa.Example(encode_png(image / 255), row["caption"], asked)
        examples[split_of(row["key"])].append(one)
    options = {"what": tuple(THINGS), "colour": (*HUES, "grey"), "size": SIZES}
    words = {word for row in rows for word in row["caption"].split()}
    words |= {word for text in QUESTIONS.values() for word in text.split()} | {o for of in options.values() for o in of}

    def produce(writer: Writer) -> None:
        splits = {"encoder": "train", "train": "train", "validation": "test", "test": "test"}
        for split, source in splits.items():
            vqa.write_shard(writer, split, 0, 0, examples[source])
        vqa.write_meta(writer, vqa.Meta(SIDE, options, tuple(sorted(words))), examples["test"])

    settings = {"side": SIDE, "keys": sorted(row["key"] for row in rows)}
    return artifacts.ensure(f"{config.out}/corpus", produce, kind=vqa.KIND, config=settings)


def thumbnail(content: bytes) -> NDArray[np.uint8]:
    """Pixels (3, SIDE, SIDE) on white."""
    small = decode_image(content).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.uint8).transpose(2, 0, 1)


def main() -> None:
    config = tyro.cli(EmojiExperiment, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    found = corpus(config)
    made = make_parts(
        PartsConfig(
            corpus=found.url,
            out=f"{config.out}/parts",
            encoder_steps=config.encoder_steps,
            autoencoder_steps=config.autoencoder_steps,
        )
    )
    sweep(
        SweepConfig(
            corpus=found.url,
            parts=made.url,
            out=f"{config.out}/experiment",
            runs=config.runs,
            arms=config.arms,
            controls=config.controls,
            calibration_samples=3200,
            workers=config.workers,
        )
    )
    report = claims.analyse(read_runs(f"{config.out}/experiment"))
    claims.write(report, Path(config.out) / "report")
    counts = shares(found)
    (Path(config.out) / "report" / "answers.json").write_text(json.dumps(counts, indent=1) + "\n")
    print(json.dumps(counts))
    print(f"report: {config.out}/report/report.md")


def shares(corpus: Artifact) -> dict[str, Any]:
    """Of the test questions: how many there are, and the share of the most frequent answer."""
    asked = [one for questions in vqa.read_split(corpus, "test").questions for one in questions]
    found = {}
    for kind in QUESTIONS:
        answers = [one.answer for one in asked if one.kind == kind]
        found[kind] = {"questions": len(answers), "most frequent": max(map(answers.count, set(answers))) / len(answers)}
    return found


if __name__ == "__main__":
    with progress.stage("emoji"):
        main()
