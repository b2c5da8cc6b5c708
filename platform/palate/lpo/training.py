"""Tuning a denoiser on ranked lists, in the one train loop: LPO, its comparators, and plain denoising.

A step's loss is the mean over the lists of the global batch, by their weights; lists that order nothing are left out.
The reference's errors are computed once for each drawn list, before the passes that need a gradient.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from palate.config import require, require_at_least, require_shares, scale
from palate.lpo import caching, objectives
from palate.lpo.denoising import Conditioning, NoiseSchedule, predict
from palate.lpo.samples import ListSample, Order
from palate.training import loop
from palate.training.guards import TrainingStopped
from palate.training.parallel import Precision, World
from palate.training.stream import Source, Stream

LISTS = "lists"  # the name of the one group of parameters, and of the total that the loss is divided by
BINS = 4  # of timesteps, in the signals


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned from a list."""

    objective: Literal["lpo", "gp-dpo", "dpo", "sft", "denoising"] = "lpo"
    """lpo: the whole list (Plackett-Luce); gp-dpo: all its pairs; dpo: some of its pairs; sft: denoise the winners;
    denoising: denoise all its images, whatever their rank."""
    pairs: Literal["random", "adjacent", "extreme"] = "random"
    """Which pairs dpo takes of a list: one at random, all neighbours, or best against worst."""
    kl_beta: float = 5000.0
    """Strength of the KL term: larger stays closer to the reference. Diffusers' convention, with its factor 0.5."""
    reduction: objectives.Reduction = "mean_terms"
    """Sum of a list's terms, as in the paper, or their mean, which weighs short and long lists alike."""
    label_smoothing: float = 0.0
    """Share of the reversed order in the loss, for noisy rankings."""
    support_weights: bool = False
    """Weigh an image's term by the votes behind it."""
    safeguard_mu: float | None = None
    """Scale down what pushes losers away until winners' errors do not grow (SDPO's rule); 0 to 1, None: off."""

    def __post_init__(self) -> None:
        require(self, lambda beta: beta > 0, "larger than 0", "kl_beta")
        require(self, lambda share: 0 <= share < 0.5, "a share below 0.5", "label_smoothing")
        require(self, lambda mu: mu is None or 0 <= mu <= 1, "from 0 to 1, or none", "safeguard_mu")


@dataclass(frozen=True)
class TuneConfig:
    """How the denoiser is tuned."""

    steps: int = 1000
    """Updates."""
    batch: int = 64
    """Lists in a global batch."""
    learning_rate: float = 1e-5
    """AdamW's peak rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the rate does after the warm-up: stays, or falls to 0 at the last step."""
    warmup_ratio: float = 0.05
    """Share of the steps over which the rate rises."""
    weight_decay: float = 0.01
    """AdamW's."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    precision: Precision = "fp32"
    """bf16 computes in bfloat16 where that is safe; errors and scores stay float32."""
    spike_sigmas: float | None = scale(20.0)
    """Skip an update whose loss is so many robust deviations above the median, and stop after three; None: never."""
    caching: Literal["none", "two-pass", "one-pass"] = scale("none")
    """List gradient caching: memory of one chunk of images. one-pass suits adapters, two-pass full weights."""
    micro_batch: int = scale(4)
    """Lists that are drawn and scored together on a rank."""
    chunk: int = scale(8)
    """Images that go through the network at once, with caching; without, all of a micro-batch do."""
    checkpoint_every: int = scale(100)
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps", "batch", "micro_batch", "chunk", "checkpoint_every")
        require_at_least(self, 0, "learning_rate", "weight_decay")
        require_shares(self, "warmup_ratio")
        require(self, lambda norm: norm > 0, "larger than 0", "clip_norm")
        require(self, lambda most: most is None or most > 0, "larger than 0, or none", "spike_sigmas")


@dataclass(frozen=True)
class Denoiser:
    """What is tuned, and against what.

    Attributes:
        network: with some parameters that require a gradient.
        reference: a context in which calling what it yields gives the reference's prediction.
        given: what a batch's conditioning needs beside the sample, such as the embeddings of its people.
    """

    network: nn.Module
    family: str
    schedule: NoiseSchedule
    reference: Callable[[], AbstractContextManager[nn.Module]]
    given: Callable[[Conditioning], Conditioning] = lambda conditioning: conditioning

    def errors(self, network: nn.Module, images: "Images") -> tuple[Tensor, Tensor]:
        """Mean squared error (n,) of each image's prediction in float32, and the residuals (n, C, H, W)."""
        noisy = self.schedule.noisy(images.latents, images.noise, images.index_N)
        target = self.schedule.target(images.latents, images.noise, images.index_N)
        times_N = self.schedule.times_T.to(noisy.device)[images.index_N]
        residuals = predict(network, self.family, noisy, times_N, images.given).float() - target.float()
        return residuals.square().flatten(1).mean(1), residuals


