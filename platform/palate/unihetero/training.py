"""Pretraining on the one train loop: parameter groups, what a sample weighs, the loss."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from palate.config import require_at_least, scale
from palate.training import parallel
from palate.training.loop import Group, LoopConfig, LossOutput, TrainingSummary, train
from palate.training.parallel import Precision, World
from palate.training.stream import Stream
from palate.unihetero.arms import Arm
from palate.unihetero.averages import Average
from palate.unihetero.flops import IMAGE_MARKS, flops_per_sample, shape_of
from palate.unihetero.latents import LatentMaker
from palate.unihetero.model import Losses, UniHeteroModel
from palate.unihetero.objectives import (
    ObjectiveConfig,
    Weights,
    collapse,
    gradient_alignment,
    total,
    weights_at,
)
from palate.unihetero.samples import Sample, collate, split

# What each stage trains: the projector alone, all but the encoder, the pixel decoder alone.
Stage = Literal["projector", "joint", "pixels"]
# A head that is not trained has nothing to say to the projector, nor has the text to the pixel head.
LOSSES: dict[Stage, Losses] = {"projector": "text", "joint": "all", "pixels": "pixels"}


@dataclass(frozen=True)
class PretrainConfig:
    """How a stage is trained."""

    stage: Stage = "joint"
    """projector: a warm-up of the projector alone; joint: projector, language model and heads, also to tune on
    instructions; pixels: the pixel decoder alone."""
    steps: int = 1000
    """Updates."""
    batch: int = 64
    """Samples, or packs, an update."""
    learning_rate: float = 5e-4
    """Peak rate."""
    weight_decay: float = 0.01
    """AdamW's."""
    clip_norm: float = 1.0
    """Of the gradient of each group: the language model with its projector, the semantic head, the pixel head."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps over which it rises."""
    precision: Precision = "fp32"
    """bf16: the forward pass computes in bfloat16 where that is safe."""
    spike_sigmas: float | None = scale(20.0)
    """Skip an update whose loss is so many robust deviations above the median; stop after three in a row."""
    max_corrupt: int = scale(10_000)
    """Stop when more samples than this could not be read."""
    average: float | None = None
    """End with an average of the weights over the steps, with this exponent (see ``averages``), as with a constant
    rate; None: with the last."""
    monitor_every: int = scale(0)
    """Steps between looks at the targets (collapse) and at how the losses' gradients agree, by layer; 0: none."""
    micro_batch: int = scale(16)
    """Samples, or packs, that a rank takes through the model at once."""
    checkpoint_every: int = scale(200)
    """Steps between checkpoints."""
    keep: int = scale(2)
    """Checkpoints to keep."""
    read_ahead: int = scale(2)
    """Steps whose samples are read while others are computed."""
    readers: int = scale(4)
    """Threads that read samples."""
    peak_tflops: float | None = scale(None)
    """Of a rank's accelerator at this precision, to log the utilization (MFU)."""
    background_saves: bool = scale(True)
    """Write checkpoints while training goes on."""
    shard: bool = scale(False)
    """Shard weights, gradients and moments over the ranks (FSDP2)."""
    checkpoint_activations: bool = scale(False)
    """Compute activations again in the backward pass rather than keep them."""
    compile: bool = scale(False)
    """torch.compile the language model's layers."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps", "batch", "micro_batch", "checkpoint_every", "keep")
        if self.monitor_every and (self.stage != "joint" or self.shard or self.compile):
            raise ValueError(
                "--monitor-every looks at whole gradients: with --stage joint, without --shard and --compile"
            )


@dataclass
class Pretraining:
    """A model on its way: what the loop calls."""

    model: UniHeteroModel
    arm: Arm
    objective: ObjectiveConfig
    config: PretrainConfig
    device: torch.device
    weights: Weights = field(init=False)
    average: Average | None = None
    observe: Callable[[int], None] | None = None
    stops: Sequence[int] = ()
    latents: Callable[[Tensor], Tensor] | None = None
    row: int | None = None
    look: bool = False
    encoded: bool = False
    """Whether samples bring the encoder's features, which then cost nothing."""
    groups: tuple[str, ...] = field(init=False)
    """What is trained; found once, for a walk over the model at every sample costs more than reading one."""

    def __post_init__(self) -> None:
        self.groups = tuple(name for name, _ in parameters(self.model, self.config.stage))

    def before_step(self, step: int) -> None:
        """What follows the update before, and the weights of the step's losses."""
        if step > 1:
            self.after_step(step - 1)
        every = self.config.monitor_every
        self.look = bool(every) and step % every == 0
        self.weights = weights_at(step, self.config.steps, self.arm, self.objective)

    def after_step(self, step: int) -> None:
        """The averages of weights after ``step`` updates, and a look at the model where one is wanted."""
        if self.config.stage != "pixels":  # there the projector stands still
            self.model.follow(self.objective.momentum)
        if self.average is not None:
            self.average.follow(step)
        if self.observe is not None and step in self.stops:
            self.model.eval()
            with self.average.in_place() if self.average is not None else nullcontext():
                self.observe(step)
            self.model.train()

    def weigh(self, unit: Sample | Sequence[Sample]) -> dict[str, float]:
        samples = _samples(unit)
        images = sum(sample.image_count for sample in samples)
        weights = {
            "text": float(sum(sample.supervised for sample in samples)),
            "visual": float(images * self.model.config.image_tokens),
            "tokens": float(sum(sample.length for sample in samples)),
        }
        return weights | dict.fromkeys(self.groups, 1.0)

    def flops(self, totals: Mapping[str, float]) -> float:
        """Model FLOPs of a global batch, its samples taken to be alike: images with as much text each."""
        images = max(1.0, totals.get("visual", 0.0) / self.model.config.image_tokens)
        text = max(1.0, totals["tokens"] / images - self.model.config.image_tokens - IMAGE_MARKS)
        one = flops_per_sample(
            shape_of(self.model.config),
            text,
            totals["text"] / images,
            encoded=self.encoded,
            stage=self.config.stage,
            latents=self.latents.flops if isinstance(self.latents, LatentMaker) else 0.0,
        )
        return images * one.total

    def loss(self, model: nn.Module, units: Sequence[Any], totals: Mapping[str, float]) -> LossOutput:
        batch = collate([row for unit in units for row in split(_samples(unit), self.row)]).to(self.device)
        arguments = batch.arguments()
        self.encoded = batch.image_features is not None
        if self.latents is not None and batch.pixel_values is not None:
            arguments["latents"] = self.latents(batch.pixel_values)
        output = model(**arguments, losses=LOSSES[self.config.stage])
        loss, metrics = total(output, self.weights, totals)
        if self.look and output.targets is not None:
            rows = len(output.targets)
            for name, value in collapse(output, self.model.config.image_tokens).items():
                metrics[f"targets/{name}"] = (value * rows, rows)
        if self.look:
            self.look = False  # one micro-batch is enough
            metrics |= {name: (value, 1.0) for name, value in self.alignment(output).items()}
        return LossOutput(loss, metrics)

    def alignment(self, output: Any) -> dict[str, float]:
        """How the gradients of the weighted losses agree in the language model."""
        losses: dict[str, Tensor] = {"text": output.text_loss / max(1, output.text_count)}
        for name, value, weight in (
            ("semantic", output.semantic_loss, self.weights.semantic),
            ("pixel", output.pixel_loss, self.weights.pixel if self.arm.pixels == "inside" else 0.0),
        ):
            if value is not None and weight:
                losses[name] = value * weight / output.visual_count
        layers = {"projector": list(self.model.projector.parameters())}
        layers |= {f"layer{n}": list(layer.parameters()) for n, layer in enumerate(self.model.layers)}
        return gradient_alignment(losses, layers) if len(losses) > 1 else {}


