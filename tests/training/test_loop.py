"""The train loop in one process, against closed forms and plain torch loops."""

import dataclasses
import json
import math
import signal
import threading

import pytest
import torch
from torch import nn

import toy_training as toy
from palate import artifacts
from palate.training import guards, loop, stream
from palate.training.logging import RunLog, read
from palate.training.loop import Group, LoopConfig, LossOutput, train
from palate.training.parallel import World


class Line(nn.Module):
    """Two weights, each fitted to the samples of its own group."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([2.0, -1.0]))
        self.b = nn.Parameter(torch.tensor([0.5]))


def squares(model, samples, totals):
    """Each group's mean of (w · x - y)^2 over the global batch, summed over groups."""
    parts = [
        ((getattr(model, s["group"]) * s["x"]).sum() - s["y"]) ** 2 * s["weight"] / totals[s["group"]] for s in samples
    ]
    return LossOutput(torch.stack(parts).sum())


def weigh(sample):
    return {sample["group"]: sample["weight"]}


def line_samples(groups="aababaabbaaa"):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "group": group,
            "x": torch.randn(2 if group == "a" else 1, generator=generator),
            "y": float(torch.randn((), generator=generator)),
            "weight": 1.0 + number % 3,
        }
        for number, group in enumerate(groups)
    ]


def line_groups(model, **options):
    settings = {"learning_rate": 0.1, "weight_decay": 0.3, "clip_norm": 0.4} | options
    return [
        Group("a", [("a", model.a)], **settings),
        Group("b", [("b", model.b)], **(settings | {"learning_rate": 0.02})),
    ]


def line_stream(samples, batch=3, **options):
    return stream.Stream([stream.ListSource("line", samples, [str(i) for i in range(len(samples))])], batch, **options)


def run(folder, steps=20, samples=None, options=None, batch=3, **config):
    model = Line()
    samples = samples or line_samples()
    settings = LoopConfig(steps, tensorboard=False, **config)
    summary = train(
        model, line_groups(model, **(options or {})), line_stream(samples, batch), weigh, squares, settings, folder
    )
    return model, summary


def test_equals_a_plain_torch_loop_for_each_group_alone(tmp_path):
    """Each group's own AdamW, clipping and schedule, over only the batches that hold some of it."""
    samples, steps = line_samples(), 20
    batches = line_stream(samples)
    counts = loop.updates_per_group(batches, weigh, ["a", "b"], steps)
    assert counts["a"] > counts["b"] < steps  # b is absent from some batches
    model = Line()
    groups = [dataclasses.replace(g, steps=counts[g.name]) for g in line_groups(model)]
    config = LoopConfig(steps, warmup_ratio=0.2, schedule="cosine", tensorboard=False, micro_batch=2)
    summary = train(model, groups, batches, weigh, squares, config, tmp_path)
    assert summary.updates == counts

    expected, clipped = Line(), 0
    for group in line_groups(expected):
        parameters = [p for _, p in group.parameters]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.3)
        cursors, update = batches.start(), 0
        for _ in range(steps):
            units, cursors = batches.plan(cursors)
            chosen = [samples[u.indices[0]] for u in units if samples[u.indices[0]]["group"] == group.name]
            if not chosen:
                continue
            warmup, total = round(0.2 * counts[group.name]), counts[group.name]
            factor = (update + 1) / (warmup + 1)
            if update >= warmup:
                factor = 0.5 + 0.5 * math.cos(math.pi * (update - warmup) / (total - warmup))
            optimizer.param_groups[0]["lr"] = group.learning_rate * factor
            optimizer.zero_grad()
            squares(expected, chosen, {group.name: sum(s["weight"] for s in chosen)}).loss.backward()
            clipped += float(nn.utils.clip_grad_norm_(parameters, 0.4)) > 0.4
            optimizer.step()
            update += 1
    assert clipped > 5
    torch.testing.assert_close(model.a, expected.a, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.b, expected.b, rtol=1e-5, atol=1e-6)