@dataclass(frozen=True)
class Images:
    """Some images of some lists, one row each."""

    latents: Tensor
    noise: Tensor
    index_N: Tensor
    given: Conditioning

    def __len__(self) -> int:
        return len(self.index_N)

    def rows(self, chosen: Tensor | slice) -> "Images":
        given = Conditioning(**{f.name: _at(getattr(self.given, f.name), chosen) for f in fields(Conditioning)})
        return Images(self.latents[chosen], self.noise[chosen], self.index_N[chosen], given)


def _at(value: Tensor | None, chosen: Tensor | slice) -> Any:
    return None if value is None else value[chosen]


def images_of(samples: Sequence[ListSample], device: torch.device) -> Images:
    """All images of the lists, list after list."""

    def joined(name: str) -> Any:
        found = [getattr(sample.given, name) for sample in samples]
        return None if found[0] is None else torch.cat(found).to(device)

    return Images(
        latents=torch.cat([sample.latents_MCHW for sample in samples]).to(device),
        noise=torch.cat([sample.noise_MCHW for sample in samples]).to(device),
        index_N=torch.cat([sample.index_M for sample in samples]).to(device),
        given=Conditioning(**{field.name: joined(field.name) for field in fields(Conditioning)}),
    )


@dataclass(frozen=True)
class Orders:
    """The orders of B lists of up to M images: which places hold one, and [j, k]: j was preferred to k."""

    mask_BM: Tensor
    order_BMM: Tensor
    support_BMM: Tensor

    @staticmethod
    def of(found: Sequence[Order], device: torch.device | None = None) -> "Orders":
        most = max(len(order.tie_groups) for order in found)
        mask_BM = torch.zeros(len(found), most, dtype=torch.bool)
        groups_BM = torch.zeros(len(found), most, dtype=torch.long)
        support_BMM = torch.zeros(len(found), most, most)
        for row, order in enumerate(found):
            mask_BM[row, : len(order.tie_groups)] = True
            groups_BM[row, : len(order.tie_groups)] = torch.tensor(order.tie_groups)
            for winner, loser, votes in order.edges:
                support_BMM[row, winner, loser] = votes
        order_BMM = objectives.ranked_order(mask_BM, tie_group_BM=groups_BM)
        top_B = torch.tensor([order.top_k or most for order in found])
        order_BMM = objectives.first_choices(order_BMM, top_B)
        partial_B = torch.tensor([order.partial for order in found])
        if partial_B.any():
            edges_BMM = (support_BMM > 0) & partial_B[:, None, None]
            order_BMM = torch.where(partial_B[:, None, None], objectives.partial_order(edges_BMM, mask_BM), order_BMM)
        where = device or torch.device("cpu")
        return Orders(mask_BM.to(where), order_BMM.to(where), support_BMM.to(where))


def orders_anything(order: Order) -> bool:
    """Whether a list prefers some image to another."""
    return bool(order.edges) if order.partial else len(set(order.tie_groups)) > 1


def list_losses(
    errors_BM: Tensor, reference_BM: Tensor, orders: Orders, uniform_B: Tensor, config: ObjectiveConfig
) -> Tensor:
    """The loss of each list, (B,), from its images' errors."""
    mask_BM, order_BMM = orders.mask_BM, orders.order_BMM
    if config.objective == "denoising":
        return torch.where(mask_BM, errors_BM, 0.0).sum(1) / mask_BM.sum(1)
    if config.objective == "sft":
        return objectives.sft_loss(errors_BM, order_BMM)
    scores_BM = objectives.implicit_rewards(errors_BM, reference_BM, config.kl_beta)
    if config.objective == "lpo":
        return objectives.plackett_luce_loss(
            scores_BM,
            mask_BM,
            reduction=config.reduction,
            order_BMM=order_BMM,
            term_weights_BM=objectives.edge_support_weights(orders.support_BMM) if config.support_weights else None,
            label_smoothing=config.label_smoothing,
        )
    return objectives.pairwise_loss(
        scores_BM,
        pairs_of(order_BMM, uniform_B, config),
        reduction=config.reduction,
        pair_weights_BMM=(
            torch.where(orders.support_BMM > 0, orders.support_BMM, 1.0) if config.support_weights else None
        ),
        label_smoothing=config.label_smoothing,
    )


