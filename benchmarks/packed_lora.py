"""What packed LoRA adds to a decode step: bare base, packed, and PEFT's ``adapter_names``, side by side.

    python benchmarks/packed_lora.py

One decode step of ``--batch`` rows with ``--context`` tokens before it, adapters spread over the rows, all linear
layers adapted, on the engine's slot cache. The variants take turns, a step each, and a ratio is the median over the
turns, so that a machine shared with others slows all of them alike; only ratios mean anything there. On a busy machine
``--clock cpu --threads 1`` counts the process's own CPU time instead of waiting time.
"""

import inspect
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from palate import progress
from palate.card import adapters
from palate.models.causal_lm import load_causal_lm
from palate.serving.cache import SlotCache


@dataclass(frozen=True)
class Config:
    """What to measure; see the module's text."""

    model: str = "smollm2"
    device: str = "cpu"
    threads: int = 2
    clock: Literal["wall", "cpu"] = "wall"
    batch: int = 16
    context: int = 64
    repeats: int = 15
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    ranks: tuple[int, ...] = (8, 16)
    peft_counts: tuple[int, ...] = (1, 4, 16)
    out: Path = Path("benchmarks/out/packed_lora.json")


Step = Callable[[], Any]


def pack(model: PreTrainedModel, count: int, rank: int, masked: bool | None = None) -> adapters.RowMask:
    """Pack adapters with weights that are not zero; ``masked`` forces one of the two products."""
    limit = adapters.MASKED_UP_TO
    if masked is not None:
        adapters.MASKED_UP_TO = count * rank if masked else 0
    rows = adapters.pack(model, count, adapters.LoraConfig(rank=rank))
    adapters.MASKED_UP_TO = limit
    for _, layer in adapters.packed_layers(model):
        layer.requires_grad_(False)
        for B in layer.B:
            nn.init.normal_(B, std=0.01)
    return rows


def unpack(model: PreTrainedModel) -> None:
    """The bare model again."""
    for name, layer in list(adapters.packed_layers(model)):
        model.set_submodule(name, layer.base)


def decode_step(model: nn.Module, base: PreTrainedModel, config: Config, **extra: Any) -> Step:
    """A function that runs one decode step; the tokens before it are zeros, as what they are takes no time."""
    cache = SlotCache(base.config, config.batch, config.context + 1, base.dtype, base.device)
    tokens = torch.arange(config.batch, device=base.device)
    positions = torch.full((config.batch,), config.context, device=base.device)
    mask = torch.zeros(config.batch, 1, 1, config.context + 1, dtype=base.dtype, device=base.device)
    # transformers 5.24 renamed the argument.
    name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
    inputs = {"input_ids": tokens[:, None], "attention_mask": mask, "position_ids": positions[:, None]}

    def step() -> None:
        cache.decode(config.batch, positions, config.context)
        with torch.no_grad():
            model(**inputs, **{name: cache}, use_cache=True, **extra)
        if base.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def take_turns(steps: dict[str, Step], config: Config) -> dict[str, list[float]]:
    """Seconds of every step; the first turn warms up and is not counted."""
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(config.repeats + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def ratio(over: list[float], under: list[float]) -> float:
    """The median over the turns."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def compare_with_peft(config: Config, count: int, rank: int) -> dict[str, float]:
    """Medians in seconds, and the ratios, of base, packed and PEFT with the same adapters."""
    base, model, plain = (load_causal_lm(config.model, device=config.device).model for _ in range(3))
    rows = pack(model, count, rank)
    with tempfile.TemporaryDirectory() as folder:
        for index in range(count):
            where = Path(folder) / str(index)
            adapters.export_adapter(model, index, adapters.LoraConfig(rank=rank), where, config.model)
        peft = PeftModel.from_pretrained(plain, f"{folder}/0", adapter_name="0")
        for index in range(1, count):
            peft.load_adapter(f"{folder}/{index}", adapter_name=str(index))
    peft.eval()
    index_B = torch.arange(config.batch, device=base.device) % count
    rows.set(index_B)
    names = [str(index) for index in index_B.tolist()]
    steps = {
        "base": decode_step(base, base, config),
        "packed": decode_step(model, model, config),
        "peft": decode_step(peft, plain, config, adapter_names=names),
    }
    seconds = take_turns(steps, config)
    return {
        **{f"{name}_seconds": statistics.median(times) for name, times in seconds.items()},
        "packed_over_base": ratio(seconds["packed"], seconds["base"]),
        "peft_over_packed": ratio(seconds["peft"], seconds["packed"]),
    }


def curve_point(config: Config, base: PreTrainedModel, model: PreTrainedModel, count: int, rank: int) -> dict[str, Any]:
    """Both products over the base at one number of adapters and one rank, and which of them is used."""
    seconds: dict[str, float] = {}
    for masked in (True, False):
        rows = pack(model, count, rank, masked)
        rows.set(torch.arange(config.batch, device=base.device) % count)
        steps = {"base": decode_step(base, base, config), "packed": decode_step(model, model, config)}
        times = take_turns(steps, config)
        seconds["masked" if masked else "gathered"] = ratio(times["packed"], times["base"])
        unpack(model)
    used = "masked" if count * rank <= adapters.MASKED_UP_TO else "gathered"
    return {"adapters": count, "rank": rank, "used": used, **seconds}


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    print(f"r=8, batch {config.batch}, all linear layers of {config.model}, on {config.device}:")
    print("\n| K | base ms | packed ms | PEFT ms | packed / base | PEFT / packed |\n|--:|--:|--:|--:|--:|--:|")
    headline = {}
    for count in config.peft_counts:
        found = headline[count] = compare_with_peft(config, count=count, rank=8)
        milliseconds = " | ".join(f"{found[f'{name}_seconds'] * 1000:.1f}" for name in ("base", "packed", "peft"))
        ratios = f"{found['packed_over_base']:.2f} | {found['peft_over_packed']:.2f}"
        print(f"| {count} | {milliseconds} | {ratios} |", flush=True)
    base, model = (load_causal_lm(config.model, device=config.device).model for _ in range(2))
    points = [(count, rank) for rank in config.ranks for count in config.counts]
    curve = [curve_point(config, base, model, *point) for point in progress.track(points, "curve")]
    print("\n| K | r | K·r | masked / base | gathered / base | used |\n|--:|--:|--:|--:|--:|:--|")
    for point in curve:
        print(
            f"| {point['adapters']} | {point['rank']} | {point['adapters'] * point['rank']} | {point['masked']:.2f} "
            f"| {point['gathered']:.2f} | {point['used']} |"
        )
    settings = {**vars(config), "out": str(config.out), "torch": torch.__version__}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps({"config": settings, "with_peft": headline, "curve": curve}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
