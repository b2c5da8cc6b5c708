"""A small run through the train loop, for tests that kill it: linear heads of several clusters behind a dropout.

As a script it is one process of a run: ``toy_training.py --folder FOLDER [--launcher torchrun] [--NAME VALUE …]``.
"""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from palate import artifacts, config
from palate.training.logging import read
from palate.training.loop import Group, LoopConfig, LossOutput, train
from palate.training.parallel import World, run_local, run_torchrun, shard
from palate.training.stream import CorruptSample, ListSource, Stream

# Processes that start with torch imported: each run in one of its own takes a tenth of the time.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["toy_training", "torch._dynamo"])  # the optimizer imports the latter, in 2 s

CLUSTERS, WIDTH, SAMPLES = 3, 6, 41


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    folder: str
    steps: int = 12
    global_batch: int = 5
    micro_batch: int = 2
    dropout: float = 0.2
    checkpoint_every: int = 4
    keep: int = 2
    background_saves: bool = True
    read_ahead: int = 0
    average: bool = False
    """Keep a moving average of the first head's weights, which is not trained, in the checkpoints."""
    launcher: Literal["local", "torchrun"] = "local"
    sharded: bool = False
    kill_step: int = 0
    """Send a signal to the process of kill_rank in this step's loss; 0: never."""
    kill_signal: Literal["SIGKILL", "SIGTERM"] = "SIGKILL"
    kill_rank: int = 0
    marker: str = ""
    """Folder for the file "killed", by default the run's: who finds it there is not killed."""
    kill_fault: str = ""
    """Send SIGKILL to rank 0 at this fault point of its second checkpoint, once it is in kill_step, if that is set."""
    learning_rate: float = 0.05
    seed: int = 0
    tensorboard: bool = False
    fresh: bool = False


class Toy(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(CLUSTERS))
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x_BW: torch.Tensor, cluster_B: torch.Tensor) -> torch.Tensor:
        answers_KB3 = torch.stack([head(self.dropout(x_BW)) for head in self.heads])
        return answers_KB3[cluster_B, torch.arange(len(cluster_B))]


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
    answers_B3 = model(torch.stack([s["x"] for s in samples]), torch.tensor([s["cluster"] for s in samples]))
    errors_B = (answers_B3 - torch.stack([s["y"] for s in samples])).square().mean(dim=1)
    errors_B = errors_B * torch.tensor([s["weight"] for s in samples])
    shares_B = errors_B / torch.tensor([totals[f"cluster-{s['cluster']}"] for s in samples])
    return LossOutput(shares_B.sum(), {"error": (errors_B.sum(), sum(s["weight"] for s in samples))})


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
    before_loss = _killing(settings, world)
    loop = LoopConfig(
        settings.steps,
        seed=settings.seed,
        micro_batch=settings.micro_batch,
        checkpoint_every=settings.checkpoint_every,
        keep=settings.keep,
        background_saves=settings.background_saves,
        read_ahead=settings.read_ahead,
        tensorboard=settings.tensorboard,
        warmup_ratio=0.25,
    )

    def watched(model: nn.Module, samples: list[Any], totals: Mapping[str, float]) -> LossOutput:
        before_loss(totals)
        return loss(model, samples, totals)

    stream = Stream([source()], settings.global_batch, seed=settings.seed)
    parts = groups(model, settings.learning_rate)
    average = nn.Parameter(model.heads[0].weight.detach().clone(), requires_grad=False)
    more: dict[str, Any] = {"fresh": settings.fresh}
    if settings.average:
        more |= {
            "kept": [("average", average)],
            "before_step": lambda step: average.data.lerp_(model.heads[0].weight.data, 0.25),
        }
    summary = train(model, parts, stream, weigh, watched, loop, settings.folder, world, **more)
    return dataclasses.asdict(summary)


def _killing(settings: ToyConfig, world: World) -> Callable[[Mapping[str, float]], None]:
    """Arms the kill; what it returns is to be called before every loss."""

    def kill() -> None:
        # A process that is started again with the same settings, as Ray does, is not killed again.
        marker = Path(settings.marker or settings.folder) / "killed"
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL if settings.kill_fault else signal.Signals[settings.kill_signal])

    points: list[str] = []
    reached = threading.Event()

    def fault(point: str) -> None:
        points.append(point)
        if point == settings.kill_fault and points.count(point) == 2:
            if settings.kill_step:
                reached.wait()
            kill()

    if settings.kill_fault:
        artifacts.fault_hook = fault

    steps: list[Mapping[str, float]] = []

    def before_loss(totals: Mapping[str, float]) -> None:
        if not steps or steps[-1] is not totals:
            steps.append(totals)
        if world.rank == settings.kill_rank and len(steps) == settings.kill_step:
            reached.set()
            if not settings.kill_fault:
                kill()

    return before_loss


def trace(folder: str | Path) -> list[tuple[Any, ...]]:
    """What two equal runs have in common, step by step; losses to the last bit."""
    return [(row["step"], row["loss"].hex(), row["fingerprint"], tuple(sorted(row["groups"]))) for row in read(folder)]


def process(settings: ToyConfig, environment: Mapping[str, str] | None = None) -> None:
    """One process of a run; ``environment`` is added to its own."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    (run_local if settings.launcher == "local" else run_torchrun)(run, settings)


if __name__ == "__main__":
    process(config.parse(ToyConfig))
