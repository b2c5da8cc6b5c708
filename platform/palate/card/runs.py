"""A finished CARD run as those who use it read it: evaluation and serving."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from palate import artifacts
from palate.artifacts import Artifact
from palate.card import features, heads, stages, styles
from palate.card.correction import Head
from palate.card.preferences import Positions, Prior
from palate.corpora import schema
from palate.corpora.schema import Task
from palate.models.causal_lm import LoadedModel

Embed = Callable[[Sequence[Sequence[str]]], np.ndarray]  # histories (texts of each person) -> (people, E)


@dataclass(frozen=True)
class Run:
    """The artifacts of a run, every byte of them checked.

    Attributes:
        model, fingerprint: the base model by name, and what it must be.
        folders: the clusters' PEFT folders, in order.
        settings: how prompts were made and adapters trained.
        beta: strength of the correction that the head was trained for.
        most_texts: how many of a person's latest texts a vector is fitted to.
        task: what the texts answer; None for runs of before it was kept.
    """

    url: str
    style: Artifact
    clusters: Artifact
    trained: Artifact
    fitted: Artifact
    model: str
    fingerprint: Mapping[str, Any]
    folders: Sequence[Path]
    settings: Mapping[str, Any]
    beta: float
    most_texts: int
    task: Task | None

    @property
    def version(self) -> str:
        """What a person's vector is fitted to: it means nothing to another head, or with other adapters."""
        return self.fitted.digest

    def head(self, loaded: LoadedModel) -> tuple[Head, Prior]:
        """Head and prior, for the base model that the run was made with."""
        return heads.load_head(self.fitted, stages.output_embeddings(loaded))

    def embedding(self) -> Embed:
        """The style embedding that people were clustered by."""
        encoder = self.style.config["encoder"]
        if encoder == "stylometric":
            return styles.load_style_map(self.style.local(styles.STYLE_MAP))
        from palate.models.encoders import load_encoder

        return load_encoder(encoder).embed_histories

    def contexts(self) -> Positions | None:
        """Where to look what a vector promotes; None for runs of before they were kept."""
        kept = stages.CONTEXTS in self.fitted.paths()
        return features.load_positions(self.fitted.local(stages.CONTEXTS)) if kept else None

    def centroids(self) -> np.ndarray:
        """The centroids (K, E) of the clusters."""
        return styles.load_centroids(self.clusters.local(styles.CENTROIDS))


def open_run(url: str) -> Run:
    """The run that ``palate.card.stages`` made at ``url``.

    Raises:
        ArtifactMissing: a stage of it is not finished.
        ArtifactCorrupt: a file of it has other bytes than were written.
    """
    kinds = {"style": stages.STYLE, "clusters": stages.CLUSTERS, "adapters": stages.ADAPTERS, "head": stages.HEAD}
    found = {name: artifacts.open_artifact(artifacts.join(url, name), kind).verify() for name, kind in kinds.items()}
    statistics = artifacts.open_artifact(artifacts.join(url, "contrast", "statistics"), stages.STATISTICS)
    base = found["adapters"].read_json("base.json")
    return Run(
        url=url,
        style=found["style"],
        clusters=found["clusters"],
        trained=found["adapters"],
        fitted=found["head"],
        model=base["model"],
        fingerprint=base["fingerprint"],
        folders=stages.adapter_folders(found["adapters"]),
        settings=found["adapters"].config,
        beta=found["head"].config["decoding_beta"],
        most_texts=statistics.config["contrast_items"],
        task=schema.read_task(found["head"]) if "task.json" in found["head"].paths() else None,
    )
