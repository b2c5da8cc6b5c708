"""The personal branch: nobody is the base model bit for bit; what is stored runs in plain diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from palate.lpo import personal
from palate.lpo.denoising import Conditioning, predict
from palate.models.small_diffusion import build_shapes_pipeline

WIDTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    build_shapes_pipeline(0).save_pretrained(folder)
    return folder


def given(count: int, people: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> Conditioning:
    text = torch.randn(count, 16, 64, generator=torch.Generator().manual_seed(1))
    return Conditioning(text, user_NJ=people, user_scale_N=scale)


def with_branch(folder: Path) -> tuple[StableDiffusionPipeline, personal.People]:
    """A branch that says something: its values are not zero any more."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    personal.add_branch(pipeline.unet, WIDTH, seed=3)
    for name, parameter in personal.branch_parameters(pipeline.unet):
        if "to_v_ip" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return pipeline, personal.new_people(["ann", "bob", "cid"], WIDTH, seed=4)


def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 16, 16, generator=generator), torch.tensor([5, 300, 700, 999][:count])


@torch.no_grad()
def test_nobody_gets_the_base_models_prediction_bit_for_bit(folder: Path) -> None:
    base = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).unet
    pipeline, people = with_branch(folder)
    noisy, times = drawn(4)
    plain = predict(base, "sd", noisy, times, given(4))
    places = torch.tensor([[0.0], [1.0], [2.0], [0.0]])
    nobody = people.given(pipeline.unet, given(4, places, torch.zeros(4)))
    assert torch.equal(predict(pipeline.unet, "sd", noisy, times, nobody), plain)
    some = people.given(pipeline.unet, given(4, places, torch.tensor([1.0, 0.0, 1.0, 0.0])))
    mixed = predict(pipeline.unet, "sd", noisy, times, some)
    assert torch.equal(mixed[[1, 3]], plain[[1, 3]])
    assert (mixed[[0, 2]] - plain[[0, 2]]).abs().amax() > 1e-3


@torch.no_grad()
def test_a_new_branch_adds_nothing(folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    noisy, times = drawn(2)
    plain = predict(pipeline.unet, "sd", noisy, times, given(2))
    personal.add_branch(pipeline.unet, WIDTH)
    people = personal.new_people(["ann"], WIDTH)
    with_person = people.given(pipeline.unet, given(2, torch.zeros(2, 1), torch.ones(2)))
    assert torch.equal(predict(pipeline.unet, "sd", noisy, times, with_person), plain)


def test_gradients_reach_the_branch_and_the_people_alone(folder: Path) -> None:
    pipeline, people = with_branch(folder)
    noisy, times = drawn(2)
    conditioning = people.given(pipeline.unet, given(2, torch.tensor([[0.0], [1.0]]), torch.tensor([1.0, 1.0])))
    predict(pipeline.unet, "sd", noisy, times, conditioning).square().mean().backward()
    touched = {name for name, p in pipeline.unet.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched
    assert all("_ip." in name or name.startswith("encoder_hid_proj.") for name in touched)
    gradient = people.embeddings_UJ.grad
    assert gradient is not None
    assert (gradient[:2].abs().sum(1) > 0).all()
    assert gradient[2].abs().sum() == 0


@torch.no_grad()
def test_plain_diffusers_runs_what_is_stored(folder: Path, tmp_path: Path) -> None:
    pipeline, people = with_branch(folder)
    personal.save_branch(pipeline.unet, people, tmp_path)
    vanilla = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    vanilla.load_ip_adapter(str(tmp_path), "", personal.ADAPTER, image_encoder_folder=None)
    noisy, times = drawn(2)
    own = predict(
        pipeline.unet,
        "sd",
        noisy,
        times,
        people.given(pipeline.unet, given(2, torch.tensor([[1.0], [2.0]]), torch.ones(2))),
    )
    embeddings = people.embeddings_UJ[[1, 2]]
    theirs = vanilla.unet(noisy, times, given(2).text_NLD, added_cond_kwargs={"image_embeds": [embeddings[:, None]]})
    torch.testing.assert_close(own, theirs.sample, rtol=1e-5, atol=1e-5)
    images = vanilla(
        "a small red circle on grey",
        ip_adapter_image_embeds=[embeddings[:1, None].repeat(2, 1, 1)],
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    vanilla.set_ip_adapter_scale(0.0)
    base = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    settings = {"num_inference_steps": 2, "output_type": "np"}
    stranger = vanilla(
        "a small red circle on grey",
        ip_adapter_image_embeds=[embeddings[:1, None].repeat(2, 1, 1)],
        generator=torch.Generator().manual_seed(0),
        **settings,
    ).images
    plain = base("a small red circle on grey", generator=torch.Generator().manual_seed(0), **settings).images
    assert (stranger == plain).all()
    assert (images != plain).any()


def test_a_stored_branch_comes_back(folder: Path, tmp_path: Path) -> None:
    pipeline, people = with_branch(folder)
    personal.save_branch(pipeline.unet, people, tmp_path)
    again = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    loaded = personal.load_branch(again.unet, tmp_path)
    assert loaded.ids == people.ids
    assert torch.equal(loaded.embeddings_UJ, people.embeddings_UJ)
    theirs = dict(again.unet.named_parameters())
    for name, parameter in personal.branch_parameters(pipeline.unet):
        assert torch.equal(parameter, theirs[name]), name
    (tmp_path / personal.USERS).unlink()
    with pytest.raises(FileNotFoundError, match=r"users\.safetensors"):
        personal.load_branch(again.unet, tmp_path)


def test_other_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="personal tuning needs a U-Net"):
        personal.add_branch(torch.nn.Linear(2, 2), WIDTH)
