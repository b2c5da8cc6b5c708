"""Statistics of scaling curves: arms of one experiment, measured at log-spaced sample counts over paired seeds.

A curve is an array (S, K): S seeds that are the same for all arms (same data, same order, same start), K sample counts.
The unit of replication is the seed, and seeds are few, so intervals are Student's t over seeds, of paired differences.
Questions are no replicates: their intervals say nothing about another training run.

A seed whose difference is not finite at a size is left out at that size; a curve (fit, slope, crossover) takes the
seeds that are finite at every size in all arms compared, so that no mean mixes seeds from size to size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations_with_replacement
from typing import Literal

import numpy as np
import scipy  # its parts are imported where they are first used
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Outcome = Literal["supported", "refuted", "undecided"]
Place = Literal["before", "inside", "after"]

NAN = float("nan")
POWER = 0.8
EXPONENTS = (0.01, 5.0)  # bounds of c; below, a - b n^-c is a straight line in log n and a, b lose their meaning
SMALLEST_CURVE = 3  # sizes that a fit of three parameters needs
ENUMERATED_SEEDS = 8  # 8 seeds have 6,435 different resamples; with more they are drawn
DRAWN_RESAMPLES = 10_000


@dataclass(frozen=True)
class SeedEstimate:
    """A mean over ``n`` seeds with its 95% t-interval; ``nan`` bounds and a ``reason`` where there is none.

    ``smallest_detectable`` is the true mean that a two-sided t-test at 5% over as many seeds with this spread finds 4
    times in 5.
    """

    value: float
    low: float
    high: float
    n: int
    standard_error: float = NAN
    smallest_detectable: float = NAN
    reason: str = ""

    @property
    def positive(self) -> bool:
        return self.low > 0

    @property
    def negative(self) -> bool:
        return self.high < 0

    def __str__(self) -> str:
        if self.reason:
            return f"{self.value:+.4g} (no interval: {self.reason})"
        return f"{self.value:+.4g} [{self.low:+.4g}, {self.high:+.4g}] over {self.n} seeds"


def over_seeds(values: ArrayLike) -> SeedEstimate:
    """The mean of one number a seed, (S,), such as paired differences: mean ± t(0.975, n - 1) s / sqrt(n).

    Values that are not finite are left out. Without spread there is no interval: equal values of few seeds are a sign
    of a coarse score (or of a copy), not of certainty.
    """
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1:
        raise ValueError(f"one value a seed is expected, shape (S,); found shape {given.shape}")
    kept = given[np.isfinite(given)]
    n = len(kept)
    if n == 0:
        return SeedEstimate(NAN, NAN, NAN, 0, reason="no seed has a finite value")
    mean = float(kept.mean())
    if n == 1:
        return SeedEstimate(mean, NAN, NAN, 1, reason="one seed has no spread")
    error = float(kept.std(ddof=1)) / math.sqrt(n)
    if np.ptp(kept) <= 1e-12 * max(1.0, float(np.abs(kept).max())):
        return SeedEstimate(mean, NAN, NAN, n, 0.0, reason=f"all {n} seeds have the same value: no spread")
    margin = float(scipy.stats.t.ppf(0.975, n - 1)) * error
    return SeedEstimate(mean, mean - margin, mean + margin, n, error, detectable_standard_errors(n) * error)


@cache
def detectable_standard_errors(n: int) -> float:
    """What a paired t-test over ``n`` seeds detects with 80% power at 5% two-sided, in standard errors of the mean.

    The noncentrality d for which P(|T'(n - 1, d)| > t(0.975, n - 1)) = 0.8 (Cohen, Statistical Power Analysis, 1988,
    chapter 2); 3.76 for 5 seeds, 2.80 in the limit.
    """
    if n < 2:
        return NAN
    critical = float(scipy.stats.t.ppf(0.975, n - 1))

    def excess(d: float) -> float:
        upper, lower = scipy.stats.nct.sf(critical, n - 1, d), scipy.stats.nct.cdf(-critical, n - 1, d)
        return float(upper + np.nan_to_num(lower)) - POWER  # the far tail underflows to nan in scipy for large d

    return float(scipy.optimize.brentq(excess, 0.1, 3 * critical))


def paired_difference(b: ArrayLike, a: ArrayLike) -> SeedEstimate:
    """Mean of b - a over seeds, both (S,) with one order of seeds."""
    first, second = np.asarray(b, dtype=np.float64), np.asarray(a, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired arms need the same seeds; found shapes {first.shape} and {second.shape}")
    return over_seeds(first - second)


def paired_differences(b: ArrayLike, a: ArrayLike) -> tuple[SeedEstimate, ...]:
    """``paired_difference`` at each size; both (S, K)."""
    first, second = _curves(b), _curves(a)
    if first.shape != second.shape:
        raise ValueError(f"paired arms need the same seeds and sizes; found shapes {first.shape} and {second.shape}")
    return tuple(paired_difference(first[:, k], second[:, k]) for k in range(first.shape[1]))


@dataclass(frozen=True)
class PowerLaw:
    """score(n) = a - b n^-c, with the root mean square of what it leaves and the number of points it was fitted to.

    ``a`` is the score without end of data; b < 0 is a falling curve. ``reason`` says why there is no fit (all ``nan``),
    or what is not determined (c of a flat curve, a and b of one that is straight in log n).
    """

    a: float
    b: float
    c: float
    residual: float
    points: int
    reason: str = ""

    def score(self, n: ArrayLike) -> Floats:
        """Scores at sample counts, (...) -> (...)."""
        return self.a - self.b * np.asarray(n, dtype=np.float64) ** -self.c

    def slope(self, n: float) -> float:
        """d score / d log10 n = ln(10) b c n^-c, the gain a tenfold of data at this rate."""
        return math.log(10) * self.b * self.c * float(n) ** -self.c


def fit(scores: ArrayLike, sizes: ArrayLike) -> PowerLaw:
    """Least squares of ``PowerLaw`` on one curve, (K,) at (K,) sample counts; scores that are not finite are left out.

    For a given c the best a and b are linear, which gives the starts (a grid of c); ``scipy.optimize.least_squares``
    refines a, b' = b n_1^-c and c together from the three best, with c in ``EXPONENTS``. Nothing is random.
    """
    counts = _sizes(sizes)
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != counts.shape:
        raise ValueError(f"one score a size is expected, shape {counts.shape}; found {values.shape}")
    kept = np.isfinite(values)
    values, counts = values[kept], counts[kept]
    points = len(values)
    if points < SMALLEST_CURVE:
        return PowerLaw(NAN, NAN, NAN, NAN, points, f"{points} finite sizes; three parameters need {SMALLEST_CURVE}")
    spread = float(np.ptp(values))
    if spread <= 1e-12 * max(1.0, float(np.abs(values).max())):
        return PowerLaw(
            float(values.mean()), 0.0, 1.0, 0.0, points, "the curve is flat: its exponent is not determined"
        )

    # In units where the smallest size is 1 and the scores span [0, 1] the starts and tolerances suit every benchmark.
    relative, scaled = counts / counts[0], (values - values.min()) / spread

    def residuals(p: Floats) -> Floats:
        return p[0] - p[1] * relative ** -p[2] - scaled

    def jacobian(p: Floats) -> Floats:
        power = relative ** -p[2]
        return np.stack([np.ones(points), -power, p[1] * power * np.log(relative)], axis=1)

    starts = []
    for c in np.geomspace(*EXPONENTS, 33):
        design = np.stack([np.ones(points), -(relative**-c)], axis=1)
        (a, b), *_ = np.linalg.lstsq(design, scaled, rcond=None)
        start = np.array([a, b, c])
        starts.append((float(np.sum(residuals(start) ** 2)), start))
    low, high = np.array([-np.inf, -np.inf, EXPONENTS[0]]), np.array([np.inf, np.inf, EXPONENTS[1]])
    found = []
    for cost, start in sorted(starts, key=lambda pair: pair[0])[:3]:
        inside = np.array([*start[:2], np.clip(start[2], EXPONENTS[0] * 1.0001, EXPONENTS[1] * 0.9999)])
        result = scipy.optimize.least_squares(
            residuals, inside, jacobian, bounds=(low, high), x_scale="jac", xtol=1e-12, ftol=1e-12, gtol=1e-12
        )
        found += [(float(2 * result.cost), result.x), (cost, start)]
    cost, (a, b, c) = min(found, key=lambda pair: pair[0])
    reason = ""
    if c < 1.01 * EXPONENTS[0]:
        reason = "straight in log n: a and b are not determined, the slope is"
    elif c > EXPONENTS[1] / 1.01:
        reason = f"flat but for the first size: the exponent is at its bound, {EXPONENTS[1]:g}"
    return PowerLaw(
        a=float(values.min() + spread * a),
        b=float(spread * b * counts[0] ** c),
        c=float(c),
        residual=spread * math.sqrt(cost / points),
        points=points,
        reason=reason,
    )


@dataclass(frozen=True)
class ArmFit:
    """The fit of an arm's mean curve, the fits of its seeds, and the slope at the largest size over seeds."""

    mean: PowerLaw
    seeds: tuple[PowerLaw, ...]
    slope: SeedEstimate


