"""What gives an image a number. None of them is a person: each says what it looks at, and what not.

    utility        the true taste of the annotators of a ``shapes`` corpus; no weights
    recognised     whether an independent classifier sees the asked shape and colour; ``shapes`` only, no weights
    colourfulness  Hasler and Suesstrunk's measure (2003); no weights, and no judgement of quality
    clip           cosine of a CLIP model's embeddings of image and text
    pickscore      the same with PickScore's weights (arXiv 2305.01569), which are a CLIP model's
    hpsv2          the same with HPSv2's weights (arXiv 2306.09341), published for open_clip and converted here
    aesthetics     the LAION linear head on CLIP ViT-L/14 embeddings
    imagereward    arXiv 2304.05977, by the package ``image-reward``
    l1, clip_image, dino   of edits: distance and similarity to the target image

Weights are given by path and never fetched. Folders are transformers' with safetensors, and files are safetensors.

Symbols: N images, D width.
"""

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPConfig, CLIPModel

from palate import progress
from palate.artifacts import Artifact
from palate.config import scale
from palate.corpora.worlds import shapes
from palate.evaluation.prompts import Prompt
from palate.models.shape_classifier import sees, trained_classifier

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Drawn:
    """An image, and what it was drawn from; ``target`` is the image that an edit should give."""

    image: Image.Image
    prompt: Prompt
    target: Image.Image | None = None


@dataclass(frozen=True)
class Scorer:
    """``score`` gives N images (N,) finite numbers; ``about`` says what they mean, and what not.

    ``compares``: two images of one seed can be compared by it (a win rate is reported).
    """

    name: str
    score: Callable[[Sequence[Drawn]], Array]
    about: str
    higher_is_better: bool = True
    unit: str = ""
    compares: bool = True


@dataclass(frozen=True)
class ScorerConfig:
    """Which scorers there are: each needs the path of its weights, and is left out without."""

    clip: str | None = None
    """Folder of a CLIP model (transformers' CLIPModel with tokenizer and image processor); of CLIP scores."""
    pickscore: str | None = None
    """Folder of PickScore's weights, with the tokenizer and the image processor of CLIP ViT-H-14."""
    hpsv2: str | None = None
    """File of HPSv2's weights (HPS_v2_compressed or HPS_v2.1_compressed, converted to safetensors); needs --hpsv2-clip.
    Versions are not comparable."""
    hpsv2_clip: str | None = None
    """Folder of the CLIP ViT-H-14 whose shape, tokenizer and image processor HPSv2 has."""
    aesthetics: str | None = None
    """File of the aesthetics head (sac+logos+ava1-l14-linearMSE, converted to safetensors); needs --aesthetics-clip."""
    aesthetics_clip: str | None = None
    """Folder of CLIP ViT-L/14, which the head reads."""
    imagereward: str | None = None
    """File of ImageReward's weights; needs the package image-reward."""
    dino: str | None = None
    """Folder of a DINO or DINOv2 model (transformers), for edits."""
    score_batch: int = scale(16)
    """Images that are scored together."""


class ScorerError(ValueError):
    """A scorer that cannot be used; the message says what is missing and which flag to change."""


def scorers(
    config: ScorerConfig, corpus: Artifact | None, prompts: Sequence[Prompt], device: str = "cpu"
) -> list[Scorer]:
    """Every scorer that the prompts and the given weights allow; at least one.

    Raises:
        ScorerError: weights that are given cannot be used.
    """
    found = [*_of_shapes(corpus, prompts), colourfulness_scorer()]
    batched = partial(_batched, size=config.score_batch)
    if config.clip:
        clip = load_clip(config.clip, "--clip", device)
        about = "cosine of CLIP's embeddings of image and text: how well they fit, by CLIP; not how good the image is"
        found.append(Scorer("clip", batched(clip.text_score), about))
    if config.pickscore:
        model = load_clip(config.pickscore, "--pickscore", device)
        score = batched(partial(model.text_score, scaled=True))
        found.append(Scorer("pickscore", score, "PickScore: predicts people's choices on Pick-a-Pic (70% right there)"))
    if config.hpsv2:
        model = load_open_clip(config.hpsv2, _given(config.hpsv2_clip, "--hpsv2", "--hpsv2-clip"), "--hpsv2", device)
        about = f"HPSv2 with {Path(config.hpsv2).name}: compare images of one prompt only, and of one version"
        found.append(Scorer("hpsv2", batched(model.text_score), about))
    if config.aesthetics:
        folder = _given(config.aesthetics_clip, "--aesthetics", "--aesthetics-clip")
        head = AestheticHead.load(config.aesthetics, load_clip(folder, "--aesthetics-clip", device))
        about = "LAION's aesthetics head, 1 to 10: does not see the prompt"
        found.append(Scorer("aesthetics", batched(head.score), about))
    if config.imagereward:
        found.append(image_reward(config.imagereward, device))
    if any(prompt.target for prompt in prompts):
        about = "mean absolute difference from the target image, pixels in [0, 1]"
        found.append(Scorer("l1", batched(l1), about, higher_is_better=False))
        if config.clip:
            about = "cosine of CLIP's embeddings of the edit and of the target image"
            found.append(Scorer("clip_image", batched(clip.image_score), about))
        if config.dino:
            dino = load_dino(config.dino, device)
            about = "cosine of DINO's embeddings of the edit and of the target image"
            found.append(Scorer("dino", batched(dino.score), about))
    return found


