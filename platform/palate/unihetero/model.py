"""The unified model: a frozen vision encoder, a projector into any decoder-only language model, and heads that predict
what images hold (UniHetero, arXiv 2512.23512; what the paper leaves open is chosen as the settings below say).

    image -> vision (frozen) -> x_s (P, d_s) -> projector -> e (P, d), which stand in the text's embeddings
    h = language model (causal, image tokens too)
    text     next token's cross-entropy
    semantic the state before a visual token predicts it: x_s ("encoder"), or e ("embedding", UniHetero's choice)
    pixel    a diffusion head tells the image's latents from the states ("inside"), or from the embeddings, outside of
             the language model, which gets no gradient ("decoder")

Symbols: B rows, T tokens, I images of the batch in reading order, P visual tokens of an image, V = I · P, d and d_s
widths.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from palate.unihetero.heads import DiffusionHead, MlpHead, PixelDecoder, Projector, draw_noise, to_scale

Semantic = Literal["none", "encoder", "embedding"]
SemanticLoss = Literal["cosine", "mse", "diffusion"]
Target = Literal["ema", "frozen", "current", "open"]
Pixels = Literal["none", "inside", "decoder"]
Losses = Literal["all", "text", "pixels"]  # that are wanted of those that a model has

DRAWS = 4  # of time and noise for each token and step (MAR's diffusion_batch_mul)
CONDITION_DROPOUT = 0.1  # of the diffusion heads, for guidance
DEFAULT_SCALE = 0.02


class UniHeteroConfig(PreTrainedConfig):
    """Settings of a ``UniHeteroModel``.

    Args:
        image_size: pixels of a side of the images that the encoder gets, which may be others than it was trained on.
        image_tokens: P. Where the encoder's grid is larger, its patches are merged.
        merge: mean: patches that are merged are averaged; concatenate: they stand side by side (pixel unshuffle).
        image_token_id, image_start_id, image_end_id: the placeholder of a visual token, and what stands around an
            image.
        embed_scale: root mean square of the embeddings that the projector gives.
        semantic: what is predicted of the next visual token.
        semantic_loss: cosine: 1 - cos; mse: squared distance over the target's square; diffusion: MAR's head.
        target: of "embedding": the projector's average over steps (ema, as in GAS), the projector as it was in the
            beginning (frozen), as it is (current, no gradient), or with gradient (open: it collapses).
        shift: predict the next visual token; False: the token at the state's own place (a control).
        branch_from: the layer after which generation goes on in layers of its own (GAS); None: nowhere.
        pixels: whether and where latents are told.
        latent_width: values of a latent token.
    """

    model_type = "unihetero"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        image_size: int | None = None,
        image_tokens: int = 16,
        merge: Literal["mean", "concatenate"] = "mean",
        image_token_id: int = 0,
        image_start_id: int = 0,
        image_end_id: int = 0,
        embed_scale: float = DEFAULT_SCALE,
        semantic: Semantic = "none",
        semantic_loss: SemanticLoss = "cosine",
        target: Target = "ema",
        shift: bool = True,
        branch_from: int | None = None,
        pixels: Pixels = "none",
        latent_width: int = 16,
        head_width: int = 256,
        head_blocks: int = 3,
        **others: Any,
    ) -> None:
        self.text_config = _config(text_config, "llama")
        self.vision_config = _config(vision_config, "vit")
        self.image_size = image_size or int(self.vision_config.image_size)
        self.image_tokens, self.merge = image_tokens, merge
        self.image_token_id, self.image_start_id, self.image_end_id = image_token_id, image_start_id, image_end_id
        self.embed_scale = embed_scale
        self.semantic, self.semantic_loss, self.target, self.shift = semantic, semantic_loss, target, shift
        self.branch_from = branch_from
        self.pixels, self.latent_width = pixels, latent_width
        self.head_width, self.head_blocks = head_width, head_blocks
        super().__init__(**others)

    @property
    def feature_width(self) -> int:
        """d_s: of a visual token before the projector."""
        merged = (self.image_size // self.vision_config.patch_size) ** 2 // self.image_tokens
        return int(self.vision_config.hidden_size) * (merged if self.merge == "concatenate" else 1)

    def get_text_config(self, *args: Any, **keywords: Any) -> Any:
        return self.text_config


@dataclass
class UniHeteroOutput:
    """``states`` (B, T, d); ``logits`` (B, T, vocabulary) only without labels. Losses are sums over ``text_count``
    supervised tokens or ``visual_count`` visual tokens; ``predicted`` and ``targets`` (V, z) are the semantic
    head's."""

    states: Tensor
    logits: Tensor | None = None
    text_loss: Tensor | None = None
    text_count: int | None = None
    semantic_loss: Tensor | None = None
    predicted: Tensor | None = None
    targets: Tensor | None = None
    pixel_loss: Tensor | None = None
    visual_count: int | None = None