def fit_arm(scores: ArrayLike, sizes: ArrayLike) -> ArmFit:
    """Fits of an arm's curves, (S, K) at (K,)."""
    curves, counts = _curves(scores), _sizes(sizes)
    laws = tuple(fit(curve, counts) for curve in curves)
    return ArmFit(
        fit(_complete(curves).mean(axis=0), counts), laws, over_seeds([law.slope(counts[-1]) for law in laws])
    )


def local_slopes(scores: ArrayLike, sizes: ArrayLike, last: int = 3) -> Floats:
    """Slope of score against log10 n by least squares over the ``last`` sizes, without a model: (S, K) -> (S,)."""
    curves, counts = _curves(scores), _sizes(sizes)
    if not 2 <= last <= len(counts):
        raise ValueError(f"a slope over the last {last} sizes needs 2 to {len(counts)} of them, as there are")
    x = np.log10(counts[-last:])
    x = x - x.mean()
    return np.asarray(curves[:, -last:] @ (x / np.sum(x**2)))


def slope_difference(
    b: ArrayLike, a: ArrayLike, sizes: ArrayLike, *, kind: Literal["fit", "local"] = "fit", last: int = 3
) -> SeedEstimate:
    """Slope of arm b minus slope of arm a at the largest size, paired over seeds; in score a tenfold of data.

    ``fit`` takes each seed's fitted power law at the largest size, ``local`` a straight line over the ``last`` sizes.
    The fit uses all sizes but believes its formula: where the two disagree, the curve has another form.
    """
    first, second = _paired(b, a)
    if kind == "local":
        return paired_difference(local_slopes(first, sizes, last), local_slopes(second, sizes, last))
    counts = _sizes(sizes)
    slopes = [[fit(curve, counts).slope(counts[-1]) for curve in curves] for curves in (first, second)]
    return paired_difference(*slopes)


