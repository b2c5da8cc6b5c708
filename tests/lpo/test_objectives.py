"""The list losses, against closed forms, enumeration of orders, plain loops and autograd in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.nn.functional import logsigmoid

from palate.lpo import objectives
from palate.lpo.objectives import pairwise_loss, plackett_luce_loss, ranked_order, safeguard_scale

BETA = 5000.0


def draw(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def all_of(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def first(lengths: list[int], places: int) -> torch.Tensor:
    return torch.arange(places)[None] < torch.tensor(lengths)[:, None]


def order_of(edges: list[tuple[int, int]], places: int) -> torch.Tensor:
    order = torch.zeros(1, places, places, dtype=torch.bool)
    for winner, loser in edges:
        order[0, winner, loser] = True
    return order


def by_loops(scores: list[float], order: torch.Tensor) -> float:
    """The loss of one list from its order, without any of the library's tricks."""
    total = 0.0
    for j in range(len(scores)):
        below = [k for k in range(len(scores)) if order[j, k]]
        if below:
            total += math.log(sum(math.exp(scores[k]) for k in [j, *below])) - scores[j]
    return total


scores_lists = st.lists(st.floats(-20, 20), min_size=1, max_size=7)


def diffusers_dpo_loss(e_w, e_l, r_w, r_l, beta):
    """What diffusers' Diffusion-DPO script computes for one pair (spec a.7)."""
    model_difference, reference_difference = e_w - e_l, r_w - r_l
    logit = -0.5 * beta * (model_difference - reference_difference)
    return -logsigmoid(logit)


@pytest.mark.parametrize("reduction", ["sum", "mean_terms"])
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-3, 1e-4)])
def test_two_images_are_the_pairwise_loss_of_diffusers_script(reduction, dtype, rtol, atol):
    errors = (0.2 + draw(64, 2, scale=1e-3)).to(dtype).requires_grad_()
    reference = (0.2 + draw(64, 2, seed=1, scale=1e-3)).to(dtype)
    expected = diffusers_dpo_loss(errors[:, 0], errors[:, 1], reference[:, 0], reference[:, 1], BETA)
    scores = objectives.implicit_rewards(errors, reference, BETA)
    found = plackett_luce_loss(scores, all_of(64, 2), reduction=reduction)
    assert expected.std() > 0.5  # the logits are of order 1
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    (gradient,) = torch.autograd.grad(found.sum(), errors)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), errors)
    torch.testing.assert_close(gradient, expected_gradient, rtol=rtol, atol=atol * BETA)


def test_two_images_are_the_pairwise_loss_bit_for_bit():
    scores = draw(1000, 2, scale=10, dtype=torch.float32)
    found = plackett_luce_loss(scores, all_of(1000, 2))
    assert torch.equal(found, -logsigmoid(scores[:, 0] - scores[:, 1]))
    assert torch.equal(found, pairwise_loss(scores, ranked_order(all_of(1000, 2))))


def test_implicit_rewards():
    errors, reference = torch.tensor([0.3, 0.1]).requires_grad_(), torch.tensor([0.2, 0.2]).requires_grad_()
    rewards = objectives.implicit_rewards(errors, reference, 10.0)
    torch.testing.assert_close(rewards, torch.tensor([-0.5, 0.5]))
    rewards.sum().backward()
    assert errors.grad.tolist() == [-5.0, -5.0]
    assert reference.grad is None
    per_image = objectives.implicit_rewards(errors, reference, torch.tensor([10.0, 20.0]))
    torch.testing.assert_close(per_image, torch.tensor([-0.5, 1.0]))
    assert objectives.implicit_rewards(errors.bfloat16(), reference.bfloat16(), 1.0).dtype == torch.float32
    with pytest.raises(ValueError, match="kl_beta must be positive, got 0"):
        objectives.implicit_rewards(errors, reference, 0)
    with pytest.raises(ValueError, match=r"shape \(2,\), but reference_errors \(1,\)"):
        objectives.implicit_rewards(errors, reference[:1], 1.0)


