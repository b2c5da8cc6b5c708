"""Samples as the model reads them: a prefix with its images, and segments that each go on from it.

Segments of one sample (a caption, questions with answers) see the prefix and themselves, not one another, so that one
pass over an image serves several questions. Samples packed into a row see only themselves. Positions count from the
start of a sample, and in each segment from the end of the prefix.

Symbols: B rows, T tokens, I images, P visual tokens, s feature width, c latent width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # label of a token that is not supervised


@dataclass(frozen=True)
class Segment:
    """Token ids and their labels, ``IGNORED`` where nothing is supervised. The first token cannot be: nothing in the
    segment predicts it, and what stands before it in the row may be another segment."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.labels) or not self.ids or self.labels[0] != IGNORED:
            raise ValueError(
                "a segment has a label for each token, and none for the first: begin it with what is given"
            )

    @staticmethod
    def answered(given: Sequence[int], answer: Sequence[int]) -> "Segment":
        """What is given, then what is supervised."""
        return Segment((*given, *answer), (*(IGNORED,) * len(given), *answer))


@dataclass(frozen=True)
class Sample:
    """One unit of training. ``prefix`` has the placeholders of the images; it is supervised where ``prefix_labels`` is.

    ``images`` are pixel values (images, 3, H, W) or, with ``encoded``, features of the encoder (images, P, s);
    ``latents`` (images, P, c). ``seed`` decides whatever is drawn for it.
    """

    id: str
    prefix: tuple[int, ...]
    segments: tuple[Segment, ...]
    images: Tensor | None
    encoded: bool = False
    latents: Tensor | None = None
    seed: int = 0
    prefix_labels: tuple[int, ...] | None = None  # IGNORED where it is not supervised
    targets: Tensor | None = None  # features (images, P, s) of other images, to be predicted instead (a control)

    @property
    def length(self) -> int:
        return len(self.prefix) + sum(len(segment.ids) for segment in self.segments)

    @property
    def supervised(self) -> int:
        """Text tokens with a label."""
        labels = [*(self.prefix_labels or ())[1:], *(label for segment in self.segments for label in segment.labels)]
        return sum(label != IGNORED for label in labels)

    @property
    def image_count(self) -> int:
        return 0 if self.images is None else len(self.images)


@dataclass(frozen=True)
class Batch:
    """Rows for the model. ``attention_mask`` (B, 1, T, T) is True where a row's token may look."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None = None
    image_features: Tensor | None = None
    latents: Tensor | None = None
    target_features: Tensor | None = None
    seeds: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def arguments(self) -> dict[str, Any]:
        """For ``UniHeteroModel.forward``."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"seeds": list(self.seeds)}


def collate(rows: Sequence[Sequence[Sample]], padding: int = 0) -> Batch:
    """Rows of packed samples as one batch, each row padded to the longest.

    Raises:
        ValueError: some samples bring pixels and others features, or some latents and others none.
    """
    length = max(sum(sample.length for sample in row) for row in rows)
    # Plain lists, made tensors once: writing each segment into a tensor took longer than a small model's forward pass.
    ids, labels, places, owners, segments = (list[list[int]]() for _ in range(5))
    for row in rows:
        for column in (ids, labels, places, owners, segments):
            column.append([])
        for owner, sample in enumerate(row):
            prefix = len(sample.prefix)
            start = len(labels[-1])
            parts = [(sample.prefix, sample.prefix_labels or (IGNORED,) * prefix, 0)]
            parts += [(segment.ids, segment.labels, prefix) for segment in sample.segments]
            for which, (tokens, marks, first) in enumerate(parts):
                ids[-1] += tokens
                labels[-1] += marks
                places[-1] += range(first, first + len(tokens))
                owners[-1] += [owner] * len(tokens)
                segments[-1] += [which] * len(tokens)
            labels[-1][start] = IGNORED  # predicted from nothing

    def padded(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([one + [value] * (length - len(one)) for one in lists])

    samples = [sample for row in rows for sample in row if sample.images is not None]
    encoded = {sample.encoded for sample in samples}
    with_latents = {sample.latents is not None for sample in samples}
    if len(encoded) > 1 or len(with_latents) > 1:
        raise ValueError("some samples bring features or latents, and others do not: make a source's samples alike")
    images = torch.cat([sample.images for sample in samples if sample.images is not None]) if samples else None
    latents = [sample.latents for sample in samples if sample.latents is not None]
    targets = [sample.targets for sample in samples if sample.targets is not None]
    seeds = [sample.seed * 64 + i for sample in samples for i in range(sample.image_count)]
    return Batch(
        input_ids=padded(ids, padding),
        attention_mask=visible(padded(owners, -1), padded(segments, 0)),
        position_ids=padded(places, 0),
        labels=padded(labels, IGNORED),
        pixel_values=None if encoded == {True} else images,
        image_features=images if encoded == {True} else None,
        latents=torch.cat(latents) if latents else None,
        target_features=torch.cat(targets) if targets else None,
        seeds=tuple(seed % (1 << 63) for seed in seeds),
    )


def split(samples: Sequence[Sample], longest: int | None) -> list[list[Sample]]:
    """Samples as rows of at most ``longest`` tokens, in their order; a longer sample is a row of its own."""
    rows: list[list[Sample]] = [[]]
    length = 0
    for sample in samples:
        if rows[-1] and longest is not None and length + sample.length > longest:
            rows.append([])
            length = 0
        rows[-1].append(sample)
        length += sample.length
    return rows


def shortened(sample: Sample, longest: int) -> Sample:
    """The sample cut to ``longest`` tokens: last segments go first, then the end of the first one.

    Raises:
        ValueError: its prefix alone, with its images, is longer.
    """
    room = longest - len(sample.prefix)
    if room < 0:
        raise ValueError(f"{len(sample.prefix)} tokens up to the end of the image, of at most {longest}")
    kept: list[Segment] = []
    for segment in sample.segments:
        cut = Segment(segment.ids[:room], segment.labels[:room]) if room > 0 else None
        if cut is None or (kept and len(cut.ids) < len(segment.ids)):
            break
        kept.append(cut)
        room -= len(cut.ids)
    return replace(sample, segments=tuple(kept))


def visible(owners_BT: Tensor, segments_BT: Tensor) -> Tensor:
    """Where each token may look, (B, 1, T, T): back, in its own sample, at the prefix (segment 0) and its own segment.
    Padding (owner -1) looks at itself, for a softmax over nothing is not a number."""
    length = owners_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=owners_BT.device).tril()
    same_BTT = (owners_BT[:, :, None] == owners_BT[:, None, :]) & (owners_BT >= 0)[:, :, None]
    inside_BTT = (segments_BT[:, None, :] == 0) | (segments_BT[:, :, None] == segments_BT[:, None, :])
    itself_TT = torch.eye(length, dtype=torch.bool, device=owners_BT.device)
    return ((causal_TT & same_BTT & inside_BTT) | itself_TT)[:, None]
