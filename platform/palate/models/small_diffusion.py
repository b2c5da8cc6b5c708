"""Small text-to-image and editing pipelines for the world of coloured shapes, from diffusers' own classes.

They save to folders that vanilla diffusers loads. Nothing is downloaded: the CLIP tokenizer's vocabulary is made of
the words given, the text encoder stays as it was drawn (its random features tell words and places apart), and the VAE
is the identity, so the denoiser works on pixels. All that is to be trained is the U-Net.
"""

from collections.abc import Iterable

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from palate.corpora.worlds import shapes

TOKENS = 16  # of a prompt, start and end included
TEXT_WIDTH = 64
PIXEL_STD = 0.69  # of scenes in [-1, 1], as measured; the denoiser sees pixels divided by it
_START, _END = "<|startoftext|>", "<|endoftext|>"
_QUIET = 128.0  # see identity_vae


def build_shapes_pipeline(
    seed: int, *, edit: bool = False
) -> StableDiffusionPipeline | StableDiffusionInstructPix2PixPipeline:
    """A pipeline with random weights for scenes of ``shapes.SIDE`` pixels; with ``edit`` one that changes a scene."""
    return build_small_pipeline(shapes.vocabulary(), seed, side=shapes.SIDE, pixel_std=PIXEL_STD, edit=edit)


def build_small_pipeline(
    words: Iterable[str], seed: int, *, side: int, pixel_std: float, edit: bool = False
) -> StableDiffusionPipeline | StableDiffusionInstructPix2PixPipeline:
    """A pipeline with random weights for images of ``side`` pixels, a multiple of 8, whose captions are of ``words``.

    v-prediction, 1,000 timesteps with zero terminal SNR (arXiv 2305.08891), DDIM. Weights are a function of the
    seed; torch's own random state is left alone.

    Args:
        pixel_std: of the images, pixels in [-1, 1]; the denoiser sees pixels divided by it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = small_text_encoder(tokenizer := word_tokenizer(words, TOKENS))
        unet = UNet2DConditionModel(
            sample_size=side,
            in_channels=6 if edit else 3,
            out_channels=3,
            # Few channels where there are many pixels: that is where a CPU's time goes.
            block_out_channels=(16, 32, 48),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            # Pooled text beside the timestep in every block: with cross-attention at 4 x 4 alone it took six times as
            # long until what was drawn was what the text asks for.
            addition_embed_type="text",
            addition_embed_type_num_heads=8,
            attention_head_dim=8,
            norm_num_groups=1,
        )
        vae = identity_vae(1 / pixel_std, side)
    made = StableDiffusionInstructPix2PixPipeline if edit else StableDiffusionPipeline
    return made(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def word_tokenizer(words: Iterable[str], length: int) -> CLIPTokenizer:
    """A CLIP tokenizer to which every given word (ASCII letters) is one token; other text falls into bytes.

    Args:
        length: tokens of a prompt, start and end included; longer prompts are cut.
    """
    merges: list[tuple[str, str]] = []
    for word in sorted({word.lower() for word in words}):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for merge in merges:
            pieces = _merged(pieces, merge)
        # What the earlier words' merges leave apart; later words' merges come too late to touch this one.
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merged(pieces, merges[-1])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(tokens), _START, _END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def _merged(pieces: list[str], merge: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == merge:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def small_text_encoder(tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH) -> CLIPTextModel:
    """A CLIP text encoder of one layer with random weights, drawn from torch's random state."""
    return CLIPTextModel(text_config(tokenizer, width, layers=1)).eval()


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """Sizes of a small CLIP text encoder that fits the tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def identity_vae(scaling_factor: float, side: int = shapes.SIDE) -> AutoencoderKL:
    """An ``AutoencoderKL`` whose latents are the pixels: mean x, deviation e^-15, and decoding gives x back.

    Its residual branches are zero. The eight hidden channels are (x, -x, q, -q) with a constant q far larger than any
    pixel: their mean is 0 and their variance is q^2/4 whatever the image, to one part in 10^4, so group normalization
    only divides by q/2; and silu(u) - silu(-u) = u undoes the activation.
    """
    vae = AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=3,
        norm_num_groups=1,
        layers_per_block=1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scaling_factor,
        force_upcast=False,
        sample_size=side,
    )
    for weight in vae.parameters():
        weight.zero_()
    signs = torch.cat([torch.eye(3), -torch.eye(3), torch.zeros(2, 3)])
    for half in (vae.encoder, vae.decoder):
        half.conv_norm_out.weight.fill_(1)
        _centre(half.conv_in.weight).copy_(signs)
        half.conv_in.bias[6:] = torch.tensor([_QUIET, -_QUIET])
        _centre(half.conv_out.weight)[:3].copy_(_QUIET / 2 * signs.T)
    vae.encoder.conv_out.bias[3:] = -30  # log variances, the least that diffusers keeps
    return vae.eval()


def _centre(kernels: Tensor) -> Tensor:
    return kernels[:, :, kernels.shape[2] // 2, kernels.shape[3] // 2]
