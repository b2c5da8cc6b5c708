"""The small pipelines for coloured shapes: tokenizer, identity autoencoder, and that diffusers runs them."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.corpora.worlds import shapes
from palate.models.small_diffusion import TOKENS, build_shapes_pipeline, identity_vae, word_tokenizer

CAPTION = "a small red circle on grey"


@pytest.fixture(scope="module")
def pipeline():
    made = build_shapes_pipeline(0)
    made.set_progress_bar_config(disable=True)
    return made


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("abcde", min_size=1, max_size=6), min_size=1, max_size=12))
def test_every_word_is_one_token_whatever_the_others_are(words):
    tokenizer = word_tokenizer(words, 16)
    for word in words:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]


def test_unknown_text_is_kept_in_pieces_and_long_text_is_cut(pipeline):
    tokenizer = pipeline.tokenizer
    assert tokenizer.decode(tokenizer("a Red zebra").input_ids, skip_special_tokens=True) == "a red zebra"
    ids = tokenizer(" ".join(["red"] * 40), truncation=True, max_length=TOKENS).input_ids
    assert len(ids) == TOKENS
    assert ids[-1] == tokenizer.eos_token_id
    for asked in shapes.ASKED:
        assert len(tokenizer(asked.caption).input_ids) == 8


def test_all_captions_are_encoded_apart(pipeline):
    captions = [asked.caption for asked in shapes.ASKED]
    encoded, _ = pipeline.encode_prompt(captions, "cpu", 1, False)
    distances = torch.cdist(encoded.flatten(1), encoded.flatten(1)) + 1e9 * torch.eye(len(captions))
    assert encoded.shape == (144, TOKENS, 64)
    assert distances.min() > 1


@torch.no_grad()
@pytest.mark.parametrize("fill", [-1.0, 0.0, 1.0, None])
def test_the_autoencoder_is_the_identity(fill):
    vae = identity_vae(1.0)
    images = torch.rand(2, 3, 16, 16) * 2 - 1 if fill is None else torch.full((2, 3, 16, 16), fill)
    posterior = vae.encode(images).latent_dist
    assert (posterior.mean - images).abs().max() < 1e-3
    assert posterior.std.max() < 1e-6
    assert (vae.decode(images).sample - images).abs().max() < 1e-3


def test_latents_of_scenes_have_deviation_one(pipeline):
    random = np.random.default_rng(0)
    images = torch.from_numpy(shapes.paint([shapes.draw_scene(asked, random) for asked in shapes.ASKED])).float()
    with torch.no_grad():
        latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    assert abs(latents.std() - 1) < 0.05


def sample(pipeline, **options):
    generator = torch.Generator().manual_seed(0)
    return pipeline(num_inference_steps=2, generator=generator, output_type="pt", **options).images


def test_vanilla_diffusers_loads_it_and_draws_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    images = sample(pipeline, prompt=CAPTION)
    assert images.shape == (1, 3, shapes.SIDE, shapes.SIDE)
    assert torch.equal(sample(again, prompt=CAPTION), images)
    assert not torch.equal(sample(again, prompt="a large blue cross on white"), images)
    assert torch.equal(build_shapes_pipeline(0).unet.conv_in.weight, pipeline.unet.conv_in.weight)
    assert not torch.equal(build_shapes_pipeline(1).unet.conv_in.weight, pipeline.unet.conv_in.weight)


def test_the_editor_sees_the_source_and_takes_dual_guidance(tmp_path):
    build_shapes_pipeline(0, edit=True).save_pretrained(tmp_path)
    editor = DiffusionPipeline.from_pretrained(tmp_path)
    sources = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"prompt": "make the circle red", "guidance_scale": 2.0, "image_guidance_scale": 1.5}
    one, other = (sample(editor, image=source, **options) for source in sources)
    assert one.shape == (1, 3, shapes.SIDE, shapes.SIDE)
    assert not torch.equal(one, other)
