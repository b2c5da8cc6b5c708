"""The processor of a unified model: an image processor and a tokenizer that knows the image tokens, as one folder."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from palate.unihetero.model import UniHeteroConfig
from palate.unihetero.phrasing import PLACEHOLDER, Phrasing, Words


class UniHeteroProcessor(ProcessorMixin):
    """Texts with ``<image>`` where an image stands, and the images, as the model takes them.

    Args:
        image_tokens: visual tokens of an image.
        words: what stands around captions, questions and answers (``phrasing.Words``).
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_tokens: int = 16,
        words: Any = None,
        **others: Any,
    ) -> None:
        self.image_tokens = image_tokens
        self.words = dict(words or {})
        super().__init__(image_processor, tokenizer, **others)

    @cached_property
    def phrasing(self) -> Phrasing:
        return Phrasing(self.tokenizer, self.image_tokens, Words(**self.words))

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """(I, 3, H, W), as the vision encoder wants them."""
        given = self.image_processor(images=list(images))
        return torch.as_tensor(np.array(given["pixel_values"]))

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **others: Any) -> BatchFeature:
        """Rows of token ids, padded on the right, with their attention mask and pixel values.

        Raises:
            ValueError: texts name more or fewer images than there are.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = [] if images is None else [images] if isinstance(images, Image.Image) else list(images)
        phrasing, rows, named = self.phrasing, [], 0
        for one in texts:
            pieces = one.split(PLACEHOLDER)
            named += len(pieces) - 1
            ids = phrasing.ids(pieces[0])
            for piece in pieces[1:]:
                ids += [*phrasing.image(), *phrasing.ids(piece)]
            rows.append(ids)
        if named != len(pictures):
            raise ValueError(f"the texts have {named} {PLACEHOLDER} for {len(pictures)} images")
        longest = max(map(len, rows), default=0)
        ids_BT = torch.full((len(rows), longest), self.tokenizer.pad_token_id or 0)
        mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        for number, ids in enumerate(rows):
            ids_BT[number, : len(ids)], mask_BT[number, : len(ids)] = torch.tensor(ids), 1
        found = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if pictures:
            found["pixel_values"] = self.pixels(pictures)
        return BatchFeature(found)


AutoProcessor.register(UniHeteroConfig, UniHeteroProcessor)
