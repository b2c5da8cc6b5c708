"""FLOPs of one sample of image and text, counted from shapes: for plans, for matching arms, for utilization.

A matmul of T rows with a weight of n_in x n_out is 2 T n_in n_out FLOPs forward, as much again for the gradient of
the weight and as much again for that of its input: 6 N a token for N trained weights (Kaplan et al. 2020, arXiv
2001.08361, section 2.1), 2 N for frozen ones through which no gradient goes. Attention adds 4 T^2 a width forward
(scores, and their sum over values) and twice that backward, over the whole square of the sample's T tokens: that half
of it is masked saves nothing in this count, as in PaLM's (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) and in
``torch.utils.flop_counter``. Norms, activations, rotations, softmax and look-ups are left out: they are no matmuls.

Model FLOPs are those of one forward and one backward pass. What activation checkpointing computes again is not among
them but in ``Flops.hardware``: utilization by model FLOPs (MFU) does not reward computing things twice.

Symbols: T tokens of the sample in the language model, P visual tokens among them, d and d_s widths of the language
model and of the vision encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Head = Literal["none", "mlp", "diffusion"]
Pixels = Literal["none", "inside", "decoder"]

DRAWS = 4  # of noise for each token in a diffusion loss (MAR's diffusion_batch_mul)
DECODER_LAYERS = 2  # of the pixel decoder's transformer
IMAGE_MARKS = 2  # tokens: where an image starts and ends
# Language models whose feed-forward layers have no gate; all others that are in use have one.
UNGATED = {"gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi", "starcoder2", "mpt", "codegen"}


@dataclass(frozen=True)
class TransformerShape:
    """Layers of attention and MLP. ``gated`` MLPs have three matrices (SwiGLU), others two."""

    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_width: int
    gated: bool = True

    @property
    def weights_per_layer(self) -> int:
        """Weights of a layer's matmuls."""
        attention = 2 * self.width * self.head_width * (self.heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.width * self.intermediate


@dataclass(frozen=True)
class VisionShape:
    """A vision transformer, frozen: square images of ``image_size`` pixels in patches, and ``extra_tokens`` such as the
    class token."""

    layers: TransformerShape
    image_size: int
    patch_size: int
    extra_tokens: int = 1

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        return self.patches + self.extra_tokens

    @property
    def parameters(self) -> int:
        """Without norms and biases."""
        embedding = 3 * self.patch_size**2 + self.tokens
        return self.layers.layers * self.layers.weights_per_layer + embedding * self.layers.width


@dataclass(frozen=True)
class ModelShape:
    """A unified model: the parts of ``UniHeteroModel`` by their sizes.

    ``semantic`` is the head's form and ``semantic_width`` the width of what it predicts; ``target_pass``: the target
    goes through a projector ("embedding"); ``open_target``: with gradient. ``branch_layers`` are those of an isolated
    branch.
    """

    text: TransformerShape
    vocabulary: int
    vision: VisionShape | None
    image_tokens: int
    tied: bool = True
    semantic: Head = "none"
    semantic_width: int = 0
    target_pass: bool = False
    open_target: bool = False
    branch_layers: int = 0
    pixels: Pixels = "none"
    latent_width: int = 16
    head_width: int = 256
    head_blocks: int = 3
    draws: int = DRAWS
    merged: int = 1
    """Patches that stand side by side in one visual token."""

    @property
    def feature_width(self) -> int:
        """Of a visual token before the projector; 0 without an encoder."""
        return 0 if self.vision is None else self.vision.layers.width * self.merged

    @property
    def trained(self) -> int:
        """Parameters that are trained, without norms and biases."""
        d, w, text = self.text.width, self.head_width, self.text
        count = text.layers * text.weights_per_layer + self.vocabulary * d * (1 if self.tied else 2)
        count += self.branch_layers * text.weights_per_layer
        if self.vision is not None:
            count += self._projector
        if self.semantic == "mlp":
            count += d * d + d * self.semantic_width
        elif self.semantic == "diffusion":
            count += diffusion_weights(self.semantic_width, d, w, self.head_blocks)
        if self.pixels != "none":
            count += diffusion_weights(self.latent_width, d, w, self.head_blocks)
        if self.pixels == "decoder":
            count += DECODER_LAYERS * 12 * d * d + self.image_tokens * d
        return count

    @property
    def frozen(self) -> int:
        """Parameters that are not: the vision encoder, and the target's projector where it is one of its own."""
        if self.vision is None:
            return 0
        return self.vision.parameters + (self._projector if self.target_pass and not self.open_target else 0)

    @property
    def blocks(self) -> int:
        """Trained parameters in transformer layers, those that sharding gathers one by one."""
        return (self.text.layers + self.branch_layers) * self.text.weights_per_layer

    @property
    def _projector(self) -> int:
        return 0 if self.vision is None else (self.feature_width + self.text.width) * self.text.width


@dataclass(frozen=True)
class Cost:
    """FLOPs of a part, forward and backward."""

    forward: float
    backward: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Flops:
    """FLOPs of a sample: model FLOPs forward and backward, what checkpointing computes again, and ``by_part``."""

    forward: float
    backward: float
    recomputed: float = 0.0
    by_part: Mapping[str, Cost] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Model FLOPs."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """All that is computed."""
        return self.total + self.recomputed


def flops_per_sample(
    shape: ModelShape,
    text_tokens: float,
    supervised_tokens: float | None = None,
    *,
    images: float = 1,
    encoded: bool = False,
    checkpoint_activations: bool = False,
    stage: Literal["projector", "joint", "pixels"] = "joint",
    latents: float = 0.0,
) -> Flops:
    """The FLOPs of training on one sample.

    Args:
        text_tokens: without the visual tokens and the marks around an image.
        supervised_tokens: whose logits are computed; all text tokens by default.
        images: in the sample; a mean may be a fraction (as the token counts may), which leaves attention a little low.
        encoded: the features were computed before, so the vision encoder does not run.
        checkpoint_activations: the language model's layers (and the branch's) run forward twice.
        stage: what is trained; a part that is not needed for it costs nothing, and one that stands still has no
            gradients of its weights.
        latents: FLOPs of making an image's latents, if they are made: by an autoencoder that stands still.
    """
    visual = shape.image_tokens * images
    tokens = text_tokens + visual + (IMAGE_MARKS * images if shape.vision is not None else 0)
    supervised = text_tokens if supervised_tokens is None else supervised_tokens
    width, text = shape.text.width, shape.text
    parts = {
        "language layers": transformer(text, tokens),
        "text head": linear(supervised, width, shape.vocabulary),
    }
    if shape.vision is not None and visual:
        parts |= _visual(shape, shape.vision, visual, images, encoded)
        if shape.pixels != "none" and latents:
            parts["autoencoder"] = Cost(latents * images)
    if shape.branch_layers and visual:
        parts["branch"] = _times(transformer(text, tokens), shape.branch_layers / text.layers)
    if stage == "projector":
        frozen = transformer(text, tokens, trained=False)
        attention = frozen.forward - 2.0 * tokens * text.layers * text.weights_per_layer
        parts = {
            "vision encoder": parts.get("vision encoder", Cost(0.0)),
            "projector": parts.get("projector", Cost(0.0)),
            "language layers": Cost(frozen.forward, frozen.forward + attention),  # attention passes gradients twice
            "text head": Cost(parts["text head"].forward, parts["text head"].forward),
        }
    elif stage == "pixels":
        needed = ["vision encoder", "autoencoder", "pixel head"]
        if shape.pixels == "inside":  # on the states of a language model that stands still
            parts |= {name: Cost(parts[name].forward) for name in ("projector", "language layers") if name in parts}
            needed += ["projector", "language layers"]
        parts = {name: parts[name] for name in needed if name in parts}
    again = sum(parts[name].forward for name in ("language layers", "branch") if name in parts)
    return Flops(
        forward=sum(part.forward for part in parts.values()),
        backward=sum(part.backward for part in parts.values()),
        recomputed=again if checkpoint_activations else 0.0,
        by_part=parts,
    )


def utilization(flops_per_second: float, accelerators: int, peak_flops: float) -> float:
    """The share of the accelerators' peak, both in FLOPs a second; of model FLOPs it is the MFU."""
    return flops_per_second / (accelerators * peak_flops)


