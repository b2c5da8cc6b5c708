"""Tiny diffusers pipelines with random weights, from diffusers' and transformers' own classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from palate.models.small_diffusion import text_config, word_tokenizer

WORDS = ("a", "small", "large", "red", "blue", "circle", "square", "on", "black", "make", "the")
WIDTH = 32  # of text; SD3 and FLUX see two encoders' of it at once
SIDE = 32  # pixels of an image; latents have half the sides
CAPTIONS = ["a small red circle on black", "a large blue square", ""]


def save_tiny(kind: str, folder: Path) -> Path:
    """The folder of a saved pipeline of one of ``KINDS``, made unless it is there; its weights are always the same."""
    if not (folder / kind).exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            KINDS[kind]().save_pretrained(folder / kind)
    return folder / kind


def tiny_sd(prediction: str = "epsilon") -> StableDiffusionPipeline:
    return StableDiffusionPipeline(**_sd_parts(prediction, channels=4))


def tiny_ip2p() -> StableDiffusionInstructPix2PixPipeline:
    return StableDiffusionInstructPix2PixPipeline(**_sd_parts("epsilon", channels=8))


def tiny_sdxl() -> StableDiffusionXLPipeline:
    tokenizer = tiny_clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=tiny_vae(4),
        text_encoder=CLIPTextModel(text_config(tokenizer, WIDTH, layers=2)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, WIDTH, layers=2)),
        tokenizer=tokenizer,
        tokenizer_2=tiny_clip_tokenizer(),
        unet=_unet(
            4,
            2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
            use_linear_projection=True,
        ),
        scheduler=_ddim("epsilon"),
    )


def tiny_sd3() -> StableDiffusion3Pipeline:
    tokenizer = tiny_clip_tokenizer()
    return StableDiffusion3Pipeline(
        vae=tiny_vae(4, shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(text_config(tokenizer, WIDTH, layers=2)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, WIDTH, layers=2)),
        text_encoder_3=tiny_t5(2 * WIDTH),
        tokenizer=tokenizer,
        tokenizer_2=tiny_clip_tokenizer(),
        tokenizer_3=tiny_t5_tokenizer(),
        transformer=SD3Transformer2DModel(
            sample_size=SIDE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def tiny_flux() -> FluxPipeline:
    tokenizer = tiny_clip_tokenizer()
    return FluxPipeline(
        vae=tiny_vae(4, shift_factor=0.1),
        text_encoder=CLIPTextModel(text_config(tokenizer, WIDTH, layers=2)),
        text_encoder_2=tiny_t5(WIDTH),
        tokenizer=tokenizer,
        tokenizer_2=tiny_t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


KINDS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": tiny_sd,
    "sd-v": lambda: tiny_sd("v_prediction"),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "ip2p": tiny_ip2p,
}


def tiny_clip_tokenizer() -> CLIPTokenizer:
    """``WORDS`` as tokens, everything else as bytes; prompts of 16 tokens."""
    return word_tokenizer(WORDS, 16)


def tiny_t5_tokenizer() -> T5Tokenizer:
    """``WORDS`` and single letters."""
    pieces = [(f"▁{word}", -1.0) for word in WORDS] + [(chr(code), -5.0) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *pieces]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=32)


def tiny_t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(tiny_t5_tokenizer()), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    )


def tiny_vae(latent_channels: int, **options: Any) -> AutoencoderKL:
    """Halves the sides of images."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=SIDE,
        **options,
    )


def _sd_parts(prediction: str, channels: int) -> dict[str, Any]:
    tokenizer = tiny_clip_tokenizer()
    return {
        "vae": tiny_vae(4),
        "text_encoder": CLIPTextModel(text_config(tokenizer, WIDTH, layers=2)),
        "tokenizer": tokenizer,
        "unet": _unet(channels, WIDTH),
        "scheduler": _ddim(prediction),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _unet(in_channels: int, text_width: int, **options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 2,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    )


def _ddim(prediction: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
