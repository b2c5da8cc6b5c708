"""CARD's logit correction: a pure function (CARD, arXiv 2601.06352, sections 2.5 and 2.6).

On the top-k candidates C_t of the cluster model, ``Delta_t(v) = e_v · M (p_u ∘ W_p h_t)`` is added to the logits,
beta times; other logits stay. Symbols: B rows, V vocabulary, d width of the features, J width of a user vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FeatureMap:
    """How hidden states become features: states of ``layers``, standardized, averaged, whitened.

    ``mean_Ld`` and ``scale_Ld`` standardize each layer; ``whitening_dd`` maps their average to unit covariance.
    Layer l is the output of decoder block l (0 is the embedding), as in transformers' ``hidden_states``.
    """

    layers: tuple[int, ...]
    mean_Ld: Tensor
    scale_Ld: Tensor
    whitening_dd: Tensor

    def __call__(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Features of shape (..., d) from one hidden state (..., d) per layer."""
        total = torch.zeros_like(hidden_states[0], dtype=torch.float32)
        for state, mean_d, scale_d in zip(hidden_states, self.mean_Ld, self.scale_Ld, strict=True):
            total += (state.float() - mean_d) * scale_d
        return (total / len(self.layers)) @ self.whitening_dd


@dataclass(frozen=True)
class Head:
    """What all people share: ``project_dJ`` is W_p transposed, ``output_VJ`` holds e_v · M for every token.

    Tied: ``output_VJ = E M`` with the base model's output embedding E (V, d), 2·d·J learned numbers in all.
    Free: ``output_VJ`` itself is learned.
    """

    features: FeatureMap
    project_dJ: Tensor
    output_VJ: Tensor
    top_k: int
    bias_J: Tensor | None = None  # added to the projection: what a person prefers whatever the context

    @property
    def width(self) -> int:
        return self.project_dJ.shape[1]


def gates(head: Head, features: Tensor) -> Tensor:
    """What the person's vector is multiplied with: features (..., d) projected to (..., J)."""
    projected = features @ head.project_dJ
    return projected if head.bias_J is None else projected + head.bias_J


def candidate_rows(head: Head, features_Nd: Tensor, candidates_Nk: Tensor) -> Tensor:
    """Phi of shape (N, k, J) with ``Delta = Phi p``: the correction is linear in the user's vector."""
    gates_NJ = gates(head, features_Nd)
    return F.embedding(candidates_Nk, head.output_VJ) * gates_NJ[:, None, :]  # faster than indexing


def correct(
    logits_BV: Tensor, hidden_states: Sequence[Tensor], vectors_BJ: Tensor, betas_B: Tensor, head: Head
) -> Tensor:
    """Corrected logits (B, V). A row whose beta is 0 comes back bit for bit.

    Args:
        hidden_states: one (B, d) tensor per layer of ``head.features.layers``, at the position being decoded.
    """
    rows = betas_B.nonzero().squeeze(1)
    if rows.numel() == 0:
        return logits_BV
    candidates_Nk = logits_BV[rows].topk(head.top_k, dim=-1).indices
    features_Nd = head.features([state[rows] for state in hidden_states])
    delta_Nk = (candidate_rows(head, features_Nd, candidates_Nk) @ vectors_BJ[rows, :, None]).squeeze(2)
    corrected = logits_BV.clone()
    corrected[rows[:, None], candidates_Nk] += (betas_B[rows, None] * delta_Nk).to(logits_BV.dtype)
    return corrected