@dataclass(frozen=True)
class Crossover:
    """From which sample count on arm b's mean curve stays above arm a's.

    ``place`` is "inside" the range of sizes at ``value`` samples; "before" it (b is above at every size; ``value`` 0)
    or "after" it (b is not above at the largest size: it crosses later, or never; ``value`` inf). ``low`` and ``high``
    are the 95% bootstrap interval over seeds, ``test_low`` and ``test_high`` that of the inverted t-test, with 0 for
    before and inf for after the range. ``shares`` are the places' shares of the resamples.
    """

    place: Place
    value: float
    low: float
    high: float
    test_low: float
    test_high: float
    shares: Mapping[Place, float]
    n: int
    range: tuple[float, float]
    reason: str = ""

    @property
    def outside(self) -> float:
        """The share of resamples without a crossover inside the range."""
        return 1 - self.shares["inside"]

    @property
    def certainly_inside(self) -> bool:
        """Both intervals lie in the observed range; false where there is none."""
        low, high = min(self.low, self.test_low), max(self.high, self.test_high)
        return bool(self.range[0] <= low <= high <= self.range[1]) and not self.reason

    def __str__(self) -> str:
        names = {"before": "before the range", "inside": f"at {self.value:.4g} samples", "after": "not in the range"}
        if self.reason:
            return f"{names[self.place]} (no interval: {self.reason})"
        ends = [_end(end) for end in (self.low, self.high, self.test_low, self.test_high)]
        return (
            f"{names[self.place]} [{ends[0]}, {ends[1]}], by t-tests [{ends[2]}, {ends[3]}], over {self.n} seeds; "
            f"{self.outside:.1%} of resamples have none inside"
        )


