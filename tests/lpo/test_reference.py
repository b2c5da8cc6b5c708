"""Reference errors computed before the training are those that it would compute."""

from pathlib import Path
from typing import Any

import pytest
import torch

import toy_lists
from palate.artifacts import ArtifactMismatch
from palate.lpo import reference, training
from palate.lpo.denoising import noise_schedule
from palate.lpo.encoding import EncodeConfig, encode
from palate.lpo.networks import WeightsConfig, tuned
from palate.lpo.samples import DrawConfig, Drawing, ListSource, list_source
from palate.lpo.training import Denoiser, ObjectiveConfig, TuneConfig
from palate.models.diffusion import load_diffusion
from palate.training.parallel import World


@pytest.fixture
def made(tmp_path: Path) -> tuple[Denoiser, Any, ListSource]:
    """A denoiser whose LoRA has moved, its parameters, and lists with two draws each."""
    lists = toy_lists.lists(tmp_path / "lists")
    settings = EncodeConfig(resolution=16, latent_dtype="float32")
    loaded = load_diffusion("shapes")
    schedule = noise_schedule(loaded.scheduler)
    encoded = encode(lists, "shapes", str(tmp_path / "encoded"), settings)
    source = list_source(lists, "train", Drawing(encoded, schedule, DrawConfig(fixed_draws=2), (0.0, 1 / 0.65)))
    parameters, base = tuned(loaded, WeightsConfig(rank=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return Denoiser(loaded.denoiser, "sd", schedule, base), parameters, source


def gradient(denoiser: Denoiser, parameters: Any, samples: Any, **learn: Any) -> tuple[torch.Tensor, torch.Tensor]:
    for _, parameter in parameters:
        parameter.grad = None
    output = training.step_loss(
        denoiser.network,
        samples,
        {"lists": float(len(samples))},
        denoiser=denoiser,
        objective=ObjectiveConfig(**learn),
        config=TuneConfig(),
    )
    output.loss.backward()
    return output.loss.detach(), torch.cat([parameter.grad.flatten() for _, parameter in parameters])


@pytest.mark.parametrize("learn", [{"objective": "lpo"}, {"objective": "dpo", "pairs": "random"}])
def test_loss_and_gradient_are_the_same(
    made: tuple[Denoiser, Any, ListSource], learn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, parameters, source = made
    known = reference.precomputed(denoiser, source, TuneConfig(), str(tmp_path / "reference"), World(), {})
    before = gradient(denoiser, parameters, [source.load(index, 5) for index in range(6)], **learn)

    def never(*_: Any) -> None:
        raise AssertionError("the reference was asked again")

    monkeypatch.setattr(training, "reference_errors", never)
    monkeypatch.setattr(reference, "reference_errors", never)
    after = gradient(denoiser, parameters, [known.load(index, 5) for index in range(6)], **learn)
    torch.testing.assert_close(after[0], before[0], rtol=1e-4, atol=1e-5)
    assert (after[1] - before[1]).norm() < 1e-3 * before[1].norm()
    # What is there is used; another model's is refused.
    reference.precomputed(denoiser, source, TuneConfig(), str(tmp_path / "reference"), World(), {})
    with pytest.raises(ArtifactMismatch, match="model"):
        reference.precomputed(denoiser, source, TuneConfig(), str(tmp_path / "reference"), World(), {"model": "x"})


def test_training_goes_through_the_same_draws_again(made: tuple[Denoiser, Any, ListSource]) -> None:
    source = made[2]
    noises = [source.load(0, seed).noise_MCHW for seed in range(6)]
    assert torch.equal(noises[0], noises[2])
    assert torch.equal(noises[1], noises[5])
    assert not torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], source.load(1, 0).noise_MCHW[: len(noises[0])][:1])


def test_every_rank_makes_its_shards_and_a_killed_run_goes_on(
    made: tuple[Denoiser, Any, ListSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, _, source = made
    monkeypatch.setattr(reference, "LISTS", 6)
    whole = reference.precomputed(denoiser, source, TuneConfig(), str(tmp_path / "whole"), World(), {})
    calls: list[int] = []
    real = reference.reference_errors

    def dying(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(reference, "reference_errors", dying)
    with pytest.raises(KeyboardInterrupt):
        reference.precomputed(denoiser, source, TuneConfig(), str(tmp_path / "parts"), World(), {})
    monkeypatch.setattr(reference, "reference_errors", real)
    parts = reference.precomputed(denoiser, source, TuneConfig(), str(tmp_path / "parts"), World(), {})
    for index in range(len(source)):
        for draw in range(2):
            assert torch.equal(parts.draw(index, draw).reference_M, whole.draw(index, draw).reference_M)
