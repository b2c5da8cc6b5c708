"""The exact fit of user vectors, against scipy's minimum of an objective written in plain softmax arithmetic."""

import numpy as np
import pytest
import scipy.optimize
import torch

from palate.card import fitting, preferences
from palate.card.correction import candidate_rows
from toy_preferences import WIDTH, make_head, make_positions


def test_the_fit_equals_scipys_on_the_same_objective():
    head, (positions, logits, tokens) = make_head(), make_positions(60)
    prior = preferences.Prior(torch.linspace(-0.5, 0.5, WIDTH), torch.linspace(0.5, 3.0, WIDTH))

    def objective(vector: np.ndarray) -> float:
        p = torch.from_numpy(vector)
        rows = logits.double().clone()
        delta = candidate_rows(head, positions.features_Nd, positions.candidates_Nk).double() @ p
        rows.scatter_add_(1, positions.candidates_Nk, delta)
        likelihood = rows.log_softmax(-1).gather(1, tokens[:, None]).sum()
        return float(-likelihood + 0.5 * (prior.precision_J.double() * (p - prior.mean_J.double()).square()).sum())

    reference = scipy.optimize.minimize(objective, np.zeros(WIDTH), method="BFGS", options={"gtol": 1e-6})
    fit = fitting.fit_vector(positions, head, prior)
    assert fit.gradient_norm <= 1e-5
    np.testing.assert_allclose(fit.vector_J.numpy(), reference.x, atol=2e-4)
    assert objective(fit.vector_J.double().numpy()) <= reference.fun + 1e-7


def test_without_history_the_fit_is_the_prior_mean():
    head, (positions, _, _) = make_head(), make_positions(4)
    prior = preferences.Prior(torch.arange(WIDTH, dtype=torch.float32), torch.ones(WIDTH))
    fit = fitting.fit_vector(positions.select(torch.zeros(4, dtype=torch.bool)), head, prior)
    assert torch.equal(fit.vector_J, prior.mean_J)


def test_features_that_are_not_finite_are_refused():
    head, (positions, _, _) = make_head(), make_positions(4)
    positions.features_Nd[2, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        fitting.fit_vector(positions, head, preferences.Prior(torch.zeros(WIDTH), torch.ones(WIDTH)))


def test_people_of_any_length_are_fitted_together_as_they_are_alone():
    head = make_head()
    prior = preferences.Prior(torch.full((WIDTH,), 0.1), torch.linspace(0.2, 4.0, WIDTH))
    people = [make_positions(count, seed)[0] for seed, count in enumerate([60, 1, 25, 7, 60, 3])]
    people.insert(2, people[0].select(torch.zeros(60, dtype=torch.bool)))
    alone = [fitting.fit_vector(one, head, prior) for one in people]
    assert torch.equal(alone[2].vector_J, prior.mean_J)
    for fit, one in zip(fitting.fit_vectors(people, head, prior), alone, strict=True):
        assert fit.gradient_norm <= 1e-5
        assert torch.equal(fit.vector_J, one.vector_J)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing_and_their_number_stays(threads):
    head, people = make_head(), [make_positions(30, seed)[0] for seed in range(8)]
    prior = preferences.Prior(torch.zeros(WIDTH), torch.ones(WIDTH))
    expected = [fitting.fit_vector(one, head, prior).vector_J for one in people]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = fitting.fit_vectors(people, head, prior)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(fit.vector_J, vector) for fit, vector in zip(found, expected, strict=True))


def test_nobody_is_fitted_to_nothing():
    prior = preferences.Prior(torch.zeros(WIDTH), torch.ones(WIDTH))
    assert fitting.fit_vectors([], make_head(), prior) == []


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("precision", [1e-3, 1.0, 1e4])
def test_the_gradient_vanishes_whatever_the_scale_of_features_and_prior(scale, precision):
    """Checked by automatic differentiation in float64; strong corrections make Newton's full steps overshoot."""
    head, (positions, _, _) = make_head(), make_positions(40)
    positions.features_Nd.mul_(scale)
    prior = preferences.Prior(torch.full((WIDTH,), 0.3), torch.full((WIDTH,), precision))
    fit = fitting.fit_vector(positions, head, prior, tolerance=1e-4)
    vector = fit.vector_J.double().requires_grad_()
    delta = candidate_rows(head, positions.features_Nd, positions.candidates_Nk).double() @ vector
    likelihood = preferences.log_ratios(delta, positions.log_probs_Nk.double(), positions.target_N).sum()
    prior_term = 0.5 * (prior.precision_J.double() * (vector - prior.mean_J.double()).square()).sum()
    (prior_term - likelihood).backward()
    # Sums of 40 float32 terms of the features' size, and the rounding of the vector itself to float32.
    assert vector.grad.norm() <= 1e-4 + 1e-5 * scale + 1e-6 * precision
    assert fit.iterations < 60


def test_a_prior_without_precision_is_refused():
    with pytest.raises(ValueError, match="precisions must be positive"):
        fitting.fit_vector(make_positions(4)[0], make_head(), preferences.Prior(torch.zeros(WIDTH), torch.zeros(WIDTH)))