def crossover(b: ArrayLike, a: ArrayLike, sizes: ArrayLike, *, seed: int = 0) -> Crossover:
    """Where the mean of b - a over seeds turns positive for good, by straight lines in log n between the sizes.

    The bootstrap resamples seeds. Up to ``ENUMERATED_SEEDS`` all S^S resamples are enumerated, as multisets with their
    multinomial weights; beyond, ``DRAWN_RESAMPLES`` are drawn with ``seed``. Percentiles of few values are too narrow,
    so their level is expanded to Phi(-sqrt(S / (S - 1)) t(0.975, S - 1)) on each side (Hesterberg, What Teachers Should
    Know About the Bootstrap, The American Statistician 69, 2015). An interval of S seeds cannot be wider than the seeds
    themselves are: below 5 it covers less than stated (S = 3: at most 75%).

    The t-test has no such limit: ``test_low`` is up to where b is last significantly below a, ``test_high`` from where
    on it is significantly above for good (each at 2.5%; Fieller's construction on the interpolated differences).
    """
    first, second = _paired(b, a)
    counts = _sizes(sizes)
    if first.shape[1] != len(counts):
        raise ValueError(f"curves of {first.shape[1]} sizes and {len(counts)} sizes do not go together")
    differences = first - second
    n, logs, ends = len(differences), np.log(counts), (float(counts[0]), float(counts[-1]))
    if n == 0:
        shares: dict[Place, float] = {"before": NAN, "inside": NAN, "after": NAN}
        return Crossover("after", NAN, NAN, NAN, NAN, NAN, shares, 0, ends, "no seed has finite scores at every size")
    value = float(_crossings(differences.mean(axis=0)[None], logs)[0])
    if n == 1:
        shares = {place: float(place == _place(value)) for place in ("before", "inside", "after")}
        return Crossover(_place(value), value, NAN, NAN, NAN, NAN, shares, 1, ends, "one seed cannot be resampled")
    if np.all(np.ptp(differences, axis=0) <= 1e-12):
        shares = {place: float(place == _place(value)) for place in ("before", "inside", "after")}
        return Crossover(_place(value), value, NAN, NAN, NAN, NAN, shares, n, ends, f"all {n} seeds differ equally")
    counts_RS, weights_R = _resamples(n, seed)
    values_R = _crossings(counts_RS @ differences / n, logs)
    level = float(scipy.stats.norm.cdf(-math.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.975, n - 1)))
    low, high = _weighted_quantiles(values_R, weights_R, level)
    places: dict[Place, float] = {
        "before": float(weights_R[values_R == 0].sum()),
        "inside": float(weights_R[(values_R > 0) & np.isfinite(values_R)].sum()),
        "after": float(weights_R[np.isinf(values_R)].sum()),
    }
    return Crossover(_place(value), value, low, high, *_inverted_test(differences, logs), places, n, ends)


def samples_at_equal_flops(samples: float, flops_per_sample: float, other_flops_per_sample: float) -> float:
    """How many samples the other arm sees for the FLOPs of ``samples`` of this one."""
    if not flops_per_sample > 0 or not other_flops_per_sample > 0:
        raise ValueError(f"FLOPs a sample are positive, found {flops_per_sample} and {other_flops_per_sample}")
    return samples * flops_per_sample / other_flops_per_sample


def difference_at_equal_flops(
    arm: ArrayLike,
    samples: float,
    flops_per_sample: float,
    baseline: ArrayLike,
    baseline_sizes: ArrayLike,
    baseline_flops_per_sample: float,
) -> SeedEstimate:
    """An arm's scores (S,) after ``samples`` minus the baseline's after the same FLOPs, paired over seeds.

    The baseline, (S, K), went on to more samples than the arm; between its sizes it is interpolated in log n.

    Raises:
        ValueError: the baseline was not continued far enough; the message says how far it must go.
    """
    scores, curves, counts = np.asarray(arm, dtype=np.float64), _curves(baseline), _sizes(baseline_sizes)
    if scores.shape != curves.shape[:1] or curves.shape[1] != len(counts):
        raise ValueError(
            f"an arm (S,) and its baseline (S, K) at (K,) sizes are expected; found {scores.shape}, {curves.shape} and "
            f"{counts.shape}"
        )
    wanted = samples_at_equal_flops(samples, flops_per_sample, baseline_flops_per_sample)
    # A size that is meant to match may miss by a rounding to whole samples or batches.
    if not counts[0] * (1 - 1e-3) <= wanted <= counts[-1] * (1 + 1e-3):
        raise ValueError(
            f"equal FLOPs need the baseline at {wanted:,.0f} samples, but it was measured from {counts[0]:,.0f} to "
            f"{counts[-1]:,.0f}: continue it from its checkpoint"
        )
    at = np.log(np.clip(wanted, counts[0], counts[-1]))
    return paired_difference(scores, [float(np.interp(at, np.log(counts), curve)) for curve in curves])