def linear(rows: float, n_in: int, n_out: int, *, trained: bool = True, to_input: bool = True) -> Cost:
    """A matmul with a weight: (rows, n_in) -> (rows, n_out)."""
    once = 2.0 * rows * n_in * n_out
    return Cost(once, once * (trained + (trained and to_input)))


def transformer(shape: TransformerShape, tokens: float, *, trained: bool = True) -> Cost:
    """Layers over one sequence."""
    weights = 2.0 * tokens * shape.weights_per_layer
    attention = 4.0 * tokens**2 * shape.heads * shape.head_width
    forward = shape.layers * (weights + attention)
    return Cost(forward, 2 * forward if trained else 0.0)


def diffusion_weights(width_out: int, condition: int, width: int, blocks: int) -> int:
    """Weights of a per-token diffusion head's matmuls: into and out of ``width``, the condition's, the time's two, five
    a residual block, and the last modulation."""
    return 2 * width_out * width + condition * width + (2 + 5 * blocks + 2) * width * width


def diffusion_loss(rows: float, width_out: int, condition: int, width: int, blocks: int, draws: int) -> Cost:
    """The loss of a diffusion head on ``rows`` tokens, each noised ``draws`` times."""
    noised = rows * draws
    # No gradient goes to the noisy token nor to the time.
    first = linear(noised, width_out, width, to_input=False) + linear(noised, width, width, to_input=False)
    rest = linear(noised, condition, width) + linear(noised, width, width_out)
    return first + rest + _times(linear(noised, width, width), 1 + 5 * blocks + 2)


