"""How much of an accelerator pretraining uses: model FLOPs utilization, and what the train loop adds to a bare one.

    python benchmarks/pretraining.py --sizes smollm2-135m 1b --peak-tflops 989 --precision bf16 --compile

Models of published shapes with random weights: a language model with a DINOv2-B-shaped encoder at 224 pixels, whose
256 patches become ``--image-tokens`` visual tokens, and a caption of ``--text-tokens``. ``loop`` is ``pretrain`` with
its stream, logs and data threads; ``bare`` is the same model and optimizer on one batch that is on the device already,
as one would write it by hand. Rates are medians over steps after the warm-up; give the peak of the device at the
precision (``--peak-tflops``) for the utilization. ``tiny`` is for a look on a CPU.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from transformers import Dinov2Config, LlamaConfig

from palate import progress
from palate.training import logging as run_logs
from palate.training.parallel import World
from palate.training.stream import Stream
from palate.unihetero.arms import ARMS, ArmName, configured
from palate.unihetero.flops import flops_per_sample, shape_of, utilization
from palate.unihetero.model import UniHeteroConfig, UniHeteroModel
from palate.unihetero.objectives import ObjectiveConfig, Weights, total
from palate.unihetero.samples import Sample, Segment, collate
from palate.unihetero.training import PretrainConfig, pretrain

Size = Literal["tiny", "smollm2-135m", "1b"]
LANGUAGE: dict[Size, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    # As SmolLM2-135M and Llama-3.2-1B.
    "smollm2-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
}
VOCABULARY: dict[Size, int] = {"tiny": 512, "smollm2-135m": 49_152, "1b": 128_256}


@dataclass(frozen=True)
class Config:
    """What to measure; see the module's text."""

    sizes: tuple[Size, ...] = ("tiny",)
    arm: ArmName = "embedding"
    image_tokens: int = 256
    text_tokens: int = 64
    batch: int = 16
    """Samples an update, all at once."""
    steps: int = 30
    warmup: int = 10
    """Steps that do not count."""
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    peak_tflops: float | None = None
    out: Path = Path("benchmarks/out/pretraining.json")


@dataclass(frozen=True)
class Pictures:
    """A source of samples that cost nothing to read: one image over and over."""

    config: UniHeteroConfig
    text_tokens: int
    name: str = "pictures"
    fingerprint: str = "pictures"

    @cached_property
    def image(self) -> Tensor:
        side = self.config.image_size
        return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 1_000_000

    def id(self, index: int) -> str:
        return str(index)

    def load(self, index: int, seed: int) -> Sample:
        config = self.config
        image = (config.image_start_id, *[config.image_token_id] * config.image_tokens, config.image_end_id)
        words = torch.randint(config.text_config.vocab_size - 3, (self.text_tokens,)).tolist()
        return Sample(str(index), image, (Segment.answered(words[:1], words[1:]),), self.image, seed=seed % (1 << 40))


def build(size: Size, config: Config) -> UniHeteroModel:
    vocabulary = VOCABULARY[size]
    settings = UniHeteroConfig(
        text_config=LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **LANGUAGE[size]),
        vision_config=Dinov2Config(image_size=224, patch_size=14)
        if size != "tiny"
        else Dinov2Config(
            image_size=224, patch_size=14, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2
        ),
        image_tokens=config.image_tokens,
        image_start_id=vocabulary - 3,
        image_token_id=vocabulary - 2,
        image_end_id=vocabulary - 1,
    )
    torch.manual_seed(0)
    return UniHeteroModel(configured(settings, ARMS[config.arm], "cosine", LANGUAGE[size]["num_hidden_layers"] // 2))


def loop(model: UniHeteroModel, config: Config, world: World) -> float:
    """Seconds a step of ``pretrain``."""
    with tempfile.TemporaryDirectory() as folder:
        pretrain(
            model,
            ARMS[config.arm],
            Stream([Pictures(model.config, config.text_tokens)], config.batch, seed=0),
            ObjectiveConfig(),
            PretrainConfig(
                steps=config.steps,
                batch=config.batch,
                micro_batch=config.batch,
                precision=config.precision,
                compile=config.compile,
                checkpoint_every=config.steps,
                spike_sigmas=None,
            ),
            folder,
            world,
        )
        seconds = [row["seconds"] for row in run_logs.read(folder)]
    return statistics.median(seconds[config.warmup : -1])  # the last one saves a checkpoint


def bare(model: UniHeteroModel, config: Config, world: World) -> float:
    """Seconds a step of the same model and optimizer on a batch that is there."""
    source = Pictures(model.config, config.text_tokens)
    batch = collate([[source.load(number, number)] for number in range(config.batch)]).to(world.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-5, fused=True)
    totals = {"text": float(config.batch * (config.text_tokens - 1)), "visual": float(config.batch)}
    seconds = []
    for _ in range(config.steps):
        started = time.perf_counter()
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss, _ = total(model(**batch.arguments()), Weights(1, 1, 1), totals)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[config.warmup :])


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    world = World.current()
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    table = []
    for size in config.sizes:
        with progress.stage(size):
            model = build(size, config).to(world.device)
            step, by_hand = loop(model, config, world), bare(model, config, world)
            cost = flops_per_sample(shape_of(model.config), config.text_tokens, config.text_tokens - 1)
            rate = cost.total * config.batch / step
            table.append(
                {
                    "size": size,
                    "device": device,
                    "trained parameters": shape_of(model.config).trained,
                    "GFLOP a sample": cost.total / 1e9,
                    "samples a second": config.batch / step,
                    "TFLOP a second": rate / 1e12,
                    "MFU": None if config.peak_tflops is None else utilization(rate, 1, config.peak_tflops * 1e12),
                    "bare over loop": by_hand / step,
                }
            )
            print(json.dumps(table[-1]), flush=True)
            del model
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
