"""What the personalization head needs of texts: one forward pass of the frozen cluster model over each.

Several answers to one prompt share the prompt's part of the pass: they stand behind it in one row, each with the
positions that it would have alone, and attend to the prompt and to themselves only. Separate rows give the same.

Symbols: N token positions, k candidates, L layers, d width of the model, T length of a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from palate import progress
from palate.card.adapters import RowMask
from palate.card.correction import FeatureMap
from palate.card.preferences import ABSENT, Positions
from palate.models.causal_lm import LoadedModel

ROW_TOKENS = 2048  # tokens of one forward pass, padding included


@dataclass(frozen=True)
class Branches:
    """One prompt and the answers to it, as token ids, under one adapter (-1: the bare base model)."""

    prompt_ids: Sequence[int]
    answers: Sequence[Sequence[int]]
    adapter: int

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + sum(map(len, self.answers))


def extract(
    loaded: LoadedModel,
    rows: RowMask | None,
    features: FeatureMap,
    texts: Sequence[Branches],
    top_k: int,
    label: str = "features",
) -> Positions:
    """Positions of every token of every answer, answers numbered in the order given (over all branches).

    Args:
        rows: the row mask of a packed model; None where no text names an adapter.
        features: how hidden states are made into features.

    Raises:
        ValueError: a text is longer than the model's context.
    """
    first_text = _first_texts(texts)
    parts: dict[int, Positions] = {}
    with progress.meter(label, len(texts)) as bar:
        for batch in _batches(texts):
            found = _forward(loaded, rows, features, [texts[index] for index in batch], top_k)
            for index, positions in zip(batch, found, strict=True):
                parts[index] = renumbered(positions, first_text[index])
            bar.update(len(batch))
    return concatenate([_no_positions(features, top_k), *(parts[index] for index in range(len(texts)))])


def fit_standardization(
    loaded: LoadedModel, rows: RowMask | None, layers: Sequence[int], texts: Sequence[Branches]
) -> FeatureMap:
    """Mean and scale of each layer's hidden states over the answers of ``texts``; no whitening yet.

    Raises:
        ValueError: a layer is outside the model, or there is not one answer.
    """
    count = loaded.fingerprint["layers"]
    if bad := [layer for layer in layers if not 0 <= layer <= count]:
        raise ValueError(f"--layers {bad[0]}: {loaded.name} has hidden states 0 (embeddings) to {count}")
    width = loaded.fingerprint["hidden_size"]
    total, squares, n = torch.zeros(len(layers), width).double(), torch.zeros(len(layers), width).double(), 0
    for batch in _batches(texts):
        states, _ = _hidden(loaded, rows, layers, [texts[i] for i in batch])
        hidden_LNd = torch.cat(states, dim=1).double().cpu()
        total, squares, n = total + hidden_LNd.sum(1), squares + hidden_LNd.square().sum(1), n + hidden_LNd.shape[1]
    if n == 0:
        raise ValueError("there is no text to take the statistics of the features from: the histories are empty")
    mean_Ld = total / n
    deviation_Ld = (squares / n - mean_Ld.square()).clamp(min=0).sqrt()
    scale_Ld = 1 / deviation_Ld.clamp(min=1e-3 * float(deviation_Ld.max()) + 1e-12)
    return FeatureMap(tuple(layers), mean_Ld.float(), scale_Ld.float(), torch.eye(mean_Ld.shape[1]))


def concatenate(parts: Sequence[Positions]) -> Positions:
    """One ``Positions`` of several whose texts are numbered already."""
    return Positions(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Positions)))


def renumbered(positions: Positions, first: int) -> Positions:
    """The same positions, their texts counted from ``first``."""
    values = {field.name: getattr(positions, field.name) for field in fields(Positions)}
    return Positions(**{**values, "text_N": positions.text_N + first})


def save_positions(positions: Positions, file: Path) -> None:
    """Write as safetensors."""
    save_file({field.name: getattr(positions, field.name).contiguous() for field in fields(Positions)}, file)


def load_positions(file: Path) -> Positions:
    """What ``save_positions`` wrote; text numbers are those of the file."""
    with safe_open(file, framework="pt") as stored:
        return Positions(*(stored.get_tensor(field.name) for field in fields(Positions)))


def _no_positions(features: FeatureMap, top_k: int) -> Positions:
    """What comes of no text, so that people without one need no case of their own."""
    whole, real = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    candidates_Nk = torch.zeros(0, top_k, dtype=torch.long)
    features_Nd = torch.zeros(0, features.whitening_dd.shape[1])
    return Positions(features_Nd, candidates_Nk, candidates_Nk.float(), whole, real, whole)


def _first_texts(texts: Sequence[Branches]) -> list[int]:
    first, count = [], 0
    for text in texts:
        first.append(count)
        count += len(text.answers)
    return first


def _batches(texts: Sequence[Branches]) -> Iterator[list[int]]:
    """Indices of texts of like length that fill a forward pass together."""
    order = sorted(range(len(texts)), key=lambda index: -texts[index].length)
    start = 0
    while start < len(order):
        count = max(1, ROW_TOKENS // max(texts[order[start]].length, 1))
        yield order[start : start + count]
        start += count


def _forward(
    loaded: LoadedModel, rows: RowMask | None, features: FeatureMap, texts: Sequence[Branches], top_k: int
) -> list[Positions]:
    states, finals = _hidden(loaded, rows, features.layers, texts)
    parts = []
    for text, hidden_LNd, final_Nd in zip(texts, states, finals, strict=True):
        with torch.no_grad():
            log_probs_NV = loaded.model.get_output_embeddings()(final_Nd).float().log_softmax(-1)
        log_probs_Nk, candidates_Nk = log_probs_NV.topk(top_k, dim=-1)
        written_N = torch.tensor([token for answer in text.answers for token in answer], device=candidates_Nk.device)
        matches_Nk = candidates_Nk == written_N[:, None]
        target_N = torch.where(matches_Nk.any(1), matches_Nk.int().argmax(1), ABSENT)
        text_N = torch.tensor([number for number, answer in enumerate(text.answers) for _ in answer])
        parts.append(
            Positions(
                features_Nd=features(list(hidden_LNd)).cpu(),
                candidates_Nk=candidates_Nk.cpu(),
                log_probs_Nk=log_probs_Nk.cpu(),
                target_N=target_N.cpu(),
                target_log_prob_N=log_probs_NV.gather(1, written_N[:, None]).squeeze(1).cpu(),
                text_N=text_N,
            )
        )
    return parts


@torch.no_grad()
def _hidden(
    loaded: LoadedModel, rows: RowMask | None, layers: Sequence[int], texts: Sequence[Branches]
) -> tuple[list[Tensor], list[Tensor]]:
    """Per text, hidden states (L, N, d) of ``layers`` and the last state (N, d) from which each token is predicted."""
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and (longest := max(text.length for text in texts)) > limit:
        raise ValueError(f"a text has {longest} tokens, {loaded.name} reads {limit}: lower --max-prompt-tokens")
    device = loaded.device
    width = max(text.length for text in texts)
    tokens_BT = torch.zeros(len(texts), width, dtype=torch.long)
    positions_BT = torch.zeros(len(texts), width, dtype=torch.long)
    branch_BT = torch.full(
        (len(texts), width), -1
    )  # -1 prompt, then the answer's number; padding is a branch of its own
    sources: list[Tensor] = []
    for row, text in enumerate(texts):
        start = len(text.prompt_ids)
        tokens_BT[row, :start] = torch.as_tensor(text.prompt_ids)
        positions_BT[row, :start] = torch.arange(start)
        source: list[int] = []
        cursor = start
        for number, answer in enumerate(text.answers):
            end = cursor + len(answer)
            tokens_BT[row, cursor:end] = torch.as_tensor(answer)
            positions_BT[row, cursor:end] = torch.arange(start, start + len(answer))
            branch_BT[row, cursor:end] = number
            source += [start - 1, *range(cursor, end - 1)] if len(answer) else []
            cursor = end
        branch_BT[row, cursor:] = len(text.answers)
        sources.append(torch.tensor(source, dtype=torch.long))
    if rows is not None:
        rows.set(torch.tensor([text.adapter for text in texts], device=device))
    elif any(text.adapter >= 0 for text in texts):
        raise ValueError("texts name adapters, but the model has none packed in it")
    mask_BTT = _mask(branch_BT) if any(len(text.answers) > 1 for text in texts) else None
    output = loaded.model.base_model(
        input_ids=tokens_BT.to(device),
        position_ids=positions_BT.to(device),
        attention_mask=None if mask_BTT is None else mask_BTT[:, None].to(device),
        output_hidden_states=True,
        use_cache=False,
    )
    chosen = [output.hidden_states[layer] for layer in layers]
    states = [torch.stack([layer[row, source] for layer in chosen]) for row, source in enumerate(sources)]
    return states, [output.last_hidden_state[row, source] for row, source in enumerate(sources)]


def _mask(branch_BT: Tensor) -> Tensor:
    """Which positions (B, T, T) attend where: to what stands before, in the prompt or in the same answer."""
    causal_TT = torch.ones(branch_BT.shape[1], branch_BT.shape[1], dtype=torch.bool).tril()
    same_BTT = branch_BT[:, :, None] == branch_BT[:, None, :]
    return causal_TT & (same_BTT | (branch_BT == -1)[:, None, :])
