"""Training of the cluster adapters: all in one run, equal to one run a cluster.

The loss of a global batch is the sum over clusters of each cluster's token mean, on the answer only (CARD, section
2.3); each cluster is clipped, scheduled and counted alone, and is left untouched where the batch holds none of its
texts. That is a parameter group a cluster in the one train loop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from palate.card import adapters
from palate.config import scale
from palate.models.causal_lm import LoadedModel
from palate.training import loop
from palate.training.parallel import Precision, World
from palate.training.stream import ListSource, Stream


@dataclass(frozen=True)
class AdaptConfig:
    """How the cluster adapters are trained. The defaults are common values for LoRA and were not searched."""

    rank: int = 8
    """Rank of every adapter."""
    alpha: float = 16.0
    """LoRA's alpha: the update is scaled by alpha / rank."""
    targets: tuple[str, ...] = adapters.ALL_LINEAR
    """Linear layers that get an adapter."""
    epochs: int = 3
    """Passes over the texts that adapters learn from."""
    batch: int = 16
    """Texts in a global batch, over all clusters."""
    learning_rate: float = 5e-4
    """Peak rate, after a warm-up over a tenth of the updates, falling linearly to 0."""
    weight_decay: float = 0.01
    """AdamW's, on the adapters."""
    clip_norm: float = 1.0
    """Largest gradient norm of one cluster's adapter."""
    precision: Precision = "fp32"
    """bf16 computes in bfloat16 where that is safe."""
    max_steps: int | None = None
    """Stop after so many steps, whatever the epochs say."""
    adapters_from: tuple[str, ...] = scale(())
    """PEFT LoRA folders to take as the clusters' adapters, one a cluster in their order, instead of training."""
    micro_batch: int = scale(8)
    """Texts that go through the model at once."""
    checkpoint_every: int = scale(50)
    """Steps between checkpoints."""


@dataclass(frozen=True)
class Sample:
    """One text to learn from: token ids of prompt and answer (with its end token), and whose adapter learns it."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    cluster: int


def train_adapters(
    loaded: LoadedModel,
    clusters: int,
    samples: Sequence[Sample],
    ids: Sequence[str],
    config: AdaptConfig,
    folder: str,
    world: World,
    *,
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
) -> tuple[adapters.RowMask, loop.TrainingSummary]:
    """Pack ``clusters`` adapters into the model, in place, and train them on ``samples``.

    A cluster without a sample keeps its zero update, which is the base model.

    Args:
        ids: a stable name of each sample.
        folder: where the run keeps its checkpoints and logs.
        seed: of the start of the adapters and the order of the texts.

    Raises:
        ValueError: there is nothing to learn from.
    """
    if not samples:
        raise ValueError(
            "no text is left to train adapters on: the corpus has no history items, or --contrast-share is 1"
        )
    model = loaded.model
    rows = adapters.pack(model, clusters, lora(config), seed)
    stream = Stream([ListSource("texts", samples, ids)], config.batch, seed=seed)
    steps = -(-len(samples) * config.epochs // config.batch)
    steps = min(steps, config.max_steps) if config.max_steps else steps
    names = [group_name(cluster) for cluster in range(clusters)]
    updates = loop.updates_per_group(stream, _weigh, names, steps)
    groups = [
        loop.Group(
            name=name,
            parameters=adapters.cluster_parameters(model, cluster),
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            steps=updates[name] or None,
        )
        for cluster, name in enumerate(names)
    ]
    settings = loop.LoopConfig(
        steps=steps,
        seed=seed,
        warmup_ratio=0.1,
        precision=config.precision,
        micro_batch=config.micro_batch,
        checkpoint_every=config.checkpoint_every,
        label="adapters",
    )

    def loss(model: nn.Module, batch: list[Sample], totals: Mapping[str, float]) -> loop.LossOutput:
        return _loss(model, rows, batch, totals)

    summary = loop.train(model, groups, stream, _weigh, loss, settings, folder, world, identity=identity)
    for group in groups:
        for _, parameter in group.parameters:
            parameter.requires_grad_(False)
    return rows, summary


def group_name(cluster: int) -> str:
    """The name of a cluster in logs and folders."""
    return f"cluster-{cluster:03d}"


def lora(config: AdaptConfig) -> adapters.LoraConfig:
    return adapters.LoraConfig(config.rank, config.alpha, config.targets)


def answer_log_probs(model: nn.Module, batch: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Log-probability of every answer token of a batch, and which sample it belongs to; both (N,).

    The row mask must have been set. Rows are padded on the right, which causal attention never looks at.
    """
    device = next(model.parameters()).device
    width = max(len(sample.prompt_ids) + len(sample.answer_ids) for sample in batch) - 1
    tokens_BT = torch.zeros(len(batch), width, dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, sample in enumerate(batch):
        sequence = [*sample.prompt_ids, *sample.answer_ids]
        tokens_BT[row, : len(sequence) - 1] = torch.tensor(sequence[:-1])
        rows += [row] * len(sample.answer_ids)
        columns += range(len(sample.prompt_ids) - 1, len(sequence) - 1)
        targets += sample.answer_ids
    base = model.base_model
    final_BTd = base(input_ids=tokens_BT.to(device), use_cache=False).last_hidden_state  # type: ignore[operator]
    rows_N = torch.tensor(rows, device=device)
    logits_NV = model.get_output_embeddings()(final_BTd[rows_N, torch.tensor(columns, device=device)])  # type: ignore[operator]
    log_probs_NV = logits_NV.float().log_softmax(-1)
    return log_probs_NV.gather(1, torch.tensor(targets, device=device)[:, None]).squeeze(1), rows_N


def _weigh(sample: Sample) -> dict[str, float]:
    tokens = float(len(sample.answer_ids))
    return {group_name(sample.cluster): tokens, "tokens": tokens + len(sample.prompt_ids)}


def _loss(
    model: nn.Module, rows: adapters.RowMask, batch: list[Sample], totals: Mapping[str, float]
) -> loop.LossOutput:
    clusters_B = torch.tensor([sample.cluster for sample in batch], device=next(model.parameters()).device)
    rows.set(clusters_B)
    log_probs_N, rows_N = answer_log_probs(model, batch)
    weights_B = torch.tensor([1 / totals[group_name(sample.cluster)] for sample in batch], device=clusters_B.device)
    loss = -(log_probs_N * weights_B[rows_N]).sum()
    return loop.LossOutput(loss, {"nats_per_token": (-log_probs_N.detach().sum(), len(log_probs_N))})
