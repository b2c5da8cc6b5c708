"""The whole pipeline on toy lists; what it writes, plain diffusers loads."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny_diffusion
import toy_lists
import toy_runs
from palate import artifacts
from palate.artifacts import Artifact
from palate.config import from_dict
from palate.lpo.encoding import EncodeConfig, encode
from palate.lpo.networks import WeightsConfig
from palate.lpo.newcomers import NewcomersConfig, add_people
from palate.lpo.personal import load_branch, load_people, set_people
from palate.lpo.samples import DrawConfig
from palate.lpo.sampling import SampleConfig, generate
from palate.lpo.stages import LpoConfig, PersonalConfig, check_base, drawing_of, pipeline, start_over
from palate.lpo.taste import taste_vectors
from palate.lpo.training import ObjectiveConfig
from palate.models.diffusion import load_diffusion
from palate.models.image_features import pixel_statistics
from palate.training.parallel import World

PROMPT = "a small red circle on grey"


def config(lists: Artifact, out: Path, **changes: Any) -> LpoConfig:
    return toy_runs.lpo(lists.url, out, **changes)


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
    assert toy_runs.with_objects(tmp_path, lists.url) == []
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
    file = next(Path(folder).glob("*.safetensors"))
    save_file({name: 2 * values for name, values in load_file(file).items()}, file)
    with pytest.raises(artifacts.ArtifactMismatch, match="lora_weights"):
        pipeline(untouched, World())


def test_all_weights_and_a_pipeline_that_plain_diffusers_loads(lists: Artifact, base: Path, tmp_path: Path) -> None:
    weights = WeightsConfig(weights="full", gradient_checkpointing=True)
    tuned = pipeline(config(lists, tmp_path, model=str(base), weights=weights), World())
    vanilla = StableDiffusionPipeline.from_pretrained(tuned.local_folder("pipeline"), safety_checker=None)
    before = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    assert abs(image(vanilla) - image(before)).max() > 1e-3


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_reference_that_was_computed_before(lists: Artifact, base: Path, tmp_path: Path, weights: Any) -> None:
    settings = config(lists, tmp_path, model=str(base), weights=WeightsConfig(weights=weights))
    settings = replace(settings, draw=DrawConfig(fixed_draws=2))
    report = pipeline(settings, World()).read_json("report.json")
    # Training has moved the network away from the base, which is there again to be compared with.
    assert 1e-6 < abs(report["test/winner_error"]) < 0.5
    assert artifacts.folders(tmp_path / "reference")
    start_over(replace(settings, fresh=True))
    assert not any(artifacts.exists(folder) for folder in artifacts.folders(tmp_path / "reference"))


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


def test_people_with_examples_have_a_vector_whether_trained_on_or_not(base: Path, tmp_path: Path) -> None:
    rows = [toy_lists.row(number, 3, split="train", user_id=f"user-{number % 3}") for number in range(9)]
    rows += [toy_lists.row(9 + n, 3, split="examples", user_id=f"user-{n % 4}") for n in range(4)]
    lists = toy_lists.write(tmp_path / "lists", rows)
    chosen = PersonalConfig(personal="examples")
    tuned = pipeline(config(lists, tmp_path / "run", model=str(base), personal=chosen), World())
    network = StableDiffusionPipeline.from_pretrained(base, safety_checker=None).unet
    people = load_branch(network, tuned.local_folder("person"))
    assert people.ids == ("user-0", "user-1", "user-2", "user-3")
    vectors = taste_vectors(lists, "examples", pixel_statistics).vectors_UD
    torch.testing.assert_close(people.embeddings_UJ, torch.from_numpy(vectors).float(), check_dtype=False)
    vanilla = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    plain = image(vanilla)
    vanilla.load_ip_adapter(str(tuned.local_folder("person")), "", "ip_adapter.safetensors", image_encoder_folder=None)
    stranger = people.embeddings_UJ[3].detach().expand(2, 1, -1)
    assert abs(image(vanilla, ip_adapter_image_embeds=[stranger]) - plain).max() > 1e-5


def test_people_who_come_after_the_training(base: Path, tmp_path: Path) -> None:
    rows = [toy_lists.row(number, 3, split="train", user_id="ann") for number in range(4)]
    rows += [toy_lists.row(4 + n, 3, split="examples", user_id=user) for n, user in enumerate(("ann", "bob"))]
    lists = toy_lists.write(tmp_path / "lists", rows)
    chosen = PersonalConfig(personal="examples")
    run = config(lists, tmp_path / "run", model=str(base), personal=chosen)
    tuned = pipeline(run, World())
    later = [toy_lists.row(5, 3, split="train", user_id="eve"), toy_lists.row(6, 3, split="test", user_id="ann")]
    new = NewcomersConfig(run=run.out, lists=toy_lists.write(tmp_path / "later", later).url, out=str(tmp_path / "with"))
    made = add_people(new)
    assert (made.summary["people"], made.summary["added"]) == (3, 1)
    network = StableDiffusionPipeline.from_pretrained(base, safety_checker=None).unet
    before = load_people(tuned.local_folder("person"))
    after = load_branch(network, made.local_folder("person"))
    assert after.ids == ("ann", "bob", "eve")
    assert torch.equal(after.embeddings_UJ[1], before.embeddings_UJ[1])
    assert not torch.equal(after.embeddings_UJ[0], before.embeddings_UJ[0])  # of what she ranked now
    # In the measure of the training: what differs is said in its spreads and divided by its size.
    trained = taste_vectors(lists, "examples", pixel_statistics)
    alone = taste_vectors(artifacts.open_artifact(new.lists), None, pixel_statistics)
    told = np.isfinite(trained.spreads_D) & np.isfinite(alone.spreads_D)
    raw_D = alone.vectors_UD[1] * alone.size * np.where(told, alone.spreads_D, 0)
    expected_D = raw_D / trained.spreads_D / trained.size
    assert after.embeddings_UJ[2].detach().numpy()[told] == pytest.approx(expected_D[told], rel=1e-5)
    assert abs(expected_D[told]).max() > 0.1
    again = add_people(replace(new, run=new.out, out=str(tmp_path / "twice")))
    assert again.summary["added"] == 0
    learned = replace(run, out=str(tmp_path / "learned"), personal=PersonalConfig(personal="learned"))
    pipeline(learned, World())
    with pytest.raises(ValueError, match="is the run itself"):
        add_people(replace(new, run=new.out, fresh=True))
    assert artifacts.exists(made.url)
    with pytest.raises(artifacts.ArtifactMismatch, match="--personal examples"):
        add_people(replace(new, run=learned.out, out=str(tmp_path / "refused")))


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("caching", ["none", "two-pass", "one-pass"])
def test_lists_that_are_nobodys_change_nothing(
    lists: Artifact, base: Path, tmp_path: Path, caching: Any, micro_batch: int
) -> None:
    """A micro-batch, or a chunk of one, in which everybody is dropped has no gradient, and no more."""
    settings = config(
        lists,
        tmp_path,
        model=str(base),
        personal=PersonalConfig(personal="learned", width=8),
        draw=DrawConfig(user_dropout=0.7),
    )
    tune = replace(settings.tune, micro_batch=micro_batch, caching=caching, chunk=2)
    tuned = pipeline(replace(settings, tune=tune), World())
    rows = [json.loads(line) for line in (tmp_path / "training" / "training.jsonl").read_text().splitlines()]
    assert [row["groups"]["lists"]["total"] for row in rows] == [4.0] * 3
    assert tuned.paths("person/")


def test_another_grid_needs_no_training(lists: Artifact, base: Path, tmp_path: Path) -> None:
    settings = config(lists, tmp_path, model=str(base), weights=WeightsConfig(rank=4))
    first = pipeline(settings, World())
    before = first.local("grid.png").read_bytes()
    weights = load_file(next(Path(first.local_folder("lora")).glob("*.safetensors")))
    second = pipeline(replace(settings, sample=SampleConfig(sampler_steps=3), grid=1), World())
    assert second.local("grid.png").read_bytes() != before
    again = load_file(next(Path(second.local_folder("lora")).glob("*.safetensors")))
    assert all(torch.equal(values, again[name]) for name, values in weights.items())
    assert len((tmp_path / "training" / "training.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encode": {"resolution": 17}}, "--resolution is a multiple of 8, got 17"),
        ({"learn": {"kl_beta": -1.0}}, "--kl-beta is larger than 0"),
        ({"tune": {"batch": 0}}, "--batch is at least 1"),
        ({"draw": {"user_dropout": 2.0}}, "--user-dropout is a share"),
        ({"sample": {"sampler_steps": 0}}, "--sampler-steps is at least 1"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_said(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(LpoConfig, {"lists": "l", "out": "o", **changes})


def test_people_and_other_weights_do_not_go_together(lists: Artifact, tmp_path: Path) -> None:
    weights = WeightsConfig(weights="full")
    settings = config(lists, tmp_path, weights=weights, personal=PersonalConfig(personal="learned"))
    with pytest.raises(ValueError, match=r"--personal learned trains the branch .* leave out --weights"):
        pipeline(settings, World())


def test_people_who_edit(tmp_path: Path) -> None:
    rows = [
        toy_lists.row(number, 3, source_image="source-0", instruction="make the circle red") for number in range(12)
    ]
    lists = toy_lists.write(tmp_path / "lists", rows)
    chosen = PersonalConfig(personal="learned", width=8)
    tuned = pipeline(config(lists, tmp_path / "run", model="shapes-edit", personal=chosen), World())
    with Image.open(tuned.local("grid.png")) as grid:  # the source, nobody's and three people's
        assert grid.size == (220 + 5 * 166, 24 + 166)
    loaded: Any = load_diffusion("shapes-edit").pipeline
    people = load_branch(loaded.unet, tuned.local_folder("person"))
    source, settings = Image.new("RGB", (16, 16), "blue"), SampleConfig(sampler_steps=2)
    images = [
        generate(loaded, ["make the circle red"], [0], settings, sources=[source], embeddings=row[None])[0].tobytes()
        for row in people.embeddings_UJ.detach()[:2]
        if set_people(loaded.unet, torch.ones(1)) is None
    ]
    assert images[0] != images[1]


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
    with Image.open(tuned.local("grid.png")) as grid:  # source, before and after of the one instruction
        assert grid.size == (220 + 3 * 166, 24 + 166)
    assert "grid.png" in tuned.local("README.md").read_text()


def test_a_base_that_was_replaced_in_its_folder(lists: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    made = load_diffusion("shapes").pipeline
    made.save_pretrained(folder)
    settings = replace(config(lists, tmp_path / "run", model=str(folder), weights=WeightsConfig(rank=4)), grid=0)
    tuned = pipeline(settings, World())
    assert "grid.png" not in tuned.local("README.md").read_text()
    with torch.no_grad():
        made.unet.conv_out.weight.mul_(2)
    made.unet.save_pretrained(folder / "unet")
    with pytest.raises(artifacts.ArtifactMismatch, match="base_weights"):
        pipeline(settings, World())
    with pytest.raises(artifacts.ArtifactMismatch, match="tuned from weights"):
        check_base(load_diffusion(str(folder)), tuned)
    artifacts.discard(tuned.url)
    with pytest.raises(artifacts.ArtifactMismatch, match="weights"):  # of what was encoded
        pipeline(settings, World())


@pytest.mark.parametrize("kind", ["sd", "sd-v", "sdxl", "sd3", "flux"])
def test_every_family_is_tuned_and_plain_diffusers_loads_what_is_written(kind: str, tmp_path: Path) -> None:
    lists = toy_lists.lists(tmp_path / "lists", count=12)
    base = tiny_diffusion.save_tiny(kind, tmp_path)
    settings = config(lists, tmp_path / "run", model=str(base), weights=WeightsConfig(rank=4))
    tuned = pipeline(replace(settings, encode=replace(settings.encode, resolution=tiny_diffusion.SIDE)), World())
    vanilla = DiffusionPipeline.from_pretrained(base)
    size = {"height": tiny_diffusion.SIDE, "width": tiny_diffusion.SIDE}
    plain = image(vanilla, **size)
    vanilla.load_lora_weights(tuned.local_folder("lora"))
    assert abs(image(vanilla, **size) - plain).max() > 1e-4
    report = tuned.read_json("report.json")
    assert all(math.isfinite(value) for value in report.values())
    # Three steps away from the reference: the errors differ, and not by much.
    assert 0 < abs(report["test/winner_error"]) < 0.5


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


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_dropped_prompt_is_what_guidance_takes_in_its_place(kind: str, tmp_path: Path) -> None:
    """Of diffusers' pipelines: the empty text with Stable Diffusion, zeros with SDXL."""
    loaded: Any = load_diffusion(str(tiny_diffusion.save_tiny(kind, tmp_path / "model")))
    lists = toy_lists.lists(tmp_path / "lists", count=6)
    encoded = encode(lists, loaded, str(tmp_path / "encoded"), EncodeConfig(resolution=16, latent_dtype="float32"))
    drawing = drawing_of(loaded, encoded, DrawConfig(prompt_dropout=1.0))
    given = drawing.sample(toy_lists.row(0, 2), seed=0).given
    if kind == "sd":
        _, text = loaded.pipeline.encode_prompt("a", "cpu", 1, True)
        assert given.pooled_NP is None
    else:
        _, text, _, pooled = loaded.pipeline.encode_prompt("a", device="cpu", do_classifier_free_guidance=True)
        torch.testing.assert_close(given.pooled_NP, pooled.expand(2, -1))
        assert not given.text_NLD.any()
    torch.testing.assert_close(given.text_NLD, text.expand(2, -1, -1), rtol=1e-5, atol=1e-5)