@dataclass(frozen=True)
class Verdict:
    """What the experiment says of one claim.

    ``smallest_detectable`` is the largest of the smallest detectable differences of the comparisons that were left open
    (of all, where none was): what the experiment could have missed. ``missing`` names what the claim's rule asks for
    and was not measured.
    """

    claim: int
    outcome: Outcome
    reasons: tuple[str, ...]
    smallest_detectable: float
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.outcome == "undecided" and math.isfinite(self.smallest_detectable):
            return f"claim {self.claim}: undecided, smallest detectable difference {self.smallest_detectable:.3g}"
        return f"claim {self.claim}: {self.outcome}"


def claim_1(
    semantic: SeedEstimate | None,
    pixel: SeedEstimate | None,
    pixel_against_decoder: SeedEstimate | None,
    over_capacity: SeedEstimate | None,
    over_shuffled: SeedEstimate | None,
    slope: SeedEstimate | None = None,
) -> Verdict:
    """Generation helps understanding only if what is generated inside the language model is semantic.

    Supported if V2 - V0 > 0, and V3 - V0 < 0 or V3 - V4 < 0, while the controls do not reproduce the gain: V2 - V6 > 0
    and V2 - V7 > 0. Refuted if V2 - V0 < 0 while V2 does not rise faster (one that does is only stopped too early), if
    the pixel arm gains on both V0 and V4, or if a control is above V2. Each means that the paired 95% interval at the
    largest size excludes 0; the level is that of one comparison, not of the claim.

    Args:
        semantic: V2 - V0, embedding against understanding.
        pixel: V3 - V0, pixel loss inside the model against understanding.
        pixel_against_decoder: V3 - V4, against the detached decoder.
        over_capacity: V2 - V6, against the unused head.
        over_shuffled: V2 - V7, against shuffled targets.
        slope: of V2 - of V0, at the largest sizes.
        None for what was not measured.
    """
    named = {
        "embedding - understanding": semantic,
        "pixel - understanding": pixel,
        "pixel - decoder": pixel_against_decoder,
        "embedding - capacity": over_capacity,
        "embedding - shuffled": over_shuffled,
    }
    supports = [
        _positive(semantic),
        _negative(pixel) or _negative(pixel_against_decoder),
        _positive(over_capacity),
        _positive(over_shuffled),
    ]
    refutes = [
        _negative(semantic) and not _positive(slope),
        _positive(pixel) and _positive(pixel_against_decoder),
        _negative(over_capacity),
        _negative(over_shuffled),
    ]
    return _verdict(1, named, all(supports), any(refutes))


def claim_2(slope: SeedEstimate | None, crossing: Crossover | None) -> Verdict:
    """The unified model gains more from more data.

    Supported if V2's slope at the largest sizes is larger than V0's (paired 95% interval above 0) and the crossover's
    intervals lie inside the observed range. Refuted if the slope is smaller. A steeper arm that has not crossed yet, or
    was above from the first size on, is undecided. The smallest detectable difference is one of slopes.
    """
    inside = crossing is not None and crossing.certainly_inside
    verdict = _verdict(
        2, {"slope of embedding - slope of understanding": slope}, _positive(slope) and inside, _negative(slope)
    )
    where = "crossover: not measured" if crossing is None else f"crossover: {crossing!s}"
    missing = (*verdict.missing, *(["crossover"] if crossing is None else []))
    return replace(verdict, reasons=(*verdict.reasons, where), missing=missing)