def test_an_absent_group_is_not_touched(tmp_path):
    model, summary = run(tmp_path, samples=line_samples("a" * 12))
    assert summary.updates == {"a": 20, "b": 0}
    assert torch.equal(model.b, Line().b)  # no decay either
    assert not torch.equal(model.a, Line().a)


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_micro_batches_do_not_change_the_result(tmp_path, micro_batch):
    whole, _ = run(tmp_path / "whole", batch=5, micro_batch=100)
    split, _ = run(tmp_path / "split", batch=5, micro_batch=micro_batch)
    torch.testing.assert_close(split.a, whole.a, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(split.b, whole.b, rtol=1e-6, atol=1e-7)


def test_schedules_start_rise_and_end_where_they_should():
    linear = LoopConfig(10, warmup_ratio=0.2)
    factors = [loop.learning_rate_factor(linear, update, 10) for update in range(11)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[9] == pytest.approx(1 / 8)
    assert factors[10] == 0
    assert loop.learning_rate_factor(LoopConfig(10, schedule="constant"), 9, 10) == 1
    assert loop.learning_rate_factor(LoopConfig(10, schedule="cosine"), 5, 10) == pytest.approx(0.5)


def test_the_log_has_one_row_per_step_with_what_was_done(tmp_path):
    run(tmp_path, steps=7, options={"clip_norm": None})
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 8))
    batches = line_stream(line_samples())
    units, _ = batches.plan(batches.start())
    assert rows[0]["fingerprint"] == batches.fingerprint(units)
    chosen = [line_samples()[unit.indices[0]] for unit in units]
    totals = {g: sum(s["weight"] for s in chosen if s["group"] == g) for g in "ab"}
    output = squares(model := Line(), chosen, totals)
    output.loss.backward()
    assert rows[0]["loss"] == pytest.approx(output.loss.item())
    assert rows[0]["groups"]["a"]["norm"] == pytest.approx(model.a.grad.norm().item())
    assert rows[0]["groups"]["a"]["lr"] == 0.1
    assert rows[0]["groups"]["a"]["total"] == totals["a"]


def test_metrics_are_weighted_over_the_whole_batch(tmp_path):
    world = World()
    toy.run(toy.ToyConfig(str(tmp_path), steps=3, dropout=0.0), world)
    source, batches = toy.source(), stream.Stream([toy.source()], 5)
    units, _ = batches.plan(batches.start())
    good = [source.samples[unit.indices[0]] for unit in units if unit.indices[0] not in (3, 17)]
    heads = toy.Toy(0.0).heads
    errors = [(heads[s["cluster"]](s["x"]) - s["y"]).square().mean().item() for s in good]
    weights = [s["weight"] for s in good]
    expected = sum(e * w for e, w in zip(errors, weights, strict=True)) / sum(weights)
    assert read(tmp_path)[0]["metrics"]["error"] == pytest.approx(expected)


def test_unreadable_samples_are_ledgered_and_too_many_stop_the_run(tmp_path):
    summary = toy.run(toy.ToyConfig(str(tmp_path / "all"), steps=9, dropout=0.0), World())
    ledger = [json.loads(line) for line in (tmp_path / "all" / "corrupt.jsonl").read_text().splitlines()]
    assert {row["id"] for row in ledger} == {"sample-3", "sample-17"}  # 9 · 5 = 45 units: each at least once in 41
    assert all(row["reason"] == "not a sample" and 1 <= row["step"] <= 9 for row in ledger)
    assert summary["corrupt"] == len(ledger)

    model = toy.Toy(0.0)
    limited = LoopConfig(9, max_corrupt=1, tensorboard=False)
    with pytest.raises(loop.guards.TrainingStopped, match=r"2 samples could not be read.*max_corrupt is 1"):
        train(
            model,
            toy.groups(model),
            stream.Stream([toy.source()], 5),
            toy.weigh,
            toy.loss,
            limited,
            tmp_path / "limited",
        )


