"""Finished runs of image tuning with drawn weights, on the built-in pipelines, and settings to serve them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from palate import artifacts
from palate.artifacts import Writer
from palate.lpo import personal
from palate.lpo.stages import TUNED
from palate.models.diffusion import load_diffusion
from palate.serving.image_service import ImageSettings

PEOPLE, WIDTH = ("ann", "bob"), 8
PROMPT = "a small red circle on grey"


def lora_run(folder: Path, seed: int = 0, base: str = "shapes") -> str:
    """A run whose LoRA moves every image."""

    def produce(writer: Writer) -> None:
        loaded: Any = load_diffusion(base)
        network = loaded.denoiser
        network.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for name, weight in network.named_parameters():
                if ".lora_" in name:
                    weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        loaded.pipeline.save_lora_weights(
            writer.folder / "lora",
            unet_lora_layers=get_peft_model_state_dict(network),
            unet_lora_adapter_metadata=network.peft_config["default"].to_dict(),
        )

    return _run(folder, produce, base)


def person_run(folder: Path, base: str = "shapes", people: Sequence[str] = PEOPLE) -> str:
    """A run with a branch for people, which moves their images."""

    def produce(writer: Writer) -> None:
        network = load_diffusion(base).denoiser
        personal.add_branch(network, WIDTH)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for name, weight in network.named_parameters():
                if "to_v_ip" in name:
                    weight.copy_(4 * torch.randn(weight.shape, generator=generator))
        personal.save_branch(network, personal.new_people(people, WIDTH), writer.folder / "person")

    return _run(folder, produce, base)


def pipeline_run(folder: Path) -> str:
    """A run of full weights: the built-in's, doubled in one layer."""

    def produce(writer: Writer) -> None:
        loaded: Any = load_diffusion("shapes")
        with torch.no_grad():
            loaded.denoiser.conv_out.weight.mul_(2)
        loaded.pipeline.save_pretrained(writer.folder / "pipeline")

    return _run(folder, produce, "shapes")


def settings(folder: Path, **changes: Any) -> ImageSettings:
    return ImageSettings(database=f"sqlite:///{folder}/palate.db", **changes)


def picture(colour: str, size: tuple[int, int] = (16, 16), kind: str = "PNG", **options: Any) -> bytes:
    """The file of a plain picture."""
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind, **options)
    return stream.getvalue()


def refuse_red(image: Image.Image) -> str | None:
    """A safety hook: images that are redder than anything else are refused."""
    red, green, blue = image.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return "it is too red" if red > max(green, blue) else None


def _run(folder: Path, produce: Any, base: str) -> str:
    artifacts.ensure(
        folder / "tuned", produce, kind=TUNED, config={"model": base, "base_weights": load_diffusion(base).weights}
    )
    return str(folder)
