"""The user vector: its likelihood, its exact fit, and the training of the head that all people share.

With a position's candidates C_t and the cluster model's log-probabilities on them, the personal distribution is
``pi_u(v) ∝ pi_c(v) exp(beta Delta_t(v))`` on C_t and ``∝ pi_c(v)`` elsewhere, normalized over the whole vocabulary.
The implicit reward of a text is ``r_u(x, y) = sum_t log pi_u(y_t) - log pi_c(y_t)`` (DESIGN, "User vector"). Delta is
linear in the person's vector p, so the likelihood of their own text is concave in p, and under a Gaussian prior the fit
is unique: Newton's method finds it, without negatives.

Symbols: N positions, k candidates, d features, J width of a vector, U people, S texts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from palate.card.correction import Head, candidate_rows

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


def log_ratios(delta_Nk: Tensor, log_probs_Nk: Tensor, target_N: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """``log pi_u(y_t) - log pi_c(y_t)`` of each written token, shape (N,).

    The normalizer is ``1 + sum_C pi_c (exp(beta Delta) - 1)``: candidates are reweighted, the rest keeps its mass.
    """
    shifted_Nk = beta * delta_Nk
    normalizer_N, _ = _normalizer(shifted_Nk, log_probs_Nk)
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


def fit_vector(
    positions: Positions, head: Head, prior: Prior, *, tolerance: float = 1e-5, max_iterations: int = 50
) -> Fit:
    """The MAP vector of one person: minimizes ``-sum_t log pi_u(y_t) + (p - m)' Lambda (p - m) / 2`` over p.

    Newton's method with backtracking. The objective is strictly convex, so the minimum is the only one whatever the
    start. Without positions the answer is the prior mean.

    Raises:
        ValueError: features or log-probabilities are not finite.
    """
    mean_J, precision_J = prior.mean_J.double(), prior.precision_J.double()
    if positions.target_N.numel() == 0:
        return Fit(prior.mean_J.clone(), 0.0, 0)
    if not (torch.isfinite(positions.features_Nd).all() and torch.isfinite(positions.log_probs_Nk).all()):
        raise ValueError("the positions to fit hold NaN or infinite values: the model's forward pass on them failed")
    phi_NkJ = candidate_rows(head, positions.features_Nd, positions.candidates_Nk)
    present_N = positions.target_N != ABSENT
    chosen_NJ = phi_NkJ[torch.arange(len(present_N)), positions.target_N.clamp(min=0)] * present_N[:, None]
    chosen_J = chosen_NJ.sum(0, dtype=torch.float64)

    def evaluate(vector_J: Tensor) -> tuple[float, Tensor, Tensor]:
        delta_Nk = (phi_NkJ.view(-1, phi_NkJ.shape[2]) @ vector_J.float()).view(phi_NkJ.shape[:2])
        log_normalizer_N, weights_Nk = _normalizer(delta_Nk, positions.log_probs_Nk)
        centred_J = vector_J - mean_J
        value = log_normalizer_N.sum(dtype=torch.float64) - chosen_J @ vector_J
        value = value + 0.5 * (precision_J * centred_J.square()).sum()
        expected_J = (weights_Nk.reshape(1, -1) @ phi_NkJ.view(-1, phi_NkJ.shape[2])).squeeze(0).double()
        return float(value), expected_J - chosen_J + precision_J * centred_J, weights_Nk

    vector_J = mean_J.clone()
    value, gradient_J, weights_Nk = evaluate(vector_J)
    for iteration in range(max_iterations):
        if gradient_J.norm() <= tolerance:
            return Fit(vector_J.float(), float(gradient_J.norm()), iteration)
        direction_J = -torch.linalg.solve(_curvature(phi_NkJ, weights_Nk) + torch.diag(precision_J), gradient_J)
        slope = float(gradient_J @ direction_J)
        step = 1.0
        while True:
            trial = evaluate(vector_J + step * direction_J)
            # The second condition ends the search where the decrease is below what float32 sums can resolve.
            if trial[0] <= value + 1e-4 * step * slope or trial[1].norm() < gradient_J.norm():
                break
            step /= 2
            if step < 1e-8:
                return Fit(vector_J.float(), float(gradient_J.norm()), iteration)
        vector_J = vector_J + step * direction_J
        value, gradient_J, weights_Nk = trial
    return Fit(vector_J.float(), float(gradient_J.norm()), max_iterations)


def _normalizer(delta_Nk: Tensor, log_probs_Nk: Tensor) -> tuple[Tensor, Tensor]:
    """``log sum_v pi_c(v) exp(Delta(v))`` over the vocabulary (N,), and pi_u on the candidates (N, k)."""
    rest_N = torch.log1p(-log_probs_Nk.exp().sum(-1).clamp(max=1 - 1e-6))
    log_normalizer_N = torch.logsumexp(torch.cat([log_probs_Nk + delta_Nk, rest_N[:, None]], dim=1), dim=1)
    return log_normalizer_N, (log_probs_Nk + delta_Nk - log_normalizer_N[:, None]).exp()


def _curvature(phi_NkJ: Tensor, weights_Nk: Tensor, negligible: float = 1e-4) -> Tensor:
    """Hessian of the summed log normalizers (J, J), in float64.

    Candidates of negligible weight are left out: the result stays positive semidefinite (the kept weights of a position
    sum to at most 1) and only the path of Newton's method changes, not the point where the gradient vanishes.
    """
    kept_Nk = weights_Nk > negligible
    weights_M = weights_Nk[kept_Nk]
    rows_MJ = phi_NkJ[kept_Nk]
    weighted_MJ = rows_MJ * weights_M[:, None]
    mean_NJ = torch.zeros(phi_NkJ.shape[0], phi_NkJ.shape[2])
    mean_NJ.index_add_(0, kept_Nk.nonzero()[:, 0], weighted_MJ)
    return (rows_MJ.t() @ weighted_MJ - mean_NJ.t() @ mean_NJ).double()
