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
    divisors = torch.tensor([temperatures[row] for row in drawn], device=logits_BV.device)
    probabilities_NV = torch.softmax(logits_BV[drawn].float() / divisors[:, None], dim=-1)
    uniforms_N = uniforms_B[drawn].to(logits_BV.device)
    for where, row in enumerate(drawn):
        tokens_B[row] = _draw(probabilities_NV[where], top_ps[row], uniforms_N[where])
    return tokens_B


def _draw(probabilities_V: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    if top_p >= 1:
        return _inverse(probabilities_V, uniform)
    nucleus = _nucleus(probabilities_V, top_p)
    return nucleus[_inverse(probabilities_V[nucleus], uniform)]


def _nucleus(probabilities_V: Tensor, top_p: float) -> Tensor:
    """Indices, in vocabulary order, of the smallest set of best tokens that reaches ``top_p``."""
    count = min(_CANDIDATES, probabilities_V.numel())
    best, indices = probabilities_V.topk(count)
    if best.sum() < top_p and count < probabilities_V.numel():
        best, indices = probabilities_V.sort(descending=True)
    before = best.cumsum(0) - best
    return indices[before < top_p].sort().values


def _inverse(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulated share of the weights exceeds ``uniform``."""
    cumulated = weights.double().cumsum(0)
    # right=True steps over weights of 0; the clamp is for a uniform number that rounds up to the whole.
    return torch.searchsorted(cumulated, uniform * cumulated[-1], right=True).clamp(max=len(weights) - 1)