def parameters(model: UniHeteroModel, stage: Stage) -> list[tuple[str, list[tuple[str, nn.Parameter]]]]:
    """The groups that a stage trains, each with its named parameters.

    Heads have groups of their own, so that clipping what they need does not shorten what the language model gets.
    """
    owners = {"semantic_head": "heads", "branch": "heads", "pixel_head": "pixels"}
    wanted = {"projector": ("language",), "joint": ("language", "heads", "pixels"), "pixels": ("pixels",)}[stage]
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in wanted}
    for name, parameter in model.named_parameters():
        first = name.partition(".")[0]
        group = owners.get(first, "language")
        if first in ("vision", "target_projector") or (stage == "projector" and first != "projector"):
            continue
        if first == "branch" and "embed_tokens" in name:
            continue
        if group in groups:
            groups[group].append((name, parameter))
    found = [(name, members) for name, members in groups.items() if members]
    if not found:
        raise ValueError(f"--stage {stage} has nothing to train: the arm has no such head (pixels: --arm decoder)")
    return found


def pretrain(
    model: UniHeteroModel,
    arm: Arm,
    stream: Stream,
    objective: ObjectiveConfig,
    config: PretrainConfig,
    folder: str,
    world: World,
    *,
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
    stops: Sequence[int] = (),
    observe: Callable[[int], None] | None = None,
    latents: Callable[[Tensor], Tensor] | None = None,
    row: int | None = None,
) -> TrainingSummary:
    """Train ``model``, which is on ``world.device``, in place; every rank calls it.

    Args:
        stops: updates after which ``observe(update)`` is called, with the averaged weights in the model if there are
            any; a run that starts again may call it again for what it repeats.
        latents: makes latent tokens (I, P, c) of pixel values, where samples do not bring them.
        row: tokens of a row, at most: packs are planned by estimated lengths, and split where they turn out longer.

    Raises:
        TrainingStopped: a guard ended the run, with the ids of the samples.
    """
    model.train()
    trained = {id(p) for _, members in parameters(model, config.stage) for _, p in members}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    blocks = [*model.layers, *(model.branch.layers if model.branch is not None else [])]
    if config.checkpoint_activations:
        parallel.checkpoint_activations(blocks)
    if config.compile:
        for block in blocks:
            block.compile()
    if config.shard and world.size > 1:
        parallel.shard(model, blocks, world, config.precision)
    members = [pair for _, pairs in parameters(model, config.stage) for pair in pairs]
    average = None if config.average is None else Average(members, config.average)
    run = Pretraining(model, arm, objective, config, world.device, average, observe, stops, latents, row)
    groups = [
        Group(name, members, config.learning_rate, config.weight_decay, config.clip_norm)
        for name, members in parameters(model, config.stage)
    ]
    kept = average.kept() if average is not None else []
    if model.target_projector is not None:
        kept += [(f"target_projector.{name}", p) for name, p in model.target_projector.named_parameters()]
    loop = LoopConfig(
        steps=config.steps,
        seed=seed,
        schedule=config.schedule,
        warmup_ratio=config.warmup_ratio,
        precision=config.precision,
        # A curriculum's loss jumps where the text's comes in.
        spike_sigmas=None if arm.generation_first else config.spike_sigmas,
        max_corrupt=config.max_corrupt,
        micro_batch=config.micro_batch,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep,
        label="pretraining",
        background_saves=config.background_saves,
        read_ahead=config.read_ahead,
        readers=config.readers,
    )
    summary = train(
        model,
        groups,
        stream,
        run.weigh,
        run.loss,
        loop,
        folder,
        world,
        identity=identity,
        kept=kept,
        before_step=run.before_step,
        flops=run.flops,
        peak_flops=None if config.peak_tflops is None else config.peak_tflops * 1e12,
    )
    run.after_step(config.steps)
    if average is not None and observe is None:
        average.put()
    return summary


def _samples(unit: Any) -> Sequence[Sample]:
    return unit if isinstance(unit, list | tuple) else [unit]