def test_a_batch_of_unreadable_samples_changes_nothing(tmp_path):
    class Broken(stream.ListSource):
        def load(self, index, seed):
            raise stream.CorruptSample("gone")

    model = Line()
    batches = stream.Stream([Broken("broken", [0, 1], ["0", "1"])], 2)
    few, many = LoopConfig(3, tensorboard=False), LoopConfig(9, tensorboard=False)
    with pytest.raises(loop.guards.TrainingStopped, match="nothing was learned: none of 6 samples"):
        train(model, line_groups(model), batches, weigh, squares, few, tmp_path / "few")
    assert torch.equal(model.a, Line().a)
    assert [row["loss"] for row in read(tmp_path / "few")] == [0, 0, 0]
    with pytest.raises(loop.guards.TrainingStopped, match=r"step 4: none of the first 8 samples could be read.*gone"):
        train(model, line_groups(model), batches, weigh, squares, many, tmp_path / "many")


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path):
    seen = []

    class Matrix(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)

    def matrix_loss(model, samples, totals):
        y = model.linear(torch.stack([s["x"] for s in samples]))
        seen.append(y.dtype)
        return LossOutput(y.float().square().sum() / totals["a"])

    model = Matrix()
    train(
        model,
        [Group("a", list(model.named_parameters()), 0.1)],
        line_stream(line_samples("aaaa")),
        weigh,
        matrix_loss,
        LoopConfig(2, precision="bf16", tensorboard=False),
        tmp_path,
    )
    assert set(seen) == {torch.bfloat16}
    assert model.linear.weight.dtype == torch.float32


