"""The frozen parts of the experiment, made once: a vision encoder and an autoencoder trained without labels, on
images that no evaluation sees, and what they and a random encoder give for every image.

    vision/ random/ vae/          what transformers and diffusers load; vision/ with its image processor
    language/                     a language model of random weights, whose tokenizer knows the corpus's words
    SPLIT.safetensors             features (N, P, s), random (N, P, s) and latents (N, P, c), float16
    report.json                   of scenes, how well linear probes read the encoders (see ``probes``)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTImageProcessor, ViTModel

from palate import artifacts, progress
from palate.artifacts import Artifact, Writer
from palate.config import scale
from palate.corpora import vqa
from palate.corpora.worlds import scenes
from palate.models import small_vision
from palate.models.small_lm import small_llama, word_tokenizer
from palate.unihetero import latents
from palate.unihetero.model import UniHeteroConfig, grid
from palate.unihetero.probes import probe

KIND = "unihetero-parts"
TOKENS = 16  # visual tokens of an image
MERGE: Literal["concatenate"] = "concatenate"  # how the encoder's patches become these
WORDS = ("Caption:", "Question:", "Answer:")  # that stand around texts (``phrasing.Words``)
_AT_ONCE = 256
_PROBED = 4000  # training images that probes are fitted on


@dataclass(frozen=True)
class PartsConfig:
    """Train the frozen parts on the images of a corpus, and encode all."""

    corpus: str
    """Captioned images with questions (jobs/prepare.py scenes): a folder or URL."""
    out: str = scale()
    """Folder or URL of the parts."""
    encoder_steps: int = 16_000
    """Of training the vision encoder, 64 images each. It knows colours after 1,500, shapes only after 10,000."""
    autoencoder_steps: int = 1000
    """Of training the autoencoder, 32 images each."""
    patch: int = 8
    """Side of the encoder's patches, in pixels."""
    width: int = 64
    """Of the encoder."""
    layers: int = 4
    """Of the encoder."""
    language_width: int = 96
    """Of the language model."""
    language_layers: int = 4
    """Of the language model."""
    seed: int = 0
    """Of all that is drawn."""
    fresh: bool = scale(False)
    """Discard what is at --out, finished or not."""


@dataclass(frozen=True)
class EncodedSplit:
    """A split's images with what the parts give for them; tensors in the order of ``examples.keys``."""

    examples: vqa.Split
    features_NPs: Tensor
    random_NPs: Tensor
    latents_NPc: Tensor


def make_parts(config: PartsConfig) -> Artifact:
    """The parts at ``config.out``, unless they are there."""
    corpus = artifacts.open_artifact(config.corpus, vqa.KIND)
    meta = vqa.read_meta(corpus)

    def produce(writer: Writer) -> None:
        settings = small_vision.vit_config(meta.side, config.patch, config.width, config.layers)
        images = vqa.read_split(corpus, "encoder").images_N3HW
        with progress.stage("vision encoder"):
            vision = small_vision.train_encoder(images, settings, steps=config.encoder_steps, seed=config.seed)
        with progress.stage("autoencoder"):
            vae = small_vision.train_autoencoder(images, steps=config.autoencoder_steps, seed=config.seed)
        control = small_vision.random_encoder(settings, config.seed)
        for name, part in (("vision", vision), ("random", control), ("vae", vae)):
            part.save_pretrained(writer.folder / name)
        size = {"height": meta.side, "width": meta.side}
        ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
            writer.folder / "vision"
        )
        tokenizer = word_tokenizer([*WORDS, *meta.words])
        tokenizer.save_pretrained(writer.folder / "language")
        small_llama(len(tokenizer), config.language_width, config.language_layers, seed=config.seed).save_pretrained(
            writer.folder / "language"
        )
        probed = {}
        for split in vqa.SPLITS[1:]:
            found = vqa.read_split(corpus, split)
            tensors = {
                "features": features(vision, found.images_N3HW),
                "random": features(control, found.images_N3HW),
                "latents": in_parts(lambda p: latents.to_tokens(latents.encode(vae, p), TOKENS), found.images_N3HW),
            }
            if split in ("train", "test"):
                probed[split] = (
                    scenes.described(found.facts[:_PROBED]),
                    {name: value[:_PROBED] for name, value in tensors.items()},
                )
            save_file({name: value.half() for name, value in tensors.items()}, writer.folder / f"{split}.safetensors")
        report: dict[str, dict[str, float]] = {}
        for name in ("features", "random"):
            (trained, given), (held_out, tested) = probed["train"], probed["test"]
            if trained:
                report[name] = probe(given[name].numpy(), trained, tested[name].numpy(), held_out)
        shown = torch.from_numpy(found.images_N3HW[:512]).float() / 255
        told = latents.decode(vae, latents.encode(vae, shown * 2 - 1))
        report["vae"] = {"psnr": float(-10 * torch.log10(((told - shown) ** 2).mean()))}
        writer.write_json("report.json", report)
        writer.summary.update(
            {f"{name}/{key}": value for name, values in report.items() for key, value in values.items()}
        )

    return artifacts.ensure(
        config.out, produce, kind=KIND, config=config, inputs={"corpus": corpus}, fresh=config.fresh
    )


def read_encoded(parts: Artifact, corpus: Artifact, split: str) -> EncodedSplit:
    """A split with its features and latents.

    Raises:
        ArtifactMismatch: the parts were made from another corpus.
    """
    if parts.inputs["corpus"] != corpus.digest:
        raise artifacts.ArtifactMismatch(f"{parts.url} was not made from {corpus.url}: make the parts of this corpus")
    tensors = load_file(parts.local(f"{split}.safetensors"))
    return EncodedSplit(vqa.read_split(corpus, split), tensors["features"], tensors["random"], tensors["latents"])


def features(vision: ViTModel, images_N3HW: NDArray[np.uint8]) -> Tensor:
    """What an encoder gives, merged to ``TOKENS``: (N, P, s)."""
    config = UniHeteroConfig(vision_config=vision.config, image_tokens=TOKENS, merge=MERGE)
    return in_parts(lambda pixels: grid(vision(pixel_values=pixels).last_hidden_state, config), images_N3HW)


@torch.inference_mode()
def in_parts(run: Callable[[Tensor], Tensor], images_N3HW: NDArray[np.uint8]) -> Tensor:
    """``run`` on pixels in [-1, 1], so many at once that they fit in memory."""
    starts = range(0, len(images_N3HW), _AT_ONCE)
    return torch.cat([run(small_vision.normalized(images_N3HW[start : start + _AT_ONCE])) for start in starts])
