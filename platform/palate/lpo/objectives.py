"""The list loss of Diffusion-LPO (arXiv 2510.01540) and its comparators, as functions of errors and scores.

An image's *error* e is the mean squared difference of the network's prediction and its target; its *score* is the
implicit reward ``-0.5 * beta * (e - e_ref)``. A loss over a list is a function of its scores and of an *order*: a
boolean ``order_BMM`` whose entry [j, k] says that image j was preferred to image k. An order is transitive; ranked
lists, tie groups, "only the first k choices" and partial orders are all of this form, and one formula serves them
(spec/lpo.md a.6). What is not in the order (ties, padding) contributes nothing: a list that orders no two images, be it
empty, of one image, or all ties, has loss 0 and gradient 0.

Losses are computed in float32, or in float64 where the scores are. Padding may hold anything, NaN included.

Symbols: B lists, M places in a list (best first, where places matter).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Reduction = Literal["sum", "mean_terms"]


def implicit_rewards(errors: Tensor, reference_errors: Tensor, kl_beta: float | Tensor) -> Tensor:
    """``-0.5 * kl_beta * (errors - reference_errors)``, the implicit rewards of images, positive where the trained
    network denoises better than the reference (``a * delta_theta`` of spec a.2).

    The constants T and omega(lambda_t) are folded into ``kl_beta``, and the 0.5 is that of diffusers' Diffusion-DPO
    script, so a beta means the same here and there. ``kl_beta`` may be a tensor, for a weight that depends on the
    timestep. No gradient reaches the reference.

    Raises:
        ValueError: the shapes differ, or ``kl_beta`` is not positive.
    """
    if errors.shape != reference_errors.shape:
        raise ValueError(
            f"errors have shape {tuple(errors.shape)}, but reference_errors {tuple(reference_errors.shape)}: "
            "give one reference error per image"
        )
    if not isinstance(kl_beta, Tensor) and not kl_beta > 0:
        raise ValueError(f"kl_beta must be positive, got {kl_beta} (--kl-beta)")
    return -0.5 * kl_beta * (_accurate(errors) - _accurate(reference_errors).detach())


def to_lists(values_N: Tensor, mask_BM: Tensor) -> Tensor:
    """Lay the values of all images, list after list, out as (B, M), with 0 in the padding.

    Raises:
        ValueError: there are not as many values as places in the mask.
    """
    places = int(mask_BM.sum())
    if values_N.shape != (places,):
        raise ValueError(f"mask_BM has {places} images, but the values have shape {tuple(values_N.shape)}")
    return values_N.new_zeros(mask_BM.shape).masked_scatter(mask_BM, values_N)


# Orders


def ranked_order(mask_BM: Tensor, *, tie_group_BM: Tensor | None = None, top_k: int | Tensor | None = None) -> Tensor:
    """The order of ranked lists.

    Args:
        mask_BM: boolean, which places hold an image.
        tie_group_BM: integers, lower is better; images of one group are not ordered among themselves. Without it the
            places rank the images, the first best.
        top_k: only the first k choices are known, see ``first_choices``.
    """
    _check_mask(mask_BM)
    if tie_group_BM is None:
        tie_group_BM = torch.arange(mask_BM.shape[1], device=mask_BM.device)[None]
    elif tie_group_BM.shape != mask_BM.shape:
        raise ValueError(f"tie_group_BM has shape {tuple(tie_group_BM.shape)}, expected {tuple(mask_BM.shape)}")
    order_BMM = (tie_group_BM[:, :, None] < tie_group_BM[:, None, :]) & _pairs(mask_BM)
    return order_BMM if top_k is None else first_choices(order_BMM, top_k)


def partial_order(edges_BMM: Tensor, mask_BM: Tensor) -> Tensor:
    """The order that comparisons imply: [j, k] where a chain of ``edges_BMM`` leads from j down to k.

    Raises:
        ValueError: the comparisons of a list contradict each other, naming the list and its images.
    """
    _check_mask(mask_BM)
    _check_order("edges_BMM", edges_BMM, mask_BM)
    order_BMM = edges_BMM & _pairs(mask_BM)
    # Each round doubles the length of the chains found.
    for _ in range(max(1, mask_BM.shape[1] - 1).bit_length()):
        order_BMM = order_BMM | _composed(order_BMM, order_BMM)
    cyclic_BM = order_BMM.diagonal(dim1=1, dim2=2)
    if cyclic_BM.any():
        row = int(cyclic_BM.any(1).nonzero()[0])
        places = cyclic_BM[row].nonzero()[:, 0].tolist()
        raise ValueError(
            f"list {row} of the batch: the comparisons of the images at places {places} form a cycle, which no order "
            "fits. Break cycles when the lists are built (jobs/prepare.py rankings)"
        )
    return order_BMM


def first_choices(order_BMM: Tensor, top_k: int | Tensor) -> Tensor:
    """Keep what the first k choices of each list say: the rows of the images that fewer than ``top_k`` beat.

    Below them images are unordered (best-of-n is k = 1). ``top_k`` is one number, or one per list, (B,). Counting who
    beats an image, rather than its place, keeps a tie group whole: which of its members comes first is arbitrary.
    """
    if isinstance(top_k, Tensor):
        top_k = top_k[:, None]
    elif top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    return order_BMM & (order_BMM.sum(1) < top_k)[:, :, None]


# The list loss


def plackett_luce_loss(
    scores_BM: Tensor,
    mask_BM: Tensor,
    *,
    reduction: Reduction = "sum",
    tie_group_BM: Tensor | None = None,
    top_k: int | Tensor | None = None,
    order_BMM: Tensor | None = None,
    term_weights_BM: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of each list under Plackett-Luce, shape (B,): L_LPO of spec a.2.

    Each image j that is preferred to others gives a term: that it is chosen from itself and all of those,
    ``log(exp s_j + sum_{k: j over k} exp s_k) - s_j``. For a ranked list these are its m - 1 suffix terms; m = 2 is
    Diffusion-DPO, bit for bit.

    Args:
        scores_BM: implicit rewards, best first.
        mask_BM: boolean, which places hold an image.
        reduction: "sum" of the terms, as the paper has it, or "mean_terms", their weighted mean, which makes lists of
            different length comparable. Equal at m = 2.
        tie_group_BM, top_k: see ``ranked_order`` and ``first_choices``.
        order_BMM: a partial order instead of the ranking by places, transitive (``partial_order``).
        term_weights_BM: non-negative weight of the term of each image, such as the votes behind it
            (``edge_support_weights``). With "mean_terms" only their ratios within a list matter.
        label_smoothing: share, up to 0.5, of the loss of the reversed order in the mixture.

    Raises:
        ValueError: shapes or options do not fit.
    """
    _check_mask(mask_BM)
    _check_options(reduction, label_smoothing)
    if scores_BM.shape != mask_BM.shape:
        raise ValueError(f"scores_BM has shape {tuple(scores_BM.shape)}, but mask_BM {tuple(mask_BM.shape)}")
    if order_BMM is None:
        order_BMM = ranked_order(mask_BM, tie_group_BM=tie_group_BM)
    elif tie_group_BM is not None:
        raise ValueError("give tie_group_BM or order_BMM, not both: an order says itself what is tied")
    else:
        _check_order("order_BMM", order_BMM, mask_BM)
        order_BMM = order_BMM & _pairs(mask_BM)
    if top_k is not None:
        order_BMM = first_choices(order_BMM, top_k)
    scores_BM = _accurate(scores_BM).masked_fill(~mask_BM, 0)
    weights_BM = torch.ones_like(scores_BM) if term_weights_BM is None else term_weights_BM.to(scores_BM)
    if weights_BM.shape != mask_BM.shape:
        raise ValueError(f"term_weights_BM has shape {tuple(weights_BM.shape)}, expected {tuple(mask_BM.shape)}")
    loss_B = _suffix_terms(scores_BM, order_BMM, weights_BM, reduction)
    if label_smoothing:
        # A term of the reversed order contradicts the terms of those that beat its image, so it has their mean weight.
        beaten_by_BMM = order_BMM.mT
        weights_BM = (beaten_by_BMM * weights_BM[:, None]).sum(-1) / beaten_by_BMM.sum(-1).clamp(min=1)
        reversed_B = _suffix_terms(scores_BM, beaten_by_BMM, weights_BM, reduction)
        loss_B = (1 - label_smoothing) * loss_B + label_smoothing * reversed_B
    return loss_B