@pytest.mark.parametrize("m", [2, 3, 4, 8, 12])
def test_equal_scores_give_log_factorial_and_the_closed_gradient(m):
    scores = torch.full((1, m), 7.0, dtype=torch.float64, requires_grad=True)
    loss = plackett_luce_loss(scores, all_of(1, m))
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(math.factorial(m)), rel=1e-12)
    assert scores.grad[0, 0].item() == pytest.approx(-(1 - 1 / m))
    assert scores.grad[0, -1].item() == pytest.approx(sum(1 / k for k in range(1, m + 1)) - 1)
    assert plackett_luce_loss(scores, all_of(1, m), reduction="mean_terms").item() == pytest.approx(
        loss.item() / (m - 1)
    )


def test_gradient_is_the_closed_form():
    m, scores = 6, draw(1, 6, scale=3).requires_grad_()
    plackett_luce_loss(scores, all_of(1, m)).sum().backward()
    s = scores.detach()[0]
    suffix = [torch.logsumexp(s[j:], 0) for j in range(m)]
    expected = [sum((s[k] - suffix[j]).exp() for j in range(min(k + 1, m - 1))) - float(k < m - 1) for k in range(m)]
    torch.testing.assert_close(scores.grad[0], torch.tensor(expected, dtype=torch.float64))
    assert scores.grad.sum().abs() < 1e-12


def test_equals_cumulated_log_sums_from_the_end():
    scores, mask = draw(20, 8, scale=5), first([1 + i % 8 for i in range(20)], 8)
    padded = scores.masked_fill(~mask, -1e30)
    suffix = padded.flip(1).logcumsumexp(1).flip(1)
    expected = torch.where(mask, suffix - scores, 0.0).sum(1)
    torch.testing.assert_close(plackett_luce_loss(scores, mask), expected)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_probabilities_of_all_orders_sum_to_one(m):
    scores = draw(m, seed=m, scale=3)
    orders = torch.tensor(list(itertools.permutations(range(m))))
    losses = plackett_luce_loss(scores[orders], all_of(len(orders), m))
    assert (-losses).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_is_the_sum_over_all_orders_of_the_rest(k):
    m, scores = 5, draw(5, seed=3, scale=2)
    orders = torch.tensor(list(itertools.permutations(range(m))))
    whole = (-plackett_luce_loss(scores[orders], all_of(len(orders), m))).exp()
    top = (-plackett_luce_loss(scores[orders], all_of(len(orders), m), top_k=k)).exp()
    for prefix in itertools.permutations(range(m), k):
        same = (orders[:, :k] == torch.tensor(prefix)).all(1)
        torch.testing.assert_close(top[same], whole[same].sum().expand(int(same.sum())))


def test_top_k_may_differ_between_lists():
    scores = draw(3, 5)
    found = plackett_luce_loss(scores, all_of(3, 5), top_k=torch.tensor([1, 2, 9]))
    alone = [plackett_luce_loss(scores[i : i + 1], all_of(1, 5), top_k=k) for i, k in enumerate([1, 2, 9])]
    torch.testing.assert_close(found, torch.cat(alone))
    torch.testing.assert_close(found[2:], plackett_luce_loss(scores[2:], all_of(1, 5)))
    torch.testing.assert_close(found[:1], -scores[:1].log_softmax(1)[:, 0])  # best of n: cross-entropy of the winner


def test_members_of_a_tie_group_meet_only_those_below():
    s = draw(5, seed=8)
    found = plackett_luce_loss(s[None], all_of(1, 5), tie_group_BM=torch.tensor([[0, 1, 1, 1, 2]]))
    terms = [torch.logsumexp(s, 0) - s[0], *(torch.logsumexp(s[[j, 4]], 0) - s[j] for j in (1, 2, 3))]
    torch.testing.assert_close(found, torch.stack(terms).sum()[None])
    mean = plackett_luce_loss(
        s[None], all_of(1, 5), tie_group_BM=torch.tensor([[0, 1, 1, 1, 2]]), reduction="mean_terms"
    )
    torch.testing.assert_close(mean, found / 4)


