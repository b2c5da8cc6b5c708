"""Likelihood metrics by hand."""

import math

import numpy as np
import pytest

from palate.evaluation import likelihood


def test_bits_per_token_are_weighted_by_tokens_within_a_user() -> None:
    scores = likelihood.bits_per_token(
        [2 * math.log(2), 6 * math.log(2), math.log(2)], [1, 3, 1], ["a", "b", "c"], ["u", "u", "v"]
    )
    assert scores.by_user() == pytest.approx({"u": 8 / 4, "v": 1.0})
    assert scores.value("users") == pytest.approx(1.5)
    assert scores.value("questions") == pytest.approx(9 / 5)
    assert not scores.higher_is_better
    with pytest.raises(ValueError, match="at least one"):
        likelihood.bits_per_token([1.0], [0], ["a"], ["u"])


def test_a_tie_counts_half_and_nan_is_not_a_loss() -> None:
    scores = likelihood.pair_accuracy([1.0, 0.0, 2.0], [0.0, 1.0, 2.0], list("abc"), list("uuv"))
    assert scores.values.tolist() == [1.0, 0.0, 0.5]
    assert scores.chance == 0.5
    broken = likelihood.pair_accuracy([float("nan")], [0.0], ["a"], ["u"])
    assert np.isnan(broken.values).all()
    assert "not finite" in broken.estimate().reason
    with pytest.raises(ValueError, match="one length"):
        likelihood.pair_accuracy([1.0], [1.0, 2.0], ["a"], ["u"])


def test_policy_accuracy_compares_log_probabilities_per_token() -> None:
    arguments = ([-10.0], [-6.0], ["a"], ["u"])
    assert likelihood.policy_accuracy(*arguments).values.tolist() == [0.0]
    by_token = likelihood.policy_accuracy(*arguments, chosen_tokens_N=[10], rejected_tokens_N=[3])
    assert by_token.values.tolist() == [1.0]
    with pytest.raises(ValueError, match="both sides"):
        likelihood.policy_accuracy(*arguments, chosen_tokens_N=[10])
