"""What stops a run, and with which words."""

import json
import math

import pytest
import torch

import toy_training as toy
from palate.training import guards
from palate.training.guards import LossSpike, NonFinite, SpikeGuard
from palate.training.loop import LoopConfig, LossOutput, train
from palate.training.stream import Stream


def run(folder, loss, **config):
    model = toy.Toy(0.0)
    settings = LoopConfig(12, micro_batch=3, checkpoint_every=4, tensorboard=False, **config)
    train(model, toy.groups(model), Stream([toy.source()], 5), toy.weigh, loss, settings, folder)
    return model


def poisoned(value, where):
    """The toy's loss, with one sample's answer broken."""

    def loss(model, samples, totals):
        broken = [{**s, "y": s["y"] * value} if s is where else s for s in samples]
        return toy.loss(model, broken, totals)

    return loss


@pytest.fixture
def late_sample(monkeypatch):
    """A sample of cluster 1 or 2 that first comes after the first checkpoint, and its id and step."""
    source = toy.source()
    monkeypatch.setattr(toy, "source", lambda: source)
    batches = Stream([source], 5)
    cursors = batches.start()
    for step in range(1, 9):
        units, cursors = batches.plan(cursors)
        for unit in units:
            sample = source.samples[unit.indices[0]]
            if step > 5 and sample["cluster"] > 0:
                return sample, batches.ids(unit)[0], step
    raise AssertionError("no such sample")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_sample_and_its_cluster(tmp_path, late_sample, value):
    sample, name, step = late_sample
    with pytest.raises(NonFinite) as caught:
        run(tmp_path, poisoned(value, sample))
    message = str(caught.value)
    assert f"step {step}: the loss is" in message
    assert f"samples: {name}; groups: cluster-{sample['cluster']}." in message
    # Nothing is lost and nothing broken is kept: the mended run goes on from the checkpoint before, to the same end.
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    mended = run(tmp_path, toy.loss)
    expected = run(tmp_path / "never", toy.loss)
    assert toy.trace(tmp_path) == toy.trace(tmp_path / "never")
    for found, other in zip(mended.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, other)


def test_a_gradient_that_is_not_finite_names_its_group(tmp_path):
    def loss(model, samples, totals):
        output = toy.loss(model, samples, totals)
        root = model.heads[0].weight.sum().sub(model.heads[0].weight.sum().detach()).sqrt()  # 0, with gradient inf
        return LossOutput(output.loss + root, output.metrics)

    with pytest.raises(NonFinite, match=r"step 1: a gradient is not finite.*groups: cluster-0\."):
        run(tmp_path, loss)
    assert not (tmp_path / "checkpoints").exists()


def test_the_spike_guard_rejects_what_leaves_the_usual_range():
    guard = SpikeGuard(sigmas=6.0)
    generator = torch.Generator().manual_seed(0)
    usual = (2 + 0.1 * torch.randn(40, generator=generator)).tolist()
    assert all(guard.accepts(loss, step) for step, loss in enumerate(usual))
    assert not guard.accepts(3.5, 40)
    assert guard.accepts(2.05, 41)
    assert guard.rejected == 0
    assert guard.losses[-1] == 2.05
    assert 3.5 not in guard.losses
    assert guard.accepts(0.1, 42)  # a fall is no spike
    assert not guard.accepts(9.0, 43)
    assert not guard.accepts(9.0, 44)
    with pytest.raises(LossSpike, match=r"step 45: loss 9 is above 2\.\d+, like 2 before it.*samples: a/1, a/2\."):
        guard.accepts(9.0, 45, lambda: ["a/1", "a/2"])
    assert SpikeGuard(sigmas=None).accepts(1e30, 0)


def test_a_spike_skips_the_update(tmp_path):
    spiked = 20

    def loss(model, samples, totals):
        output = toy.loss(model, samples, totals)
        seen.append(len(samples))
        factor = 100.0 if sum(seen) > skip_after and not fired else 1.0
        if factor > 1:
            fired.append(True)
        return LossOutput(output.loss * factor, output.metrics)

    seen, fired, skip_after = [], [], spiked * 5
    model = toy.Toy(0.0)
    config = LoopConfig(24, micro_batch=5, spike_sigmas=20.0, tensorboard=False)
    summary = train(model, toy.groups(model), Stream([toy.source()], 5), toy.weigh, loss, config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    skipped = [row for row in rows if row["skipped"]]
    assert len(skipped) == 1
    assert skipped[0]["groups"]["cluster-0"]["lr"] == 0
    assert summary.updates["cluster-0"] == 23


def test_many_samples_are_counted_rather_than_listed():
    error = guards.non_finite(3, math.nan, {}, [f"s/{i}" for i in range(50)], ["a"])
    assert "s/19 and 30 more" in str(error)