def test_top_k_keeps_a_tie_group_whole():
    scores, groups = draw(1, 4), torch.tensor([[0, 0, 1, 2]])
    one = plackett_luce_loss(scores, all_of(1, 4), tie_group_BM=groups, top_k=1)
    assert one.item() == pytest.approx(by_loops(scores[0].tolist(), order_of([(0, 2), (0, 3), (1, 2), (1, 3)], 4)[0]))
    # Two images beat the third: it is the third choice.
    torch.testing.assert_close(plackett_luce_loss(scores, all_of(1, 4), tie_group_BM=groups, top_k=2), one)
    assert plackett_luce_loss(scores, all_of(1, 4), tie_group_BM=groups, top_k=3) > one


@pytest.mark.parametrize(
    ("name", "edges", "closure"),
    [
        ("chain", [(0, 1), (1, 2), (2, 3)], [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
        ("star", [(0, 1), (0, 2), (0, 3)], [(0, 1), (0, 2), (0, 3)]),
        ("diamond", [(0, 1), (0, 2), (1, 3), (2, 3)], [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]),
        ("two heads", [(0, 2), (1, 2), (2, 3)], [(0, 2), (1, 2), (2, 3), (0, 3), (1, 3)]),
        ("session", [(3, 0), (0, 1), (0, 2)], [(3, 0), (3, 1), (3, 2), (0, 1), (0, 2)]),
    ],
)
def test_partial_orders(name, edges, closure):
    scores = draw(1, 4, seed=5, scale=2)
    order = objectives.partial_order(order_of(edges, 4), all_of(1, 4))
    assert torch.equal(order, order_of(closure, 4))
    found = plackett_luce_loss(scores, all_of(1, 4), order_BMM=order)
    assert found.item() == pytest.approx(by_loops(scores[0].tolist(), order[0]), rel=1e-12)
    if name == "chain":
        torch.testing.assert_close(found, plackett_luce_loss(scores, all_of(1, 4)))
    if name == "star":
        torch.testing.assert_close(found, plackett_luce_loss(scores, all_of(1, 4), top_k=1))


def test_a_long_chain_is_closed_and_padding_leaves_the_order():
    edges = torch.zeros(2, 9, 9, dtype=torch.bool)
    edges[:, range(8), range(1, 9)] = True
    mask = first([9, 4], 9)
    assert torch.equal(objectives.partial_order(edges, mask), ranked_order(mask))


def test_a_cycle_is_refused_with_its_images():
    edges = torch.cat([order_of([(0, 1)], 4), order_of([(0, 1), (1, 3), (3, 0), (0, 2)], 4)])
    with pytest.raises(ValueError, match=r"list 1 .* places \[0, 1, 3\] form a cycle"):
        objectives.partial_order(edges, all_of(2, 4))


def test_label_smoothing_mixes_with_the_reversed_order():
    scores = draw(10, 5, scale=2)
    mask = all_of(10, 5)
    straight, turned = plackett_luce_loss(scores, mask), plackett_luce_loss(scores.flip(1), mask)
    found = plackett_luce_loss(scores, mask, label_smoothing=0.2)
    torch.testing.assert_close(found, 0.8 * straight + 0.2 * turned)
    pair = plackett_luce_loss(scores[:, :2], mask[:, :2], label_smoothing=0.2)
    margin = scores[:, 0] - scores[:, 1]
    torch.testing.assert_close(pair, -0.8 * logsigmoid(margin) - 0.2 * logsigmoid(-margin))
    torch.testing.assert_close(
        pair, pairwise_loss(scores[:, :2], ranked_order(mask[:, :2]), label_smoothing=0.2), rtol=1e-12, atol=0
    )


def test_term_weights():
    scores, mask = draw(1, 4), all_of(1, 4)
    terms = [torch.logsumexp(scores[0, j:], 0) - scores[0, j] for j in range(3)]
    weights = torch.tensor([[3.0, 0.0, 1.0, 99.0]])  # the last image has no term
    found = plackett_luce_loss(scores, mask, term_weights_BM=weights)
    torch.testing.assert_close(found, (3 * terms[0] + terms[2])[None])
    mean = plackett_luce_loss(scores, mask, term_weights_BM=weights, reduction="mean_terms")
    torch.testing.assert_close(mean, found / 4)
    smooth = plackett_luce_loss(scores, mask, term_weights_BM=weights, label_smoothing=0.5)
    turned = [torch.logsumexp(scores[0, : k + 1], 0) - scores[0, k] for k in range(1, 4)]
    contradicted = [3.0, 1.5, 4 / 3]  # the mean weight of the terms above
    torch.testing.assert_close(
        smooth, 0.5 * found + 0.5 * sum(w * t for w, t in zip(contradicted, turned, strict=True))[None]
    )
    nothing = plackett_luce_loss(scores, mask, term_weights_BM=torch.zeros(1, 4), reduction="mean_terms")
    assert nothing.tolist() == [0.0]


def test_edge_support():
    support = torch.tensor([[[0, 4, 2], [0, 0, 5], [0, 0, 0]], [[0, 0, 1], [0, 0, 0], [0, 0, 0]]])
    weights = objectives.edge_support_weights(support)
    torch.testing.assert_close(weights, torch.tensor([[3.0, 5.0, 1.0], [1.0, 1.0, 1.0]]))


OPTIONS = {
    "plain": {},
    "mean": {"reduction": "mean_terms"},
    "ties": {"tie_group_BM": torch.tensor([[0, 0, 1, 2, 2], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]])},
    "top-k": {"top_k": 2},
    "order": {"order_BMM": order_of([(0, 1), (0, 2), (3, 4)], 5).expand(3, 5, 5)},
    "smoothing": {"label_smoothing": 0.3},
    "weights": {"term_weights_BM": draw(3, 5).abs(), "label_smoothing": 0.1, "reduction": "mean_terms"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    scores, mask = draw(3, 5, scale=2).requires_grad_(), first([5, 3, 2], 5)
    assert torch.autograd.gradcheck(lambda s: plackett_luce_loss(s, mask, **OPTIONS[name]), scores)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck_of_the_comparators(smoothing):
    scores, mask = draw(3, 5, scale=2).requires_grad_(), first([5, 3, 1], 5)
    order = ranked_order(mask)
    weights = draw(3, 5, 5).abs()
    assert torch.autograd.gradcheck(
        lambda s: pairwise_loss(s, order, reduction="mean_terms", pair_weights_BMM=weights, label_smoothing=smoothing),
        scores,
    )
    assert torch.autograd.gradcheck(lambda s: objectives.sft_loss(s, order), scores)


@given(scores_lists, st.floats(-1e3, 1e3))
def test_a_shift_of_all_scores_changes_nothing(scores, shift):
    values = torch.tensor([scores], dtype=torch.float64)
    mask = all_of(*values.shape)
    torch.testing.assert_close(
        plackett_luce_loss(values + shift, mask), plackett_luce_loss(values, mask), rtol=1e-9, atol=1e-9
    )


@given(st.data(), scores_lists)
def test_images_may_be_permuted_with_their_groups(data, scores):
    m = len(scores)
    values = torch.tensor([scores], dtype=torch.float64)
    groups = torch.tensor([data.draw(st.lists(st.integers(0, 3), min_size=m, max_size=m))])
    chosen = torch.tensor(data.draw(st.permutations(range(m))))
    before = plackett_luce_loss(values, all_of(1, m), tie_group_BM=groups)
    after = plackett_luce_loss(values[:, chosen], all_of(1, m), tie_group_BM=groups[:, chosen])
    torch.testing.assert_close(after, before)
    by_hand = by_loops(scores, (groups[0][:, None] < groups[0][None]))
    assert before.item() == pytest.approx(by_hand, rel=1e-9, abs=1e-7)


@given(st.data(), st.integers(2, 6))
def test_swapping_images_of_equal_score_changes_nothing(data, m):
    values = torch.tensor([data.draw(st.lists(st.sampled_from([-1.0, 0.5, 2.0]), min_size=m, max_size=m))])
    i, j = data.draw(st.tuples(st.integers(0, m - 1), st.integers(0, m - 1)))
    values[0, j] = values[0, i]
    swapped = torch.arange(m)
    swapped[[i, j]] = swapped[[j, i]]
    order = ranked_order(all_of(1, m))
    turned = order[:, swapped][:, :, swapped]  # the same scores, with the two images in each other's place
    torch.testing.assert_close(
        plackett_luce_loss(values, all_of(1, m), order_BMM=turned), plackett_luce_loss(values, all_of(1, m))
    )


@given(
    arrays.arrays("float64", (4, 6), elements=st.floats(-50, 50)),
    st.lists(st.integers(0, 6), min_size=4, max_size=4),
    st.sampled_from(["sum", "mean_terms"]),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([0.0, 0.3]),
)
def test_a_mask_is_a_truncation_whatever_the_padding_holds(values, lengths, reduction, top_k, smoothing):
    scores, mask = torch.tensor(values), first(lengths, 6)
    options = {"reduction": reduction, "top_k": top_k, "label_smoothing": smoothing}
    padded = scores.masked_fill(~mask, torch.nan).requires_grad_()
    found = plackett_luce_loss(padded, mask, **options)
    found.sum().backward()
    for row, length in enumerate(lengths):
        alone = scores[row : row + 1, :length].clone().requires_grad_()
        expected = plackett_luce_loss(alone, all_of(1, length), **options)
        expected.sum().backward()
        torch.testing.assert_close(found[row : row + 1], expected)
        torch.testing.assert_close(padded.grad[row, :length], alone.grad[0])
        assert not padded.grad[row, length:].any()


def test_the_mask_may_have_holes():
    scores = draw(1, 4)
    mask = torch.tensor([[True, False, True, True]])
    torch.testing.assert_close(plackett_luce_loss(scores, mask), plackett_luce_loss(scores[:, [0, 2, 3]], all_of(1, 3)))


@pytest.mark.parametrize("pattern", [[1e4, -1e4, 1e4, -1e4], [-1e4, 0.0, 1e4, 1e4], [1e4, 1e4 - 1, 0.0, -1e4]])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "mean_terms", "top_k": 2}])
def test_extreme_scores_are_exact_in_float32(pattern, options):
    scores = torch.tensor([pattern], requires_grad=True)
    loss = plackett_luce_loss(scores, all_of(1, 4), **options)
    loss.sum().backward()
    exact = torch.tensor([pattern], dtype=torch.float64, requires_grad=True)
    expected = plackett_luce_loss(exact, all_of(1, 4), **options)
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert loss.isfinite().all()
    assert scores.grad.isfinite().all()


