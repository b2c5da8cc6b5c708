"""The user vector's likelihood and prior.

With a position's candidates C_t and the cluster model's log-probabilities on them, the personal distribution is
``pi_u(v) ∝ pi_c(v) exp(beta Delta_t(v))`` on C_t and ``∝ pi_c(v)`` elsewhere, normalized over the whole vocabulary.
The implicit reward of a text is ``r_u(x, y) = sum_t log pi_u(y_t) - log pi_c(y_t)``. Delta is
linear in the person's vector p, so the likelihood of their own text is concave in p, and under a Gaussian prior the fit
is unique, and needs no negatives (``palate.card.fitting``).

Symbols: N positions, k candidates, d features, J width of a vector, U people, S texts.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ABSENT = -1  # target index of a written token that is not among the candidates


@dataclass(frozen=True)
class Positions:
    """Everything that the head needs of N token positions; texts are contiguous runs of positions."""

    features_Nd: Tensor
    candidates_Nk: Tensor
    log_probs_Nk: Tensor  # the cluster model's, normalized over the whole vocabulary
    target_N: Tensor  # where the written token stands among the candidates, or ABSENT
    target_log_prob_N: Tensor  # the cluster model's, of the written token
    text_N: Tensor  # which text a position belongs to, 0..S-1

    @property
    def texts(self) -> int:
        return int(self.text_N.max()) + 1 if self.text_N.numel() else 0

    def select(self, mask_N: Tensor) -> "Positions":
        """The positions of ``mask_N``; texts keep their numbers."""
        return Positions(*(getattr(self, name)[mask_N] for name in self.__dataclass_fields__))

    def likeliest(self, k: int) -> "Positions":
        """The same positions with their ``k`` likeliest candidates only, as decoding with a smaller top-k has them.

        Raises:
            ValueError: there are fewer candidates.
        """
        if k > (most := self.candidates_Nk.shape[1]):
            raise ValueError(f"top-k {k} is more than the {most} candidates that were kept: choose at most {most}")
        log_probs_Nk, places_Nk = self.log_probs_Nk.topk(k, dim=1)
        among_Nk = (places_Nk == self.target_N[:, None]) & (self.target_N != ABSENT)[:, None]
        target_N = torch.where(among_Nk.any(1), among_Nk.int().argmax(1), ABSENT)
        candidates_Nk = self.candidates_Nk.gather(1, places_Nk)
        return replace(self, candidates_Nk=candidates_Nk, log_probs_Nk=log_probs_Nk, target_N=target_N)


def log_ratios(delta_Nk: Tensor, log_probs_Nk: Tensor, target_N: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """``log pi_u(y_t) - log pi_c(y_t)`` of each written token, shape (N,).

    The normalizer is ``1 + sum_C pi_c (exp(beta Delta) - 1)``: candidates are reweighted, the rest keeps its mass.
    """
    shifted_Nk = beta * delta_Nk
    normalizer_N, _ = normalizer(shifted_Nk, log_probs_Nk)
    chosen_N = shifted_Nk.gather(1, target_N.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(target_N == ABSENT, 0.0, chosen_N) - normalizer_N


@dataclass(frozen=True)
class Prior:
    """Gaussian prior of user vectors, from the training users: mean and diagonal precision, both (J,)."""

    mean_J: Tensor
    precision_J: Tensor


@dataclass(frozen=True)
class Fit:
    """A person's fitted vector, with what the solver can say about it."""

    vector_J: Tensor
    gradient_norm: float
    iterations: int


def normalizer(delta_Nk: Tensor, log_probs_Nk: Tensor) -> tuple[Tensor, Tensor]:
    """``log sum_v pi_c(v) exp(Delta(v))`` over the vocabulary (N,), and pi_u on the candidates (N, k)."""
    rest_N = torch.log1p(-log_probs_Nk.exp().sum(-1).clamp(max=1 - 1e-6))
    log_normalizer_N = torch.logsumexp(torch.cat([log_probs_Nk + delta_Nk, rest_N[:, None]], dim=1), dim=1)
    return log_normalizer_N, (log_probs_Nk + delta_Nk - log_normalizer_N[:, None]).exp()
