"""What a model has understood, by likelihood: multiple choice, the loss of texts, and the errors of free running.

Likelihood, not generation, because it tells small models apart before they can write. Rows are evaluated without
gradient; nothing here draws from the global generators.

Symbols: N samples, I images, P visual tokens, s feature width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palate.unihetero.generation import Stream, draw_embeddings, image_prefix
from palate.unihetero.model import UniHeteroModel
from palate.unihetero.phrasing import Phrasing
from palate.unihetero.samples import IGNORED, Sample, Segment, collate

RIDGE = 1e-3  # of the reader of free running, a sample


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
        states_BTd = model(**{**told.arguments(), "labels": None}, logits=False).states
        for (row,), plan, states_Td in zip(rows, plans, states_BTd, strict=True):
            scores.append(_read(model, row, plan, states_Td))
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


def _read(model: UniHeteroModel, sample: Sample, plans: Sequence[_Plan], states_Td: Tensor) -> list[list[float]]:
    def told(places: list[int], tokens: list[int]) -> Tensor:
        """Log-likelihoods of tokens, each after the state at a place; logits are made where they are read only."""
        logits_Nv: Tensor = model.get_output_embeddings()(states_Td[places])
        return logits_Nv.float().log_softmax(-1)[range(len(tokens)), tokens]

    found, place, number = [], len(sample.prefix), 0
    for plan in plans:
        scores = []
        for segment in sample.segments[number : number + plan.segments]:
            end = place + len(segment.ids)
            if plan.tokens is not None:
                scores = told([end - 1] * len(plan.tokens), list(plan.tokens)).tolist()
            else:
                where = [n for n, label in enumerate(segment.labels) if label != IGNORED]
                labels = [segment.labels[n] for n in where]
                scores.append(float(told([place + n - 1 for n in where], labels).sum()))
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
    """How free running errs, each entry over k = the steps run: the share of variance about each place's mean that is
    explained, of the true features x_s at all places that were made; and the loss of captions that are then read from
    the image so made (nats a token). ``true_caption_loss`` is from true images, ``explained_of_true`` how well x_s is
    read from true embeddings, which no made ones can exceed."""

    k: tuple[int, ...]
    explained: tuple[float, ...]
    caption_loss: tuple[float, ...]
    true_caption_loss: float
    explained_of_true: float


@torch.inference_mode()
def free_run(
    model: UniHeteroModel,
    phrasing: Phrasing,
    features_IPs: Tensor,
    captions: Sequence[str],
    fitted_IPs: Tensor,
    steps: Sequence[int] = (1, 4, 16, 64),
) -> FreeRun:
    """Free running after a caption and the true first P - k visual tokens, for each k up to P.

    Arms predict in spaces of their own, so what they make is compared in one, that of x_s: a linear reader from what
    the language model takes in to x_s is fitted for each model on true images. The image so made is also read by the
    model itself: the loss of the caption behind it, which does not see the caption before it.

    Args:
        fitted_IPs: features of other images, to fit the reader on.
    """
    tokens = model.config.image_tokens
    chosen = tuple(k for k in steps if k <= tokens)
    features_IPs, fitted_IPs = features_IPs.to(model.device), fitted_IPs.to(model.device)
    read = _reader(model.projector(fitted_IPs).flatten(0, 1), fitted_IPs.flatten(0, 1))
    mean_Ps = fitted_IPs.mean(0)
    true_IPd = model.projector(features_IPs)

    def explained(embeddings_IPd: Tensor, first: int) -> float:
        wanted, told = features_IPs[:, first:], read(embeddings_IPd[:, first:])
        return 1 - float(((told - wanted) ** 2).sum() / ((wanted - mean_Ps[first:]) ** 2).sum())

    shares, losses = [], []
    for k in chosen:
        made_IPd = true_IPd.clone()
        for rows, prefix in _by_length(phrasing, captions):
            start = torch.cat([image_prefix(model, prefix.to(model.device)), true_IPd[rows, : tokens - k]], dim=1)
            generators = [torch.Generator().manual_seed(row) for row in rows]
            made_IPd[rows, tokens - k :] = draw_embeddings(Stream.begin(model, start), k, generators)
        shares.append(explained(made_IPd, tokens - k))
        losses.append(_caption_loss(model, phrasing, made_IPd, captions))
    true_loss = _caption_loss(model, phrasing, true_IPd, captions)
    return FreeRun(chosen, tuple(shares), tuple(losses), true_loss, explained(true_IPd, 0))


def _reader(embeddings_Nd: Tensor, features_Ns: Tensor) -> Callable[[Tensor], Tensor]:
    """Ridge regression from embeddings to features, both standardized by their means and one deviation."""
    given, wanted = embeddings_Nd.double(), features_Ns.double()
    mean, scale_, target_mean = given.mean(0), given.std(), wanted.mean(0)
    x_Nd = (given - mean) / scale_
    gram = x_Nd.T @ x_Nd + RIDGE * len(x_Nd) * torch.eye(x_Nd.shape[1], dtype=x_Nd.dtype, device=x_Nd.device)
    weights_ds = torch.linalg.solve(gram, x_Nd.T @ (wanted - target_mean))
    return lambda values: (((values.double() - mean) / scale_) @ weights_ds + target_mean).float()


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
