"""Image-text shards as samples of the model: what a decoded record becomes.

A caption becomes a segment after the image, or, for a share of the samples, the text that an image is drawn after;
LLaVA's conversations become a segment; the questions of worlds (``questions`` in a tar's JSON) become segments of
their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from palate.corpora.captions import RawSample
from palate.corpora.pictures import decode_image
from palate.unihetero.phrasing import text_first
from palate.unihetero.processing import UniHeteroProcessor
from palate.unihetero.samples import Sample, Segment, shortened


@dataclass(frozen=True)
class Decode:
    """From a raw sample and a seed to a ``Sample``; a ``ShardSource``'s ``decode``.

    Raises (when called):
        ValueError: the image is broken, or the record has nothing to learn from.
    """

    processor: UniHeteroProcessor
    text_first: float = 0.0
    longest: int = 2048
    """Tokens of a sample; a longer one is cut."""

    def __call__(self, raw: RawSample, seed: int) -> Sample:
        image = self.processor.pixels([decode_image(raw.image)])
        phrasing = self.processor.phrasing
        seed %= 1 << 40
        if raw.text and text_first(seed, self.text_first):
            sample = phrasing.to_draw(raw.key, raw.text, image, seed=seed)
        else:
            segments = self._segments(raw)
            if not segments:
                raise ValueError("no caption, conversation or question")
            sample = phrasing.described(raw.key, image, segments, seed=seed)
        return sample if sample.length <= self.longest else shortened(sample, self.longest)

    def _segments(self, raw: RawSample) -> list[Segment]:
        phrasing, record = self.processor.phrasing, raw.record or {}
        found = [phrasing.caption(raw.text)] if raw.text else []
        try:
            if turns := record.get("conversations"):
                found.append(phrasing.conversation([(turn["from"], turn["value"]) for turn in turns]))
            for question in record.get("questions") or []:
                found.append(phrasing.question(question["text"], question["answer"]))
        except (AttributeError, KeyError, TypeError) as error:  # whatever a record may be
            raise ValueError(
                f"a record that is not understood ({error!r}): conversations are lists of from and value, questions of "
                "text and answer"
            ) from None
        return found


def token_lengths(image_tokens: int, characters_per_token: float = 3.5) -> Callable[[Any], Any]:
    """Tokens of samples from the characters of their captions, which the index holds: an estimate, to plan packs by."""

    def lengths(characters_N: np.ndarray) -> np.ndarray:
        return np.ceil(characters_N / characters_per_token).astype(np.int64) + image_tokens + 8

    return lengths
