"""What is evaluated: a finished CARD run, read from its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from palate import config as configs
from palate.artifacts import Artifact, ArtifactMismatch
from palate.card import stages
from palate.card.adaptation import AdaptConfig
from palate.card.correction import Head
from palate.card.preferences import Prior
from palate.card.runs import open_run
from palate.models.causal_lm import check_compatible, load_causal_lm


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


def read_run(url: str, corpus: Artifact) -> Subject:
    """The run that ``palate.card.stages`` made at ``url`` from ``corpus``.

    Raises:
        ArtifactMissing: a stage of the run is not finished.
        ArtifactCorrupt: a file of it has other bytes than were written.
        ArtifactMismatch: the run was made from another corpus.
    """
    run = open_run(url)
    if run.trained.inputs["corpus"] != corpus.digest:
        raise ArtifactMismatch(
            f"the run {url} was made from another corpus than {corpus.url} (digest "
            f"{run.trained.inputs['corpus'][:12]}… against {corpus.digest[:12]}…): pass --corpus with the one that it "
            "learned from"
        )
    loaded = load_causal_lm(run.model)
    check_compatible(loaded, run.fingerprint)
    head, prior = run.head(loaded)
    settings = run.settings
    adapt = {name: settings[name] for name in configs.identity(AdaptConfig())}
    return Subject(
        model=run.model,
        fingerprint=run.fingerprint,
        adapters=run.folders,
        clusters=stages.read_assignment(run.clusters),
        vectors=stages.read_vectors(run.fitted),
        learned_from=stages.read_people(corpus, settings["learn_from"]).learned_from,
        head=head,
        prior=prior,
        beta=run.beta,
        history_k=settings["history_k"],
        max_prompt_tokens=settings["max_prompt_tokens"],
        max_answer_tokens=settings["max_answer_tokens"],
        adapt=configs.from_dict(AdaptConfig, adapt),
        adapter_seed=settings["seed"],
        inputs={"clusters": run.clusters, "adapters": run.trained, "head": run.fitted},
    )
