"""The exact fit of user vectors, many people at a time.

The objective ``-sum_t log pi_u(y_t) + (p - m)' Lambda (p - m) / 2`` is smooth and strictly convex (see
``palate.card.preferences``), so its minimum is the only one whatever the path. The path here: L-BFGS with backtracking,
started from each person's own Hessian, which is taken anew only when a step had to be shortened (Nocedal and Wright,
algorithms 7.4 and 3.1). A Hessian costs as much as several gradients: this is Newton's method with fewer of them.

Corrections and the candidates' probabilities are computed in float32; sums over positions, and all that has the
length of a vector, in float64.

Symbols: U people of a batch, N positions, k candidates, J width of a vector.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from palate import progress
from palate.card.correction import Head, gates
from palate.card.preferences import ABSENT, Fit, Positions, Prior, normalizer

_HISTORY = 10  # steps until the Hessian is taken anew
_SMALLEST_STEP = 1e-8
_RESOLUTION = 1e-6  # of a position's term, computed in float32


def fit_vector(
    positions: Positions, head: Head, prior: Prior, *, tolerance: float = 1e-5, max_iterations: int = 100
) -> Fit:
    """``fit_vectors`` for one person."""
    return fit_vectors([positions], head, prior, tolerance=tolerance, max_iterations=max_iterations)[0]


def fit_vectors(
    people: Sequence[Positions],
    head: Head,
    prior: Prior,
    *,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
    batch_bytes: int | None = None,
) -> list[Fit]:
    """The MAP vector of each person, in order. Without positions it is the prior mean.

    Args:
        people: each one's positions, on the head's device, all with the same number of candidates.
        tolerance: on the norm of the gradient of the summed log-likelihood and the prior.
        batch_bytes: how much the candidates' rows, N·k·J floats a person, may take in one batch. By default what
            stays in a processor's cache, where one person at a time is fastest, or 1 GiB on an accelerator.

    Raises:
        ValueError: features or log-probabilities are not finite, or the prior's precision is not positive.
    """
    if not bool((prior.precision_J > 0).all()):
        raise ValueError("the prior's precisions must be positive: without it a vector's minimum may not exist")
    fits: dict[int, Fit] = {}
    limit = batch_bytes or (1 << 30 if head.project_dJ.is_cuda else 8 << 20)
    batches = list(_batches(people, 4 * head.width, limit))

    # Each thread's rows lie in the same memory for all its batches: to get megabytes anew from the system takes longer
    # than to fill them. The longest batch comes first.
    reused = threading.local()

    def fit(batch: list[int]) -> dict[int, Fit]:
        members = [people[number] for number in batch]
        size = len(members) * max(one.candidates_Nk.numel() for one in members) * head.width
        if getattr(reused, "memory", None) is None or reused.memory.numel() < size:
            reused.memory = head.output_VJ.new_empty(size)
        return dict(zip(batch, _fit(members, head, prior, tolerance, max_iterations, reused.memory), strict=True))

    # A person's steps are too short to be shared by threads, so each thread takes people of its own.
    threads = torch.get_num_threads()
    with progress.meter("fitting vectors", len(people), unit="person") as bar:
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                for done in pool.map(fit, batches):
                    fits.update(done)
                    bar.update(len(done))
        finally:
            torch.set_num_threads(threads)
    return [fits[number] for number in range(len(people))]


def _batches(people: Sequence[Positions], row_bytes: int, limit: int) -> Iterator[list[int]]:
    """People of similar length together, as many as fit in ``limit`` when padded to the longest."""
    batch: list[int] = []
    order = sorted(range(len(people)), key=lambda number: -len(people[number].target_N))
    for number in order:
        longest = people[batch[0]] if batch else people[number]
        if batch and (len(batch) + 1) * longest.candidates_Nk.numel() * row_bytes > limit:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


class _Objective:
    """The objectives of U people, padded to the longest; values in float64."""

    def __init__(self, people: Sequence[Positions], head: Head, prior: Prior, memory: Tensor) -> None:
        self.lengths = [len(one.target_N) for one in people]
        longest, k = max(self.lengths), people[0].candidates_Nk.shape[1]
        # A candidate of probability zero in a place that adds nothing: padding changes neither value nor gradient.
        self.log_probs_UNk = _padded([one.log_probs_Nk for one in people], longest, -torch.inf)
        features_UNd = _padded([one.features_Nd for one in people], longest, 0.0)
        candidates_UNk = _padded([one.candidates_Nk for one in people], longest, 0)
        target_UN = _padded([one.target_N for one in people], longest, ABSENT)
        # In place: these rows are most of the work, and one copy of them fits in the cache where two do not.
        rows = memory[: candidates_UNk.numel() * head.width].view(-1, head.width)
        torch.index_select(head.output_VJ, 0, candidates_UNk.reshape(-1), out=rows)
        self.phi_UNkJ = rows.view(*candidates_UNk.shape, head.width)
        self.phi_UNkJ.mul_(gates(head, features_UNd)[:, :, None, :])
        chosen = target_UN.clamp(min=0)[:, :, None, None].expand(-1, -1, 1, head.width)
        chosen_UNJ = self.phi_UNkJ.gather(2, chosen).squeeze(2) * (target_UN != ABSENT)[:, :, None]
        self.chosen_UJ = chosen_UNJ.sum(1, dtype=torch.float64)
        self.mean_J, self.precision_J = prior.mean_J.double(), prior.precision_J.double()
        self.shape = (len(people), longest, k)

    def __call__(self, vectors_UJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (U,), gradients (U, J), and the probabilities of the candidates (U, N, k)."""
        users, longest, k = self.shape
        # A product a person: batched matrix times vector is far slower on a CPU.
        rows = zip(self.phi_UNkJ.view(users, longest * k, -1), vectors_UJ.float(), strict=True)
        delta_UNk = torch.stack([phi @ vector for phi, vector in rows]).view(self.shape)
        log_normalizer, weights = normalizer(delta_UNk.view(-1, k), self.log_probs_UNk.view(-1, k))
        weights_UNk = weights.view(self.shape)
        expected_UNJ = (weights.view(-1, 1, k) @ self.phi_UNkJ.view(users * longest, k, -1)).view(users, longest, -1)
        centred_UJ = vectors_UJ - self.mean_J
        values_U = log_normalizer.view(users, longest).sum(1, dtype=torch.float64) - (self.chosen_UJ * vectors_UJ).sum(
            1
        )
        values_U += 0.5 * (self.precision_J * centred_UJ.square()).sum(1)
        gradients_UJ = expected_UNJ.sum(1, dtype=torch.float64) - self.chosen_UJ + self.precision_J * centred_UJ
        return values_U, gradients_UJ, weights_UNk

    def factors(self, weights_UNk: Tensor) -> Tensor:
        """Cholesky factors of the Hessians at the given probabilities, (U, J, J)."""
        hessians = torch.stack([_curvature(*pair) for pair in zip(self.phi_UNkJ, weights_UNk, strict=True)])
        hessians += torch.diag(self.precision_J)
        # What float32 sums may have taken away.
        rounding_U = 1e-6 * hessians.diagonal(dim1=1, dim2=2).amax(1)
        return torch.linalg.cholesky(hessians + rounding_U[:, None, None] * torch.eye(hessians.shape[1]).to(hessians))