def test_a_nearly_won_list_keeps_its_digits():
    # log(1 + exp(-30)) is below what 1 + x can hold in float32.
    loss = plackett_luce_loss(torch.tensor([[30.0, 0.0]]), all_of(1, 2))
    assert loss.item() == pytest.approx(math.exp(-30), rel=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean_terms"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_lists_that_order_nothing_have_loss_and_gradient_0(reduction, smoothing):
    mask = first([0, 1, 3, 3], 3)
    groups = torch.tensor([[0, 1, 2], [0, 1, 2], [5, 5, 5], [0, 1, 2]])  # nobody, one, all ties, and a list
    scores = draw(4, 3).requires_grad_()
    order = ranked_order(mask, tie_group_BM=groups)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    for losses in (
        plackett_luce_loss(scores, mask, tie_group_BM=groups, **options),
        pairwise_loss(scores, order, **options),
        pairwise_loss(scores, objectives.random_pair(order, torch.full((4,), 0.5)), **options),
        objectives.sft_loss(scores, order),
    ):
        (gradient,) = torch.autograd.grad(losses.sum(), scores)
        assert losses[:3].tolist() == [0.0, 0.0, 0.0]
        assert losses[3] != 0
        assert not gradient[:3].any()
        assert gradient[3].any()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_nan_arises_on_the_way():
    scores, mask = draw(3, 4).requires_grad_(), first([0, 1, 4], 4)
    with torch.autograd.detect_anomaly():
        plackett_luce_loss(scores, mask, label_smoothing=0.1, reduction="mean_terms").sum().backward()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_lists_and_no_places(shape):
    scores = torch.zeros(shape, requires_grad=True)
    losses = plackett_luce_loss(scores, all_of(*shape), label_smoothing=0.1)
    assert losses.tolist() == [0.0] * shape[0]
    losses.sum().backward()
    assert scores.grad.shape == shape


def test_half_precision_scores_and_autocast_are_computed_in_float32():
    scores = draw(4, 6, scale=3, dtype=torch.float32).bfloat16()
    expected = plackett_luce_loss(scores.float(), all_of(4, 6))
    assert torch.equal(plackett_luce_loss(scores, all_of(4, 6)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plackett_luce_loss(scores.float(), all_of(4, 6)), expected)


# The comparators


def test_pairwise_loss_on_all_pairs_is_gp_dpo():
    scores, m = draw(3, 4), 4
    pairs = [(j, k) for j in range(m) for k in range(j + 1, m)]
    expected = sum(-logsigmoid(scores[:, j] - scores[:, k]) for j, k in pairs)
    order = ranked_order(all_of(3, m))
    torch.testing.assert_close(pairwise_loss(scores, order), expected)
    torch.testing.assert_close(pairwise_loss(scores, order, reduction="mean_terms"), expected / len(pairs))
    # At equal scores every pair pulls alike: the gradient is symmetric, unlike the list loss's.
    flat = torch.zeros(1, m, requires_grad=True)
    pairwise_loss(flat, ranked_order(all_of(1, m))).sum().backward()
    torch.testing.assert_close(flat.grad, torch.tensor([[-1.5, -0.5, 0.5, 1.5]]))


def test_pair_weights():
    scores, order = draw(1, 3), ranked_order(all_of(1, 3))
    weights = torch.zeros(1, 3, 3)
    weights[0, 0, 1], weights[0, 1, 2], weights[0, 2, 0] = 3, 1, 50  # the last is no pair of the order
    a, b = (-logsigmoid(scores[0, j] - scores[0, j + 1]) for j in (0, 1))
    torch.testing.assert_close(pairwise_loss(scores, order, pair_weights_BMM=weights), (3 * a + b)[None])
    mean = pairwise_loss(scores, order, pair_weights_BMM=weights, reduction="mean_terms")
    torch.testing.assert_close(mean, (3 * a + b)[None] / 4)


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=7))
def test_the_list_loss_bounds_the_pairwise_average_from_above(scores):
    """Eq. 8 in its strict form (spec a.3): the average over strictly lower images."""
    values = torch.tensor([scores], dtype=torch.float64)
    m = len(scores)
    averaged = sum(
        -logsigmoid(values[0, j] - values[0, j + 1 :]).mean() for j in range(m - 1)
    )  # log(e^s_j + e^s_k) - s_j, averaged over k > j
    assert plackett_luce_loss(values, all_of(1, m)).item() >= averaged.item() - 1e-9