def edge_support_weights(support_BMM: Tensor) -> Tensor:
    """The weight of each image's term, (B, M): the mean support of the recorded comparisons that it won, 1 where none
    is recorded. ``support_BMM`` [j, k]: votes, or any positive weight, for j over k; 0 where they were not compared.

    A term weighs one choice from many, so the support of single comparisons has to be reduced to one number; the mean
    over what was recorded does not grow with the length of the list.
    """
    recorded_BM = (support_BMM > 0).sum(-1)
    mean_BM = _accurate(support_BMM).sum(-1) / recorded_BM.clamp(min=1)
    return torch.where(recorded_BM > 0, mean_BM, 1.0)


def _suffix_terms(scores_BM: Tensor, order_BMM: Tensor, weights_BM: Tensor, reduction: Reduction) -> Tensor:
    chooses_BM = order_BMM.any(-1)
    # A row with nobody below would be all -inf and give NaN, which the end discards but anomaly detection trips over:
    # there, its image stands itself.
    itself_MM = torch.eye(order_BMM.shape[1], dtype=torch.bool, device=order_BMM.device)
    rivals_BMM = order_BMM | (itself_MM & ~chooses_BM[:, :, None])
    # Differences first: they stay exact where scores are large and close, and a term is then the softplus of a
    # log-sum, which keeps its digits also where it is near 0.
    gaps_BMM = scores_BM[:, None, :] - scores_BM[:, :, None]
    gaps_BMM = gaps_BMM.masked_fill(~rivals_BMM, -torch.inf)
    # The gradient of logsumexp is as exact as its value, which float32 has to 1e-3 only at 1e4: so once more near 0.
    about_BM = torch.logsumexp(gaps_BMM, dim=-1).detach()
    behind_BM = about_BM + torch.logsumexp(gaps_BMM - about_BM[:, :, None], dim=-1)
    weights_BM = torch.where(chooses_BM, weights_BM, 0.0)
    return _reduce(-logsigmoid(-behind_BM), weights_BM, reduction)