@torch.no_grad()  # in each thread anew
def _fit(
    people: Sequence[Positions], head: Head, prior: Prior, tolerance: float, max_iterations: int, memory: Tensor
) -> list[Fit]:
    if not max(len(one.target_N) for one in people):
        return [Fit(prior.mean_J.clone(), 0.0, 0) for _ in people]
    objective = _Objective(people, head, prior, memory)
    vectors_UJ = prior.mean_J.double().repeat(len(people), 1)
    values_U, gradients_UJ, weights_UNk = objective(vectors_UJ)
    if not bool(torch.isfinite(gradients_UJ).all()):
        raise ValueError("the positions to fit hold NaN or infinite values: the model's forward pass failed there")
    iterations_U = torch.zeros(len(people), dtype=torch.long, device=vectors_UJ.device)
    moving_U = gradients_UJ.norm(dim=1) > tolerance
    renew = True
    for _ in range(max_iterations):
        if not bool(moving_U.any()):
            break
        if renew:
            factors_UJJ = objective.factors(weights_UNk)
            pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        directions_UJ = -_inverse_hessian_times(gradients_UJ, pairs, factors_UJJ)
        slopes_U = (gradients_UJ * directions_UJ).sum(1)
        steps_U = moving_U.double()
        while True:
            trial_UJ = vectors_UJ + steps_U[:, None] * directions_UJ
            trial_values_U, trial_gradients_UJ, weights_UNk = objective(trial_UJ)
            resolution_U = _RESOLUTION * (values_U.abs() + objective.shape[1])
            enough_U = trial_values_U <= values_U + 1e-4 * steps_U * slopes_U
            # Near the minimum a decrease is below what float32 resolves: there the gradient decides.
            equal_U = trial_values_U <= values_U + resolution_U
            enough_U |= equal_U & (trial_gradients_UJ.norm(dim=1) < gradients_UJ.norm(dim=1))
            short_U = ~enough_U & (steps_U > 0)
            if not bool(short_U.any()):
                break
            steps_U = torch.where(short_U, steps_U / 2, steps_U)
            steps_U = torch.where(steps_U < _SMALLEST_STEP, 0.0, steps_U)
        moved_UJ, bent_UJ = trial_UJ - vectors_UJ, trial_gradients_UJ - gradients_UJ
        curvature_U = (moved_UJ * bent_UJ).sum(1)
        # Zero for whoever did not move: the pair then changes nothing.
        inverse_U = torch.where(curvature_U > 0, 1 / curvature_U.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        pairs.append((moved_UJ, bent_UJ, inverse_U))
        # Who had to shorten a step is far from where the Hessian was taken.
        renew = len(pairs) == _HISTORY or bool((steps_U < moving_U.double()).any())
        iterations_U += moving_U
        still_U = steps_U > 0
        vectors_UJ = torch.where(still_U[:, None], trial_UJ, vectors_UJ)
        gradients_UJ = torch.where(still_U[:, None], trial_gradients_UJ, gradients_UJ)
        values_U = torch.where(still_U, trial_values_U, values_U)
        # Who cannot move although the Hessian was taken here is at the limit of the arithmetic.
        moving_U = moving_U & (still_U | (len(pairs) > 1)) & (gradients_UJ.norm(dim=1) > tolerance)
    norms = gradients_UJ.norm(dim=1).tolist()
    return [
        Fit(vector_J.float(), norm, iterations)
        for vector_J, norm, iterations in zip(vectors_UJ, norms, iterations_U.tolist(), strict=True)
    ]


def _inverse_hessian_times(
    gradients_UJ: Tensor, pairs: Sequence[tuple[Tensor, Tensor, Tensor]], factors_UJJ: Tensor
) -> Tensor:
    """L-BFGS's two loops, with the factored Hessian where the usual form has a multiple of the identity."""
    result_UJ, shares = gradients_UJ.clone(), []
    for moved_UJ, bent_UJ, inverse_U in reversed(pairs):
        share_U = inverse_U * (moved_UJ * result_UJ).sum(1)
        result_UJ -= share_U[:, None] * bent_UJ
        shares.append(share_U)
    result_UJ = torch.cholesky_solve(result_UJ[:, :, None], factors_UJJ).squeeze(2)
    for (moved_UJ, bent_UJ, inverse_U), share_U in zip(pairs, reversed(shares), strict=True):
        result_UJ += (share_U - inverse_U * (bent_UJ * result_UJ).sum(1))[:, None] * moved_UJ
    return result_UJ


def _curvature(phi_NkJ: Tensor, weights_Nk: Tensor, negligible: float = 1e-2) -> Tensor:
    """Hessian of one person's summed log normalizers (J, J), in float64.

    Candidates of negligible weight are left out, which changes the path to the minimum and not the point where the
    gradient vanishes. Written as a sum of squares, with ``1 - sum_c w_c`` for what lies outside the kept candidates, so
    that rounding leaves it positive semidefinite.
    """
    count, k, width = phi_NkJ.shape
    kept_M = (weights_Nk.reshape(-1) > negligible).nonzero().squeeze(1)
    rows_MJ, weights_M = phi_NkJ.view(-1, width).index_select(0, kept_M), weights_Nk.reshape(-1)[kept_M]
    position_M = kept_M // k
    mean_NJ = phi_NkJ.new_zeros(count, width).index_add_(0, position_M, rows_MJ * weights_M[:, None])
    outside_N = (1 - phi_NkJ.new_zeros(count).index_add_(0, position_M, weights_M)).clamp(min=0)
    centred_MJ = (rows_MJ - mean_NJ[position_M]) * weights_M.sqrt()[:, None]
    mean_NJ *= outside_N.sqrt()[:, None]
    return (centred_MJ.t() @ centred_MJ + mean_NJ.t() @ mean_NJ).double()


def _padded(tensors: Sequence[Tensor], length: int, value: float) -> Tensor:
    if len(tensors) == 1:
        return tensors[0][None]
    return torch.stack([F.pad(t, (*([0, 0] * (t.dim() - 1)), 0, length - t.shape[0]), value=value) for t in tensors])