def test_choices_of_pairs():
    mask = first([4, 2, 1], 4)
    order = ranked_order(mask)

    def pairs(choice):
        return [[tuple(pair) for pair in row.nonzero().tolist()] for row in choice]

    assert pairs(objectives.adjacent_pairs(order)) == [[(0, 1), (1, 2), (2, 3)], [(0, 1)], []]
    assert pairs(objectives.extreme_pairs(order)) == [[(0, 3)], [(0, 1)], []]
    drawn = [pairs(objectives.random_pair(order, torch.full((3,), (i + 0.5) / 6))) for i in range(6)]
    assert [row[0] for row in drawn] == [[pair] for pair in pairs(order)[0]]
    assert all(row[1:] == [[(0, 1)], []] for row in drawn)
    last = objectives.random_pair(order, torch.full((3,), 1.0))  # what float32 rounds 1 - 1e-9 to
    assert pairs(last)[0] == [(2, 3)]
    used = objectives.images_of(objectives.extreme_pairs(order))
    assert used.tolist() == [[True, False, False, True], [True, True, False, False], [False] * 4]


def test_choices_of_pairs_with_ties_and_partial_orders():
    tied = ranked_order(all_of(1, 4), tie_group_BM=torch.tensor([[0, 1, 1, 2]]))
    assert objectives.adjacent_pairs(tied)[0].nonzero().tolist() == [[0, 1], [0, 2], [1, 3], [2, 3]]
    assert objectives.extreme_pairs(tied)[0].nonzero().tolist() == [[0, 3]]
    # An image that was never compared is neither best nor worst.
    loose = order_of([(0, 1)], 3)
    assert objectives.extreme_pairs(loose)[0].nonzero().tolist() == [[0, 1]]