def claim_3(
    errors: Mapping[int, SeedEstimate],
    scores: Mapping[str, SeedEstimate | None],
    *,
    margin: float,
    least_steps: int = 16,
) -> Verdict:
    """Predicting the input embedding beats predicting the vision encoder's output.

    Supported if the free-run error of V2 lies below V1's at every k >= ``least_steps`` measured (interval below 0), and
    V2 is not worse than V1 by ``margin`` on questions and probes (interval above -``margin``, which is to be fixed
    before the experiment). Refuted if the error is above at one such k, or a score is below 0 and not within it.

    Args:
        errors: error of V2 - error of V1, both mapped to one space, by the number of free-run steps k.
        scores: V2 - V1 by what was asked, such as "questions" and "probes"; None for what was not measured, without
            which the claim cannot be supported.
        margin: in the unit of the scores.
    """
    if margin < 0:
        raise ValueError(f"the margin is at least 0, found {margin}")
    late = {
        f"error of embedding - error of encoder at k = {k}": e for k, e in sorted(errors.items()) if k >= least_steps
    }
    asked = {f"embedding - encoder, {name}": score for name, score in scores.items()}
    supported = (
        bool(late)
        and bool(asked)
        and all(_negative(e) for e in late.values())
        and all(score is not None and score.low > -margin for score in scores.values())
    )
    worse = any(_negative(score) and not score.low > -margin for score in scores.values() if score is not None)
    within = {name for name, score in asked.items() if score is not None and score.low > -margin}
    verdict = _verdict(3, {**late, **asked}, supported, worse or any(_positive(e) for e in late.values()), within)
    missing = [
        what
        for what, found in ((f"free-run error at k >= {least_steps}", late), ("questions and probes", asked))
        if not found
    ]
    reasons = (*verdict.reasons, *(f"{what}: not measured" for what in missing))
    return replace(verdict, reasons=reasons, missing=(*verdict.missing, *missing))


def _verdict(
    claim: int,
    named: Mapping[str, SeedEstimate | None],
    supported: bool,
    refuted: bool,
    settled: set[str] | frozenset[str] = frozenset(),
) -> Verdict:
    reasons = tuple(name + (": not measured" if e is None else f": {e}") for name, e in named.items())
    measured = {name: e for name, e in named.items() if e is not None}
    left_open = [
        e.smallest_detectable
        for name, e in measured.items()
        if not (e.positive or e.negative or name in settled) and math.isfinite(e.smallest_detectable)
    ]
    finite = [e.smallest_detectable for e in measured.values() if math.isfinite(e.smallest_detectable)]
    outcome: Outcome = "refuted" if refuted else "supported" if supported else "undecided"
    missing = tuple(name for name, e in named.items() if e is None)
    return Verdict(claim, outcome, reasons, max(left_open or finite, default=NAN), missing)


def _positive(e: SeedEstimate | None) -> bool:
    return e is not None and e.positive


def _negative(e: SeedEstimate | None) -> bool:
    return e is not None and e.negative


def _curves(scores: ArrayLike) -> Floats:
    curves = np.asarray(scores, dtype=np.float64)
    if curves.ndim != 2:
        raise ValueError(f"curves are (seeds, sizes), found shape {curves.shape}")
    return curves


def _sizes(sizes: ArrayLike) -> Floats:
    counts = np.asarray(sizes, dtype=np.float64)
    if counts.ndim != 1 or not len(counts) or not np.all(np.isfinite(counts)) or counts[0] <= 0:
        raise ValueError(f"sizes are positive sample counts, (K,); found {counts.tolist()}")
    if np.any(np.diff(counts) <= 0):
        raise ValueError(f"sizes must increase, found {counts.tolist()}")
    return counts


def _complete(curves: Floats) -> Floats:
    """The seeds that are finite at every size; one row of nan where there is none, so that means are nan."""
    kept = curves[np.isfinite(curves).all(axis=1)]
    return kept if len(kept) else np.full((1, curves.shape[1]), NAN)


def _paired(b: ArrayLike, a: ArrayLike) -> tuple[Floats, Floats]:
    """The curves of the seeds that are finite at every size in both arms, (S, K) each."""
    first, second = _curves(b), _curves(a)
    if first.shape != second.shape:
        raise ValueError(f"paired arms need the same seeds and sizes; found shapes {first.shape} and {second.shape}")
    kept = np.isfinite(first).all(axis=1) & np.isfinite(second).all(axis=1)
    return first[kept], second[kept]