# The comparators, on the same lists


def sft_loss(errors_BM: Tensor, order_BMM: Tensor) -> Tensor:
    """Mean error of each list's winners, those that beat somebody and whom nobody beats, (B,).

    A list that orders nothing names no winner and gives 0, so that all methods learn from the same lists.
    """
    winners_BM = order_BMM.any(2) & ~order_BMM.any(1)
    return _reduce(_accurate(errors_BM), winners_BM.to(_accurate(errors_BM)), "mean_terms")


def pairwise_loss(
    scores_BM: Tensor,
    pairs_BMM: Tensor,
    *,
    reduction: Reduction = "sum",
    pair_weights_BMM: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Diffusion-DPO's loss, ``-log sigmoid(s_j - s_k)``, over chosen pairs of each list, (B,).

    With the pairs of a whole order this is GP-DPO (spec a.3): its m(m - 1)/2 pairs, equally weighted. With
    ``random_pair``, ``adjacent_pairs`` or ``extreme_pairs`` of it, plain DPO on the same lists.

    Args:
        pairs_BMM: boolean, [j, k]: j is the winner and k the loser of a pair.
        reduction: "sum" of the pairs or "mean_terms", their weighted mean.
        pair_weights_BMM: non-negative, such as votes.
        label_smoothing: share, up to 0.5, of the loss with the pair turned around.
    """
    _check_options(reduction, label_smoothing)
    _check_order("pairs_BMM", pairs_BMM, scores_BM)
    scores_BM = _accurate(scores_BM)
    margins_BP = (scores_BM[:, :, None] - scores_BM[:, None, :]).masked_fill(~pairs_BMM, 0).flatten(1)
    terms_BP = -logsigmoid(margins_BP)
    if label_smoothing:
        terms_BP = (1 - label_smoothing) * terms_BP - label_smoothing * logsigmoid(-margins_BP)
    weights_BMM = pairs_BMM.to(scores_BM)
    if pair_weights_BMM is not None:
        weights_BMM = torch.where(pairs_BMM, pair_weights_BMM.to(scores_BM), 0.0)
    return _reduce(terms_BP, weights_BMM.flatten(1), reduction)


def adjacent_pairs(order_BMM: Tensor) -> Tensor:
    """The pairs that nothing stands between; of a ranked list, its m - 1 neighbours."""
    return order_BMM & ~_composed(order_BMM, order_BMM)


def extreme_pairs(order_BMM: Tensor) -> Tensor:
    """The pairs of an unbeaten image and one that beats none; of a ranked list, its first and last."""
    beats_BM, beaten_BM = order_BMM.any(2), order_BMM.any(1)
    return order_BMM & ~beaten_BM[:, :, None] & ~beats_BM[:, None, :]


def random_pair(order_BMM: Tensor, uniform_B: Tensor) -> Tensor:
    """One pair of each list, the one that ``uniform_B`` in [0, 1) points at, all equally likely.

    The draw is an argument so that it can belong to the list, whichever batch it comes in.
    """
    flat_BP = order_BMM.flatten(1)
    count_B = flat_BP.sum(1)
    index_B = torch.minimum((uniform_B * count_B).long(), count_B - 1)
    return (flat_BP & (flat_BP.cumsum(1) - 1 == index_B[:, None])).view_as(order_BMM)


def images_of(pairs_BMM: Tensor) -> Tensor:
    """Which images take part, (B, M): what has to be scored."""
    return pairs_BMM.any(1) | pairs_BMM.any(2)


# The winner-error safeguard


def safeguard_scale(weights_BM: Tensor, gram_BMM: Tensor, mu: float = 0.0) -> Tensor:
    """By how much to scale each image's gradient so that the preferred images' errors do not grow, (B, M).

    A step moves against ``sum_k w_k g_k``, with w = dL/de and g_k the gradient of error k. Let A be the sum over the
    images that are pulled (w > 0) and -B that over those pushed away (w < 0). The pushed get
    ``lambda = min(1, (1 - mu) |A|^2 / (A . B))`` where A . B > 0, and 1 elsewhere; the pulled always get 1. Then, to
    first order, the pulled images' errors, weighted by w, fall by at least ``mu |A|^2`` times the step. At m = 2 this
    is the rule of Diffusion-SDPO (arXiv 2511.03317).

    For lists the pulled images stand together as the winner because a scale that keeps their sum from growing always
    exists; for the first image alone it may not, as other pulled images may work against it. Lists are treated apart,
    so the result does not depend on the batch.

    Args:
        gram_BMM: inner products of the g_k: in the space of predictions (``output_gram``) or of parameters.
        mu: in [0, 1], larger is more careful.
    """
    if not 0 <= mu <= 1:
        raise ValueError(f"mu must be in [0, 1], got {mu}")
    weights_BM, gram_BMM = _accurate(weights_BM).detach(), _accurate(gram_BMM).detach()
    tiny = torch.finfo(weights_BM.dtype).tiny
    shares_BM = weights_BM / weights_BM.abs().amax(1, keepdim=True).clamp(min=tiny)  # only ratios matter
    pulled_BM, pushed_BM = shares_BM.clamp(min=0), (-shares_BM).clamp(min=0)
    # Padding has weight 0, but may hold anything in the Gram matrix.
    gram_BMM = torch.where((shares_BM[:, :, None] * shares_BM[:, None, :]) != 0, gram_BMM, 0.0)
    pull_BM = (pulled_BM[:, :, None] * gram_BMM).sum(1)
    own_B, against_B = (pull_BM * pulled_BM).sum(1), (pull_BM * pushed_BM).sum(1)
    conflict_B = against_B > 0
    limit_B = (1 - mu) * own_B / torch.where(conflict_B, against_B, 1.0)
    scale_B = torch.where(conflict_B, limit_B.clamp(max=1), 1.0)
    return torch.where(weights_BM < 0, scale_B[:, None], 1.0)


def output_gram(residuals: Tensor) -> Tensor:
    """Inner products of the errors' gradients with respect to the predictions, (B, M, M).

    ``residuals`` (B, M, ...) are prediction minus target. Their use in place of the gradients of parameters is
    Diffusion-SDPO's approximation; it costs no further backward pass.
    """
    flat_BMD = _accurate(residuals.detach()).flatten(2)
    with torch.autocast(residuals.device.type, enabled=False):
        return flat_BMD @ flat_BMD.mT * (2 / flat_BMD.shape[2]) ** 2


def safeguarded(errors_BM: Tensor, losses_of: Callable[[Tensor], Tensor], gram_BMM: Tensor, mu: float = 0.0) -> Tensor:
    """The same errors, whose gradients ``safeguard_scale`` scales: ``losses_of(safeguarded(errors_BM, losses_of, …))``
    has the value of ``losses_of(errors_BM)`` and a safe gradient.

    Args:
        losses_of: the losses (B,) as a function of the errors; it is differentiated once more, on numbers alone.
    """
    fixed_BM = errors_BM.detach()
    with torch.enable_grad():
        leaf_BM = fixed_BM.clone().requires_grad_()
        (weights_BM,) = torch.autograd.grad(losses_of(leaf_BM).sum(), leaf_BM)
    scale_BM = safeguard_scale(weights_BM, gram_BMM, mu).to(errors_BM)
    return fixed_BM + scale_BM * (errors_BM - fixed_BM)


# Helpers


def _accurate(values: Tensor) -> Tensor:
    """In float32 at least; errors differ in digits that bfloat16 does not have."""
    return values if values.dtype == torch.float64 else values.float()


def _reduce(terms: Tensor, weights: Tensor, reduction: Reduction) -> Tensor:
    """Sum or weighted mean of (B, n) terms; those of weight 0 may hold anything, and their gradient is 0."""
    total_B = (torch.where(weights > 0, terms, 0.0) * weights).sum(1)
    if reduction == "sum":
        return total_B
    weight_B = weights.sum(1)
    return total_B / torch.where(weight_B > 0, weight_B, 1.0)


def _pairs(mask_BM: Tensor) -> Tensor:
    return mask_BM[:, :, None] & mask_BM[:, None, :]


def _composed(first_BMM: Tensor, then_BMM: Tensor) -> Tensor:
    """[j, l] where some k has ``first`` [j, k] and ``then`` [k, l]."""
    return (first_BMM[:, :, :, None] & then_BMM[:, None, :, :]).any(2)


def _check_mask(mask_BM: Tensor) -> None:
    if mask_BM.dtype != torch.bool or mask_BM.dim() != 2:
        raise ValueError(
            f"mask_BM must be boolean of shape (lists, places), got {mask_BM.dtype} of shape {tuple(mask_BM.shape)}"
        )


def _check_order(name: str, order_BMM: Tensor, like_BM: Tensor) -> None:
    expected = (*like_BM.shape, like_BM.shape[-1])
    if order_BMM.dtype != torch.bool or order_BMM.shape != expected:
        raise ValueError(
            f"{name} must be boolean of shape {expected}, got {order_BMM.dtype} of shape {tuple(order_BMM.shape)}"
        )


def _check_options(reduction: str, label_smoothing: float) -> None:
    if reduction not in ("sum", "mean_terms"):
        raise ValueError(f'reduction must be "sum" or "mean_terms", got {reduction!r}')
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5], got {label_smoothing}: above, it reverses preferences")
