"""Weights over steps, what tells a collapse, how gradients agree."""

import contextlib
import math

import numpy as np
import pytest
import torch

from palate.unihetero.arms import ARMS
from palate.unihetero.averages import Average
from palate.unihetero.model import UniHeteroOutput
from palate.unihetero.objectives import ObjectiveConfig, Weights, collapse, gradient_alignment, total, weights_at
from palate.unihetero.samples import collate
from toy_unihetero import PLACES, model, samples


def test_weights_rise_linearly_and_stay():
    config = ObjectiveConfig(semantic_weight=2.0, pixel_weight=3.0, ramp_from=0.1, ramp=50)
    found = [weights_at(step, 100, ARMS["embedding"], config) for step in (1, 25, 50, 100)]
    assert [one.semantic for one in found] == pytest.approx([2 * 0.118, 2 * 0.55, 2.0, 2.0])
    assert found[3].pixel == 3.0
    assert all(one.text == 1.0 for one in found)


def test_generation_first_has_no_text_loss_at_first():
    config = ObjectiveConfig(ramp=0)
    assert [weights_at(step, 10, ARMS["curriculum"], config).text for step in (1, 2, 3, 10)] == [0, 0, 1, 1]
    assert weights_at(5, 10, ARMS["capacity"], config).semantic == 0.0


@pytest.mark.parametrize("name", ["semantic_weight", "momentum", "ramp_from"])
def test_weights_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=name.replace("_", "-")):
        ObjectiveConfig(**{name: -0.1})


def test_micro_batches_add_up_to_the_batch():
    network = model("embedding").eval()
    rows = [[sample] for sample in samples(6)]
    totals = {"text": float(sum(s.supervised for (s,) in rows)), "visual": 6.0 * PLACES}
    whole, _ = total(network(**collate(rows).arguments()), Weights(1, 0.5, 1), totals)
    parts = [total(network(**collate(rows[i : i + 2]).arguments()), Weights(1, 0.5, 1), totals)[0] for i in (0, 2, 4)]
    torch.testing.assert_close(whole, sum(parts))


def output(targets, predicted=None):
    return UniHeteroOutput(torch.zeros(1), targets=targets, predicted=predicted)


def test_a_collapse_is_told_by_the_share_of_variance():
    generator = torch.Generator().manual_seed(0)
    alive = torch.randn(64 * PLACES, 8, generator=generator)
    one = torch.randn(8, generator=generator).expand(64 * PLACES, 8)
    collapsed = one + 0.01 * torch.randn(64 * PLACES, 8, generator=generator)
    found = [collapse(output(values, values), PLACES) for values in (alive, collapsed)]
    assert found[0]["variance_share"] == pytest.approx(1.0, abs=0.02)
    assert found[1]["variance_share"] < 1e-3
    # What misleads: predictions are perfect in both, and the rank of what is left is as high.
    assert [one["cosine"] for one in found] == pytest.approx([1.0, 1.0])
    assert found[1]["effective_rank"] == pytest.approx(found[0]["effective_rank"], rel=0.1)
    assert found[0]["cosine_gain"] > 0.5
    assert found[1]["cosine_gain"] < 0.01


def test_the_gain_is_over_the_best_constant_of_each_place():
    places = torch.randn(PLACES, 8, generator=torch.Generator().manual_seed(1))
    targets = places.repeat(10, 1)
    assert collapse(output(targets, targets), PLACES)["cosine_gain"] == pytest.approx(0.0, abs=1e-6)


def test_effective_rank_of_known_spectra():
    values = torch.zeros(8 * PLACES, 6)
    values[:, 0] = torch.linspace(-1, 1, 8 * PLACES)
    assert collapse(output(values), PLACES)["effective_rank"] == pytest.approx(1.0, abs=1e-3)
    orthogonal = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).normal(size=(32, 6)))[0])
    centred = orthogonal - orthogonal.mean(0)
    q, _ = np.linalg.qr(centred.numpy())
    assert collapse(output(torch.as_tensor(q)), PLACES)["effective_rank"] == pytest.approx(6.0, rel=0.02)


def test_gradients_by_closed_form():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    other = torch.nn.Parameter(torch.tensor([1.0]))
    losses = {"text": weight[0] * 3 + other.sum(), "semantic": (weight * torch.tensor([4.0, 3.0])).sum()}
    found = gradient_alignment(losses, {"a": [weight], "b": [other]})
    assert found["ratio/semantic/a"] == pytest.approx(5 / 3)
    assert found["cosine/semantic/a"] == pytest.approx(0.8)
    assert (found["ratio/semantic/b"], found["cosine/semantic/b"]) == (0.0, 0.0)
    assert found["ratio/semantic/all"] == pytest.approx(5 / math.sqrt(10))
    assert found["cosine/semantic/all"] == pytest.approx(12 / (5 * math.sqrt(10)))


# Averages


def test_the_average_weighs_updates_by_their_power():
    parameter, gamma = torch.nn.Parameter(torch.zeros(1)), 3.0
    average = Average([("w", parameter)], gamma)
    values = np.random.default_rng(0).normal(size=20)
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            parameter.fill_(value)
        average.follow(step)
    # Weights of update i among t: prod of the momenta after it, which are (1 - 1/s)^(gamma + 1).
    t = np.arange(1, 21)
    shares = (t / 20) ** (gamma + 1) - ((t - 1) / 20) ** (gamma + 1)
    assert float(average.slow[0][1]) == pytest.approx(float(shares @ values), rel=1e-4)


def test_the_model_gets_its_weights_back():
    network = model()
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    average = Average(named, 6.94)
    before = {name: p.detach().clone() for name, p in named}
    with torch.no_grad():
        for _, parameter in average.slow:
            parameter.zero_()
    with contextlib.suppress(RuntimeError), average.in_place():
        assert not any(bool(p.any()) for _, p in named)
        raise RuntimeError
    assert all(torch.equal(before[name], p) for name, p in named)
