"""The vector's likelihood, against plain softmax arithmetic."""

from dataclasses import replace

import pytest
import torch

from palate.card import preferences
from palate.card.correction import candidate_rows, correct
from toy_preferences import TOP_K, WIDTH, make_head, make_positions


def test_log_ratio_is_that_of_the_two_softmaxes_that_decoding_uses():
    head, (positions, logits, tokens) = make_head(), make_positions(30)
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    corrected = correct(logits, [positions.features_Nd], vector.expand(30, -1), torch.full((30,), 0.7), head)
    expected = (corrected.log_softmax(-1) - logits.log_softmax(-1)).gather(1, tokens[:, None]).squeeze(1)
    delta = candidate_rows(head, positions.features_Nd, positions.candidates_Nk) @ vector
    found = preferences.log_ratios(delta, positions.log_probs_Nk, positions.target_N, beta=0.7)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_fewer_candidates_are_those_that_decoding_with_a_smaller_top_k_corrects():
    head, (positions, logits, tokens) = make_head(), make_positions(30)
    fewer, small = positions.likeliest(TOP_K // 2), replace(head, top_k=TOP_K // 2)
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    corrected = correct(logits, [fewer.features_Nd], vector.expand(30, -1), torch.full((30,), 0.7), small)
    expected = (corrected.log_softmax(-1) - logits.log_softmax(-1)).gather(1, tokens[:, None]).squeeze(1)
    delta = candidate_rows(small, fewer.features_Nd, fewer.candidates_Nk) @ vector
    found = preferences.log_ratios(delta, fewer.log_probs_Nk, fewer.target_N, beta=0.7)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (fewer.target_N == preferences.ABSENT).sum() > (positions.target_N == preferences.ABSENT).sum()
    assert torch.equal(positions.likeliest(TOP_K).target_N, positions.target_N)
    with pytest.raises(ValueError, match=f"top-k {TOP_K + 1} is more than the {TOP_K} candidates"):
        positions.likeliest(TOP_K + 1)


def test_beta_zero_returns_the_logits_bit_for_bit_beside_a_corrected_row():
    head, (positions, logits, _) = make_head(), make_positions(2)
    corrected = correct(logits, [positions.features_Nd], torch.ones(2, WIDTH), torch.tensor([0.0, 1.0]), head)
    assert torch.equal(corrected[0], logits[0])
    assert not torch.equal(corrected[1], logits[1])
    changed = (corrected[1] != logits[1]).nonzero().squeeze(1)
    assert set(changed.tolist()) <= set(logits[1].topk(TOP_K).indices.tolist())