def test_sft_takes_the_winners():
    errors = torch.tensor([[0.1, 0.2, 0.4, torch.nan], [0.3, 0.5, 0.7, 0.9]])
    order = ranked_order(first([3, 4], 4), tie_group_BM=torch.tensor([[0, 1, 2, 3], [0, 0, 1, 1]]))
    torch.testing.assert_close(objectives.sft_loss(errors, order), torch.tensor([0.1, 0.4]))


def test_to_lists():
    values = torch.arange(1.0, 6.0).requires_grad_()
    mask = first([3, 0, 2], 3)
    lists = objectives.to_lists(values, mask)
    assert lists.tolist() == [[1, 2, 3], [0, 0, 0], [4, 5, 0]]
    (lists * torch.arange(9.0).view(3, 3)).sum().backward()
    assert values.grad.tolist() == [0, 1, 2, 6, 7]
    with pytest.raises(ValueError, match=r"mask_BM has 5 images, but the values have shape \(4,\)"):
        objectives.to_lists(values[:4], mask)


# The safeguard


def test_safeguard_of_a_pair_is_sdpos_rule():
    w = torch.tensor([[2.0, -2.0]])
    for g_winner, g_loser in [([1.0, 0.0], [2.0, 5.0]), ([1.0, 0.0], [0.5, 1.0]), ([1.0, 1.0], [-1.0, 0.5])]:
        g = torch.tensor([g_winner, g_loser])
        inner = (g[0] @ g[1]).item()
        for mu in (0.0, 0.4, 1.0):
            expected = 1.0 if inner <= 0 else min(1.0, (1 - mu) * (g[0] @ g[0]).item() / inner)
            scale = safeguard_scale(w, (g @ g.T)[None], mu)
            torch.testing.assert_close(scale, torch.tensor([[1.0, expected]]))


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 1.0]))
def test_the_pulled_images_errors_never_grow_to_first_order(seed, mu):
    m = 2 + seed % 5
    gradients = draw(1, m, 3, seed=seed)  # few dimensions, so that they conflict
    scores = draw(1, m, seed=seed + 1).requires_grad_()
    (by_score,) = torch.autograd.grad(plackett_luce_loss(scores, all_of(1, m)).sum(), scores)
    weights = -by_score  # a score falls as its error grows
    scale = safeguard_scale(weights, gradients @ gradients.mT, mu)
    assert ((scale >= 0) & (scale <= 1)).all()
    assert (scale[weights >= 0] == 1).all()
    step = ((weights * scale)[..., None] * gradients).sum(1)
    pull = (weights.clamp(min=0)[..., None] * gradients).sum(1)
    assert (pull * step).sum() >= mu * (pull * pull).sum() - 1e-9


