"""What a model has understood, by likelihood: multiple choice, the loss of texts, and the errors of free running.

Likelihood, not generation, because it tells small models apart before they can write. Rows are evaluated without
gradient; nothing here draws from the global generators.

Symbols: N samples, I images, P visual tokens, s feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.unihetero.generation import Stream, draw_embeddings, image_prefix
from palate.unihetero.model import UniHeteroModel
from palate.unihetero.phrasing import Phrasing
from palate.unihetero.samples import IGNORED, Sample, Segment, collate


@dataclass(frozen=True)
class Asked:
    """A multiple-choice question."""

    question: str
    options: tuple[str, ...]
    answer: int
    kind: str = ""


@torch.inference_mode()
def choose(
    model: UniHeteroModel,
    phrasing: Phrasing,
    images: Sequence[Tensor],
    asked: Sequence[Sequence[Asked]],
    *,
    encoded: bool,
    batch: int = 32,
) -> list[list[list[float]]]:
    """Log-likelihoods of each option of each question of each image, the end of the answer included.

    Options are segments after the image, all questions' in one pass. Options of a token each are read at one place,
    where the question ends; their ends, which say little more, are not read then.

    Args:
        images: pixels (1, 3, H, W) or, ``encoded``, features (1, P, s) of each image.
    """
    scores = []
    for start in range(0, len(images), batch):
        rows, plans = [], []
        for number, (image, questions) in enumerate(
            zip(images[start : start + batch], asked[start : start + batch], strict=True)
        ):
            segments, plan = _segments(phrasing, questions)
            rows.append([phrasing.described(str(number), image, segments, encoded=encoded)])
            plans.append(plan)
        told = collate(rows).to(model.device)
        states = model(**{**told.arguments(), "labels": None}).logits.log_softmax(-1)
        for (row,), plan, logits_Tv in zip(rows, plans, states, strict=True):
            scores.append(_read(row, plan, logits_Tv))
    return scores


@dataclass(frozen=True)
class _Plan:
    """How to read a question's options: the tokens to look up where its one segment ends, or a segment for each."""

    tokens: tuple[int, ...] | None
    segments: int


def _segments(phrasing: Phrasing, questions: Sequence[Asked]) -> tuple[list[Segment], list[_Plan]]:
    segments, plans = [], []
    for one in questions:
        given = phrasing.asked(one.question)
        answers = [phrasing.ids(" " + option) for option in one.options]
        if all(len(ids) == 1 for ids in answers):
            segments.append(Segment(tuple(given), (IGNORED,) * len(given)))
            plans.append(_Plan(tuple(ids[0] for ids in answers), 1))
        else:
            segments += [Segment.answered(given, [*ids, phrasing.end]) for ids in answers]
            plans.append(_Plan(None, len(answers)))
    return segments, plans


def _read(sample: Sample, plans: Sequence[_Plan], logits_Tv: Tensor) -> list[list[float]]:
    found, place, number = [], len(sample.prefix), 0
    for plan in plans:
        scores = []
        for segment in sample.segments[number : number + plan.segments]:
            end = place + len(segment.ids)
            if plan.tokens is not None:
                scores = logits_Tv[end - 1, list(plan.tokens)].tolist()
            else:
                where = [n for n, label in enumerate(segment.labels) if label != IGNORED]
                labels = [segment.labels[n] for n in where]
                scores.append(float(logits_Tv[[place + n - 1 for n in where], labels].sum()))
            place = end
        number += plan.segments
        found.append(scores)
    return found


def correct(scores: Sequence[Sequence[Sequence[float]]], asked: Sequence[Sequence[Asked]]) -> list[list[bool]]:
    """Whether the likeliest option is the right one; ties are wrong."""
    return [
        [
            sum(value >= likelihoods[one.answer] for value in likelihoods) == 1
            for likelihoods, one in zip(image_scores, questions, strict=True)
        ]
        for image_scores, questions in zip(scores, asked, strict=True)
    ]


