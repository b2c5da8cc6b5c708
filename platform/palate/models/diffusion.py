"""Loading a diffusers pipeline by hub id, folder or built-in name; encoding texts and images with it.

Weights are read from safetensors alone, and no code that came with a model is run. The built-ins ``shapes`` and
``shapes-edit`` are small pipelines with random weights for the world of coloured shapes, to be trained from nothing
(``models/small_diffusion.py``).

Symbols: B images or captions, H x W pixels, C channels of latents, h x w latents, L tokens, D and P widths.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palate import artifacts
from palate.models.small_diffusion import build_shapes_pipeline
from palate.models.weights import sampled_hash

Family = Literal["sd", "sdxl", "sd3", "flux", "ip2p"]
Prediction = Literal["epsilon", "v_prediction", "flow"]

# What each family's pipeline cannot do without, the network that denoises first.
_SD = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_SDXL = (*_SD, "text_encoder_2", "tokenizer_2")
_FLUX = ("transformer", *_SDXL[1:])
FAMILIES: Mapping[str, tuple[Family, tuple[str, ...]]] = {
    "StableDiffusionPipeline": ("sd", _SD),
    "StableDiffusionInstructPix2PixPipeline": ("ip2p", _SD),
    "StableDiffusionXLPipeline": ("sdxl", _SDXL),
    "StableDiffusion3Pipeline": ("sd3", _FLUX),
    "FluxPipeline": ("flux", _FLUX),
}
BUILT_IN = ("shapes", "shapes-edit")
# Classifiers that blank whole images, and what only they need: left out, so that results show what a model draws.
_CHECKER = ("safety_checker", "feature_extractor")
_NAMES = (
    "a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5, a local folder that diffusers' save_pretrained "
    f"wrote, the URL of one in a finished artifact, or one of {', '.join(BUILT_IN)}"
)


@dataclass(frozen=True)
class LoadedDiffusion:
    """A diffusers pipeline in eval mode, and what its training must know.

    The pipeline holds the parts: what is done to ``denoiser`` (adapters, attention processors), its sampling sees.
    ``weights`` tells the model from another at the same place (``models/weights.py``).
    """

    pipeline: DiffusionPipeline
    name: str
    family: Family
    prediction: Prediction
    weights: str

    @property
    def pipeline_class(self) -> str:
        return type(self.pipeline).__name__

    @property
    def denoiser_name(self) -> str:
        """``unet`` or ``transformer``: the folder of a saved pipeline that holds the denoiser."""
        return FAMILIES[self.pipeline_class][1][0]

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def vae(self) -> nn.Module:
        return self.pipeline.vae

    @property
    def scheduler(self) -> Any:
        return self.pipeline.scheduler

    @property
    def text_encoders(self) -> tuple[PreTrainedModel, ...]:
        return tuple(part for _, part in self._parts("text_encoder"))

    @property
    def tokenizers(self) -> tuple[PreTrainedTokenizerBase, ...]:
        return tuple(part for _, part in self._parts("tokenizer"))

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    def _parts(self, prefix: str) -> list[tuple[str, Any]]:
        # "text_encoder", "text_encoder_2", ...: the order of the names is the order of use.
        found = sorted(self.pipeline.components.items())
        return [(name, part) for name, part in found if name.startswith(prefix) and part is not None]


def load_diffusion(name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedDiffusion:
    """The pipeline called ``name``, in eval mode; a safety checker is left out.

    Args:
        name: a hub id, a folder, the URL of one in a finished artifact, ``shapes`` or ``shapes-edit``.

    Raises:
        ValueError: there is no such model or device, it is of no supported family, or a part or a weight of it is
            missing; the message names what was looked for.
        ArtifactError: it is a URL, and there is no such folder, or it is damaged.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch {torch.__version__} finds no CUDA device here; use cpu")
    if name in BUILT_IN:
        made = build_shapes_pipeline(seed=0, edit=name == "shapes-edit")
        for part in made.components.values():
            if isinstance(part, nn.Module):
                nn.Module.to(part, dtype)  # theirs warns of precisions that these do not mix
        return wrap(made.to(device), name)
    place = artifacts.model_source(name)
    folder = Path(place).expanduser()
    if (place.startswith((".", "/", "~")) or place.count("/") > 1) and not folder.is_dir():
        raise ValueError(f"--model {name}: there is no such folder; a model is {_NAMES}")
    with _explained(name, "model_index.json"):
        source = str(folder) if folder.is_dir() else name
        index = DiffusionPipeline.load_config(source)
    parts = _stated_parts(name, index)
    models = {part: _load_model(name, source, part, *where, dtype) for part, where in parts.items()}
    left_out: dict[str, Any] = {part: None for part in _CHECKER if part in index}
    if "requires_safety_checker" in index:
        left_out["requires_safety_checker"] = False
    with _explained(name, "its tokenizers and scheduler"):
        made = {part: model for part, model in models.items() if model is not None}
        pipeline = DiffusionPipeline.from_pretrained(source, use_safetensors=True, **made, **left_out)
    return wrap(pipeline.to(device), name)


