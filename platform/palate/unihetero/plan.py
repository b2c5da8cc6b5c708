"""What a pretraining run takes, before it starts: steps, hours, memory, storage, checkpoint traffic, cost.

FLOPs are counted from shapes (``flops``). Time comes from a throughput that was measured, or from the accelerators'
peak and an assumed utilization, as far as the cores can decode images for it; what the network between accelerators
costs is part of that utilization. Everything else is arithmetic, which the fields of ``Plan`` state. Sizes are decimal
(GB = 1e9 bytes).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from palate import config as configs
from palate.artifacts import locate
from palate.config import require_at_least, require_shares
from palate.unihetero.arms import ARMS, ArmName
from palate.unihetero.flops import (
    IMAGE_MARKS,
    Flops,
    ModelShape,
    TransformerShape,
    VisionShape,
    flops_per_sample,
    utilization,
)
from palate.unihetero.model import SemanticLoss

HOURS_A_MONTH = 730.0
INDEX_BYTES = 150  # a sample, of the index beside the shards: a key, byte ranges and a length
LATENT_BYTES = 2  # a value, in half precision
CROSS_ENTROPY_BYTES = 14  # a logit: bfloat16, float32, its log-softmax, its gradient

EXAMPLE_PRICES: dict[str, Any] = {
    "source": "example: round figures, no offer of anybody; give your own by --prices",
    "date": "example",
    "currency": "USD",
    "accelerator_hour": {"example-80gb": 2.5},
    "storage_gb_month": 0.023,
    "written_gb": 0.0,
}


class PlanRefused(ValueError):
    """The run costs more than the cap, or its price is not known."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A pretraining run, by its numbers. The defaults are SmolLM2-135M with DINOv2-B on 64 accelerators."""

    samples: int = 200_000_000
    """Samples seen."""
    text_tokens: float = 64
    """Text tokens of a sample, on average."""
    supervised_tokens: float | None = None
    """Those that are predicted; all by default."""
    arm: ArmName = "embedding"
    """What is learned beside the text."""
    semantic_loss: SemanticLoss = "cosine"
    """Of the semantic arms."""
    layers: int = 30
    """Of the language model."""
    width: int = 576
    """Of its hidden states."""
    intermediate: int = 1536
    """Of its (gated) MLPs."""
    heads: int = 9
    """Of its attention."""
    kv_heads: int = 3
    """Of its keys and values."""
    head_width: int | None = None
    """Of a head; width / heads by default."""
    vocabulary: int = 49_152
    """Tokens."""
    tied: bool = True
    """Input and output embeddings are one matrix."""
    vision_layers: int = 12
    """Of the vision encoder, which is frozen."""
    vision_width: int = 768
    """Of its hidden states."""
    vision_intermediate: int = 3072
    """Of its MLPs."""
    vision_heads: int = 12
    """Of its attention."""
    image_size: int = 224
    """Pixels of an image's side."""
    patch_size: int = 14
    """Pixels of a patch's side."""
    image_tokens: int = 256
    """Visual tokens of an image in the language model."""
    latent_tokens: int = 256
    """Latent tokens of an image, for the arms that tell pixels."""
    latent_width: int = 16
    """Values of a latent token."""
    diffusion_width: int = 1024
    """Of the diffusion heads."""
    diffusion_blocks: int = 3
    """Of the diffusion heads."""
    branch_from: int = 20
    """Layer after which the isolated arm's branch begins."""
    batch: int = 2048
    """Samples an update, over all accelerators."""
    micro_batch: int = 32
    """Samples that an accelerator takes through the model at once."""
    accelerators: int = 64
    """How many."""
    accelerator: str = "example-80gb"
    """Its name in the price table."""
    memory_gb: float = 80
    """Its memory."""
    peak_tflops: float = 989
    """Its peak in bfloat16 without sparsity, 1e12 FLOPs a second (an H100 SXM: 989)."""
    assumed_utilization: float = 0.4
    """Share of the peak, of all that is computed, that is reached where no throughput was measured."""
    samples_per_second: float | None = None
    """Measured on one accelerator of this run; takes the place of the peak and its assumed utilization."""
    cores: int = 16
    """Processor cores for each accelerator."""
    decoded_per_core: float = 200
    """Images that a core decodes and scales a second; measure it on yours."""
    lost: float = 0.05
    """Share of the time that restarts, evaluation and stragglers take."""
    shard: bool = True
    """Weights, gradients and moments are sharded over the accelerators (FSDP2)."""
    checkpoint_activations: bool = False
    """The language model's layers run forward again in the backward pass."""
    sample_kb: float = 35
    """A sample in the shards, in 1000 bytes (DataComp: 4.5 TB for 128M)."""
    cache_latents: bool = False
    """Latents come with the samples from a source of one's own; jobs/unihetero.py makes them at every step."""
    latents_gflops: float = 137
    """Of making an image's latents, for the arms that tell pixels (KL-16's encoder at 256 pixels)."""
    checkpoint_minutes: float = 30
    """Between checkpoints."""
    keep: int = 2
    """Checkpoints kept to go on from."""
    keep_for_good: int = 0
    """Weights that are kept beside, such as for evaluation; jobs/unihetero.py keeps none but the last."""
    checkpoint_gb_per_second: float = 2.0
    """At which all accelerators together write to storage."""
    storage_months: float = 1.0
    """That data and checkpoints stay stored, beside the run itself."""
    prices: str = ""
    """JSON file or URL with the price table; an example by default."""
    max_cost: float | None = None
    """Refuse to start if the run costs more."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "samples", "text_tokens", "layers", "width", "intermediate", "heads", "kv_heads")
        require_at_least(self, 1, "vocabulary", "image_tokens", "batch", "micro_batch", "accelerators", "cores", "keep")
        require_at_least(self, 0, "lost", "sample_kb", "keep_for_good", "storage_months")
        require_shares(self, "assumed_utilization")
        positive = "memory_gb", "peak_tflops", "assumed_utilization", "checkpoint_minutes", "checkpoint_gb_per_second"
        configs.require(self, lambda value: value > 0, "above 0", *positive, "decoded_per_core")
        configs.require(self, lambda value: value is None or value > 0, "above 0", "samples_per_second", "max_cost")
        configs.require(self, lambda value: value < 1, "below 1", "lost")
        if ARMS[self.arm].isolated:
            configs.require(self, lambda value: 0 < value < self.layers, f"from 1 to {self.layers - 1}", "branch_from")


@dataclass(frozen=True)
class Memory:
    """GB on one accelerator at the peak of a step; what libraries and fragments take comes on top."""

    weights: float
    """float32, sharded or whole."""
    gathered: float
    """bfloat16 copies to compute with: the embeddings, encoder and heads, and two layers where weights are sharded."""
    gradients: float
    """float32."""
    moments: float
    """AdamW's two, float32."""
    activations: float
    """Of the language model's layers for a micro-batch."""
    logits: float
    """Of the supervised tokens, with softmax and gradients."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Storage:
    """GB in storage."""

    shards: float
    index: float
    latents: float
    checkpoints: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Checkpoints:
    """What is written to go on from: ``gigabytes`` each (trained weights and moments in float32, frozen projectors left
    out), every ``interval_steps``; ``share`` of the time if steps waited for the writing, which they need not."""

    gigabytes: float
    interval_steps: int
    count: int
    written_gigabytes: float
    seconds: float
    share: float


@dataclass(frozen=True)
class Costs:
    """In ``currency``, by the table of ``source`` and ``date``."""

    accelerators: float
    storage: float
    traffic: float
    currency: str
    source: str
    date: str

    @property
    def total(self) -> float:
        return self.accelerators + self.storage + self.traffic


@dataclass(frozen=True)
class Plan:
    """See ``plan``. ``utilization`` is of model FLOPs (MFU), ``hardware_utilization`` of all that is computed;
    ``relative_flops`` is by arm, relative to understanding alone; ``decoding_cores`` are needed for an accelerator."""

    config: PlanConfig
    trained_parameters: int
    frozen_parameters: int
    tokens_per_sample: float
    flops: Flops
    relative_flops: Mapping[str, float]
    total_flops: float
    steps: int
    accumulation: int
    samples_per_second: float
    tokens_per_second: float
    seconds_per_step: float
    hours: float
    accelerator_hours: float
    utilization: float
    hardware_utilization: float
    read_gb_per_second: float
    decoding_cores: float
    memory: Memory
    storage: Storage
    checkpoints: Checkpoints
    costs: Costs
    warnings: tuple[str, ...] = field(default=())


def shape(config: PlanConfig, arm: ArmName | None = None) -> ModelShape:
    """The model of the run, or of another arm."""
    chosen = ARMS[arm or config.arm]
    embedding = chosen.semantic == "embedding"
    return ModelShape(
        text=TransformerShape(
            config.layers,
            config.width,
            config.intermediate,
            config.heads,
            config.kv_heads,
            config.head_width or config.width // config.heads,
        ),
        vocabulary=config.vocabulary,
        vision=VisionShape(
            TransformerShape(
                config.vision_layers,
                config.vision_width,
                config.vision_intermediate,
                config.vision_heads,
                config.vision_heads,
                config.vision_width // config.vision_heads,
                gated=False,
            ),
            config.image_size,
            config.patch_size,
        ),
        image_tokens=config.image_tokens,
        tied=config.tied,
        semantic="none" if chosen.semantic == "none" else "diffusion" if config.semantic_loss == "diffusion" else "mlp",
        semantic_width=config.width if embedding else config.vision_width,
        target_pass=embedding,
        open_target=chosen.target == "open",
        branch_layers=config.layers - config.branch_from if chosen.isolated else 0,
        pixels=chosen.pixels,
        latent_width=config.latent_width,
        head_width=config.diffusion_width,
        head_blocks=config.diffusion_blocks,
    )


def plan(config: PlanConfig) -> Plan:
    """The run of ``config``, worked out.

    Raises:
        PlanRefused: it costs more than ``max_cost``, or the price table lacks a price; the message has the numbers.
    """
    model = shape(config)
    flops = _flops(config, config.arm)
    base = _flops(config, "understanding").total
    steps = math.ceil(config.samples / config.batch)
    peak = config.peak_tflops * 1e12
    if config.samples_per_second is not None:
        rate = config.samples_per_second * config.accelerators
    else:
        computed = config.assumed_utilization * peak / flops.hardware
        rate = config.accelerators * min(computed, config.cores * config.decoded_per_core)
    hours = steps * config.batch / rate / 3600 / (1 - config.lost)
    tokens = config.text_tokens + config.image_tokens + IMAGE_MARKS
    checkpoints = _checkpoints(config, model, config.batch / rate, steps, hours)
    storage = _storage(config, model, checkpoints)
    memory = memory_of(config, model)
    costs = _costs(config, hours, storage, checkpoints)
    found = Plan(
        config=config,
        trained_parameters=model.trained,
        frozen_parameters=model.frozen,
        tokens_per_sample=tokens,
        flops=flops,
        relative_flops={arm: _flops(config, arm).total / base for arm in ARMS if _possible(config, arm)},
        total_flops=flops.total * steps * config.batch,
        steps=steps,
        accumulation=math.ceil(config.batch / (config.accelerators * config.micro_batch)),
        samples_per_second=rate,
        tokens_per_second=rate * tokens,
        seconds_per_step=config.batch / rate,
        hours=hours,
        accelerator_hours=hours * config.accelerators,
        utilization=utilization(rate * flops.total, config.accelerators, peak),
        hardware_utilization=utilization(rate * flops.hardware, config.accelerators, peak),
        read_gb_per_second=rate * config.sample_kb * 1e3 / 1e9,
        decoding_cores=rate / config.accelerators / config.decoded_per_core,
        memory=memory,
        storage=storage,
        checkpoints=checkpoints,
        costs=costs,
    )
    if config.max_cost is not None and costs.total > config.max_cost:
        raise PlanRefused(
            f"the run costs {costs.total:,.0f} {costs.currency} ({found.accelerator_hours:,.0f} accelerator-hours at "
            f"{costs.accelerators / found.accelerator_hours:,.2f} are {costs.accelerators:,.0f}, storage and traffic "
            f"{costs.storage + costs.traffic:,.0f}; prices: {costs.source}, {costs.date}), more than --max-cost "
            f"{config.max_cost:,.0f}: take fewer --samples or a smaller model, or raise the cap"
        )
    return replace(found, warnings=tuple(_warnings(found)))


def memory_of(config: PlanConfig, model: ModelShape) -> Memory:
    """An estimate of what a step takes on one accelerator, for the layout that ``training.parallel`` gives it.

    Activations are what autograd keeps of a Llama layer in bfloat16 for a token: 16 d for the two norms (input in
    float32, normalized and scaled output each), 4 (heads + kv_heads) head_width for attention without its square, 8
    intermediate for the MLP, in bytes. With checkpointing it is 2 d a layer, and one layer whole.
    """
    ranks = config.accelerators if config.shard else 1
    trained, every = model.trained, model.trained + model.frozen
    whole = every - model.blocks  # gathered once and kept through the step
    layers = model.text.layers + model.branch_layers
    gathered = whole + 2 * model.blocks / layers if config.shard else every
    text = model.text
    per_layer = 16 * text.width + 4 * (text.heads + text.kv_heads) * text.head_width + 8 * text.intermediate
    kept = layers * 2 * text.width + per_layer if config.checkpoint_activations else layers * per_layer
    tokens = config.text_tokens + config.image_tokens + IMAGE_MARKS
    supervised = config.text_tokens if config.supervised_tokens is None else config.supervised_tokens
    return Memory(
        weights=4 * every / ranks / 1e9,
        gathered=2 * gathered / 1e9,
        gradients=4 * trained / ranks / 1e9,
        moments=8 * trained / ranks / 1e9,
        activations=config.micro_batch * tokens * kept / 1e9,
        logits=config.micro_batch * supervised * config.vocabulary * CROSS_ENTROPY_BYTES / 1e9,
    )


def read_prices(path: str) -> dict[str, Any]:
    """A price table; the example where no path is given.

    Raises:
        PlanRefused: it lacks a field.
    """
    if not path:
        return EXAMPLE_PRICES
    filesystem, inside = locate(path)
    try:
        table = json.loads(filesystem.cat_file(inside))
    except FileNotFoundError:
        raise PlanRefused(f"--prices {path}: there is no such file") from None
    except ValueError as error:
        raise PlanRefused(f"--prices {path}: not JSON: {error}") from None
    missing = sorted(set(EXAMPLE_PRICES) - set(table)) if isinstance(table, dict) else sorted(EXAMPLE_PRICES)
    if missing:
        raise PlanRefused(f"--prices {path} lacks {missing}; a table looks so: {json.dumps(EXAMPLE_PRICES)}")
    return dict(table)


def to_dict(found: Plan) -> dict[str, Any]:
    """The plan as JSON values, with the totals of its parts, to 6 digits."""
    values = asdict(found)
    for name in ("memory", "storage", "costs"):
        values[name]["total"] = getattr(found, name).total
    return dict(_rounded(values))


def markdown(found: Plan, title: str = "Plan") -> str:
    """The plan for people."""
    config, memory, storage = found.config, found.memory, found.storage
    flops, saved, costs = found.flops, found.checkpoints, found.costs
    measured = "measured" if config.samples_per_second is not None else "assumed"
    rows = [
        ("Samples", f"{config.samples:,}, {found.tokens_per_sample:g} tokens each ({config.image_tokens} visual)"),
        ("Arm", config.arm),
        (
            "Parameters",
            f"{found.trained_parameters / 1e6:,.1f}M trained, {found.frozen_parameters / 1e6:,.1f}M frozen",
        ),
        ("FLOPs a sample", f"{flops.forward:.3g} forward, {flops.backward:.3g} backward, {flops.recomputed:.3g} again"),
        ("FLOPs in all", f"{found.total_flops:.3g}"),
        ("Steps", f"{found.steps:,} of {config.batch:,} samples, {config.micro_batch} an accelerator at once"),
        ("Accelerators", f"{config.accelerators} ({config.accelerator}, {config.peak_tflops:g} TFLOPs peak)"),
        ("Utilization", f"{found.utilization:.1%} of model FLOPs ({measured})"),
        ("Throughput", f"{found.samples_per_second:,.0f} samples/s, {found.tokens_per_second:,.0f} tokens/s"),
        ("Time", f"{found.hours:,.1f} hours ({config.lost:.0%} lost), {found.seconds_per_step:.3g} s a step"),
        (
            "Data",
            f"{found.read_gb_per_second:.3g} GB/s read; {found.decoding_cores:.1f} of {config.cores} cores an "
            f"accelerator decode {config.decoded_per_core:g} images/s each",
        ),
        (
            "Memory an accelerator",
            f"{memory.total:.1f} of {config.memory_gb:g} GB: weights {memory.weights:.2f}, gathered "
            f"{memory.gathered:.2f}, gradients {memory.gradients:.2f}, moments {memory.moments:.2f}, activations "
            f"{memory.activations:.2f}, logits {memory.logits:.2f}",
        ),
        (
            "Storage",
            f"{storage.total:,.0f} GB: shards {storage.shards:,.0f}, index {storage.index:,.0f}, latents "
            f"{storage.latents:,.0f}, checkpoints {storage.checkpoints:,.0f}",
        ),
        (
            "Checkpoints",
            f"{saved.count} of {saved.gigabytes:.2f} GB, every {saved.interval_steps:,} steps; "
            f"{saved.written_gigabytes:,.0f} GB written, {saved.seconds:.1f} s each, {saved.share:.2%} of the time if "
            "waited for",
        ),
        (
            "Cost",
            f"{costs.total:,.0f} {costs.currency}: {found.accelerator_hours:,.0f} accelerator-hours "
            f"{costs.accelerators:,.0f}, storage {costs.storage:,.0f}, traffic {costs.traffic:,.0f}",
        ),
        ("Prices", f"{costs.source} ({costs.date})"),
    ]
    lines = [f"## {title}", "", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows), ""]
    lines += ["| part | forward | backward | share |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {part.forward:.3g} | {part.backward:.3g} | {part.total / flops.total:.1%} |"
        for name, part in flops.by_part.items()
    ]
    arms = ", ".join(f"{arm} {ratio:.3f}" for arm, ratio in found.relative_flops.items())
    lines += ["", f"FLOPs a sample relative to understanding alone: {arms}.", ""]
    lines += [line for warning in found.warnings for line in (f"**Warning:** {warning}.", "")]
    return "\n".join(lines)


EXAMPLES: dict[str, PlanConfig] = {
    "SmolLM2-135M with DINOv2-B": PlanConfig(),
    "1B (Llama 3.2's shape) with DINOv2-B": PlanConfig(
        layers=16,
        width=2048,
        intermediate=8192,
        heads=32,
        kv_heads=8,
        vocabulary=128_256,
        branch_from=8,
    ),
}
EXAMPLE_FILE = "plan-200m-64"


def write_examples(folder: str | Path) -> None:
    """Write the plans of 200M samples on 64 accelerators as JSON and Markdown."""
    found = {title: plan(config) for title, config in EXAMPLES.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    values = {title: to_dict(one) for title, one in found.items()}
    Path(folder, f"{EXAMPLE_FILE}.json").write_text(json.dumps(values, indent=2) + "\n")
    head = (
        "# Plans: 200 million samples on 64 accelerators\n\n"
        "Written by `palate.unihetero.plan.write_examples`. Utilization is assumed and prices are an example: give "
        "what you measured by `--samples-per-second`, and your prices by `--prices`.\n\n"
    )
    text = head + "\n".join(markdown(one, title) for title, one in found.items())
    Path(folder, f"{EXAMPLE_FILE}.md").write_text(text.rstrip() + "\n")


def _possible(config: PlanConfig, arm: ArmName) -> bool:
    return not ARMS[arm].isolated or 0 < config.branch_from < config.layers


def _flops(config: PlanConfig, arm: ArmName) -> Flops:
    return flops_per_sample(
        shape(config, arm),
        config.text_tokens,
        config.supervised_tokens,
        checkpoint_activations=config.checkpoint_activations,
        latents=0.0 if config.cache_latents else config.latents_gflops * 1e9,
    )


def _checkpoints(config: PlanConfig, model: ModelShape, step_seconds: float, steps: int, hours: float) -> Checkpoints:
    gigabytes = 12 * model.trained / 1e9
    interval = max(1, round(config.checkpoint_minutes * 60 / step_seconds))
    count = math.ceil(steps / interval)
    seconds = gigabytes / config.checkpoint_gb_per_second
    written = count * gigabytes + config.keep_for_good * gigabytes / 3
    return Checkpoints(gigabytes, interval, count, written, seconds, count * seconds / (hours * 3600))


def _storage(config: PlanConfig, model: ModelShape, checkpoints: Checkpoints) -> Storage:
    latents = model.pixels != "none" and config.cache_latents
    return Storage(
        shards=config.samples * config.sample_kb * 1e3 / 1e9,
        index=config.samples * INDEX_BYTES / 1e9,
        # Posteriors: mean and logarithm of the variance of each value.
        latents=config.samples * config.latent_tokens * 2 * config.latent_width * LATENT_BYTES / 1e9 * latents,
        checkpoints=(config.keep + config.keep_for_good / 3) * checkpoints.gigabytes,
    )


def _costs(config: PlanConfig, hours: float, storage: Storage, checkpoints: Checkpoints) -> Costs:
    table = read_prices(config.prices)
    hourly = table["accelerator_hour"]
    if config.accelerator not in hourly:
        raise PlanRefused(
            f"--accelerator {config.accelerator}: the price table has {sorted(hourly)} (--prices "
            f"{config.prices or 'FILE'})"
        )
    months = hours / HOURS_A_MONTH + config.storage_months
    return Costs(
        accelerators=hours * config.accelerators * hourly[config.accelerator],
        storage=storage.total * months * table["storage_gb_month"],
        traffic=checkpoints.written_gigabytes * table["written_gb"],
        currency=table["currency"],
        source=table["source"],
        date=table["date"],
    )


def _warnings(found: Plan) -> list[str]:
    config, memory = found.config, found.memory
    warnings = []
    if memory.total > 0.9 * config.memory_gb:
        warnings.append(
            f"{memory.total:.1f} GB leave too little of {config.memory_gb:g} GB: lower --micro-batch, or take "
            "--checkpoint-activations or --shard"
        )
    if found.accumulation * config.accelerators * config.micro_batch != config.batch:
        warnings.append(
            f"a batch of {config.batch:,} is no multiple of {config.accelerators} accelerators x {config.micro_batch} "
            "samples: some micro-batches are smaller"
        )
    if config.samples_per_second is None and found.decoding_cores > 0.9 * config.cores:
        warnings.append(
            f"decoding needs {found.decoding_cores:.1f} of {config.cores} cores an accelerator and sets the pace: take "
            "more --cores, or store smaller images"
        )
    if found.hardware_utilization > 1:
        warnings.append(
            f"{found.hardware_utilization:.0%} of the peak is more than there is: check --samples-per-second, which is "
            "of one accelerator, and --peak-tflops"
        )
    if found.checkpoints.seconds > found.checkpoints.interval_steps * found.seconds_per_step:
        warnings.append("writing a checkpoint takes longer than the time between two")
    return warnings


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
