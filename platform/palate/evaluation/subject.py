"""What is evaluated: a finished CARD run, read from its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from palate import artifacts
from palate import config as configs
from palate.artifacts import Artifact, ArtifactMismatch
from palate.card import heads, stages
from palate.card.adaptation import AdaptConfig
from palate.card.correction import Head
from palate.card.preferences import Prior
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
    clusters = artifacts.open_artifact(artifacts.join(url, "clusters"), stages.CLUSTERS).verify()
    trained = artifacts.open_artifact(artifacts.join(url, "adapters"), stages.ADAPTERS).verify()
    fitted = artifacts.open_artifact(artifacts.join(url, "head"), stages.HEAD).verify()
    if trained.inputs["corpus"] != corpus.digest:
        raise ArtifactMismatch(
            f"the run {url} was made from another corpus than {corpus.url} (digest {trained.inputs['corpus'][:12]}… "
            f"against {corpus.digest[:12]}…): pass --corpus with the one that it learned from"
        )
    base, settings = trained.read_json("base.json"), trained.config
    loaded = load_causal_lm(base["model"])
    check_compatible(loaded, base["fingerprint"])
    head, prior = heads.load_head(fitted, stages.output_embeddings(loaded))
    adapt = {name: settings[name] for name in configs.identity(AdaptConfig())}
    return Subject(
        model=base["model"],
        fingerprint=base["fingerprint"],
        adapters=stages.adapter_folders(trained),
        clusters=stages.read_assignment(clusters),
        vectors=stages.read_vectors(fitted),
        learned_from=stages.read_people(corpus, settings["learn_from"]).learned_from,
        head=head,
        prior=prior,
        beta=fitted.config["decoding_beta"],
        history_k=settings["history_k"],
        max_prompt_tokens=settings["max_prompt_tokens"],
        max_answer_tokens=settings["max_answer_tokens"],
        adapt=configs.from_dict(AdaptConfig, adapt),
        adapter_seed=settings["seed"],
        inputs={"clusters": clusters, "adapters": trained, "head": fitted},
    )