def wrap(pipeline: DiffusionPipeline, name: str) -> LoadedDiffusion:
    """A pipeline at hand, as a ``LoadedDiffusion`` in eval mode. Call it before adapters are put in.

    Raises:
        ValueError: it is of no supported family, or trained to predict something that is not supported.
    """
    family, _ = _family(name, type(pipeline).__name__)
    parts = {part: model for part, model in pipeline.components.items() if isinstance(model, nn.Module)}
    for model in parts.values():
        model.eval()
    pipeline.set_progress_bar_config(disable=True)
    weights = sampled_hash(
        (f"{part}.{n}", value) for part, model in parts.items() for n, value in model.named_parameters()
    )
    loaded = LoadedDiffusion(pipeline, name, family, _prediction(name, pipeline.scheduler), weights)
    for part, tokenizer in loaded._parts("tokenizer"):
        if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
            # transformers makes an empty tokenizer where the files of one are missing.
            raise ValueError(f"--model {name}: its {part} has no vocabulary; {part}/tokenizer.json is missing or empty")
    return loaded


@torch.no_grad()
def encode_text(loaded: LoadedDiffusion, captions: Sequence[str]) -> dict[str, Tensor]:
    """What the denoiser is told of captions, as the pipeline itself encodes them.

    Returns:
        ``prompt_embeds`` (B, L, D), and for SDXL, SD3 and FLUX ``pooled_prompt_embeds`` (B, P).
    """
    prompt, device, pipeline = list(captions), loaded.device, loaded.pipeline
    pooled = None
    if loaded.family == "sd":
        text, _ = pipeline.encode_prompt(prompt, device, 1, do_classifier_free_guidance=False)
    elif loaded.family == "ip2p":  # whose method is not public
        text = pipeline._encode_prompt(prompt, device, 1, do_classifier_free_guidance=False)
    elif loaded.family == "sdxl":
        text, _, pooled, _ = pipeline.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
    elif loaded.family == "sd3":
        text, _, pooled, _ = pipeline.encode_prompt(
            prompt, None, None, device=device, do_classifier_free_guidance=False
        )
    else:
        text, pooled, _ = pipeline.encode_prompt(prompt, None, device=device)
    return {"prompt_embeds": text} | ({} if pooled is None else {"pooled_prompt_embeds": pooled})


@torch.no_grad()
def encode_images(loaded: LoadedDiffusion, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior, each (B, C, h, w) in float32, not yet shifted or scaled.

    Args:
        images_B3HW: pixels in [-1, 1]; sides that the VAE's factor divides.

    Raises:
        ValueError: images of another shape, or sides that the VAE would cut.
    """
    factor = loaded.pipeline.vae_scale_factor
    if images_B3HW.dim() != 4 or images_B3HW.shape[1] != 3:
        raise ValueError(f"images have the shape (B, 3, H, W), found {tuple(images_B3HW.shape)}")
    if images_B3HW.shape[2] % factor or images_B3HW.shape[3] % factor:
        raise ValueError(
            f"{loaded.name} takes images whose sides are multiples of {factor}, found "
            f"{images_B3HW.shape[2]}x{images_B3HW.shape[3]}: resize or crop them"
        )
    with _wide_enough(loaded.vae) as vae:
        posterior = vae.encode(images_B3HW.to(loaded.device, vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()


@contextmanager
def _wide_enough(vae: Any) -> Iterator[Any]:
    """The VAE; in float32 for the time being where float16 would overflow (SDXL's says so in its config)."""
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.float()
    try:
        yield vae
    finally:
        if upcast:
            vae.half()


def _stated_parts(name: str, index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of every part that is there, by name, checked before anything large is read."""
    _, required = _family(name, index.get("_class_name"))
    stated = {
        part: (where[0], where[1])
        for part, where in index.items()
        if isinstance(where, list | tuple) and len(where) == 2 and where[0] is not None and part not in _CHECKER
    }
    missing = [part for part in required if part not in stated]
    if missing:
        raise ValueError(
            f"--model {name}: its model_index.json has no {missing[0]}, which a {index['_class_name']} needs; "
            f"it has {', '.join(sorted(stated))}"
        )
    for part, (library, class_name) in stated.items():
        if library not in ("diffusers", "transformers"):
            raise ValueError(
                f"--model {name}: its {part} is a {library}.{class_name}, code that came with the model and is not "
                "run; parts from diffusers and transformers are supported"
            )
    return stated


def _load_model(name: str, source: str, part: str, library: str, class_name: str, dtype: torch.dtype) -> Any:
    """One network with all its weights; None for what is no network (tokenizers, schedulers)."""
    found = getattr(importlib.import_module(library), class_name, None)
    if found is None:
        raise ValueError(f"--model {name}: its {part} is a {class_name}, which the installed {library} does not have")
    if not issubclass(found, (ModelMixin, PreTrainedModel)):
        return None
    with _explained(name, part):
        model, report = found.from_pretrained(
            source, subfolder=part, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    if report["missing_keys"]:
        # diffusers and transformers would go on with random weights in their place.
        raise ValueError(
            f"--model {name}: its {part} lacks {len(report['missing_keys'])} weights of a {class_name}, such as "
            f"{min(report['missing_keys'])}: the folder is incomplete"
        )
    return model


@contextmanager
def _explained(name: str, part: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"--model {name}: {part} cannot be loaded: {error}\nA model is {_NAMES}") from error


def _family(name: str, class_name: Any) -> tuple[Family, tuple[str, ...]]:
    if class_name not in FAMILIES:
        raise ValueError(f"--model {name} is a {class_name}; supported pipelines: {', '.join(FAMILIES)}")
    return FAMILIES[class_name]


def _prediction(name: str, scheduler: Any) -> Prediction:
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow"
    stated = scheduler.config.get("prediction_type", "epsilon")
    if stated not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"--model {name}: its {type(scheduler).__name__} has prediction_type {stated!r}; supported: epsilon, "
            "v_prediction, and flow matching's schedulers"
        )
    return stated
