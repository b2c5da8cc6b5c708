"""Point estimates, paired bootstrap intervals over users, and what difference an experiment could have seen.

Questions of one person are not independent, so the resampled unit is the person: a resample draws as many users as
there are, with replacement, and all questions of a drawn user come along. Two systems are compared on the questions
that both answered, and in every resample on the same users (paired), which removes what is hard or easy for all.

Intervals are percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). With
few users (below about 30) they are a little too narrow: by sqrt((n - 1) / n) in width, and by their skew.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Average = Literal["users", "questions"]
Combine = Callable[[NDArray[np.float64]], NDArray[np.float64]]

# What is detected with 80% power by a two-sided test at 5%: (z_0.975 + z_0.8) standard errors, about 2.80.
DETECTABLE_STANDARD_ERRORS = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)

_CELLS_AT_ONCE = 1 << 22  # resampled indices held in memory at a time: 32 MiB


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval over ``n`` users; ``nan`` bounds with a ``reason`` where there is no interval."""

    value: float
    low: float
    high: float
    n: int
    questions: int
    standard_error: float
    reason: str = ""

    @property
    def smallest_detectable_difference(self) -> float:
        """For an estimate of a paired difference: the true difference that such an experiment finds 4 times in 5.

        (z_0.975 + z_0.8) * SE, with SE the bootstrap standard error of the paired difference; ``nan`` without one.
        """
        return DETECTABLE_STANDARD_ERRORS * self.standard_error if self.standard_error > 0 else float("nan")

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def first_column(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """The metric that is a mean itself: (..., 1) -> (...)."""
    return means[..., 0]


def estimate(
    values: ArrayLike,
    users: Sequence[str],
    *,
    weights: ArrayLike | None = None,
    combine: Combine = first_column,
    average: Average = "users",
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """A metric with its bootstrap interval over users.

    Args:
        values: (N,) or (N, C), a row per question. Metrics that are no mean have C columns whose means determine them.
        users: the person of each row.
        weights: (N,) positive, such as token counts; rows weigh equally without it.
        combine: (..., C) means of the columns -> (...) metric, such as the square root for RMSE.
        average: "users": the mean over users of each user's (weighted) mean. "questions": the (weighted) mean over
            all questions, as the official metrics have it; users are resampled all the same.
    """
    return _bootstrap([_per_user(values, users, weights, average)], [combine], len(users), resamples, seed)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    users: Sequence[str],
    *,
    weights: ArrayLike | None = None,
    combine: Combine = first_column,
    average: Average = "users",
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Metric of ``a`` minus metric of ``b`` on the same questions; arguments as in ``estimate``."""
    if np.shape(a) != np.shape(b):
        raise ValueError(f"paired arrays need equal shapes, found {np.shape(a)} and {np.shape(b)}")
    sides = [_per_user(values, users, weights, average) for values in (a, b)]
    difference = _bootstrap(sides, [combine, combine], len(users), resamples, seed)
    if not difference.reason and np.array_equal(a, b):
        return replace(difference, reason="the two systems score equally on every question")
    return difference


@dataclass(frozen=True, eq=False)
class Scores:
    """How one system did under one metric: a row per question, with all that is needed to average it.

    ``values`` has shape (N,) or (N, C); see ``estimate`` for ``weights`` and ``combine``. ``questions`` names the
    rows, so that systems that answered different samples are compared on what they share. ``chance`` is what
    guessing gives, where that is known.
    """

    questions: tuple[str, ...]
    users: tuple[str, ...]
    values: NDArray[np.float64]
    weights: NDArray[np.float64] | None = None
    combine: Combine = first_column
    unit: str = ""
    higher_is_better: bool = True
    chance: float | None = None
    _rows: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lengths = {"questions": len(self.questions), "users": len(self.users), "values": len(self.values)}
        if self.weights is not None:
            lengths["weights"] = len(self.weights)
        if len(set(lengths.values())) != 1:
            raise ValueError(f"scores need one row per question, found lengths {lengths}")
        object.__setattr__(self, "_rows", {question: row for row, question in enumerate(self.questions)})
        if len(self._rows) != len(self.questions):
            repeated = next(q for row, q in enumerate(self.questions) if self._rows[q] != row)
            raise ValueError(f"question {repeated!r} is scored more than once: give each row its own id")

    def value(self, average: Average = "questions") -> float:
        """The metric without an interval; "questions" is the official number of a benchmark."""
        if not self.questions:
            return float("nan")
        numerators, denominators = _per_user(self.values, self.users, self.weights, average)
        return float(self.combine(numerators.sum(axis=0) / denominators.sum()))

    def estimate(self, average: Average = "users", resamples: int = 10_000, seed: int = 0) -> Estimate:
        """The metric with its interval."""
        return estimate(
            self.values,
            self.users,
            weights=self.weights,
            combine=self.combine,
            average=average,
            resamples=resamples,
            seed=seed,
        )

    def minus(self, other: "Scores", average: Average = "users", resamples: int = 10_000, seed: int = 0) -> Estimate:
        """This system's metric minus another's, paired on the questions that both answered.

        Raises:
            ValueError: a shared question belongs to different users or has different weights.
        """
        shared = [question for question in self.questions if question in other._rows]
        mine, theirs = self.select(shared), other.select(shared)
        if mine.users != theirs.users:
            question = next(q for q, a, b in zip(shared, mine.users, theirs.users, strict=True) if a != b)
            raise ValueError(f"question {question!r} belongs to different users in the two systems: check the ids")
        if not np.array_equal(mine._weights(), theirs._weights()):
            raise ValueError(
                "the two systems weigh the shared questions differently (such as by token counts of different "
                "tokenizers): a paired comparison needs equal weights"
            )
        return paired_difference(
            mine.values,
            theirs.values,
            mine.users,
            weights=self.weights if self.weights is None else mine.weights,
            combine=self.combine,
            average=average,
            resamples=resamples,
            seed=seed,
        )

    def select(self, questions: Sequence[str]) -> "Scores":
        """The same scores on some of the questions, in that order."""
        rows = [self._rows[question] for question in questions]
        return replace(
            self,
            questions=tuple(questions),
            users=tuple(self.users[row] for row in rows),
            values=self.values[rows],
            weights=None if self.weights is None else self.weights[rows],
        )

    def by_user(self) -> dict[str, float]:
        """The metric of each user, sorted by user."""
        numerators, denominators = _per_user(self.values, self.users, self.weights, "users")
        values = self.combine(numerators / denominators[:, None])
        return dict(zip(sorted(set(self.users)), (float(v) for v in values), strict=True))

    def _weights(self) -> NDArray[np.float64]:
        return np.ones(len(self.questions)) if self.weights is None else self.weights


def _per_user(
    values: ArrayLike, users: Sequence[str], weights: ArrayLike | None, average: Average
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(U, C) numerators and (U,) denominators whose ratio of sums over users is the (C,) vector of means."""
    rows = np.asarray(values, dtype=np.float64)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or len(rows) != len(users):
        raise ValueError(f"values must be (N,) or (N, C) with N = {len(users)} users, found shape {np.shape(values)}")
    mass = np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=np.float64)
    if mass.shape != (len(rows),) or not np.all(mass > 0):
        raise ValueError(f"weights must be ({len(rows)},) and positive: leave out questions that weigh nothing")
    names, index = np.unique(np.asarray(users, dtype=object).astype(str), return_inverse=True)
    numerators = np.zeros((len(names), rows.shape[1]))
    np.add.at(numerators, index, rows * mass[:, None])
    denominators = np.bincount(index, weights=mass, minlength=len(names)).astype(np.float64)
    if average == "users":
        return numerators / denominators[:, None], np.ones(len(names))
    return numerators, denominators


def _bootstrap(
    sides: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    combines: Sequence[Combine],
    questions: int,
    resamples: int,
    seed: int,
) -> Estimate:
    """One side: its metric. Two sides: the first's metric minus the second's, on the same resamples."""
    users = len(sides[0][1])
    if users == 0:
        return _without_interval(float("nan"), 0, 0, "no questions")

    def metric(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        values = [
            combine(counts @ numerators / (counts @ denominators)[:, None])
            for combine, (numerators, denominators) in zip(combines, sides, strict=True)
        ]
        return values[0] if len(values) == 1 else values[0] - values[1]

    value = float(metric(np.ones((1, users)))[0])
    if not np.isfinite(value):
        return _without_interval(float("nan"), users, questions, "some scores are not finite")
    if users == 1:
        return _without_interval(value, users, questions, "one user: nothing to resample")

    generator = np.random.default_rng(seed)
    replicates = np.empty(resamples)
    rows = max(1, _CELLS_AT_ONCE // users)
    for start in range(0, resamples, rows):
        drawn = generator.integers(users, size=(min(rows, resamples - start), users))
        drawn += users * np.arange(len(drawn))[:, None]
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        replicates[start : start + len(drawn)] = metric(counts.astype(np.float64))
    low, high = np.quantile(replicates, [0.025, 0.975])
    return Estimate(value, float(low), float(high), users, questions, float(np.std(replicates, ddof=1)))


def _without_interval(value: float, users: int, questions: int, reason: str) -> Estimate:
    nan = float("nan")
    return Estimate(value, nan, nan, users, questions, nan, reason)
