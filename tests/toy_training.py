"""A small run through the train loop, for tests that kill it: linear heads of several clusters behind a dropout.

As a script it is one process of a run: ``toy_training.py FOLDER [--launcher torchrun] [--NAME VALUE …]``.
"""

import dataclasses
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from palate import artifacts, config
from palate.training.logging import read
from palate.training.loop import Group, LoopConfig, LossOutput, train
from palate.training.parallel import World, run_local, run_torchrun, shard
from palate.training.stream import CorruptSample, ListSource, Stream

CLUSTERS, WIDTH, SAMPLES = 3, 6, 41


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    folder: str
    steps: int = 12
    global_batch: int = 5
    micro_batch: int = 2
    dropout: float = 0.2
    checkpoint_every: int = 4
    launcher: Literal["local", "torchrun"] = "local"
    sharded: bool = False
    kill_step: int = 0
    """Kill the process in this step's loss; with kill_rank, on that rank only."""
    kill_rank: int = 0
    kill_fault: str = ""
    """Kill at this fault point of the second checkpoint."""
    nan_step: int = 0
    learning_rate: float = 0.05
    seed: int = 0
    tensorboard: bool = False


class Toy(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(CLUSTERS))
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: torch.Tensor, cluster: int) -> torch.Tensor:
        return torch.stack([head(self.dropout(x)) for head in self.heads])[cluster]


class Source(ListSource):
    """Samples 3 and 17 cannot be read."""

    def load(self, index: int, seed: int) -> Any:
        if index in (3, 17):
            raise CorruptSample("not a sample")
        return super().load(index, seed)


def source() -> Source:
    generator = torch.Generator().manual_seed(3)
    samples = [
        # Most samples are of cluster 0, so that the others are absent from some batches.
        {
            "cluster": max(0, index % 8 - 5),
            "x": torch.randn(WIDTH, generator=generator),
            "y": torch.randn(3, generator=generator),
            "weight": 1 + index % 3,
        }
        for index in range(SAMPLES)
    ]
    return Source("toy", samples, [f"sample-{index}" for index in range(SAMPLES)])


def weigh(sample: dict[str, Any]) -> dict[str, float]:
    return {f"cluster-{sample['cluster']}": sample["weight"], "tokens": sample["weight"]}


def loss(model: nn.Module, samples: list[Any], totals: Mapping[str, float]) -> LossOutput:
    parts, errors = [], 0.0
    for sample in samples:
        error = (model(sample["x"], sample["cluster"]) - sample["y"]).square().mean() * sample["weight"]
        parts.append(error / totals[f"cluster-{sample['cluster']}"])
        errors += error.item()
    return LossOutput(torch.stack(parts).sum(), {"error": (errors, sum(sample["weight"] for sample in samples))})


def groups(model: nn.Module, learning_rate: float = 0.05) -> list[Group]:
    found = []
    for cluster in range(CLUSTERS):
        named = [(n, p) for n, p in model.named_parameters() if n.startswith(f"heads.{cluster}.")]
        found.append(Group(f"cluster-{cluster}", named, learning_rate, weight_decay=0.1, clip_norm=0.5))
    return found


def run(settings: ToyConfig, world: World) -> dict[str, Any]:
    """Train, killing this process where the settings say. Returns the summary."""
    model = Toy(settings.dropout)
    if settings.sharded:
        shard(model, model.heads, world)
    calls = _killing(settings, world)
    loop = LoopConfig(
        settings.steps,
        seed=settings.seed,
        micro_batch=settings.micro_batch,
        checkpoint_every=settings.checkpoint_every,
        tensorboard=settings.tensorboard,
        warmup_ratio=0.25,
    )

    def watched(model: nn.Module, samples: list[Any], totals: Mapping[str, float]) -> LossOutput:
        output = loss(model, samples, totals)
        return calls(output, samples)

    stream = Stream([source()], settings.global_batch, seed=settings.seed)
    summary = train(model, groups(model, settings.learning_rate), stream, weigh, watched, loop, settings.folder, world)
    return dataclasses.asdict(summary)


def _killing(settings: ToyConfig, world: World):
    def kill() -> None:
        # A restarted process, under Ray with the same settings, is not killed again.
        marker = Path(settings.folder) / "killed"
        if not marker.exists():
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    points: list[str] = []

    def fault(point: str) -> None:
        points.append(point)
        if point == settings.kill_fault and points.count(point) == 2:
            kill()

    if settings.kill_fault:
        artifacts.fault_hook = fault

    def step() -> int:
        rows = Path(settings.folder) / "training.jsonl"
        return 1 + (len(rows.read_text().splitlines()) if rows.exists() else 0)

    def watched(output: LossOutput, samples: list[Any]) -> LossOutput:
        if settings.kill_step and world.rank == settings.kill_rank and step() == settings.kill_step:
            kill()
        if settings.nan_step and step() == settings.nan_step:
            return LossOutput(output.loss * float("nan"), output.metrics)
        return output

    return watched


def trace(folder: str | Path) -> list[tuple[Any, ...]]:
    """What two equal runs have in common, step by step; losses to the last bit."""
    return [(row["step"], row["loss"].hex(), row["fingerprint"], tuple(sorted(row["groups"]))) for row in read(folder)]


if __name__ == "__main__":
    chosen = config.parse(ToyConfig)
    torch.set_num_threads(1)
    (run_local if chosen.launcher == "local" else run_torchrun)(run, chosen)