def test_safeguard_treats_lists_apart_and_ignores_padding():
    weights = torch.tensor([[1.0, -1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    gram = torch.full((3, 3, 3), torch.nan)
    gram[0, :2, :2] = torch.tensor([[1.0, 2.0], [2.0, 9.0]])
    gram[1, :2, :2] = torch.tensor([[1.0, -2.0], [-2.0, 9.0]])
    assert safeguard_scale(weights, gram).tolist() == [[1.0, 0.5, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    tiny = safeguard_scale(weights * 1e-30, gram)
    assert tiny[0].tolist() == [1.0, 0.5, 1.0]
    with pytest.raises(ValueError, match=r"mu must be in \[0, 1\], got 1.5"):
        safeguard_scale(weights, gram, 1.5)


def test_output_gram_is_that_of_the_errors_gradients():
    target, predictions = draw(2, 3, 2, 4, 4), draw(2, 3, 2, 4, 4, seed=1).requires_grad_()
    errors = (predictions - target).square().flatten(2).mean(-1)
    (gradients,) = torch.autograd.grad(errors.sum(), predictions)
    flat = gradients.flatten(2)
    torch.testing.assert_close(objectives.output_gram(predictions - target), flat @ flat.mT)


def test_safeguarded_keeps_the_value_and_scales_the_gradient():
    errors = (0.2 + draw(3, 4, scale=1e-3)).requires_grad_()
    reference, mask = 0.2 + draw(3, 4, seed=1, scale=1e-3), first([4, 3, 1], 4)
    residuals = 1 + draw(3, 4, 2, seed=2, scale=0.3)  # nearly parallel, so that images conflict

    def losses_of(errors):
        return plackett_luce_loss(objectives.implicit_rewards(errors, reference, BETA), mask)

    (plain,) = torch.autograd.grad(losses_of(errors).sum(), errors)
    gram = objectives.output_gram(residuals)
    safe = losses_of(objectives.safeguarded(errors, losses_of, gram, mu=0.5))
    assert torch.equal(safe, losses_of(errors))
    (gradient,) = torch.autograd.grad(safe.sum(), errors)
    scale = safeguard_scale(plain, gram, 0.5)
    torch.testing.assert_close(gradient, plain * scale)
    assert (scale < 1).any()
    with torch.no_grad():
        assert torch.equal(losses_of(objectives.safeguarded(errors, losses_of, gram)), losses_of(errors))


def test_what_does_not_fit_is_refused_by_name():
    scores, mask = torch.zeros(2, 3), all_of(2, 3)
    with pytest.raises(ValueError, match=r"mask_BM must be boolean .* got torch.float32"):
        plackett_luce_loss(scores, mask.float())
    with pytest.raises(ValueError, match=r"scores_BM has shape \(2, 3\), but mask_BM \(2, 4\)"):
        plackett_luce_loss(scores, all_of(2, 4))
    with pytest.raises(ValueError, match='reduction must be "sum" or "mean_terms", got \'mean\''):
        plackett_luce_loss(scores, mask, reduction="mean")
    with pytest.raises(ValueError, match="tie_group_BM or order_BMM, not both"):
        plackett_luce_loss(scores, mask, tie_group_BM=mask.long(), order_BMM=ranked_order(mask))
    with pytest.raises(ValueError, match=r"tie_group_BM has shape \(2, 2\), expected \(2, 3\)"):
        plackett_luce_loss(scores, mask, tie_group_BM=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"order_BMM must be boolean of shape \(2, 3, 3\)"):
        plackett_luce_loss(scores, mask, order_BMM=mask)
    with pytest.raises(ValueError, match=r"term_weights_BM has shape \(3,\), expected \(2, 3\)"):
        plackett_luce_loss(scores, mask, term_weights_BM=torch.ones(3))
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\], got 0.6"):
        pairwise_loss(scores, ranked_order(mask), label_smoothing=0.6)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        plackett_luce_loss(scores, mask, top_k=0)
    with pytest.raises(ValueError, match=r"pairs_BMM must be boolean of shape \(2, 3, 3\), got torch.bool"):
        pairwise_loss(scores, all_of(2, 3))
