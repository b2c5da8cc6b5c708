"""Bootstrap over users against closed forms, scipy.stats.bootstrap and brute force."""

import math

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from palate.evaluation import statistics
from palate.evaluation.statistics import Scores


def sample(users: int, per_user: int, seed: int = 0) -> tuple[NDArray[np.float64], list[str]]:
    """Values with a user effect of deviation 1 and noise of deviation 1, and their users."""
    draw = np.random.default_rng(seed)
    effect = np.repeat(draw.normal(size=users), per_user)
    return effect + draw.normal(size=users * per_user), [f"u{n // per_user}" for n in range(users * per_user)]


def test_the_interval_equals_scipys_bootstrap_of_user_means() -> None:
    values, users = sample(40, 5)
    means = values.reshape(40, 5).mean(axis=1)
    reference = scipy.stats.bootstrap(
        (means,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    )
    found = statistics.estimate(values, users, resamples=20_000)
    assert found.value == pytest.approx(means.mean(), abs=1e-12)
    # Two runs of 20,000 resamples: their quantiles differ by about 0.01 standard errors.
    assert found.low == pytest.approx(reference.confidence_interval.low, abs=0.05 * found.standard_error)
    assert found.high == pytest.approx(reference.confidence_interval.high, abs=0.05 * found.standard_error)
    assert found.standard_error == pytest.approx(reference.standard_error, rel=0.02)
    assert (found.n, found.questions) == (40, 200)


def test_the_standard_error_has_its_closed_form() -> None:
    values, users = sample(60, 3)
    means = values.reshape(60, 3).mean(axis=1)
    expected = np.std(means) / math.sqrt(60)  # the bootstrap's, with the biased deviation
    assert statistics.estimate(values, users, resamples=20_000).standard_error == pytest.approx(expected, rel=0.02)


def test_resampling_users_is_wider_than_resampling_questions() -> None:
    values, users = sample(40, 25)
    by_user = statistics.estimate(values, users)
    by_question = statistics.estimate(values, [str(n) for n in range(len(values))])
    # Effects of deviation 1 shared by 25 questions: sqrt((1 + 1/25) / 40) / sqrt((1 + 1) / 1000) = 3.6, as far as 40
    # draws of an effect show it.
    assert 2.5 < by_user.standard_error / by_question.standard_error < 4.7


def test_pairing_removes_what_both_systems_share() -> None:
    values, users = sample(50, 4)
    better = values + 0.1 + 0.05 * np.random.default_rng(5).normal(size=len(values))
    difference = statistics.paired_difference(better, values, users)
    assert difference.value == pytest.approx(0.1, abs=0.01)
    assert difference.excludes_zero
    assert difference.standard_error < 0.05 * statistics.estimate(values, users).standard_error


def test_a_paired_difference_is_the_estimate_of_the_differences() -> None:
    values, users = sample(30, 4)
    other = np.random.default_rng(9).normal(size=len(values))
    expected = statistics.estimate(values - other, users)
    found = statistics.paired_difference(values, other, users)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(300):
        values, users = sample(40, 2, seed=trial)
        found = statistics.estimate(values, users, resamples=400, seed=trial)
        covered += found.low <= 0 <= found.high
    assert 0.90 < covered / 300 < 0.98


def test_what_is_detectable_is_detected_four_times_in_five() -> None:
    values, users = sample(60, 2)
    detectable = statistics.estimate(values, users).smallest_detectable_difference
    assert detectable == pytest.approx(2.8016 * statistics.estimate(values, users).standard_error, rel=1e-4)
    found = 0
    for trial in range(300):
        shifted, users = sample(60, 2, seed=1000 + trial)
        # The true standard error is sqrt(1.5 / 60); shift by what is detectable at that.
        found += statistics.estimate(shifted + 2.8016 * math.sqrt(1.5 / 60), users, resamples=400).low > 0
    assert 0.73 < found / 300 < 0.88


def test_weights_and_averages() -> None:
    values, users, weights = [1.0, 4.0, 10.0], ["a", "a", "b"], [1.0, 2.0, 5.0]
    assert statistics.estimate(values, users, weights=weights).value == pytest.approx((3.0 + 10.0) / 2)
    assert statistics.estimate(values, users, weights=weights, average="questions").value == pytest.approx(59 / 8)
    assert statistics.estimate(values, users, average="questions").value == pytest.approx(5.0)


def test_a_metric_that_is_no_mean_is_combined_in_every_resample() -> None:
    errors, users = sample(30, 3)
    found = statistics.estimate(
        errors**2, users, combine=lambda means: np.sqrt(means[..., 0]), average="questions", resamples=4000
    )
    draw = np.random.default_rng(3)
    replicates = [math.sqrt(np.mean(errors.reshape(30, 3)[draw.integers(30, size=30)] ** 2)) for _ in range(4000)]
    assert found.value == pytest.approx(math.sqrt(np.mean(errors**2)))
    assert found.standard_error == pytest.approx(np.std(replicates), rel=0.06)


def test_equal_seeds_give_equal_intervals_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values, users = sample(30, 2)
    first = statistics.estimate(values, users, resamples=500, seed=4)
    assert statistics.estimate(values, users, resamples=500, seed=4) == first
    assert statistics.estimate(values, users, resamples=500, seed=5) != first
    monkeypatch.setattr(statistics, "_CELLS_AT_ONCE", 100)
    assert statistics.estimate(values, users, resamples=500, seed=4) == first


def test_where_there_is_no_interval_the_reason_is_stated() -> None:
    one = statistics.estimate([1.0, 2.0], ["a", "a"])
    assert (one.value, math.isnan(one.low), one.n) == (1.5, True, 1)
    assert "one user" in one.reason
    assert statistics.estimate([], []).reason == "no questions"
    assert "not finite" in statistics.estimate([1.0, float("nan")], ["a", "b"]).reason
    equal = statistics.paired_difference([1.0, 2.0], [1.0, 2.0], ["a", "b"])
    assert "equally" in equal.reason
    assert math.isnan(equal.smallest_detectable_difference)
    assert not equal.excludes_zero


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        statistics.paired_difference([1.0], [1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="N = 1"):
        statistics.estimate([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="positive"):
        statistics.estimate([1.0, 2.0], ["a", "b"], weights=[1.0, 0.0])
    with pytest.raises(ValueError, match="'q'"):
        Scores(("q", "q"), ("a", "b"), np.zeros(2))
    with pytest.raises(ValueError, match="one row per question"):
        Scores(("q",), ("a", "b"), np.zeros(2))


def test_systems_are_compared_on_the_questions_they_share() -> None:
    a = Scores(("q1", "q2", "q3"), ("u", "u", "v"), np.array([1.0, 2.0, 3.0]))
    b = Scores(("q3", "q2", "q9"), ("v", "u", "w"), np.array([1.0, 1.0, 50.0]))
    assert a.minus(b).value == pytest.approx((1.0 + 2.0) / 2)
    assert a.minus(b).questions == 2
    assert a.by_user() == {"u": 1.5, "v": 3.0}
    assert a.value() == pytest.approx(2.0)
    assert a.value("users") == pytest.approx(2.25)


def test_a_comparison_of_different_things_is_refused() -> None:
    a = Scores(("q",), ("u",), np.ones(1), weights=np.ones(1))
    with pytest.raises(ValueError, match="different users"):
        a.minus(Scores(("q",), ("v",), np.ones(1)))
    with pytest.raises(ValueError, match="equal weights"):
        a.minus(Scores(("q",), ("u",), np.ones(1), weights=np.full(1, 2.0)))