def shape_of(config: Any) -> ModelShape:
    """The shape of a ``UniHeteroConfig``."""
    text, vision = config.text_config, config.vision_config
    head: Head = "none" if config.semantic == "none" else "diffusion" if config.semantic_loss == "diffusion" else "mlp"
    layers = _layers(text, gated=text.model_type not in UNGATED)
    return ModelShape(
        text=layers,
        vocabulary=text.vocab_size,
        vision=VisionShape(
            _layers(vision, gated=bool(getattr(vision, "use_swiglu_ffn", False))),
            config.image_size,
            vision.patch_size,
            extra_tokens=1 + int(getattr(vision, "num_register_tokens", 0)),
        ),
        image_tokens=config.image_tokens,
        tied=bool(text.tie_word_embeddings),
        semantic=head,
        semantic_width=layers.width if config.semantic == "embedding" else config.feature_width,
        target_pass=config.semantic == "embedding",
        open_target=config.target == "open",
        branch_layers=0 if config.branch_from is None else layers.layers - config.branch_from,
        pixels=config.pixels,
        latent_width=config.latent_width,
        head_width=config.head_width,
        head_blocks=config.head_blocks,
        merged=config.feature_width // vision.hidden_size,
    )


def _visual(shape: ModelShape, vision: VisionShape, visual: float, images: float, encoded: bool) -> dict[str, Cost]:
    width, wide = shape.text.width, vision.layers.width
    project = linear(visual, shape.feature_width, width) + linear(visual, width, width)
    parts = {"projector": project}
    if not encoded:
        patches = linear(vision.patches, 3 * vision.patch_size**2, wide, trained=False)
        parts["vision encoder"] = _times(transformer(vision.layers, vision.tokens, trained=False) + patches, images)
    if shape.target_pass:
        parts["target"] = project if shape.open_target else Cost(project.forward)
    sizes = (width, shape.head_width, shape.head_blocks, shape.draws)
    if shape.semantic == "mlp":
        parts["semantic head"] = linear(visual, width, width) + linear(visual, width, shape.semantic_width)
    elif shape.semantic == "diffusion":
        parts["semantic head"] = diffusion_loss(visual, shape.semantic_width, *sizes)
    if shape.pixels != "none":
        parts["pixel head"] = diffusion_loss(visual, shape.latent_width, *sizes)
    if shape.pixels == "decoder":
        context = TransformerShape(DECODER_LAYERS, width, 4 * width, width, width, 1, gated=False)
        parts["pixel head"] += _times(transformer(context, shape.image_tokens), images) + Cost(project.forward)
    return parts


def _layers(config: Any, gated: bool) -> TransformerShape:
    heads = config.num_attention_heads
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    intermediate = intermediate or int(config.hidden_size * getattr(config, "mlp_ratio", 4))
    if gated and not hasattr(config, "intermediate_size"):
        intermediate = (intermediate * 2 // 3 + 7) // 8 * 8  # DINOv2's SwiGLU
    return TransformerShape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        intermediate=intermediate,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        gated=gated,
    )


def _times(cost: Cost, factor: float) -> Cost:
    return Cost(cost.forward * factor, cost.backward * factor)