class UniHeteroModel(PreTrainedModel):
    """See the module's text. ``from_parts`` makes one of a language model and a vision encoder."""

    config_class = UniHeteroConfig
    config: UniHeteroConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: list[str] = []  # noqa: RUF012

    def __init__(self, config: UniHeteroConfig) -> None:
        super().__init__(config)
        text = config.text_config
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(text, name, None) not in (None, 1, 1.0):
                raise ValueError(f"a {text.model_type} has {name}, which is not implemented: choose another")
        self.vision = AutoModel.from_config(config.vision_config)
        if getattr(self.vision, "pooler", None) is not None:
            self.vision.pooler = None  # patches are all that is read
        self.language = AutoModelForCausalLM.from_config(text)
        self.projector = _projector(config)
        self.semantic_head = _semantic_head(config)
        self.pixel_head = _pixel_head(config)
        slow = config.semantic == "embedding" and config.target in ("ema", "frozen")
        self.target_projector = _projector(config) if slow else None
        self.branch = None if config.branch_from is None else _upper_layers(text, config.branch_from)
        self.post_init()
        self.freeze()

    @staticmethod
    def from_parts(
        language: PreTrainedModel, vision: PreTrainedModel, config: UniHeteroConfig, seed: int = 0
    ) -> "UniHeteroModel":
        """A model of these parts' weights; what is new is drawn from ``seed``, each part by a generator of its own, so
        that arms begin with equal projectors whatever heads they have."""
        with torch.random.fork_rng(devices=[]):
            model = UniHeteroModel(config)
            model.language.load_state_dict(language.state_dict())
            weights = {key: value for key, value in vision.state_dict().items() if not key.startswith("pooler.")}
            model.vision.load_state_dict(weights)
            for number, (name, make) in enumerate(_NEW_PARTS.items()):
                torch.manual_seed(seed * 16 + number)
                setattr(model, name, make(config))
        if model.target_projector is not None:
            model.target_projector.load_state_dict(model.projector.state_dict())
        if model.branch is not None:
            assert config.branch_from is not None
            upper = model.layers[config.branch_from :]
            for layer, source in zip(model.branch.layers, upper, strict=True):
                layer.load_state_dict(source.state_dict())
            model.branch.norm.load_state_dict(model.decoder.norm.state_dict())
        return model

    @property
    def decoder(self) -> Any:
        """The language model without its output layer."""
        return self.language.get_decoder()

    @property
    def layers(self) -> nn.ModuleList:
        """The language model's layers.

        Raises:
            ValueError: they are not where they are in the models that are known.
        """
        for name in ("layers", "h", "blocks"):
            if isinstance(found := getattr(self.decoder, name, None), nn.ModuleList):
                return found
        raise ValueError(f"the layers of a {self.config.text_config.model_type} are not known: choose another")

    def freeze(self) -> None:
        """No gradient to the vision encoder and to the target's projector."""
        for part in (self.vision, self.target_projector):
            if part is not None:
                part.requires_grad_(False)

    def train(self, mode: bool = True) -> "UniHeteroModel":
        super().train(mode)
        self.vision.eval()
        self.freeze()  # also after from_pretrained, which puts in new parameters and calls eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.language.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.language.get_output_embeddings()

    @torch.no_grad()
    def encode(self, pixel_values_I3HW: Tensor) -> Tensor:
        """What the vision encoder puts out, x_s (I, P, d_s)."""
        size = pixel_values_I3HW.shape[-1]
        if pixel_values_I3HW.shape[-2:] != (self.config.image_size, self.config.image_size):
            raise ValueError(
                f"images are {tuple(pixel_values_I3HW.shape[-2:])}, expected {self.config.image_size} a side"
            )
        others = {}
        if size != self.config.vision_config.image_size:
            names = inspect.signature(self.vision.forward).parameters  # some interpolate unasked
            others = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in names else {}
        return grid(self.vision(pixel_values=pixel_values_I3HW, **others).last_hidden_state, self.config)

    def embed(self, input_ids_BT: Tensor, features_IPs: Tensor | None) -> Tensor:
        """The language model's input (B, T, d): token embeddings, and the projected features at the visual tokens.

        Raises:
            ValueError: the placeholders are not as many as the features.
        """
        embeddings_BTd = self.get_input_embeddings()(input_ids_BT)
        visual_BT = input_ids_BT == self.config.image_token_id
        given = 0 if features_IPs is None else features_IPs.shape[0] * features_IPs.shape[1]
        if int(visual_BT.sum()) != given:
            raise ValueError(f"the text has places for {int(visual_BT.sum())} visual tokens, the images give {given}")
        if features_IPs is None:
            return cast(Tensor, embeddings_BTd)
        projected_Vd = self.projector(features_IPs).flatten(0, 1).to(embeddings_BTd.dtype)
        return cast(Tensor, embeddings_BTd.masked_scatter(visual_BT[:, :, None], projected_Vd))

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the target's projector towards the projector (an exponential average over steps)."""
        if self.target_projector is not None and self.config.target == "ema":
            for slow, fast in zip(self.target_projector.parameters(), self.projector.parameters(), strict=True):
                slow.lerp_(fast.to(slow.dtype), 1 - momentum)

    def target_of(self, features_IPs: Tensor) -> Tensor:
        """What the semantic head should predict: (I, P, d) or, of "encoder", (I, P, d_s) itself."""
        if self.config.semantic == "encoder":
            return features_IPs
        if self.target_projector is not None:
            with torch.no_grad():
                return cast(Tensor, self.target_projector(features_IPs))
        projected = cast(Tensor, self.projector(features_IPs))
        return projected if self.config.target == "open" else projected.detach()

    def decode(self, embeddings_BTd: Tensor, cache: Cache | None = None, **others: Any) -> Any:
        """The language model's output on embeddings; ``cache`` grows in place."""
        mask = others.get("attention_mask")
        if mask is not None and mask.dtype == torch.bool:
            others["attention_mask"] = _mask_for(self.language.config._attn_implementation, mask, embeddings_BTd.dtype)
        if cache is not None:
            # transformers 5.24 renamed `past_key_values` to `cache`, model by model.
            names = inspect.signature(self.decoder.forward).parameters
            others["cache" if "cache" in names else "past_key_values"] = cache
        return self.decoder(inputs_embeds=embeddings_BTd, use_cache=cache is not None, **others)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        latents: Tensor | None = None,
        seeds: list[int] | None = None,
        target_features: Tensor | None = None,
        cache: Cache | None = None,
        logits: bool = True,
        losses: Losses = "all",
    ) -> UniHeteroOutput:
        """States and logits; with ``labels``, losses instead of logits.

        Args:
            attention_mask: (B, T) of ones and zeros, or (B, 1, T, T) of True where a row's token may look.
            pixel_values: (I, 3, H, W), or else ``image_features`` (I, P, d_s), which the encoder gave before.
            labels: (B, T), -100 where nothing is supervised; a token's label stands at its own place.
            latents: (I, P, latent_width), for the pixel loss.
            seeds: one an image, of what the diffusion losses draw.
            target_features: (I, P, d_s) of other images, in the place of their own as semantic targets (a control).
            cache: of keys and values, which grows in place.
            logits: False leaves them out; the states are enough to make those that are read.
            losses: "text" leaves out what the heads would say; "pixels" is the pixel head's alone, for which a decoder
                outside of the language model does not run it.
        """
        if image_features is None and pixel_values is not None:
            image_features = self.encode(pixel_values)
        if losses == "pixels" and isinstance(self.pixel_head, PixelDecoder):
            result = UniHeteroOutput(torch.empty(0))
            if image_features is None:  # texts tell nothing, and take part in the step all the same
                result.pixel_loss = torch.stack([p.sum() * 0 for p in self.pixel_head.parameters()]).sum()
                result.visual_count = 0
            else:
                self._pixels(result, None, image_features, latents, seeds or [0] * len(image_features))
            return result
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids, image_features)
        output = self.decode(
            inputs_embeds,
            cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
            output_hidden_states=labels is not None and self.branch is not None,
        )
        states_BTd = output.last_hidden_state
        result = UniHeteroOutput(states_BTd)
        if labels is None and not logits:
            return result
        if labels is None:
            result.logits = self.get_output_embeddings()(states_BTd)
            return result
        supervised_BT = labels[:, 1:] != -100
        logits_Nv = self.get_output_embeddings()(states_BTd[:, :-1][supervised_BT])
        result.text_loss = F.cross_entropy(logits_Nv.float(), labels[:, 1:][supervised_BT], reduction="sum")
        result.text_count = len(logits_Nv)
        if image_features is None or input_ids is None or losses == "text":
            return result
        generating_BTd = states_BTd
        if self.branch is not None:
            generating_BTd = self.branch(
                inputs_embeds=output.hidden_states[self.config.branch_from],
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            ).last_hidden_state
        self._generation(result, generating_BTd, input_ids, image_features, latents, seeds, target_features)
        return result

    def _generation(
        self,
        result: UniHeteroOutput,
        states_BTd: Tensor,
        input_ids_BT: Tensor,
        features_IPs: Tensor,
        latents_IPc: Tensor | None,
        seeds: list[int] | None,
        target_features_IPs: Tensor | None,
    ) -> None:
        """The losses of the heads that there are."""
        images, tokens = features_IPs.shape[:2]
        result.visual_count = images * tokens
        visual_BT = input_ids_BT == self.config.image_token_id
        # The states that predict: those before each visual token, of which the first stands behind the start of the
        # image. So no prediction crosses from one image, or from one pack, into another.
        before_BT = F.pad(visual_BT[:, 1:], (0, 1)) if self.config.shift else visual_BT
        seeds = seeds if seeds is not None else [0] * images
        states_Vd = states_BTd[before_BT]
        if self.semantic_head is not None:
            targets_IPz = self.target_of(features_IPs if target_features_IPs is None else target_features_IPs)
            targets_Vz = targets_IPz.flatten(0, 1).float()
            result.targets = targets_Vz
            if isinstance(self.semantic_head, DiffusionHead):
                unit = to_scale(targets_Vz, 1.0)
                noise = draw_noise(seeds, tokens, unit.shape[1], DRAWS, CONDITION_DROPOUT, unit.device)
                result.semantic_loss = self.semantic_head.loss(unit, states_Vd, noise).sum()
            else:
                result.predicted = predicted_Vz = self.semantic_head(states_Vd).float()
                result.semantic_loss = semantic_loss(predicted_Vz, targets_Vz, self.config.semantic_loss).sum()
        self._pixels(result, states_Vd, features_IPs, latents_IPc, seeds)

    def _pixels(
        self,
        result: UniHeteroOutput,
        states_Vd: Tensor | None,
        features_IPs: Tensor,
        latents_IPc: Tensor | None,
        seeds: list[int],
    ) -> None:
        """The loss of the pixel head, if there is one and latents to tell."""
        images, tokens = features_IPs.shape[:2]
        result.visual_count = images * tokens
        if self.pixel_head is None or latents_IPc is None:
            return
        if isinstance(self.pixel_head, PixelDecoder):
            with torch.no_grad():
                embeddings_IPd = to_scale(self.projector(features_IPs), 1.0)
            condition_Vd, head = self.pixel_head.conditions(embeddings_IPd), self.pixel_head.head
        else:
            assert states_Vd is not None
            condition_Vd, head = states_Vd, cast(DiffusionHead, self.pixel_head)
        drawn, width = [seed + 1 for seed in seeds], self.config.latent_width
        noise = draw_noise(drawn, tokens, width, DRAWS, CONDITION_DROPOUT, condition_Vd.device)
        result.pixel_loss = head.loss(latents_IPc.flatten(0, 1), condition_Vd, noise).sum()


