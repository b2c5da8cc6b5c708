"""Choosing tokens against straightforward references, and the distribution of what is drawn."""

import numpy as np
import pytest
import torch
from scipy import stats

from palate.serving import sampling


def reference(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The distribution to draw from: every token in the order of its probability, until they reach top_p."""
    probabilities = np.exp((logits - logits.max()) / temperature)
    probabilities /= probabilities.sum()
    kept, reached = np.zeros_like(probabilities), 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        if reached >= top_p:
            break
        kept[token] = probabilities[token]
        reached += probabilities[token]
    return kept / kept.sum()


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_reference_distribution(temperature, top_p):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    expected = reference(logits.double().numpy(), temperature, top_p)
    # Evenly spaced uniform numbers give each token its share of them, up to one number at either border.
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = sampling.choose(logits.expand(4000, -1), [temperature] * 4000, [top_p] * 4000, uniforms)
    shares = np.bincount(drawn.numpy(), minlength=40) / 4000
    np.testing.assert_allclose(shares, expected, atol=2 / 4000)
    assert not shares[expected == 0].any()


def test_top_p_beyond_the_candidates_sorts_everything():
    logits = torch.zeros(1, 3000)
    logits[0, :3] = 1.0  # nearly flat: the 512 best hold far less than 0.9
    expected = reference(logits[0].double().numpy(), 1.0, 0.9)
    weights, tokens = sampling.nucleus(torch.softmax(logits, 1), torch.tensor([0.9]))
    assert int((weights > 0).sum()) == pytest.approx((expected > 0).sum(), abs=1)
    assert {0, 1, 2} <= set(tokens[weights > 0].tolist())


def test_greedy_and_drawing_rows_share_a_batch():
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0]] * 3)
    tokens = sampling.choose(
        logits, [0.0, 1.0, 1.0], [1.0, 1.0, 1.0], torch.tensor([0.99, 0.0, 0.9999], dtype=torch.float64)
    )
    assert tokens.tolist() == [1, 0, 3]  # the first of the equal ones; the borders of the distribution


def test_tokens_without_probability_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    ends = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sampling.choose(logits, [1.0] * 3, [1.0] * 3, ends).tolist() == [1, 3, 3]
    assert sampling.choose(logits, [1.0] * 3, [0.99] * 3, ends).tolist() == [1, 3, 3]


BROKEN = {
    "all NaN": lambda row: row.fill_(torch.nan),
    "one NaN": lambda row: row.index_fill_(0, torch.tensor([7]), torch.nan),
    "all inf": lambda row: row.fill_(torch.inf),
    "one inf": lambda row: row.index_fill_(0, torch.tensor([7]), torch.inf),
    "all -inf": lambda row: row.fill_(-torch.inf),
    "inf and NaN": lambda row: row.index_fill_(0, torch.tensor([7]), torch.nan).index_fill_(
        0, torch.tensor([2]), torch.inf
    ),
    "-inf and NaN": lambda row: row.fill_(-torch.inf).index_fill_(0, torch.tensor([7]), torch.nan),
}


@pytest.mark.parametrize("vocabulary", [40, 3000])  # fewer and more tokens than top-p looks at
@pytest.mark.parametrize("top_p", [1e-6, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1.0, 2.0])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_row_that_is_not_finite_gets_a_token_and_changes_no_other_row(kind, temperature, top_p, vocabulary):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, vocabulary, generator=generator)
    uniforms = torch.rand(6, dtype=torch.float64, generator=generator)
    uniforms[2] = 1 - 2**-53
    temperatures, top_ps = [0.0, 1.0, temperature, 0.7, temperature, 1.0], [1.0, 1.0, top_p, 0.9, top_p, 0.3]
    sound = [0, 1, 3, 5]
    alone = sampling.choose(
        logits[sound], [temperatures[row] for row in sound], [top_ps[row] for row in sound], uniforms[sound]
    )
    BROKEN[kind](logits[2])
    BROKEN[kind](logits[4])
    tokens = sampling.choose(logits, temperatures, top_ps, uniforms)
    assert torch.equal(tokens[sound], alone)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary
    # What the engine looks at to end the row.
    log_probs = logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(dim=1)
    assert log_probs.isfinite().tolist() == [True, True, False, True, False, True]


def test_rounding_as_between_batches_moves_almost_no_draw():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(500, 2000, generator=generator)
    noisy = logits + torch.randn(logits.shape, generator=generator) * 1e-6
    uniforms = torch.rand(500, dtype=torch.float64, generator=generator)
    for top_p in (1.0, 0.9):
        first = sampling.choose(logits, [1.0] * 500, [top_p] * 500, uniforms)
        second = sampling.choose(noisy, [1.0] * 500, [top_p] * 500, uniforms)
        assert (first != second).sum() <= 1


def test_draws_with_random_numbers_pass_a_chi_square_test():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(30, generator=generator) * 1.5
    drawn = sampling.choose(
        logits.expand(20_000, -1),
        [0.8] * 20_000,
        [1.0] * 20_000,
        torch.rand(20_000, dtype=torch.float64, generator=generator),
    )
    expected = reference(logits.double().numpy(), 0.8, 1.0) * 20_000
    frequent = expected >= 5
    observed = np.bincount(drawn.numpy(), minlength=30)
    cells = (
        np.append(observed[frequent], observed[~frequent].sum()),
        np.append(expected[frequent], expected[~frequent].sum()),
    )
    keep = cells[1] > 0
    assert stats.chisquare(cells[0][keep], cells[1][keep]).pvalue > 1e-3


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_rows_that_are_not_finite_get_some_token_and_disturb_nobody(broken, top_p):
    logits_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    uniforms_B = torch.tensor([0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    expected = sampling.choose(logits_BV, [1.0] * 4, [top_p] * 4, uniforms_B)
    for part in (slice(None), slice(3, 9)):
        spoiled = logits_BV.clone()
        spoiled[1, part] = broken
        found = sampling.choose(spoiled, [1.0] * 4, [top_p] * 4, uniforms_B)
        assert 0 <= int(found[1]) < 50
        assert found[[0, 2, 3]].tolist() == expected[[0, 2, 3]].tolist()
