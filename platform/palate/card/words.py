"""What a user vector promotes and demotes, in words: the answer to "what do these numbers say about me?".

In given contexts (token positions of the cluster model) the vector moves probability from some candidates to others;
the mean change of each token's probability, summed over spellings with and without a leading space, is its weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palate.card.correction import Head, candidate_rows
from palate.card.preferences import ABSENT, Positions, log_ratios
from palate.models.causal_lm import LoadedModel

END = "⟨end⟩"

_CHUNK = 512  # positions at a time: chunk · k · J numbers


@dataclass(frozen=True)
class Word:
    """A word or part of one, and by how much its probability changes, averaged over the contexts."""

    text: str
    change: float


@dataclass(frozen=True)
class Words:
    """The words that gain most, and those that lose most, strongest first."""

    promoted: tuple[Word, ...]
    demoted: tuple[Word, ...]


def correction_of_positions(head: Head, positions: Positions, vectors_NJ: Tensor) -> Tensor:
    """Delta of every candidate (N, k), each position with a vector of its own; chunked, so memory stays small."""
    parts = []
    for start in range(0, len(positions.target_N), _CHUNK):
        here = slice(start, start + _CHUNK)
        phi_nkJ = candidate_rows(head, positions.features_Nd[here], positions.candidates_Nk[here])
        parts.append((phi_nkJ @ vectors_NJ[here, :, None]).squeeze(2))
    return torch.cat(parts) if parts else torch.zeros_like(positions.log_probs_Nk)


def probability_change(head: Head, contexts: Positions, vector_J: Tensor, beta: float) -> Tensor:
    """Mean over the contexts of pi_u - pi_c for every token, shape (V,); sums to minus what the rest gains."""
    delta_Nk = correction_of_positions(head, contexts, vector_J.expand(len(contexts.target_N), -1))
    nobody_N = torch.full_like(contexts.target_N, ABSENT)
    log_normalizer_N = -log_ratios(delta_Nk, contexts.log_probs_Nk, nobody_N, beta)
    corrected_Nk = contexts.log_probs_Nk + beta * delta_Nk - log_normalizer_N[:, None]
    change_Nk = corrected_Nk.exp() - contexts.log_probs_Nk.exp()
    change_V = torch.zeros(head.output_VJ.shape[0])
    change_V.index_add_(0, contexts.candidates_Nk.flatten(), change_Nk.flatten())
    return change_V / max(len(contexts.target_N), 1)


def words(
    loaded: LoadedModel, head: Head, contexts: Positions, vector_J: Tensor, beta: float = 1.0, count: int = 8
) -> Words:
    """The ``count`` words that a vector promotes most, and those that it demotes most, in the contexts."""
    change_V = probability_change(head, contexts, vector_J, beta)
    tokens = change_V.nonzero().squeeze(1).tolist()
    changes: dict[str, float] = {}
    for token, text in zip(tokens, _texts(loaded, tokens), strict=True):
        changes[text] = changes.get(text, 0.0) + float(change_V[token])
    ranked = sorted((Word(text, change) for text, change in changes.items()), key=lambda word: -word.change)
    return Words(
        tuple(word for word in ranked[:count] if word.change > 0),
        tuple(word for word in ranked[: -count - 1 : -1] if word.change < 0),
    )


def _texts(loaded: LoadedModel, tokens: Sequence[int]) -> list[str]:
    """How a token is shown: without a leading space, white space by a visible sign, the end of the text by name."""
    shown = []
    for token in tokens:
        text = loaded.tokenizer.decode([token])
        visible = text.strip() or text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
        # Some tokens decode to nothing, as special ones of some tokenizers do: they are shown by their own name.
        visible = visible or f"⟨{loaded.tokenizer.convert_ids_to_tokens(token)}⟩"
        shown.append(END if token in loaded.eos_ids else visible)
    return shown