def semantic_loss(predicted_Vz: Tensor, targets_Vz: Tensor, kind: SemanticLoss) -> Tensor:
    """1 - cosine, or the squared distance over the target's square, of each position: (V,)."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(predicted_Vz, targets_Vz, dim=-1)
    return ((predicted_Vz - targets_Vz) ** 2).sum(-1) / (targets_Vz.detach() ** 2).sum(-1).clamp(min=1e-12)


def grid(hidden_ILs: Tensor, config: UniHeteroConfig) -> Tensor:
    """The P visual tokens (I, P, d_s) of an encoder's output: its patches, without class and register tokens, merged
    where they are more.

    Raises:
        ValueError: the patches cannot be merged to P.
    """
    vision = config.vision_config
    side = config.image_size // vision.patch_size
    patches = hidden_ILs[:, -side * side :]
    wanted = round(config.image_tokens**0.5)
    if wanted * wanted != config.image_tokens or side % wanted:
        raise ValueError(f"{side} x {side} patches cannot be merged to {config.image_tokens} visual tokens")
    if wanted == side:
        return patches
    cells = patches.transpose(1, 2).unflatten(2, (side, side))
    merged = side // wanted
    cells = F.avg_pool2d(cells, merged) if config.merge == "mean" else F.pixel_unshuffle(cells, merged)
    return cells.flatten(2).transpose(1, 2)


def _upper_layers(text: Any, start: int) -> PreTrainedModel:
    """The layers from ``start`` on, and the last norm, as a model of their own, without token embeddings."""
    if not 0 < start < text.num_hidden_layers:
        raise ValueError(f"branch_from is {start}, but the language model has {text.num_hidden_layers} layers")
    values = text.to_dict() | {"num_hidden_layers": text.num_hidden_layers - start}
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][start:]
    branch = AutoModel.from_config(type(text).from_dict(values))
    if not isinstance(getattr(branch, "layers", None), nn.ModuleList):
        # Others add learned positions to what they are given, which would come in twice.
        raise ValueError(
            f"a {text.model_type} cannot be branched: the arm isolated needs a model with rotary positions"
        )
    branch.set_input_embeddings(nn.Embedding(1, text.hidden_size))
    branch.get_input_embeddings().requires_grad_(False)
    return cast(PreTrainedModel, branch)


def _projector(config: UniHeteroConfig) -> Projector:
    return Projector(config.feature_width, config.text_config.hidden_size, config.embed_scale)


def _semantic_head(config: UniHeteroConfig) -> nn.Module | None:
    if config.semantic == "none":
        return None
    width = config.text_config.hidden_size
    width_out = width if config.semantic == "embedding" else config.feature_width
    if config.semantic_loss == "diffusion":
        return DiffusionHead(width_out, width, config.head_width, config.head_blocks)
    return MlpHead(width, width_out)


def _pixel_head(config: UniHeteroConfig) -> nn.Module | None:
    if config.pixels == "none":
        return None
    width, head = config.text_config.hidden_size, (config.head_width, config.head_blocks)
    if config.pixels == "inside":
        return DiffusionHead(config.latent_width, width, *head)
    return PixelDecoder(width, config.image_tokens, config.latent_width, *head)


# What a model has beside the language model and the encoder.
_NEW_PARTS: dict[str, Callable[[UniHeteroConfig], nn.Module | None]] = {
    "projector": _projector,
    "semantic_head": _semantic_head,
    "pixel_head": _pixel_head,
}


def _mask_for(attention: str | None, mask_B1TT: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is True where a token may look, as an implementation of attention takes it.

    Raises:
        ValueError: it takes no such mask.
    """
    if attention == "sdpa":
        return mask_B1TT
    if attention == "eager":  # it adds its mask
        return torch.zeros_like(mask_B1TT, dtype=dtype).masked_fill(~mask_B1TT, torch.finfo(dtype).min)
    raise ValueError(f"attention {attention!r} takes no mask of segments: load the language model with sdpa")


def _config(given: Any, default: str) -> Any:
    if given is None:
        return AutoConfig.for_model(default)
    if isinstance(given, dict):
        return AutoConfig.for_model(**{"model_type": default, **given})
    return given


AutoConfig.register("unihetero", UniHeteroConfig)
AutoModel.register(UniHeteroConfig, UniHeteroModel)