def test_tensorboard_has_the_losses(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = Line()
    train(model, line_groups(model), line_stream(line_samples()), weigh, squares, LoopConfig(4), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [row["loss"] for row in read(tmp_path)]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("groups/a/lr")] == [
        row["step"] for row in read(tmp_path) if "a" in row["groups"]
    ]


def test_what_does_not_fit_is_refused(tmp_path):
    model = Line()
    batches = line_stream(line_samples())
    config = LoopConfig(2, tensorboard=False)
    with pytest.raises(ValueError, match=r"totals for \['x'\], but no group is called so: the groups are \['a', 'b'\]"):
        train(model, line_groups(model), batches, lambda sample: {"x": 1}, squares, config, tmp_path)
    double = [Group("a", [("a", model.a)], 0.1), Group("b", [("a", model.a)], 0.1)]
    with pytest.raises(ValueError, match="each once"):
        train(model, double, batches, weigh, squares, config, tmp_path)
    with pytest.raises(ValueError, match=r"parameter b is torch\.bfloat16"):
        train(
            model,
            [Group("b", [("b", nn.Parameter(model.b.bfloat16()))], 0.1)],
            batches,
            weigh,
            squares,
            config,
            tmp_path,
        )
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        LoopConfig(0)


def test_utilization_is_the_models_flops_of_what_each_step_had(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, seen = Line(), []

    def flops(totals):
        seen.append(totals)
        return 1e6 * totals["a"]

    batches, config = line_stream(line_samples("a" * 12)), LoopConfig(5)
    train(model, line_groups(model), batches, weigh, squares, config, tmp_path, flops=flops, peak_flops=2e9)
    rows = read(tmp_path)
    assert [totals["a"] for totals in seen] == [row["groups"]["a"]["total"] for row in rows]
    for row in rows:
        assert row["flops_per_second"] == pytest.approx(1e6 * row["groups"]["a"]["total"] / row["seconds"])
        assert row["mfu"] == pytest.approx(row["flops_per_second"] / 2e9)
    assert rows[-1]["seconds_left"] == 0
    assert rows[1]["seconds_left"] == pytest.approx(3 * rows[1]["seconds"], abs=0.06)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"mfu", "flops_per_second", "samples_per_second", "data_wait", "seconds_left"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.value for event in events.Scalars("mfu")] == pytest.approx([row["mfu"] for row in rows])
    run(tmp_path / "plain", steps=1)
    assert not {"mfu", "flops_per_second"} & read(tmp_path / "plain")[0].keys()


@pytest.mark.parametrize("start", [0, 50])
def test_the_time_left_counts_neither_the_first_step_nor_what_an_earlier_start_did(tmp_path, monkeypatch, start):
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    log = RunLog(str(tmp_path), 100, start, "training", False)
    bar = log._bar
    bar._time, bar.mininterval, bar.delay, bar.miniters, bar.dynamic_miniters = lambda: now[0], 0, 0, 0, False
    rows = []
    for step in range(start + 1, start + 12):
        now[0] += 60.0 if step == start + 1 else 2.0  # the first step compiles
        rows.append({"step": step, "loss": 1.0})
        log.step(rows[-1], {"samples": 8})
    shown = bar.format_dict
    log.close()
    assert "seconds_left" not in rows[0]
    assert rows[-1]["seconds_left"] == 2 * (100 - start - 11)
    assert rows[-1]["samples_per_second"] == 4
    assert (shown["n"], shown["initial"], shown["elapsed"]) == (start + 11, start + 1, 20)
    assert shown["rate"] == pytest.approx(0.5)  # of which tqdm makes the time left


def sigterm_in(monkeypatch, step):
    """Send SIGTERM to this process in the loss of a step."""
    original, batches = toy.loss, []

    def loss(model, samples, totals):
        if not batches or batches[-1] is not totals:
            batches.append(totals)
            if len(batches) == step:
                signal.raise_signal(signal.SIGTERM)
        return original(model, samples, totals)

    monkeypatch.setattr(toy, "loss", loss)


@pytest.fixture
def former():
    """A handler of SIGTERM that stands for the launcher's; what it got."""
    got = []

    def handler(number, frame):
        got.append(number)

    before = signal.signal(signal.SIGTERM, handler)
    yield handler, got
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("step", [1, 4, 11])
def test_sigterm_saves_the_step_and_ends_the_run(tmp_path, monkeypatch, former, step):
    settings = toy.ToyConfig(str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        sigterm_in(patch, step)
        with pytest.raises(guards.Preempted, match=f"after step {step} of 12, which is saved in .*cut"):
            toy.run(settings, World())
    assert signal.getsignal(signal.SIGTERM) is former[0]
    assert former[1] == []
    artifacts.open_artifact(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}").verify()
    assert toy.run(settings, World())["resumed"] == step
    toy.run(toy.ToyConfig(str(tmp_path / "whole")), World())
    assert toy.trace(tmp_path / "cut") == toy.trace(tmp_path / "whole")


def test_sigterm_in_the_last_step_is_for_whoever_comes_after(tmp_path, monkeypatch, former):
    sigterm_in(monkeypatch, 12)
    assert toy.run(toy.ToyConfig(str(tmp_path)), World())["steps"] == 12
    assert former[1] == [signal.SIGTERM]


def test_a_thread_leaves_signals_alone(tmp_path, monkeypatch, former):
    seen = []
    original = toy.loss
    monkeypatch.setattr(
        toy, "loss", lambda *values: (seen.append(signal.getsignal(signal.SIGTERM)), original(*values))[1]
    )
    thread = threading.Thread(target=toy.run, args=(toy.ToyConfig(str(tmp_path), steps=2), World()))
    thread.start()
    thread.join()
    assert len(read(tmp_path)) == 2
    assert set(seen) == {former[0]}


def test_a_preempted_run_tells_of_its_steps_as_often_as_it_saved(tmp_path, monkeypatch):
    """Ray's report is a barrier: on each rank it must come equally often."""
    told = []
    sigterm_in(monkeypatch, 6)
    with pytest.raises(guards.Preempted):
        toy.run(toy.ToyConfig(str(tmp_path)), World(report=lambda figures: told.append(figures["step"])))
    assert told == [4, 6]
