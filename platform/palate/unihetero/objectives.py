"""The weighted sum of the losses, how weights come in, and what tells a collapse.

    L = L_text + lambda_s L_sem + lambda_p L_pix,   each the mean over its positions in the global batch

Monitors of the semantic targets: plain cosine, effective rank and absolute variance mislead (a collapsed projector
predicts itself perfectly), so what is logged is the share of variance, var(z) / E|z|², and the gain in cosine over
the best constant at each place of the image.

Symbols: V positions, P places of an image, z width of the targets.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.config import require_at_least, require_shares
from palate.unihetero.arms import Arm
from palate.unihetero.model import UniHeteroOutput

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the losses beside the text's."""

    semantic_weight: float = 1.0
    """Of the semantic loss, lambda_s."""
    pixel_weight: float = 1.0
    """Of the pixel loss, lambda_p."""
    ramp_from: float = 0.015
    """Share of its weight that a loss has at the first step (GAS)."""
    ramp: int = 1000
    """Steps over which weights rise to the whole, whatever a run's length."""
    momentum: float = 0.999
    """Of the target's projector, a step (GAS)."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "semantic_weight", "pixel_weight", "ramp")
        require_shares(self, "ramp_from", "momentum")


@dataclass(frozen=True)
class Weights:
    """Of the losses at one step."""

    text: float
    semantic: float
    pixel: float


def weights_at(step: int, steps: int, arm: Arm, config: ObjectiveConfig) -> Weights:
    """The weights at update ``step`` (from 1) of ``steps``."""
    first = math.floor(arm.generation_first * steps)
    risen = 1.0 if step >= config.ramp else config.ramp_from + (1 - config.ramp_from) * step / config.ramp
    on = risen if arm.weighted else 0.0
    return Weights(float(step > first), on * config.semantic_weight, on * config.pixel_weight)


def total(output: UniHeteroOutput, weights: Weights, totals: Mapping[str, float]) -> tuple[Tensor, Metrics]:
    """This part's share of the loss of a global batch with ``totals`` of "text" and "visual" positions, and metrics."""
    parts: list[Tensor] = []
    metrics: Metrics = {}
    for name, value, count, weight, of in (
        ("text_loss", output.text_loss, output.text_count, weights.text, "text"),
        ("semantic_loss", output.semantic_loss, output.visual_count, weights.semantic, "visual"),
        ("pixel_loss", output.pixel_loss, output.visual_count, weights.pixel, "visual"),
    ):
        if value is not None:
            assert count is not None
            parts.append(value * (weight / max(1.0, totals.get(of, 0.0))))
            metrics[name] = (value.detach(), count)
    if not parts:
        raise ValueError("no loss was made: the batch has nothing that this stage learns from")
    return torch.stack(parts).sum(), metrics


@torch.no_grad()
def collapse(output: UniHeteroOutput, places: int) -> dict[str, float]:
    """Monitors of the semantic head's targets over a batch of whole images.

    ``variance_share``: the targets' variance over their mean square, 0 where they have collapsed to one vector.
    ``cosine_gain``: mean cosine of predictions less that of the mean target of each place; ``cosine`` itself.
    ``effective_rank``: exp of the entropy of the covariance's spectrum (Roy and Vetterli 2007).
    """
    assert output.targets is not None
    targets_IPz = output.targets.unflatten(0, (-1, places)).double()
    flat_Vz = targets_IPz.flatten(0, 1)
    centred_Vz = flat_Vz - flat_Vz.mean(0)
    spectrum = torch.linalg.svdvals(centred_Vz).square()
    shares = spectrum / spectrum.sum().clamp(min=1e-30)
    found = {
        "variance_share": float(centred_Vz.square().sum() / flat_Vz.square().sum()),
        "effective_rank": float(torch.exp(-(shares * shares.clamp(min=1e-30).log()).sum())),
    }
    if output.predicted is not None:
        mean_IPz = targets_IPz.mean(0, keepdim=True).expand_as(targets_IPz)
        constant = F.cosine_similarity(mean_IPz, targets_IPz, dim=-1).mean()
        cosine = F.cosine_similarity(output.predicted.double(), flat_Vz, dim=-1).mean()
        found |= {"cosine": float(cosine), "cosine_gain": float(cosine - constant)}
    return found


def gradient_alignment(
    losses: Mapping[str, Tensor], layers: Mapping[str, list[torch.nn.Parameter]]
) -> dict[str, float]:
    """Between the text's gradient and each other loss's, by layer: ``cosine/LOSS/LAYER`` and the ratio of their norms,
    ``ratio/LOSS/LAYER``, each loss being as weighted as it is trained.

    Args:
        losses: scalars of one graph, "text" among them.
        layers: parameters by the layer's name; those that a loss does not reach count as zeros.
    """
    names = list(layers)
    parameters = [parameter for name in names for parameter in layers[name]]
    flat: dict[str, list[Tensor]] = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        flat[name], start = [], 0
        for layer in names:
            end = start + len(layers[layer])
            flat[name].append(torch.cat([gradient.flatten() for gradient in filled[start:end]]))
            start = end
    found = {}
    for name in losses:
        if name == "text":
            continue
        for number, layer in enumerate([*names, "all"]):
            pair = [torch.cat(flat[n]) if layer == "all" else flat[n][number] for n in ("text", name)]
            text, other = (float(gradient.norm()) for gradient in pair)
            found[f"ratio/{name}/{layer}"] = other / text if text else math.nan
            found[f"cosine/{name}/{layer}"] = float(pair[0] @ pair[1]) / (text * other) if text * other else 0.0
    return found