# Without weights


def colourfulness_scorer() -> Scorer:
    about = (
        "Hasler and Suesstrunk's colourfulness (2003): sees neither the prompt nor quality, and grows without bound "
        "when colours are overdriven; a check that always runs, not a preference"
    )
    return Scorer("colourfulness", lambda drawn: np.array([colourfulness(one.image) for one in drawn]), about)


def colourfulness(image: Image.Image) -> float:
    """sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)² + mean(yb)²), rg = R - G, yb = (R + G) / 2 - B, of 0..255."""
    red, green, blue = pixels(image) * 255
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def pixels(image: Image.Image) -> Array:
    """(3, H, W) in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float64).transpose(2, 0, 1) / 255


def l1(drawn: Sequence[Drawn]) -> Array:
    """Mean absolute difference of each image from its target, which is resized to it where it differs in size."""
    return np.array([np.abs(pixels(one.image) - pixels(_target(one).resize(one.image.size))).mean() for one in drawn])


def _of_shapes(corpus: Artifact | None, prompts: Sequence[Prompt]) -> list[Scorer]:
    """The truth of a world of shapes, where the prompts are its captions."""
    if corpus is None or "users.parquet" not in corpus.paths():
        return []
    if not all(prompt.shown in shapes.BY_CAPTION for prompt in prompts):
        return []
    annotators = shapes.read_annotators(corpus)
    weights = {one.user_id: np.array([one.weights]) for one in annotators}
    mean_1F = np.mean([one.weights for one in annotators], axis=0, keepdims=True)

    def utility(drawn: Sequence[Drawn]) -> Array:
        values = []
        for one in drawn:
            taste_1F = mean_1F if one.prompt.user_id is None else weights[one.prompt.user_id]
            image = pixels(one.image)[None]
            if one.target is None:
                values.append(shapes.utilities(shapes.measure(image), taste_1F)[0, 0])
            else:
                values.append(shapes.edit_utilities(image, pixels(one.target)[None], taste_1F)[0, 0])
        return np.array(values)

    classifier = trained_classifier()

    def recognised(drawn: Sequence[Drawn]) -> Array:
        images_N3HW = torch.from_numpy(np.stack([pixels(one.image) for one in drawn])).float()
        return sees(classifier, images_N3HW, [one.prompt.shown for one in drawn]).numpy().astype(np.float64)

    truth = "the annotators' true utility, of their mean taste, or of the person's own where the image is for one"
    seen = "share in which an independent classifier sees the asked shape and colour: drift, not taste"
    return [Scorer("utility", utility, truth), Scorer("recognised", recognised, seen, compares=False)]


# CLIP and its kin


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP model in eval mode with what prepares its inputs."""

    model: Any
    tokenizer: Any
    processor: Any

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings (N, D) of norm one."""
        given = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return normalize(self.model.get_image_features(given.pixel_values.to(self.model.device)).pooler_output, dim=1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (N, D) of norm one; long texts are cut where the model's positions end."""
        most = self.model.config.text_config.max_position_embeddings
        given = self.tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        given = {name: given[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return normalize(self.model.get_text_features(**given).pooler_output, dim=1)

    def text_score(self, drawn: Sequence[Drawn], *, scaled: bool = False) -> Array:
        """Cosine of image and text, times the model's logit scale if ``scaled`` (as PickScore reports)."""
        cosine_N = (self.images([one.image for one in drawn]) * self.texts([one.prompt.shown for one in drawn])).sum(1)
        factor = self.model.logit_scale.exp().item() if scaled else 1.0
        return cosine_N.double().cpu().numpy() * factor

    def image_score(self, drawn: Sequence[Drawn]) -> Array:
        """Cosine of image and target."""
        cosine_N = (self.images([one.image for one in drawn]) * self.images([_target(one) for one in drawn])).sum(1)
        return cosine_N.double().cpu().numpy()


def load_clip(folder: str, flag: str, device: str = "cpu") -> Clip:
    """A CLIP model of transformers' folder form, all its weights there.

    Raises:
        ScorerError: it cannot be loaded, naming the flag.
    """
    model, report = _loaded(partial(CLIPModel.from_pretrained, _folder(folder, flag), output_loading_info=True), flag)
    if missing := sorted(report["missing_keys"]):
        raise ScorerError(f"{flag} {folder} lacks {len(missing)} weights of a CLIP model, such as {missing[0]}")
    return _clip(model, folder, flag, device)


def load_open_clip(file: str, folder: str, flag: str, device: str = "cpu") -> Clip:
    """A CLIP model whose weights are open_clip's and whose shape, tokenizer and processor are the folder's.

    Raises:
        ScorerError: they do not go together.
    """
    config = _loaded(partial(CLIPConfig.from_pretrained, _folder(folder, f"{flag}-clip")), f"{flag}-clip")
    model = CLIPModel(config)
    try:
        found = from_open_clip(read_tensors(file, flag))
        model.load_state_dict({**_buffers(model), **found})
    except (KeyError, RuntimeError) as error:
        raise ScorerError(f"{flag} {file} does not fit the model of {flag}-clip {folder}: {error}") from None
    return _clip(model, folder, flag, device)


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and layouts as those of transformers' CLIPModel.

    Raises:
        KeyError: a name that open_clip's CLIP does not have.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        if name in ("attn_mask", "logit_bias"):
            continue
        if name in _OPEN_CLIP:
            found[_OPEN_CLIP[name]] = tensor
        elif name in ("text_projection", "visual.proj"):  # x @ P there, a linear layer here
            found[f"{'visual' if name == 'visual.proj' else 'text'}_projection.weight"] = tensor.T.contiguous()
        elif match := _BLOCK.fullmatch(name):
            side = "vision_model" if match[1] else "text_model"
            layer, part, rest = f"{side}.encoder.layers.{match[2]}", match[3], match[4]
            if part == "attn" and rest.startswith("in_proj_"):
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{layer}.self_attn.{letter}_proj.{rest.removeprefix('in_proj_')}"] = third.clone()
            else:
                found[f"{layer}.{_PARTS[part]}.{_INNER.get(rest.split('.')[0], '')}{rest.split('.')[-1]}"] = tensor
        else:
            raise KeyError(f"{name} is no weight of open_clip's CLIP")
    return found


_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(attn|ln_1|ln_2|mlp)\.(.+)")
_PARTS = {"attn": "self_attn", "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp": "mlp"}
_INNER = {"out_proj": "out_proj.", "c_fc": "fc1.", "c_proj": "fc2."}
_OPEN_CLIP = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}


class AestheticHead:
    """The MLP of five linear layers, without activations between, on CLIP's embedding of norm one."""

    def __init__(self, clip: Clip, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.clip, self.layers = clip, layers

    @classmethod
    def load(cls, file: str, clip: Clip, flag: str = "--aesthetics") -> "AestheticHead":
        """Raises ScorerError: the file holds no such layers, or they do not fit the CLIP model."""
        tensors = read_tensors(file, flag)
        numbers = sorted({int(match[1]) for name in tensors if (match := re.fullmatch(r"layers\.(\d+)\.\w+", name))})
        names = [(f"layers.{number}.weight", f"layers.{number}.bias") for number in numbers]
        if not names or any(name not in tensors for pair in names for name in pair):
            raise ScorerError(
                f"{flag} {file} has no layers.N.weight and .bias; it has {', '.join(sorted(tensors)[:5])}"
            )
        layers = [(tensors[weight].float(), tensors[bias].float()) for weight, bias in names]
        width = clip.model.config.projection_dim
        if layers[0][0].shape[1] != width:
            raise ScorerError(
                f"{flag} {file} reads embeddings of {layers[0][0].shape[1]}, and --aesthetics-clip gives {width}: "
                "the published head needs CLIP ViT-L/14"
            )
        return cls(clip, layers)

    @torch.inference_mode()
    def score(self, drawn: Sequence[Drawn]) -> Array:
        hidden = self.clip.images([one.image for one in drawn]).float().cpu()
        for weight, bias in self.layers:
            hidden = nn.functional.linear(hidden, weight, bias)
        return hidden[:, 0].double().numpy()


@dataclass(frozen=True, eq=False)
class Dino:
    """A DINO or DINOv2 model; an image's embedding is its class token."""

    model: Any
    processor: Any

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        given = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        states_NTD = self.model(pixel_values=given.pixel_values.to(self.model.device)).last_hidden_state
        return normalize(states_NTD[:, 0], dim=1)

    def score(self, drawn: Sequence[Drawn]) -> Array:
        """Cosine of image and target."""
        cosine_N = (self.embed([one.image for one in drawn]) * self.embed([_target(one) for one in drawn])).sum(1)
        return cosine_N.double().cpu().numpy()


def load_dino(folder: str, device: str = "cpu", flag: str = "--dino") -> Dino:
    """Raises ScorerError: it cannot be loaded."""
    place = _folder(folder, flag)
    model, report = _loaded(partial(AutoModel.from_pretrained, place, output_loading_info=True), flag)
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        raise ScorerError(f"{flag} {folder} lacks {len(missing)} weights, such as {missing[0]}")
    processor = _loaded(partial(AutoImageProcessor.from_pretrained, place, backend="pil"), flag)
    return Dino(model.eval().to(device), processor)


def image_reward(file: str, device: str = "cpu") -> Scorer:
    """ImageReward by its own package.

    Raises:
        ScorerError: the package is not installed, or there is no such file.
    """
    if importlib.util.find_spec("ImageReward") is None:
        raise ScorerError(
            "--imagereward needs the package image-reward (its BLIP is not in transformers' form), which is not "
            "installed: pip install image-reward, or leave --imagereward out"
        )
    if not Path(file).is_file():
        raise ScorerError(f"--imagereward {file}: there is no such file")
    model = importlib.import_module("ImageReward").load(file, device=device)

    def score(drawn: Sequence[Drawn]) -> Array:
        return np.array([float(model.score(one.prompt.shown, one.image)) for one in drawn])

    return Scorer("imagereward", score, "ImageReward: trained on experts' rankings, about 0 on average, one unit wide")


def read_tensors(file: str, flag: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ScorerError: there is no such file, or it is of another form.
    """
    if not Path(file).is_file():
        raise ScorerError(f"{flag} {file}: there is no such file")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ScorerError(
            f"{flag} {file}: not a safetensors file ({error}); convert weights of another format once, as "
            "docs/evaluation_images.md shows"
        ) from None


def _clip(model: Any, folder: str, flag: str, device: str) -> Clip:
    tokenizer = _loaded(partial(AutoTokenizer.from_pretrained, folder), flag)
    # PIL's resizing on every machine: scores do not depend on whether torchvision is installed.
    processor = _loaded(partial(AutoImageProcessor.from_pretrained, folder, backend="pil"), flag)
    return Clip(model.eval().to(device), tokenizer, processor)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Tables such as position numbers, which other formats leave out."""
    kept = dict(model.named_parameters())
    return {name: tensor for name, tensor in model.state_dict().items() if name not in kept}


def _folder(folder: str, flag: str) -> str:
    if not Path(folder).is_dir():
        raise ScorerError(f"{flag} {folder}: there is no such folder; nothing is downloaded")
    return folder


def _loaded(load: Callable[[], Any], flag: str) -> Any:
    try:
        return load()
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ScorerError(f"{flag}: cannot be loaded: {error}") from error


def _given(value: str | None, flag: str, needed: str) -> str:
    if value is None:
        raise ScorerError(f"{flag} needs {needed} as well")
    return value


def _target(one: Drawn) -> Image.Image:
    if one.target is None:
        raise ScorerError(f"the edit {one.prompt.text!r} has no target image: give one for every prompt, or for none")
    return one.target


def _batched(score: Callable[[Sequence[Drawn]], Array], size: int) -> Callable[[Sequence[Drawn]], Array]:
    def batches(drawn: Sequence[Drawn]) -> Array:
        starts = progress.track(range(0, len(drawn), size), "scoring")
        return np.concatenate([score(drawn[start : start + size]) for start in starts])

    return batches


def checked(scorer: Scorer, drawn: Sequence[Drawn]) -> Array:
    """The scores (N,) of images.

    Raises:
        ScorerError: one is not finite, naming the prompt.
    """
    values_N = scorer.score(drawn)
    if values_N.shape != (len(drawn),):
        raise ScorerError(f"{scorer.name} gave scores of shape {values_N.shape} for {len(drawn)} images")
    if not np.isfinite(values_N).all():
        place = int(np.flatnonzero(~np.isfinite(values_N))[0])
        raise ScorerError(f"{scorer.name} gave {values_N[place]} for an image of {drawn[place].prompt.text!r}")
    return values_N
