"""The vector's likelihood and its exact fit, against plain softmax arithmetic and scipy."""

import numpy as np
import pytest
import scipy.optimize
import torch

from palate.card import preferences
from palate.card.correction import FeatureMap, Head, candidate_rows, correct

VOCABULARY, WIDTH, FEATURES, TOP_K = 40, 6, 10, 8


def make_head(seed: int = 0) -> Head:
    generator = torch.Generator().manual_seed(seed)
    features = FeatureMap((1,), torch.zeros(1, FEATURES), torch.ones(1, FEATURES), torch.eye(FEATURES))
    project = torch.randn(FEATURES, WIDTH, generator=generator) / FEATURES**0.5
    return Head(features, project, torch.randn(VOCABULARY, WIDTH, generator=generator), TOP_K)


def make_positions(count: int, seed: int = 1) -> tuple[preferences.Positions, torch.Tensor, torch.Tensor]:
    """Positions, with the full logits (N, V) and written tokens (N,) that they came from."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, VOCABULARY, generator=generator) * 2
    tokens = torch.randint(0, VOCABULARY, (count,), generator=generator)
    log_probs, candidates = logits.log_softmax(-1).topk(TOP_K, dim=-1)
    found = candidates == tokens[:, None]
    target = torch.where(found.any(1), found.int().argmax(1), preferences.ABSENT)
    positions = preferences.Positions(
        features_Nd=torch.randn(count, FEATURES, generator=generator),
        candidates_Nk=candidates,
        log_probs_Nk=log_probs,
        target_N=target,
        target_log_prob_N=logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1),
        text_N=torch.arange(count) // 5,
    )
    return positions, logits, tokens


def test_log_ratio_is_that_of_the_two_softmaxes_that_decoding_uses():
    head, (positions, logits, tokens) = make_head(), make_positions(30)
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    corrected = correct(logits, [positions.features_Nd], vector.expand(30, -1), torch.full((30,), 0.7), head)
    expected = (corrected.log_softmax(-1) - logits.log_softmax(-1)).gather(1, tokens[:, None]).squeeze(1)
    delta = candidate_rows(head, positions.features_Nd, positions.candidates_Nk) @ vector
    found = preferences.log_ratios(delta, positions.log_probs_Nk, positions.target_N, beta=0.7)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_beta_zero_returns_the_logits_bit_for_bit_beside_a_corrected_row():
    head, (positions, logits, _) = make_head(), make_positions(2)
    corrected = correct(logits, [positions.features_Nd], torch.ones(2, WIDTH), torch.tensor([0.0, 1.0]), head)
    assert torch.equal(corrected[0], logits[0])
    assert not torch.equal(corrected[1], logits[1])
    changed = (corrected[1] != logits[1]).nonzero().squeeze(1)
    assert set(changed.tolist()) <= set(logits[1].topk(TOP_K).indices.tolist())


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
    fit = preferences.fit_vector(positions, head, prior)
    assert fit.gradient_norm <= 1e-5
    np.testing.assert_allclose(fit.vector_J.numpy(), reference.x, atol=2e-4)
    assert objective(fit.vector_J.double().numpy()) <= reference.fun + 1e-7


def test_without_history_the_fit_is_the_prior_mean():
    head, (positions, _, _) = make_head(), make_positions(4)
    prior = preferences.Prior(torch.arange(WIDTH, dtype=torch.float32), torch.ones(WIDTH))
    fit = preferences.fit_vector(positions.select(torch.zeros(4, dtype=torch.bool)), head, prior)
    assert torch.equal(fit.vector_J, prior.mean_J)


def test_features_that_are_not_finite_are_refused():
    head, (positions, _, _) = make_head(), make_positions(4)
    positions.features_Nd[2, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        preferences.fit_vector(positions, head, preferences.Prior(torch.zeros(WIDTH), torch.ones(WIDTH)))