def pairs_of(order_BMM: Tensor, uniform_B: Tensor, config: ObjectiveConfig) -> Tensor:
    """The pairs (B, M, M) that a pairwise objective learns from."""
    if config.objective == "gp-dpo":
        return order_BMM
    if config.pairs == "random":
        return objectives.random_pair(order_BMM, uniform_B)
    return (objectives.adjacent_pairs if config.pairs == "adjacent" else objectives.extreme_pairs)(order_BMM)


def scored_images(orders: Orders, uniform_B: Tensor, config: ObjectiveConfig) -> Tensor:
    """Which images (B, M) the loss reads: those alone go through the network."""
    order_BMM = orders.order_BMM
    if config.objective == "denoising":
        return orders.mask_BM
    if config.objective == "sft":
        return order_BMM.any(2) & ~order_BMM.any(1)
    return objectives.images_of(order_BMM if config.objective == "lpo" else pairs_of(order_BMM, uniform_B, config))


def tune(
    denoiser: Denoiser,
    parameters: Sequence[tuple[str, nn.Parameter]],
    source: Source,
    objective: ObjectiveConfig,
    config: TuneConfig,
    folder: str,
    world: World,
    *,
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> loop.TrainingSummary:
    """Tune the denoiser's parameters in place; goes on where a run in ``folder`` was stopped.

    Raises:
        TrainingStopped: a loss was not finite or left its usual range, and the message names the lists; or no list
            could be learned from.
        ValueError: settings that do not go together.
    """
    if objective.safeguard_mu is not None and objective.objective in ("sft", "denoising"):
        raise ValueError(f"--safeguard-mu is about losers, which {objective.objective} does not push: leave it out")
    settings = loop.LoopConfig(
        steps=config.steps,
        seed=seed,
        schedule=config.schedule,
        warmup_ratio=config.warmup_ratio,
        precision=config.precision,
        spike_sigmas=config.spike_sigmas,
        micro_batch=config.micro_batch,
        checkpoint_every=config.checkpoint_every,
        label=objective.objective,
    )
    group = loop.Group(LISTS, parameters, config.learning_rate, config.weight_decay, config.clip_norm)
    stream = Stream([source], config.batch, seed=seed)
    loss = partial(step_loss, denoiser=denoiser, objective=objective, config=config)
    weigh = partial(_weigh, objective=objective)
    summary = loop.train(
        denoiser.network, [group], stream, weigh, loss, settings, folder, world, identity=identity, fresh=fresh
    )
    if not summary.updates[LISTS]:
        raise TrainingStopped(
            f"nothing was learned in {summary.steps} steps: {summary.corrupt} lists could not be read, and the others "
            "order nothing. See training/corrupt.jsonl; prepare the lists again"
        )
    return summary


def _weigh(sample: ListSample, *, objective: ObjectiveConfig) -> dict[str, float]:
    if objective.objective != "denoising" and not orders_anything(sample.order):
        return {}
    # Lists of like length share a micro-batch.
    return {LISTS: sample.weight, "tokens": float(len(sample))}


def step_loss(
    model: nn.Module,
    samples: list[ListSample],
    totals: Mapping[str, float],
    *,
    denoiser: Denoiser,
    objective: ObjectiveConfig,
    config: TuneConfig,
) -> loop.LossOutput:
    """The share of these lists in the loss of the global batch."""
    kept = [sample for sample in samples if _weigh(sample, objective=objective)]
    device = next(model.parameters()).device
    nothing = next(parameter for parameter in model.parameters() if parameter.requires_grad).sum() * 0
    if not kept:  # lists that order nothing
        return loop.LossOutput(nothing)
    # With the one-pass form the lists are taken one by one: it keeps a gradient for each image of a call.
    parts = [[sample] for sample in kept] if config.caching == "one-pass" else [kept]
    outputs = [_part(model, part, totals[LISTS], device, denoiser, objective, config) for part in parts]
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {}
    for output in outputs:
        for name, (value, weight) in output.metrics.items():
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = (before[0] + value, before[1] + weight)
    return loop.LossOutput(torch.stack([output.loss for output in outputs]).sum() + nothing, metrics)


def _part(
    model: nn.Module,
    samples: Sequence[ListSample],
    total: float,
    device: torch.device,
    denoiser: Denoiser,
    objective: ObjectiveConfig,
    config: TuneConfig,
) -> loop.LossOutput:
    orders = Orders.of([sample.order for sample in samples], device)
    uniform_B = torch.tensor([sample.uniform for sample in samples], device=device)
    weights_B = torch.tensor([sample.weight for sample in samples], device=device) / total
    scored_BM = scored_images(orders, uniform_B, objective)
    images = images_of(samples, device).rows(scored_BM[orders.mask_BM])
    compares = objective.objective not in ("sft", "denoising")
    spans = spans_of(len(images), config)
    if not compares:
        reference_N = torch.zeros(len(images), device=device)
    elif known := [sample.reference_M for sample in samples if sample.reference_M is not None]:
        reference_N = torch.cat(known).to(device)[scored_BM[orders.mask_BM]]
    else:
        reference_N = reference_errors(denoiser, images, spans)
    in_parameters = config.caching == "one-pass"
    in_outputs = objective.safeguard_mu is not None and not in_parameters

    def errors_of(span: slice) -> tuple[Tensor, ...]:
        some = images.rows(span)
        errors_n, residuals = denoiser.errors(model, replace(some, given=denoiser.given(some.given)))
        return (errors_n, reference_N[span], *((residuals.detach(),) if in_outputs else ()))

    def whole(errors_N: Tensor, reference_N: Tensor, residuals: Tensor | None = None) -> Tensor:
        reference_BM = objectives.to_lists(reference_N, scored_BM)
        losses_of = partial(
            list_losses, reference_BM=reference_BM, orders=orders, uniform_B=uniform_B, config=objective
        )
        errors_BM = objectives.to_lists(errors_N, scored_BM)
        if residuals is not None and objective.safeguard_mu is not None:
            laid_BMD = errors_BM.new_zeros(*scored_BM.shape, residuals[0].numel())
            laid_BMD[scored_BM] = residuals.flatten(1)
            gram_BMM = objectives.output_gram(laid_BMD)
            errors_BM = objectives.safeguarded(errors_BM, losses_of, gram_BMM, objective.safeguard_mu)
        return (losses_of(errors_BM) * weights_B).sum()

    if _nobodys(images.given):  # the branch is skipped, and nothing else is trained
        with torch.no_grad():
            found = caching.plain_loss(model, spans, errors_of, whole)
    elif config.caching == "one-pass":
        found = caching.one_pass_loss(model, spans, errors_of, whole, safeguard_mu=objective.safeguard_mu)
    else:
        by = caching.two_pass_loss if config.caching == "two-pass" else caching.plain_loss
        found = by(model, spans, errors_of, whole)
    index_N = images.index_N
    metrics = (
        signals(found.errors_N, reference_N, index_N, scored_BM, orders, len(denoiser.schedule)) if compares else {}
    )
    return loop.LossOutput(found.loss, {"error": (found.errors_N.sum(), len(index_N)), **metrics})


def _nobodys(given: Conditioning) -> bool:
    return given.user_scale_N is not None and not bool(given.user_scale_N.any())


def spans_of(images: int, config: TuneConfig) -> list[slice]:
    """Which images go through the network together."""
    size = 1 if config.caching == "one-pass" else config.chunk if config.caching == "two-pass" else images
    return [slice(start, start + size) for start in range(0, images, size)]


def reference_errors(denoiser: Denoiser, images: Images, spans: Sequence[slice]) -> Tensor:
    """The reference's error (N,) of each image, without gradients."""
    with torch.no_grad(), denoiser.reference() as network:
        found = []
        for span in spans:
            some = images.rows(span)
            given = some.given
            if given.user_scale_N is not None:  # the reference knows nobody
                given = replace(given, user_scale_N=torch.zeros_like(given.user_scale_N))
            found.append(denoiser.errors(network, replace(some, given=denoiser.given(given)))[0])
    return torch.cat(found)


def signals(
    errors_N: Tensor, reference_N: Tensor, index_N: Tensor, scored_BM: Tensor, orders: Orders, timesteps: int
) -> dict[str, tuple[Tensor | float, Tensor | float]]:
    """What tells progress, as (sum, weight): the implicit pair accuracy (ties half), the share of lists whose preferred
    image has the highest score, Kendall's tau over the pairs that are ordered, and how far the errors of winners and
    losers are from the reference's. Each by length (``/m``) as well, and what is of single images or pairs by timestep
    (``/t``)."""
    gain_BM = objectives.to_lists(reference_N - errors_N, scored_BM)
    order_BMM = orders.order_BMM & scored_BM[:, :, None] & scored_BM[:, None, :]
    gaps_BMM = gain_BM[:, :, None] - gain_BM[:, None, :]
    right_BMM = torch.where(order_BMM, (gaps_BMM.sign() + 1) / 2, 0.0)
    right_B, pairs_B = right_BMM.sum((1, 2)), order_BMM.sum((1, 2)).float()
    winners_BM, losers_BM = order_BMM.any(2) & ~order_BMM.any(1), order_BMM.any(1) & ~order_BMM.any(2)
    best_BM = scored_BM & (gain_BM == gain_BM.masked_fill(~scored_BM, -torch.inf).amax(1, keepdim=True))
    ordered_B = pairs_B > 0
    top1_B = (best_BM & winners_BM).sum(1) / best_BM.sum(1).clamp(min=1)
    tau_B = 2 * right_B / pairs_B.clamp(min=1) - 1
    found: dict[str, tuple[Tensor | float, Tensor | float]] = {
        "pair_accuracy": (right_B.sum(), pairs_B.sum()),
        "top1_accuracy": (top1_B[ordered_B].sum(), ordered_B.sum().float()),
        "kendall_tau": (tau_B[ordered_B].sum(), ordered_B.sum().float()),
        "winner_error": (-gain_BM[winners_BM].sum(), winners_BM.sum().float()),
        "loser_error": (-gain_BM[losers_BM].sum(), losers_BM.sum().float()),
    }
    bins_BM = objectives.to_lists((index_N * BINS // timesteps).float(), scored_BM).long()
    for number in range(BINS):
        # A pair belongs to its winner's timestep; in lists that share one it is the pair's.
        inside_BMM = order_BMM & (bins_BM == number)[:, :, None]
        found[f"pair_accuracy/t{number}"] = (right_BMM[inside_BMM].sum(), inside_BMM.sum().float())
        for name, chosen_BM in (("winner_error", winners_BM), ("loser_error", losers_BM)):
            here_BM = chosen_BM & (bins_BM == number)
            found[f"{name}/t{number}"] = (-gain_BM[here_BM].sum(), here_BM.sum().float())
    lengths_B = orders.mask_BM.sum(1)
    for length in sorted(set(lengths_B.tolist())):
        chosen_B = lengths_B == length
        found[f"pair_accuracy/m{length}"] = (right_B[chosen_B].sum(), pairs_B[chosen_B].sum())
        found[f"kendall_tau/m{length}"] = (tau_B[chosen_B & ordered_B].sum(), (chosen_B & ordered_B).sum().float())
        found[f"top1_accuracy/m{length}"] = (top1_B[chosen_B & ordered_B].sum(), (chosen_B & ordered_B).sum().float())
        for name, places_BM in (("winner_error", winners_BM), ("loser_error", losers_BM)):
            here_BM = places_BM & chosen_B[:, None]
            found[f"{name}/m{length}"] = (-gain_BM[here_BM].sum(), here_BM.sum().float())
    return found


def measure(
    denoiser: Denoiser,
    source: Source,
    objective: ObjectiveConfig,
    config: TuneConfig,
    *,
    draws: int = 2,
    most: int = 128,
) -> dict[str, float]:
    """The signals on the lists of a source, over several draws of noise and timestep each, without training.

    All images of a list are scored, whatever the objective takes of it.
    """
    sums: dict[str, list[float]] = {}
    device = next(denoiser.network.parameters()).device
    whole = replace(objective, objective="lpo", safeguard_mu=None)
    count = min(len(source), most)
    with torch.no_grad():
        for draw in range(draws):
            for start in range(0, count, config.micro_batch):
                loaded = (
                    source.load(index, hash_of(draw, index))
                    for index in range(start, min(count, start + config.micro_batch))
                )
                samples = [sample for sample in loaded if orders_anything(sample.order)]
                if not samples:
                    continue
                output = _part(denoiser.network, samples, 1.0, device, denoiser, whole, replace(config, caching="none"))
                for name, (value, weight) in output.metrics.items():
                    total = sums.setdefault(name, [0.0, 0.0])
                    total[0] += float(value)
                    total[1] += float(weight)
    return {name: value / weight for name, (value, weight) in sums.items() if weight}


def hash_of(*parts: int) -> int:
    """A seed for a draw that no training step has."""
    return int.from_bytes(hashlib.sha256(repr(("measure", *parts)).encode()).digest()[:8], "little")
