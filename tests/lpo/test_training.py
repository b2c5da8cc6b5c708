"""Tuning on lists: against diffusers' pairwise formula, closed forms, and itself cut in other pieces."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import toy_lists
from palate.artifacts import Artifact
from palate.lpo import objectives
from palate.lpo.denoising import noise_schedule
from palate.lpo.encoding import EncodeConfig, Encoded, encode
from palate.lpo.networks import WeightsConfig, tuned
from palate.lpo.samples import DrawConfig, Drawing, ListSample, ListSource, Order, list_source, read_lists
from palate.lpo.training import (
    Denoiser,
    ObjectiveConfig,
    Orders,
    TuneConfig,
    list_losses,
    measure,
    signals,
    step_loss,
    tune,
)
from palate.models.diffusion import LoadedDiffusion, load_diffusion
from palate.training.guards import TrainingStopped
from palate.training.parallel import World


@pytest.fixture(scope="module")
def base() -> LoadedDiffusion:
    return load_diffusion("shapes")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Encoded]:
    folder = tmp_path_factory.mktemp("lists")
    lists = toy_lists.lists(folder / "lists")
    return lists, encode(lists, "shapes", str(folder / "encoded"), EncodeConfig(resolution=16, latent_dtype="float32"))


def source(base: LoadedDiffusion, corpus: tuple[Artifact, Encoded], split: str = "train", **draw: Any) -> ListSource:
    schedule = noise_schedule(base.scheduler)
    return list_source(corpus[0], split, Drawing(corpus[1], schedule, DrawConfig(**draw), scaling=(0.0, 1 / 0.65)))


def denoiser_of(base: LoadedDiffusion, seed: int = 0, **weights: Any) -> tuple[Denoiser, list[Any]]:
    """A denoiser whose LoRA has moved from its start, so that it differs from the reference."""
    loaded = replace(base, pipeline=copy.deepcopy(base.pipeline))
    parameters, reference = tuned(loaded, WeightsConfig(rank=4, **weights), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return Denoiser(loaded.denoiser, "sd", noise_schedule(base.scheduler), reference), parameters


def drawn(base: LoadedDiffusion, corpus: tuple[Artifact, Encoded], count: int = 6) -> list[ListSample]:
    lists = source(base, corpus)
    return [lists.load(index, 100 + index) for index in range(count)]


def gradient(denoiser: Denoiser, parameters: Any, samples: Any, objective: ObjectiveConfig, **tune: Any) -> Any:
    for _, parameter in parameters:
        parameter.grad = None
    totals = {"lists": float(len(samples))}
    output = step_loss(
        denoiser.network, samples, totals, denoiser=denoiser, objective=objective, config=TuneConfig(**tune)
    )
    output.loss.backward()
    return output.loss.detach(), torch.cat([p.grad.flatten() for _, p in parameters]), output.metrics


def test_pairs_give_the_loss_and_gradient_of_diffusers_dpo(base: LoadedDiffusion, corpus: Any) -> None:
    denoiser, parameters = denoiser_of(base)
    samples = [sample for sample in drawn(base, corpus, 9) if len(sample) == 2]
    assert len(samples) == 4
    beta = 2000.0
    loss, found, metrics = gradient(denoiser, parameters, samples, ObjectiveConfig(kl_beta=beta))
    for _, parameter in parameters:
        parameter.grad = None
    # As in Diffusion-DPO: winners, then losers, through the same U-Net with and without the adapter.
    order = [*range(len(samples))]
    latents = torch.stack([samples[i].latents_MCHW[j] for j in (0, 1) for i in order])
    noise = torch.stack([samples[i].noise_MCHW[j] for j in (0, 1) for i in order])
    times = torch.stack([samples[i].index_M[j] for j in (0, 1) for i in order])
    text = torch.stack([samples[i].given.text_NLD[j] for j in (0, 1) for i in order])
    noisy = base.scheduler.add_noise(latents, noise, times)
    target = base.scheduler.get_velocity(latents, noise, times)

    def errors() -> torch.Tensor:
        predicted = denoiser.network(noisy, times, text).sample
        return F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))

    with denoiser.reference(), torch.no_grad():
        won, lost = errors().chunk(2)
    win, lose = errors().chunk(2)
    logits = -0.5 * beta * ((win - lose) - (won - lost))
    expected = -F.logsigmoid(logits).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
    theirs = torch.cat([p.grad.flatten() for _, p in parameters])
    assert (found - theirs).norm() < 1e-3 * theirs.norm()
    value, weight = metrics["pair_accuracy"]
    assert float(value) / float(weight) == (logits > 0).float().mean()


@pytest.mark.parametrize("objective", ["lpo", "gp-dpo", "dpo", "sft", "denoising"])
def test_caching_changes_no_gradient(base: LoadedDiffusion, corpus: Any, objective: Any) -> None:
    denoiser, parameters = denoiser_of(base)
    samples = drawn(base, corpus)
    learn = ObjectiveConfig(objective=objective, kl_beta=5000.0)
    loss, plain, _ = gradient(denoiser, parameters, samples, learn, caching="none")
    assert plain.norm() > 0
    for caching, chunk in (("two-pass", 4), ("one-pass", 8)):
        other_loss, other, _ = gradient(denoiser, parameters, samples, learn, caching=caching, chunk=chunk)
        torch.testing.assert_close(other_loss, loss, rtol=1e-3, atol=1e-4)
        assert (other - plain).norm() < 1e-3 * plain.norm(), caching


def test_micro_batches_add_up(base: LoadedDiffusion, corpus: Any) -> None:
    denoiser, parameters = denoiser_of(base)
    samples = drawn(base, corpus)
    _, whole, _ = gradient(denoiser, parameters, samples, ObjectiveConfig())
    total = torch.zeros_like(whole)
    for sample in samples:
        for _, parameter in parameters:
            parameter.grad = None
        config = TuneConfig()
        output = step_loss(
            denoiser.network,
            [sample],
            {"lists": float(len(samples))},
            denoiser=denoiser,
            objective=ObjectiveConfig(),
            config=config,
        )
        output.loss.backward()
        total += torch.cat([p.grad.flatten() for _, p in parameters])
    assert (total - whole).norm() < 1e-3 * whole.norm()


def test_draws_depend_on_the_seed_alone_and_share_what_is_said(base: LoadedDiffusion, corpus: Any) -> None:
    shared, own = source(base, corpus), source(base, corpus, share_noise=False, share_timestep=False)
    index = next(i for i in range(len(shared)) if len(shared.row(i)["items"]) == 4)
    one, again, other = shared.load(index, 5), shared.load(index, 5), own.load(index, 5)
    assert torch.equal(one.latents_MCHW, again.latents_MCHW)
    assert torch.equal(one.noise_MCHW, one.noise_MCHW[:1].expand(4, -1, -1, -1))
    assert len(set(one.index_M.tolist())) == 1
    assert not torch.equal(other.noise_MCHW[0], other.noise_MCHW[1])
    assert len(set(other.index_M.tolist())) > 1
    assert torch.equal(other.latents_MCHW, one.latents_MCHW)
    assert not torch.equal(shared.load(index, 6).noise_MCHW, one.noise_MCHW)


def test_prompts_are_dropped_as_often_as_asked(base: LoadedDiffusion, corpus: Any) -> None:
    empty = corpus[1].text("").text
    lists = source(base, corpus, prompt_dropout=0.3)
    dropped = [torch.equal(lists.load(0, seed).given.text_NLD[0], empty) for seed in range(400)]
    assert abs(sum(dropped) / 400 - 0.3) < 0.08


def test_orders_of_every_kind() -> None:
    orders = Orders.of(
        [
            Order((0, 1, 1)),  # the last two are tied
            Order((0, 1, 2, 3), top_k=1),
            Order((0, 1, 2), edges=((0, 1, 2.0), (0, 2, 1.0)), partial=True),  # 1 and 2 were never compared
        ]
    )
    pairs = [{(j, k) for j, k in order.nonzero().tolist()} for order in orders.order_BMM]
    assert pairs == [{(0, 1), (0, 2)}, {(0, 1), (0, 2), (0, 3)}, {(0, 1), (0, 2)}]
    assert orders.mask_BM.sum(1).tolist() == [3, 4, 3]
    assert orders.support_BMM[2, 0, 1] == 2


def test_losses_are_those_of_the_objectives() -> None:
    generator = torch.Generator().manual_seed(0)
    errors, reference = torch.rand(2, 2, 4, generator=generator).unbind()
    orders = Orders.of([Order((0, 1, 2, 3)), Order((0, 1, 2, 3))])
    uniform = torch.tensor([0.1, 0.9])

    def losses(**options: Any) -> torch.Tensor:
        return list_losses(errors, reference, orders, uniform, ObjectiveConfig(kl_beta=3.0, **options))

    scores = -1.5 * (errors - reference)
    chain = -sum(scores[:, j] - scores[:, j:].logsumexp(1) for j in range(3))
    torch.testing.assert_close(losses(reduction="sum"), chain)
    torch.testing.assert_close(losses(), chain / 3)
    pairs = [-F.logsigmoid(scores[:, j] - scores[:, k]) for j in range(4) for k in range(j + 1, 4)]
    torch.testing.assert_close(losses(objective="gp-dpo"), torch.stack(pairs).mean(0))
    extreme = -F.logsigmoid(scores[:, 0] - scores[:, 3])
    torch.testing.assert_close(losses(objective="dpo", pairs="extreme"), extreme)
    torch.testing.assert_close(losses(objective="sft"), errors[:, 0])
    torch.testing.assert_close(losses(objective="denoising"), errors.mean(1))


def test_signals_of_a_list_that_is_known() -> None:
    orders = Orders.of([Order((0, 1, 2)), Order((0, 1))])
    reference = torch.zeros(5)
    # Gains: 3, 1, 2 (one of three pairs wrong), then a tie.
    errors = torch.tensor([-3.0, -1.0, -2.0, -1.0, -1.0])
    found = signals(errors, reference, torch.tensor([0, 0, 0, 900, 900]), orders.mask_BM, orders, 1000)
    values = {name: float(value) / float(weight) for name, (value, weight) in found.items() if float(weight)}
    assert math.isclose(values["pair_accuracy"], 2.5 / 4)
    assert math.isclose(values["top1_accuracy"], (1 + 0.5) / 2)
    assert math.isclose(values["kendall_tau"], (1 / 3 + 0) / 2, rel_tol=1e-6)
    assert values["winner_error"] == -2
    assert values["loser_error"] == -1.5
    assert math.isclose(values["pair_accuracy/t0"], 2 / 3, rel_tol=1e-6)
    assert values["pair_accuracy/t3"] == values["pair_accuracy/m2"] == 0.5
    assert "pair_accuracy/t1" not in values


def test_the_safeguard_keeps_winners_errors_from_growing(base: LoadedDiffusion, corpus: Any) -> None:
    denoiser, parameters = denoiser_of(base)
    samples = [sample for sample in drawn(base, corpus, 9) if len(sample) == 2][:1]
    learn = ObjectiveConfig(safeguard_mu=0.0)
    for caching in ("none", "one-pass"):
        _, step, _ = gradient(denoiser, parameters, samples, learn, caching=caching)
        _, winner, _ = gradient(denoiser, parameters, samples, ObjectiveConfig(objective="sft"))
        if caching == "one-pass":  # there the promise holds for the parameters themselves
            assert float(step @ winner) > -1e-6 * float(step.norm() * winner.norm())
        assert step.norm() > 0


def test_a_run_that_was_cut_off_ends_in_the_same_weights(base: LoadedDiffusion, corpus: Any, tmp_path: Path) -> None:
    config = TuneConfig(steps=4, batch=4, learning_rate=1e-3, checkpoint_every=2)

    class Cut(Exception):
        pass

    def stop(figures: Any) -> None:
        if figures["step"] == 2:
            raise Cut

    def run(folder: Path, world: World) -> torch.Tensor:
        denoiser, parameters = denoiser_of(base)
        tune(denoiser, parameters, source(base, corpus), ObjectiveConfig(), config, str(folder), world)
        return torch.cat([p.detach().flatten() for _, p in parameters])

    whole = run(tmp_path / "whole", World())
    with pytest.raises(Cut):
        run(tmp_path / "cut", World(report=stop))
    assert torch.equal(run(tmp_path / "cut", World()), whole)


def test_a_loss_that_is_no_number_names_the_list(base: LoadedDiffusion, corpus: Any, tmp_path: Path) -> None:
    class Broken(ListSource):
        def load(self, index: int, seed: int) -> ListSample:
            sample = super().load(index, seed)
            return replace(sample, latents_MCHW=sample.latents_MCHW * torch.nan) if index == 7 else sample

    drawing = Drawing(corpus[1], noise_schedule(base.scheduler), DrawConfig(), scaling=(0.0, 1.0))
    broken = Broken("lists-train", read_lists(corpus[0], "train"), "", drawing)
    denoiser, parameters = denoiser_of(base)
    config = TuneConfig(steps=1, batch=len(broken))
    with pytest.raises(TrainingStopped, match=f"lists-train/{broken.id(7)}"):
        tune(denoiser, parameters, broken, ObjectiveConfig(), config, str(tmp_path), World())


def test_lists_without_images(base: LoadedDiffusion, corpus: Any, tmp_path: Path, caplog: Any) -> None:
    """A few are left out, and said; many are refused: the lists and the images do not belong together."""
    drawing = Drawing(corpus[1], noise_schedule(base.scheduler), DrawConfig(), (0.0, 1.0))

    def lists(count: int) -> ListSource:  # the corpus has the images of 24
        rows = [toy_lists.row(n, 2, split="train") for n in range(count)]
        return list_source(toy_lists.write(tmp_path / f"{count}", rows), "train", drawing)

    assert len(lists(26)) == 24
    assert "2 of 26 lists" in caplog.text
    assert "such as i24-1, i25-1" in caplog.text
    with pytest.raises(ValueError, match=r"6 of 30 lists .* such as i24-1.*--image-root"):
        lists(30)


def test_an_image_whose_latents_are_lost_is_ledgered(base: LoadedDiffusion, corpus: Any, tmp_path: Path) -> None:
    rows = [toy_lists.row(n, 2, split="train") for n in range(30)]
    table = read_lists(toy_lists.write(tmp_path / "lists", rows), "train")
    drawing = Drawing(corpus[1], noise_schedule(base.scheduler), DrawConfig(), (0.0, 1.0))
    denoiser, parameters = denoiser_of(base)
    config = TuneConfig(steps=1, batch=30)
    lists = ListSource("lists", table, "all", drawing)
    summary = tune(denoiser, parameters, lists, ObjectiveConfig(), config, str(tmp_path / "run"), World())
    assert summary.corrupt == 6
    assert "i29-0" in (tmp_path / "run" / "corrupt.jsonl").read_text()
    nothing = ListSource("lists", table.slice(24), "lost", drawing)
    with pytest.raises(TrainingStopped, match="none of the first 30 samples could be read"):
        tune(denoiser, parameters, nothing, ObjectiveConfig(), config, str(tmp_path / "none"), World())


def test_learning_shows_on_lists_that_it_did_not_see(base: LoadedDiffusion, corpus: Any, tmp_path: Path) -> None:
    denoiser, parameters = denoiser_of(base)
    learn = ObjectiveConfig(kl_beta=50.0)
    config = TuneConfig(steps=16, batch=8, learning_rate=3e-3, warmup_ratio=0.0, micro_batch=8)
    held_out = source(base, corpus, "test")
    before = measure(denoiser, held_out, learn, config, draws=2)
    tune(denoiser, parameters, source(base, corpus), learn, config, str(tmp_path), World())
    after = measure(denoiser, held_out, learn, config, draws=2)
    assert after["pair_accuracy"] > max(0.75, before["pair_accuracy"])


def test_settings_that_do_not_go_together(base: LoadedDiffusion, corpus: Any, tmp_path: Path) -> None:
    denoiser, parameters = denoiser_of(base)
    with pytest.raises(ValueError, match="--safeguard-mu is about losers, which sft"):
        tune(
            denoiser,
            parameters,
            source(base, corpus),
            ObjectiveConfig(objective="sft", safeguard_mu=0.5),
            TuneConfig(steps=1),
            str(tmp_path),
            World(),
        )
    with pytest.raises(ValueError, match="no list in split 'validation'"):
        source(base, corpus, "validation")


def test_implicit_rewards_use_the_convention_of_diffusers() -> None:
    rewards = objectives.implicit_rewards(torch.tensor([0.1]), torch.tensor([0.3]), 5000.0)
    torch.testing.assert_close(rewards, torch.tensor([500.0]))