def _crossings(means_RK: Floats, logs_K: Floats) -> Floats:
    """Of each mean difference curve: from which sample count on it stays positive; 0 always, inf not at the end."""
    sizes = means_RK.shape[1]
    below = means_RK <= 0
    last = np.where(below.any(axis=1), sizes - 1 - np.argmax(below[:, ::-1], axis=1), -1)
    values = np.where(last < 0, 0.0, np.inf)
    rows = np.flatnonzero((last >= 0) & (last < sizes - 1))
    left, right = means_RK[rows, last[rows]], means_RK[rows, last[rows] + 1]
    start, end = logs_K[last[rows]], logs_K[last[rows] + 1]
    values[rows] = np.exp(start + left / (left - right) * (end - start))
    return values


def _place(value: float) -> Place:
    return "before" if value == 0 else "after" if math.isinf(value) else "inside"


@cache
def _resamples(n: int, seed: int) -> tuple[Floats, Floats]:
    """(R, n) how often each seed is drawn, and (R,) the shares of these resamples."""
    if n > ENUMERATED_SEEDS:
        counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWN_RESAMPLES)
        return counts.astype(np.float64), np.full(DRAWN_RESAMPLES, 1 / DRAWN_RESAMPLES)
    drawn = np.array([np.bincount(c, minlength=n) for c in combinations_with_replacement(range(n), n)])
    ways = [math.factorial(n) / math.prod(map(math.factorial, row)) for row in drawn.tolist()]
    return drawn.astype(np.float64), np.array(ways) / n**n


def _weighted_quantiles(values: Floats, weights: Floats, level: float) -> tuple[float, float]:
    """The smallest value with more than ``level`` of the weight at or below it, and likewise from above."""
    order = np.argsort(values, kind="stable")
    ordered, mass = values[order], weights[order]
    low = ordered[np.flatnonzero(np.cumsum(mass) > level)[0]]
    high = ordered[::-1][np.flatnonzero(np.cumsum(mass[::-1]) > level)[0]]
    return float(low), float(high)


def _inverted_test(differences_SK: Floats, logs_K: Floats) -> tuple[float, float]:
    """Up to where the mean difference is last significantly negative, and from where on it is so positive for good.

    Between two sizes the difference of a seed is linear in the weight w, so mean^2 - t^2 var / S is quadratic in w.
    """
    n, sizes = differences_SK.shape
    critical = float(scipy.stats.t.ppf(0.975, n - 1))
    bound = critical**2 / n
    means = differences_SK.mean(axis=0)
    errors = differences_SK.std(axis=0, ddof=1) * math.sqrt(bound)
    high = math.inf
    if means[-1] + errors[-1] < 0:
        return math.inf, math.inf
    if means[-1] - errors[-1] > 0:
        high = 0.0
    # From the largest size down: the first root seen while b is significantly above is ``high``, the first at which it
    # is significantly below is ``low``.
    for k in range(sizes - 2, -1, -1):
        for w in _roots(differences_SK[:, k], differences_SK[:, k + 1], bound):
            count = math.exp(logs_K[k] + w * (logs_K[k + 1] - logs_K[k]))
            sample = (1 - w) * differences_SK[:, k] + w * differences_SK[:, k + 1]
            if sample.mean() > 0 and high == 0.0:
                high = count
            if sample.mean() < 0:
                return count, high
    return 0.0, high


def _roots(left_S: Floats, right_S: Floats, bound: float) -> list[float]:
    """Weights in [0, 1], from the largest down, at which mean^2 = bound * variance between two sizes."""
    step = right_S - left_S
    quadratic = [
        step.mean() ** 2 - bound * step.var(ddof=1),
        2 * (left_S.mean() * step.mean() - bound * float(np.cov(left_S, step)[0, 1])),
        left_S.mean() ** 2 - bound * left_S.var(ddof=1),
    ]
    roots = np.roots(quadratic)
    real = roots[np.abs(roots.imag) < 1e-12].real
    return sorted((float(w) for w in real if 0 <= w <= 1), reverse=True)


def _end(value: float) -> str:
    return "before" if value == 0 else "after" if math.isinf(value) else f"{value:.4g}"
