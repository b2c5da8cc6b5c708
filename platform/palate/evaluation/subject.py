"""What is evaluated: a finished CARD run, read from its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from palate.artifacts import Artifact
from palate.card.adaptation import AdaptConfig
from palate.card.correction import Head
from palate.card.preferences import Prior


@dataclass(frozen=True)
class Subject:
    """Everything that evaluation needs of a run.

    Attributes:
        model, fingerprint: the base model by name, and what it must be.
        adapters: the clusters' PEFT folders, in order.
        clusters, vectors: of everybody in the corpus.
        learned_from: whose histories the adapters learned from.
        beta: strength of the correction that the head was trained for.
        history_k, max_prompt_tokens, max_answer_tokens: how the run makes prompts.
        adapt, adapter_seed: how its adapters were trained.
        inputs: its artifacts, for the record of what was evaluated.
    """

    model: str
    fingerprint: Mapping[str, Any]
    adapters: Sequence[Path]
    clusters: Mapping[str, int]
    vectors: Mapping[str, Tensor]
    learned_from: frozenset[str]
    head: Head
    prior: Prior
    beta: float
    history_k: int
    max_prompt_tokens: int
    max_answer_tokens: int
    adapt: AdaptConfig
    adapter_seed: int
    inputs: Mapping[str, Artifact]
