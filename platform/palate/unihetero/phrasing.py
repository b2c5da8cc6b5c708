"""How images and texts become samples: the same words for training, evaluation and answering.

    image first   <image> | caption: ... | question: ... answer: ...      segments after the image, in parallel
    text first    caption: ... <image>                                     to draw what a caption says

The placeholder of an image is its start, P visual tokens, its end. What a record says never becomes a special token.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from palate.corpora.image_text import HUMAN
from palate.unihetero.model import UniHeteroConfig
from palate.unihetero.samples import IGNORED, Sample, Segment

IMAGE_TOKENS = ("<image_start>", "<image>", "<image_end>")

PLACEHOLDER = "<image>"  # in conversations, as LLaVA writes it


@dataclass(frozen=True)
class Words:
    """What stands around texts."""

    caption: str = "\nCaption:"
    question: str = "\nQuestion:"
    answer: str = "\nAnswer:"


@dataclass(frozen=True)
class Phrasing:
    """Makes samples with a tokenizer that knows the image tokens (``add_image_tokens``)."""

    tokenizer: PreTrainedTokenizerBase
    image_tokens: int
    words: Words = field(default_factory=Words)

    @cached_property
    def plain(self) -> PreTrainedTokenizerBase:
        """The tokenizer for what people wrote: an object of its own, for the switch holds for all threads."""
        plain = copy.deepcopy(self.tokenizer)
        plain.split_special_tokens = True
        return plain

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    def ids(self, text: str) -> list[int]:
        """Token ids of plain text; spellings of special tokens stay text."""
        return list(self.plain(text, add_special_tokens=False).input_ids)

    def image(self) -> list[int]:
        """An image's place."""
        start, token, end = self.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
        return [start, *[token] * self.image_tokens, end]

    def caption(self, text: str) -> Segment:
        return Segment.answered(self.ids(self.words.caption), [*self.ids(" " + text), self.end])

    def asked(self, question: str) -> list[int]:
        """A question, up to where its answer starts."""
        return [*self.ids(self.words.question), *self.ids(" " + question), *self.ids(self.words.answer)]

    def question(self, question: str, answer: str) -> Segment:
        return Segment.answered(self.asked(question), [*self.ids(" " + answer), self.end])

    def conversation(self, turns: Sequence[tuple[str, str]]) -> Segment:
        """(role, text) turns in one segment, of which the model's are supervised.

        Raises:
            ValueError: it does not begin with a person's turn.
        """
        if not turns or turns[0][0] not in HUMAN:
            raise ValueError(f"a conversation begins with one of {HUMAN}, found {turns[:1]}")
        ids: list[int] = []
        labels: list[int] = []
        for role, text in turns:
            if role in HUMAN:
                part = self.asked(text.replace(PLACEHOLDER, "").strip())
                labels += [IGNORED] * len(part)
            else:
                part = [*self.ids(" " + text), self.end]
                labels += part
            ids += part
        return Segment(tuple(ids), tuple(labels))

    def described(
        self, name: str, images: Tensor, segments: Sequence[Segment], *, seed: int = 0, **others: Any
    ) -> Sample:
        """Image first. ``images`` are one image's pixels (1, 3, H, W), or features (1, P, s) with ``encoded=True``."""
        return Sample(name, tuple(self.image() * len(images)), tuple(segments), images, seed=seed, **others)

    def to_draw(self, name: str, caption: str, images: Tensor, *, seed: int = 0, **others: Any) -> Sample:
        """Text first: the caption and the image's start are supervised, and the visual tokens by the heads."""
        given = self.ids(self.words.caption)
        said = self.ids(" " + caption)
        image = self.image()
        labels = (*(IGNORED,) * len(given), *said, image[0], *(IGNORED,) * (len(image) - 1))
        return Sample(name, (*given, *said, *image), (), images, seed=seed, prefix_labels=labels, **others)


def text_first(seed: int, share: float) -> bool:
    """Whether a sample is written text first, by its seed."""
    return random.Random(seed).random() < share


def add_image_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer know the image tokens; one that knows them is left as it is."""
    tokenizer.add_tokens(list(IMAGE_TOKENS), special_tokens=True)


def with_tokens(config: UniHeteroConfig, tokenizer: PreTrainedTokenizerBase) -> UniHeteroConfig:
    """The settings with the ids of the tokenizer's image tokens."""
    start, token, end = tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    config.image_start_id, config.image_token_id, config.image_end_id = start, token, end
    return config
