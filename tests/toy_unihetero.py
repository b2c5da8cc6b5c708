"""Tiny models and samples for the tests of the unified model."""

import torch
from diffusers import AutoencoderKL
from transformers import LlamaForCausalLM, ViTConfig, ViTImageProcessor, ViTModel

from palate.corpora import captions
from palate.corpora.worlds import scenes
from palate.models.small_lm import small_llama, word_tokenizer
from palate.models.small_vision import random_encoder, vit_config
from palate.unihetero.arms import ARMS, configured
from palate.unihetero.model import UniHeteroConfig, UniHeteroModel
from palate.unihetero.phrasing import Phrasing, add_image_tokens, with_tokens

WIDTH, FEATURES, PLACES, LATENT = 32, 24, 4, 6
SAID = "a red blue circle square what where is it left right"
WORDS = ["Caption:", "Question:", "Answer:", *SAID.split()]


def tokenizer():
    found = word_tokenizer(WORDS)
    add_image_tokens(found)
    return found


def phrasing():
    return Phrasing(tokenizer(), PLACES)


def language(seed=0, layers=3) -> LlamaForCausalLM:
    return small_llama(len(tokenizer()), WIDTH, layers, seed=seed)


def vision() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=FEATURES,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
    )
    return ViTModel(config, add_pooling_layer=False).eval()


def config(**values) -> UniHeteroConfig:
    settings = UniHeteroConfig(
        text_config=language().config,
        vision_config=vision().config,
        image_tokens=PLACES,
        embed_scale=0.02,
        latent_width=LATENT,
        head_width=16,
        **values,
    )
    return with_tokens(settings, tokenizer())


def model(arm="understanding", loss="cosine", seed=0, **values) -> UniHeteroModel:
    chosen = arm if not isinstance(arm, str) else ARMS[arm]
    settings = configured(config(**values), chosen, loss, branch_from=1)
    return UniHeteroModel.from_parts(language(seed), vision(), settings, seed)


def samples(count=3, encoded=True, latents=True, words=None):
    """Image-first samples of a caption and two questions, and one written text first."""
    said = words or phrasing()
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        shape = (1, PLACES, FEATURES) if encoded else (1, 3, 16, 16)
        images = torch.randn(shape, generator=generator)
        given = {"encoded": encoded, "seed": number}
        if latents:
            given["latents"] = torch.randn(1, PLACES, LATENT, generator=generator)
        if number % 3 == 2:
            found.append(said.to_draw(f"s{number}", "a blue square", images, **given))
        else:
            segments = [
                said.caption("a red circle left"),
                said.question("what is it", "circle"),
                said.question("where is it", "left"),
            ]
            found.append(said.described(f"s{number}", images, segments, **given))
    return found


def build_parts(root):
    """A folder with a corpus of shards and its index, a language model, a vision encoder and an autoencoder."""
    made = scenes.prepare(
        scenes.ScenesConfig(out=f"{root}/scenes", encoder=0, train=24, validation=0, test=6, per_shard=8)
    )
    captions.prepare(
        captions.CaptionsConfig(input=(f"{made.url}/train/*.tar",), out=f"{root}/index", duplicate_distance=None)
    )
    words = word_tokenizer(["Caption:", "Question:", "Answer:", *scenes.vocabulary()])
    small_llama(len(words), 32, 2).save_pretrained(root / "language")
    words.save_pretrained(root / "language")
    random_encoder(vit_config(scenes.SIDE, patch=8, width=16, layers=1)).save_pretrained(root / "vision")
    size = {"height": scenes.SIDE, "width": scenes.SIDE}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(root / "vision")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    ).save_pretrained(root / "vae")
    return root
