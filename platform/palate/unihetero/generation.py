"""Free-running generation with a cache of keys and values: visual embeddings, pixels, text, and both in turn.

The semantic head's prediction is fed back as the next input: as it is where it is an embedding ("embedding"), through
the projector where it is an encoder's output ("encoder").

Symbols: B rows of equal length, P visual tokens, d width of the language model, s of the encoder, c of a latent token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import DynamicCache

from palate.unihetero import latents
from palate.unihetero.heads import DiffusionHead, PixelDecoder, to_scale
from palate.unihetero.model import UniHeteroModel


@dataclass
class Stream:
    """Rows on their way: the cache, and the states at their ends."""

    model: UniHeteroModel
    cache: DynamicCache
    end_Bd: Tensor
    length: int

    @staticmethod
    def begin(model: UniHeteroModel, embeddings_BTd: Tensor) -> "Stream":
        cache = DynamicCache(config=model.config.text_config)
        return Stream(model, cache, embeddings_BTd[:, 0], 0).feed(embeddings_BTd)

    def feed(self, embeddings_BTd: Tensor) -> "Stream":
        """Go on by more input."""
        rows, count = embeddings_BTd.shape[:2]
        places = torch.arange(self.length, self.length + count, device=embeddings_BTd.device).expand(rows, count)
        states = self.model.decode(embeddings_BTd, self.cache, position_ids=places).last_hidden_state
        self.end_Bd, self.length = states[:, -1], self.length + count
        return self

    def logits(self) -> Tensor:
        """Of the next token, (B, vocabulary)."""
        found: Tensor = self.model.get_output_embeddings()(self.end_Bd)
        return found


@torch.inference_mode()
def draw_embeddings(stream: Stream, count: int, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """The next ``count`` visual embeddings, (B, count, d), each fed back before the next; of a diffusion head, each
    row's by its own generator.

    Raises:
        ValueError: the model has no semantic head that sees the language model's own states.
    """
    model = stream.model
    check_draws(model)
    drawn = []
    for _ in range(count):
        embedding_Bd = predicted_embedding(model, stream.end_Bd, generators)
        drawn.append(embedding_Bd)
        stream.feed(embedding_Bd[:, None])
    return torch.stack(drawn, dim=1)


def check_draws(model: UniHeteroModel) -> None:
    config = model.config
    if config.semantic == "none" or not config.shift or config.branch_from is not None:
        raise ValueError(
            "this model cannot draw: it needs a semantic head on the language model's own states that predicts the "
            f"next token (found {config.semantic=}, {config.shift=}, {config.branch_from=}); train --arm embedding, "
            "decoder or encoder"
        )


def predicted_embedding(
    model: UniHeteroModel, states_Bd: Tensor, generators: Sequence[torch.Generator] | None = None
) -> Tensor:
    """The next visual embedding that states predict, (B, d), of the size that embeddings have."""
    head = model.semantic_head
    assert head is not None
    if not isinstance(head, DiffusionHead):
        predicted: Tensor = head(states_Bd)
    elif generators is None:
        predicted = head.sample(states_Bd, None)
    else:
        rows = zip(states_Bd.split(1), generators, strict=True)
        predicted = torch.cat([head.sample(state_1d, generator) for state_1d, generator in rows])
    if model.config.semantic == "encoder":
        embedding: Tensor = model.projector(predicted)  # its first norm makes the size of what it is given irrelevant
        return embedding
    return to_scale(predicted, model.projector.scale).to(states_Bd.dtype)


def image_prefix(model: UniHeteroModel, prefix_ids_BT: Tensor) -> Tensor:
    """Embeddings (B, T + 1, d) of a text and the start of an image."""
    start = torch.full((len(prefix_ids_BT), 1), model.config.image_start_id, device=prefix_ids_BT.device)
    found: Tensor = model.get_input_embeddings()(torch.cat([prefix_ids_BT, start], dim=1))
    return found


@torch.inference_mode()
def draw_latents(
    model: UniHeteroModel, embeddings_IPd: Tensor, seeds: Sequence[int], steps: int = 50, guidance: float = 1.0
) -> Tensor:
    """Latent tokens (I, P, c) that the pixel decoder draws for images' embeddings, each image by its own seed.

    Raises:
        ValueError: the model has no pixel decoder.
    """
    if not isinstance(model.pixel_head, PixelDecoder):
        raise ValueError("this model has no pixel decoder: train --arm decoder, or the stage pixels on it")
    drawn = []
    for embeddings_Pd, seed in zip(to_scale(embeddings_IPd, 1.0), seeds, strict=True):
        condition_Pd = model.pixel_head.conditions(embeddings_Pd[None])
        generator = torch.Generator().manual_seed(seed)
        drawn.append(model.pixel_head.head.sample(condition_Pd, generator, steps, guidance))
    return torch.stack(drawn)


def draw_images(
    model: UniHeteroModel,
    vae: AutoencoderKL,
    prefix_ids: Sequence[int],
    seeds: Sequence[int],
    steps: int = 50,
    guidance: float = 1.0,
) -> Tensor:
    """Images (I, 3, H, W) in [0, 1] for one text, one a seed.

    With a regression head the embeddings are the same for all seeds, and only the decoder's noise differs. A seed gives
    the same image whatever the others are.
    """
    rows = torch.tensor([list(prefix_ids)] * len(seeds), device=model.device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.inference_mode():
        stream = Stream.begin(model, image_prefix(model, rows))
    embeddings_IPd = draw_embeddings(stream, model.config.image_tokens, generators)
    tokens = draw_latents(model, embeddings_IPd, seeds, steps, guidance)
    return latents.decode(vae, latents.from_tokens(tokens.to(vae.dtype), int(vae.config.latent_channels)))


@dataclass(frozen=True)
class Piece:
    """A part of what the model said: token ids, or the embeddings (P, d) of an image."""

    ids: tuple[int, ...] = ()
    embeddings_Pd: Tensor | None = None


@torch.inference_mode()
def say(
    model: UniHeteroModel,
    input_ids: Sequence[int],
    features_IPs: Tensor | None,
    *,
    end: int,
    most: int = 64,
    images: int = 0,
) -> list[Piece]:
    """What the model says greedily after a text with images, as pieces in turn.

    Args:
        end: the token that ends it; it is not given back.
        most: tokens of text, at most.
        images: how many images it may draw, where it says the start of one; its start and end belong to no piece.
    """
    ids = torch.tensor([list(input_ids)], device=model.device)
    stream = Stream.begin(model, model.embed(ids, features_IPs))
    embed = model.get_input_embeddings()
    pieces: list[Piece] = []
    said: list[int] = []
    for _ in range(most):
        logits_v = stream.logits()[0]
        # A placeholder, or an image's end, says nothing where there is no image.
        logits_v[[model.config.image_token_id, model.config.image_end_id]] = -torch.inf
        if images == 0:
            logits_v[model.config.image_start_id] = -torch.inf
        token = int(logits_v.argmax())
        if token == end:
            break
        stream.feed(embed(torch.tensor([[token]], device=model.device)))
        if token != model.config.image_start_id:
            said.append(token)
            continue
        images -= 1
        if said:
            pieces.append(Piece(tuple(said)))
            said = []
        pieces.append(Piece((), draw_embeddings(stream, model.config.image_tokens)[0]))
        stream.feed(embed(torch.tensor([[model.config.image_end_id]], device=model.device)))
    return [*pieces, Piece(tuple(said))] if said else pieces
