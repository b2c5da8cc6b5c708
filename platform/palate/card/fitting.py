"""The exact fit of user vectors.

The objective ``-sum_t log pi_u(y_t) + (p - m)' Lambda (p - m) / 2`` is smooth and strictly convex (see
``palate.card.preferences``), so its minimum is the only one whatever the path. The path here: L-BFGS with backtracking,
started from the person's own Hessian, which is taken anew only when a step had to be shortened (Nocedal and Wright,
algorithms 7.4 and 3.1). A Hessian costs as much as several gradients: this is Newton's method with fewer of them.

One person at a time and a person a thread: what a gradient reads, N·k·J numbers, then stays in a processor's cache, and
a batch of people was measured slower. Corrections and the candidates' probabilities are computed in float32; sums over
positions, and all that has the length of a vector, in float64.

Symbols: N positions, k candidates, J width of a vector.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from palate import progress
from palate.card.correction import Head, gates
from palate.card.preferences import ABSENT, Fit, Positions, Prior, normalizer

_HISTORY = 10  # steps until the Hessian is taken anew
_SMALLEST_STEP = 1e-8
_RESOLUTION = 1e-6  # of a position's term, computed in float32


def fit_vectors(
    people: Sequence[Positions], head: Head, prior: Prior, *, tolerance: float = 1e-5, max_iterations: int = 100
) -> list[Fit]:
    """The MAP vector of each person, in order. Without positions it is the prior mean.

    Args:
        people: each one's positions, on the head's device.
        tolerance: on the norm of the gradient of the summed log-likelihood and the prior.

    Raises:
        ValueError: features or log-probabilities are not finite, or the prior's precision is not positive.
    """
    # Each thread keeps one block of memory for the rows of all its people: to get megabytes anew from the system takes
    # longer than to fill them.
    largest = max((one.candidates_Nk.numel() for one in people), default=0) * head.width
    kept = threading.local()

    def fit(positions: Positions) -> Fit:
        if not hasattr(kept, "memory"):
            kept.memory = head.output_VJ.new_empty(largest)
        return _fit(positions, head, prior, tolerance, max_iterations, kept.memory)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(progress.track(pool.map(fit, people), "fitting vectors", len(people)))
    finally:
        torch.set_num_threads(threads)


def fit_vector(
    positions: Positions, head: Head, prior: Prior, *, tolerance: float = 1e-5, max_iterations: int = 100
) -> Fit:
    """``fit_vectors`` for one person."""
    return fit_vectors([positions], head, prior, tolerance=tolerance, max_iterations=max_iterations)[0]


class _Objective:
    """One person's negative log posterior: float64 in and out, on the device in between."""

    def __init__(self, positions: Positions, head: Head, prior: Prior, memory: Tensor) -> None:
        self.log_probs_Nk = positions.log_probs_Nk
        # In place: one copy of these rows fits in the cache where two do not.
        self.phi_MJ = memory[: positions.candidates_Nk.numel() * head.width].view(-1, head.width)
        torch.index_select(head.output_VJ, 0, positions.candidates_Nk.reshape(-1), out=self.phi_MJ)
        self.phi_NkJ = self.phi_MJ.view(*positions.candidates_Nk.shape, head.width)
        self.phi_NkJ.mul_(gates(head, positions.features_Nd)[:, None, :])
        present_N = (positions.target_N != ABSENT).nonzero().squeeze(1)
        chosen_NJ = self.phi_NkJ[present_N, positions.target_N[present_N]]
        self.chosen_J = _numbers(chosen_NJ.sum(0, dtype=torch.float64))
        self.mean_J, self.precision_J = _numbers(prior.mean_J), _numbers(prior.precision_J)

    def __call__(self, vector_J: np.ndarray) -> tuple[float, np.ndarray, Tensor]:
        """Value, gradient (J,), and the candidates' probabilities (N, k), which ``hessian`` takes."""
        delta_M = self.phi_MJ @ torch.from_numpy(vector_J).to(self.phi_MJ)
        log_normalizer_N, weights_Nk = normalizer(delta_M.view_as(self.log_probs_Nk), self.log_probs_Nk)
        expected_NJ = (weights_Nk[:, None, :] @ self.phi_NkJ).squeeze(1)
        centred_J = vector_J - self.mean_J
        pull_J = self.precision_J * centred_J
        value = float(log_normalizer_N.sum(dtype=torch.float64)) - self.chosen_J @ vector_J + 0.5 * pull_J @ centred_J
        return value, _numbers(expected_NJ.sum(0, dtype=torch.float64)) - self.chosen_J + pull_J, weights_Nk

    def hessian(self, weights_Nk: Tensor, negligible: float = 1e-2) -> np.ndarray:
        """The Hessian (J, J) but for candidates of negligible weight.

        To leave them out changes the path to the minimum and not the point where the gradient vanishes. Written as a
        sum of squares, with ``1 - sum_c w_c`` for what lies outside the kept candidates, so that rounding leaves it
        positive semidefinite.
        """
        count, k, width = self.phi_NkJ.shape
        kept_M = (weights_Nk.reshape(-1) > negligible).nonzero().squeeze(1)
        rows_MJ, weights_M, position_M = (
            self.phi_MJ.index_select(0, kept_M),
            weights_Nk.reshape(-1)[kept_M],
            kept_M // k,
        )
        mean_NJ = rows_MJ.new_zeros(count, width).index_add_(0, position_M, rows_MJ * weights_M[:, None])
        outside_N = (1 - rows_MJ.new_zeros(count).index_add_(0, position_M, weights_M)).clamp(min=0)
        centred_MJ = rows_MJ.sub_(mean_NJ.index_select(0, position_M)).mul_(weights_M.sqrt()[:, None])
        mean_NJ *= outside_N.sqrt()[:, None]
        hessian_JJ = _numbers(centred_MJ.t() @ centred_MJ + mean_NJ.t() @ mean_NJ) + np.diag(self.precision_J)
        # What float32 sums may have taken away.
        return hessian_JJ + 1e-6 * hessian_JJ.diagonal().max() * np.eye(width)


