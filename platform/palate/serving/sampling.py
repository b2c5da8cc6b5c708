"""Choosing the next token: greedy, or by inverse distribution function from one uniform number a row.

The numbers come from each request's own generator and the distribution function runs in vocabulary order, so that
what is drawn does not depend on the batch: rounding that differs between batches moves a border by about 1e-7.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_CANDIDATES = 512  # top-p looks among this many best tokens first; sorting all costs as much as a decode step


def choose(logits_BV: Tensor, temperatures: Sequence[float], top_ps: Sequence[float], uniforms_B: Tensor) -> Tensor:
    """The next token of each row, shape (B,).

    Args:
        temperatures: 0 takes the most likely token (the first of equal ones); uniforms_B is not read there.
        top_ps: draw from the smallest set of most likely tokens whose probability reaches this much (arXiv 1904.09751).
        uniforms_B: float64 in [0, 1).
    """
    tokens_B = logits_BV.argmax(dim=-1)
    drawn = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    if not drawn:
        return tokens_B
    # The clamp and the subtraction keep tiny temperatures from overflowing.
    divisors_N1 = torch.tensor([[max(temperatures[row], 1e-6)] for row in drawn], device=logits_BV.device)
    logits_NV = logits_BV[drawn].float()
    probabilities_NV = torch.softmax((logits_NV - logits_NV.amax(dim=1, keepdim=True)) / divisors_N1, dim=1)
    uniforms_N = uniforms_B[drawn].to(logits_BV.device)
    limits_N = torch.tensor([top_ps[row] for row in drawn], device=logits_BV.device)
    cut = limits_N < 1
    drawn_N = torch.empty_like(tokens_B[drawn])
    if not cut.all():
        drawn_N[~cut] = _inverse(probabilities_NV[~cut], uniforms_N[~cut])
    if cut.any():
        weights_Nk, candidates_Nk = nucleus(probabilities_NV[cut], limits_N[cut])
        drawn_N[cut] = candidates_Nk.gather(1, _inverse(weights_Nk, uniforms_N[cut])[:, None]).squeeze(1)
    tokens_B[drawn] = drawn_N
    return tokens_B


def nucleus(probabilities_NV: Tensor, top_p_N: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest sets of most likely tokens whose probability reaches ``top_p``.

    Returns weights (N, k), 0 for what is outside the set, and the tokens they belong to, in vocabulary order.
    """
    count = min(_CANDIDATES, probabilities_NV.shape[1])
    best_Nk, tokens_Nk = probabilities_NV.topk(count)
    if (best_Nk.sum(dim=1) < top_p_N).any():
        best_Nk, tokens_Nk = probabilities_NV.sort(dim=1, descending=True)
    before_Nk = best_Nk.cumsum(dim=1) - best_Nk
    weights_Nk = best_Nk.masked_fill(before_Nk >= top_p_N[:, None], 0.0)
    tokens_Nk, order_Nk = tokens_Nk.sort(dim=1)
    return weights_Nk.gather(1, order_Nk), tokens_Nk


def _inverse(weights_Nk: Tensor, uniforms_N: Tensor) -> Tensor:
    """For each row the first index whose cumulated share of the weights exceeds the uniform number."""
    cumulated_Nk = weights_Nk.double().cumsum(dim=1)
    total_N1 = cumulated_Nk[:, -1:].contiguous()
    # right=True steps over weights of 0; the last weight that is not 0 is for a product that rounds up to the total.
    found_N1 = torch.searchsorted(cumulated_Nk, uniforms_N[:, None] * total_N1, right=True)
    found_N1 = torch.minimum(found_N1, torch.searchsorted(cumulated_Nk, total_N1))
    # Weights that are NaN have no place; any will do, for the log-probability there says that the row is broken.
    return found_N1.clamp(max=weights_Nk.shape[1] - 1).squeeze(1)