@torch.inference_mode()
def text_loss(model: UniHeteroModel, samples: Sequence[Sample], batch: int = 32) -> float:
    """Nats a supervised token, over all samples."""
    total, count = 0.0, 0
    for start in range(0, len(samples), batch):
        told = collate([[sample] for sample in samples[start : start + batch]]).to(model.device)
        output = model(**told.arguments())
        assert output.text_loss is not None
        assert output.text_count is not None
        total, count = total + float(output.text_loss), count + output.text_count
    return total / count


def without_image(samples: Sequence[Sample]) -> list[Sample]:
    """The same texts with nothing before them: what the language model alone knows."""
    return [Sample(one.id, (), one.segments, None, seed=one.seed) for one in samples if one.segments]


@dataclass(frozen=True)
class FreeRun:
    """How free running errs, each entry over k = the steps run: the embedding of the last step against the true one, by
    cosine and by the share of variance about each place's mean that is explained; and the loss of captions that are
    then read from the image so made (nats a token), and from the true one."""

    k: tuple[int, ...]
    cosine: tuple[float, ...]
    explained: tuple[float, ...]
    caption_loss: tuple[float, ...]
    true_caption_loss: float


@torch.inference_mode()
def free_run(
    model: UniHeteroModel,
    phrasing: Phrasing,
    features_IPs: Tensor,
    captions: Sequence[str],
    steps: Sequence[int] = (1, 4, 16, 64),
) -> FreeRun:
    """Free running after a caption and the true first P - k visual tokens, for each k up to P.

    All is measured in the language model's input space, whatever the head predicts, so arms compare. The image so
    made is then read by the model itself: the loss of the caption behind it, which does not see the caption before it.
    """
    tokens = model.config.image_tokens
    chosen = tuple(k for k in steps if k <= tokens)
    true_IPd = model.projector(features_IPs)
    mean_Pd = true_IPd.mean(0)
    cosine, explained, losses = [], [], []
    for k in chosen:
        made_IPd = true_IPd.clone()
        for rows, prefix in _by_length(phrasing, captions):
            start = torch.cat([image_prefix(model, prefix.to(model.device)), true_IPd[rows, : tokens - k]], dim=1)
            made_IPd[rows, tokens - k :] = draw_embeddings(Stream.begin(model, start), k)
        last, true = made_IPd[:, -1], true_IPd[:, -1]
        cosine.append(float(F.cosine_similarity(last, true, dim=-1).mean()))
        explained.append(1 - float(((last - true) ** 2).sum() / ((true - mean_Pd[-1]) ** 2).sum()))
        losses.append(_caption_loss(model, phrasing, made_IPd, captions))
    return FreeRun(
        chosen, tuple(cosine), tuple(explained), tuple(losses), _caption_loss(model, phrasing, true_IPd, captions)
    )


def _by_length(phrasing: Phrasing, captions: Sequence[str]) -> list[tuple[list[int], Tensor]]:
    """Captions as tokens (rows, T), those of equal length together, with their numbers."""
    found: dict[int, list[tuple[int, list[int]]]] = {}
    for number, caption in enumerate(captions):
        ids = [*phrasing.ids(phrasing.words.caption), *phrasing.ids(" " + caption)]
        found.setdefault(len(ids), []).append((number, ids))
    return [([n for n, _ in group], torch.tensor([ids for _, ids in group])) for group in found.values()]


def _caption_loss(model: UniHeteroModel, phrasing: Phrasing, embeddings_IPd: Tensor, captions: Sequence[str]) -> float:
    """Nats a token of captions read from images of these embeddings."""
    total, count = 0.0, 0
    embed = model.get_input_embeddings()
    for start in range(0, len(captions), 64):
        part = captions[start : start + 64]
        empty = torch.zeros(1, 0)
        rows = [[Sample("", tuple(phrasing.image()), (phrasing.caption(caption),), empty)] for caption in part]
        told = collate(rows).to(model.device)
        inputs = embed(told.input_ids).masked_scatter(
            (told.input_ids == model.config.image_token_id)[:, :, None],
            embeddings_IPd[start : start + 64].flatten(0, 1),
        )
        output = model(
            inputs_embeds=inputs,
            attention_mask=told.attention_mask,
            position_ids=told.position_ids,
            labels=told.labels,
        )
        assert output.text_loss is not None
        assert output.text_count is not None
        total, count = total + float(output.text_loss), count + output.text_count
    return total / count
