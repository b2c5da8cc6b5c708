"""The whole pipeline on toy lists; what it writes, plain diffusers loads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from PIL import Image

import toy_lists
from palate import artifacts
from palate.artifacts import Artifact
from palate.lpo.encoding import EncodeConfig
from palate.lpo.networks import WeightsConfig
from palate.lpo.sampling import SampleConfig, generate
from palate.lpo.stages import LpoConfig, PersonalConfig, pipeline
from palate.lpo.training import ObjectiveConfig, TuneConfig
from palate.models.diffusion import load_diffusion
from palate.training.parallel import World

PROMPT = "a small red circle on grey"


def config(lists: Artifact, out: Path, **changes: Any) -> LpoConfig:
    return LpoConfig(
        lists=lists.url,
        out=str(out),
        encode=EncodeConfig(resolution=16, latent_dtype="float32", encode_batch=32),
        learn=ObjectiveConfig(kl_beta=50.0),
        tune=TuneConfig(steps=3, batch=4, learning_rate=3e-3, checkpoint_every=2),
        sample=SampleConfig(sampler_steps=2),
        grid=2,
        **changes,
    )


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return toy_lists.lists(tmp_path_factory.mktemp("lists") / "lists")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    load_diffusion("shapes").pipeline.save_pretrained(folder)
    return folder


def image(pipeline: Any, **keywords: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(PROMPT, num_inference_steps=2, generator=generator, output_type="np", **keywords).images


def test_a_lora_that_plain_diffusers_loads(lists: Artifact, base: Path, tmp_path: Path) -> None:
    settings = config(lists, tmp_path / "run", model=str(base), weights=WeightsConfig(rank=4))
    tuned = pipeline(settings, World())
    assert pipeline(settings, World()).created == tuned.created  # finished: nothing is done again
    vanilla = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    plain = image(vanilla)
    vanilla.load_lora_weights(tuned.local_folder("lora"))
    assert abs(image(vanilla) - plain).max() > 1e-3
    vanilla.disable_lora()
    assert (image(vanilla) == plain).all()
    report = tuned.read_json("report.json")
    assert 0 <= report["test/pair_accuracy"] <= 1
    with Image.open(tuned.local("grid.png")) as grid:
        assert grid.size[0] > 2 * 160
    card = tuned.local("README.md").read_text()
    assert "load_lora_weights" in card
    assert "kl_beta | 50.0" in card
    with pytest.raises(artifacts.ArtifactMismatch, match="kl_beta"):
        pipeline(replace(settings, learn=ObjectiveConfig(kl_beta=60.0)), World())


def test_a_lora_made_elsewhere_is_start_and_reference(lists: Artifact, base: Path, tmp_path: Path) -> None:
    first = pipeline(config(lists, tmp_path / "a", model=str(base), weights=WeightsConfig(rank=4)), World())
    folder = str(first.local_folder("lora"))
    weights = WeightsConfig(start_lora=folder, reference_lora=folder)
    settings = config(lists, tmp_path / "b", model=str(base), weights=weights)
    untouched = replace(settings, tune=replace(settings.tune, learning_rate=0.0))
    second = pipeline(untouched, World())
    # Start and reference are one network, so nothing tells the images of a list apart.
    assert second.read_json("report.json")["test/pair_accuracy"] == pytest.approx(0.5)
    assert second.read_json("report.json")["test/winner_error"] == pytest.approx(0.0, abs=1e-6)
    ours = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    ours.load_lora_weights(folder)
    theirs = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    theirs.load_lora_weights(second.local_folder("lora"))
    assert abs(image(ours) - image(theirs)).max() < 1e-5


def test_all_weights_and_a_pipeline_that_plain_diffusers_loads(lists: Artifact, base: Path, tmp_path: Path) -> None:
    weights = WeightsConfig(weights="full", gradient_checkpointing=True)
    tuned = pipeline(config(lists, tmp_path, model=str(base), weights=weights), World())
    vanilla = StableDiffusionPipeline.from_pretrained(tuned.local_folder("pipeline"), safety_checker=None)
    before = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    assert abs(image(vanilla) - image(before)).max() > 1e-3


def test_people_that_plain_diffusers_serves(lists: Artifact, base: Path, tmp_path: Path) -> None:
    settings = config(lists, tmp_path, model=str(base), personal=PersonalConfig(personal="learned", width=8))
    tuned = pipeline(settings, World())
    vanilla = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    plain = image(vanilla)
    folder = str(tuned.local_folder("person"))
    vanilla.load_ip_adapter(folder, "", "ip_adapter.safetensors", image_encoder_folder=None)
    embeddings = torch.randn(2, 1, 8)
    assert abs(image(vanilla, ip_adapter_image_embeds=[embeddings]) - plain).max() > 1e-5
    vanilla.set_ip_adapter_scale(0.0)
    assert (image(vanilla, ip_adapter_image_embeds=[embeddings]) == plain).all()


def test_edits(tmp_path: Path) -> None:
    rows = [
        toy_lists.row(number, 3, source_image="source-0", instruction="make the circle red") for number in range(12)
    ]
    lists = toy_lists.write(tmp_path / "lists", rows)
    tuned = pipeline(config(lists, tmp_path / "run", model="shapes-edit"), World())
    base = load_diffusion("shapes-edit").pipeline
    source = Image.new("RGB", (16, 16), "blue")
    settings = SampleConfig(sampler_steps=2)
    (before,) = generate(base, ["make the circle red"], [0], settings, sources=[source])
    assert isinstance(base, StableDiffusionInstructPix2PixPipeline)
    base.load_lora_weights(tuned.local_folder("lora"))
    (after,) = generate(base, ["make the circle red"], [0], settings, sources=[source])
    assert before.tobytes() != after.tobytes()


def test_lists_without_people_cannot_be_personal(tmp_path: Path) -> None:
    lists = toy_lists.write(tmp_path / "lists", [toy_lists.row(n, 2, user_id=None) for n in range(6)])
    with pytest.raises(ValueError, match="names no person"):
        pipeline(config(lists, tmp_path / "run", model="shapes", personal=PersonalConfig(personal="learned")), World())


def test_images_do_not_depend_on_the_batch() -> None:
    base = load_diffusion("shapes").pipeline
    prompts, seeds = [*toy_lists.CAPTIONS, toy_lists.CAPTIONS[0]], [1, 2, 3, 4]
    together = generate(base, prompts, seeds, SampleConfig(sampler_steps=2, batch=4))
    alone = generate(base, prompts, seeds, SampleConfig(sampler_steps=2, batch=1))
    for one, other in zip(together, alone, strict=True):
        difference = torch.tensor(list(one.tobytes())).int() - torch.tensor(list(other.tobytes())).int()
        assert difference.abs().max() <= 1
    assert together[0].tobytes() != together[3].tobytes()