@torch.no_grad()  # it holds for one thread
def _fit(positions: Positions, head: Head, prior: Prior, tolerance: float, max_iterations: int, memory: Tensor) -> Fit:
    if not bool((prior.precision_J > 0).all()):
        raise ValueError("the prior's precisions must be positive: without it a vector's minimum may not exist")
    count = len(positions.target_N)
    if not count:
        return Fit(prior.mean_J.clone(), 0.0, 0)
    objective = _Objective(positions, head, prior, memory)
    vector_J = objective.mean_J
    value, gradient_J, weights_Nk = objective(vector_J)
    if not np.isfinite(gradient_J).all():
        raise ValueError("the positions to fit hold NaN or infinite values: the model's forward pass failed there")
    renew, iteration = True, 0
    while iteration < max_iterations and np.linalg.norm(gradient_J) > tolerance:
        if renew:
            factor_JJ = torch.linalg.cholesky(torch.from_numpy(objective.hessian(weights_Nk)))
            pairs: list[tuple[np.ndarray, np.ndarray]] = []
        direction_J = -_inverse_hessian_times(gradient_J, pairs, factor_JJ)
        slope, step = gradient_J @ direction_J, 1.0
        resolution = _RESOLUTION * (abs(value) + count)
        while step > _SMALLEST_STEP:
            trial_J = vector_J + step * direction_J
            trial_value, trial_gradient_J, weights_Nk = objective(trial_J)
            if trial_value <= value + 1e-4 * step * slope:
                break
            # Near the minimum a decrease is below what float32 resolves: there the gradient decides.
            smaller = np.linalg.norm(trial_gradient_J) < np.linalg.norm(gradient_J)
            if trial_value <= value + resolution and smaller:
                break
            step /= 2
        else:
            if not pairs:
                break  # no step although the Hessian was taken here: the limit of the arithmetic
            _, _, weights_Nk = objective(vector_J)
            renew = True
            continue
        moved_J, bent_J = trial_J - vector_J, trial_gradient_J - gradient_J
        if moved_J @ bent_J > 0:
            pairs.append((moved_J, bent_J))
        # Who had to shorten a step is far from where the Hessian was taken.
        renew = len(pairs) == _HISTORY or step < 1
        vector_J, value, gradient_J = trial_J, trial_value, trial_gradient_J
        iteration += 1
    fitted_J = torch.from_numpy(vector_J).to(prior.mean_J)
    return Fit(fitted_J, float(np.linalg.norm(gradient_J)), iteration)


def _inverse_hessian_times(
    gradient_J: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]], factor_JJ: Tensor
) -> np.ndarray:
    """L-BFGS's two loops, with the factored Hessian where the usual form has a multiple of the identity."""
    result_J, shares = gradient_J.copy(), []
    for moved_J, bent_J in reversed(pairs):
        share = (moved_J @ result_J) / (moved_J @ bent_J)
        result_J -= share * bent_J
        shares.append(share)
    # By torch, which keeps to this thread: scipy's own BLAS would start others.
    result_J = torch.cholesky_solve(torch.from_numpy(result_J)[:, None], factor_JJ).squeeze(1).numpy()
    for (moved_J, bent_J), share in zip(pairs, reversed(shares), strict=True):
        result_J += (share - (bent_J @ result_J) / (moved_J @ bent_J)) * moved_J
    return result_J


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()
