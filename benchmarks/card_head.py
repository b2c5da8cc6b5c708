"""What of the personalization head matters: retrains it under one change at a time on a finished run's features.

Every fourth own text of a person is kept out of training. On those of the development users it prints the gain over the
cluster model in nats per token (own vector; own minus permuted within the cluster; own minus everybody's mean) and the
accuracy on pairs of own text against other people's matched texts, with 95% intervals over people. Nothing of the
questions, or of the test users, is looked at.

    python benchmarks/card_head.py --run RUN --out benchmarks/out/card_head.json
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palate import artifacts
from palate import config as configs
from palate.artifacts import join
from palate.card import contrast, heads, pairs, stages
from palate.card.fitting import fit_vectors
from palate.card.heads import PreferConfig, Strength
from palate.card.preferences import ABSENT, Positions, log_ratios
from palate.config import scale
from palate.corpora.schema import user_split
from palate.evaluation.statistics import estimate
from palate.models.causal_lm import load_causal_lm


@dataclass(frozen=True)
class Change:
    """One change from the defaults: fields of PreferConfig, a prior's strength, candidates, or beta in scoring."""

    name: str
    prefer: dict[str, Any] = field(default_factory=dict)
    head_precision: float | None = None
    vector_deviation: float | None = None
    top_k: int | None = None
    beta: float = 1.0


CHANGES = (
    Change("defaults"),
    Change("embedding not whitened", {"embedding_power": 0.5}),
    Change("features whitened", {"feature_power": 0.0}),
    Change("features as they are", {"feature_power": 0.5}),
    Change("features squared spectrum", {"feature_power": 1.0}),
    Change("free output", {"output": "free"}),
    Change("additive reward", {"reward": "additive", "other_weight": 1.0, "cluster_weight": 1.0}),
    Change("width 16", {"width": 16}),
    Change("width 32", {"width": 32}),
    Change("width 128", {"width": 128}),
    Change("cluster pairs 0.1", {"cluster_weight": 0.1}),
    Change("other pairs 0.1", {"other_weight": 0.1}),
    Change("other pairs 1", {"other_weight": 1.0}),
    Change("head precision 60", head_precision=60.0),
    Change("head precision 600", head_precision=600.0),
    Change("vector deviation 0.3", vector_deviation=0.3),
    Change("vector deviation 2", vector_deviation=2.0),
    Change("10 candidates", top_k=10),
    Change("25 candidates", top_k=25),
    Change("beta 0.5", beta=0.5),
    Change("beta 0.75", beta=0.75),
    Change("beta 1.5", beta=1.5),
    Change("beta 2", beta=2.0),
)


@dataclass(frozen=True)
class HeadBenchmark:
    """Ablations of the head on a finished run."""

    run: str
    """Folder or URL of the run."""
    out: str = scale("benchmarks/out/card_head.json")
    """Where the figures go."""
    head_precision: float = 200.0
    """Of the defaults that the changes start from."""
    vector_deviation: float = 0.7
    """The same."""
    only: tuple[str, ...] = ()
    """Names of the changes to try; all when empty."""


@dataclass(frozen=True)
class Data:
    """A run's texts with standardized features; ``kept`` are the held-out samples of development users."""

    texts: Sequence[pairs.Text]
    positions: Positions
    clusters: dict[str, int]
    people: dict[str, int]
    learned: list[heads.OwnText]
    kept: list[heads.OwnText]
    statistics: contrast.FeatureMap
    embeddings_Ve: torch.Tensor


def read(run: str) -> Data:
    found = artifacts.folders(join(run, "contrast"))
    shards = [artifacts.open_artifact(url, stages.SHARD) for url in found if "/shard-" in url]
    texts, positions = contrast.read(shards)
    people = {user: row for row, user in enumerate(sorted({text.user_id for text in texts}))}
    learned, kept, seen = [], [], dict.fromkeys(people, 0)
    for sample in heads.own_texts(texts, people):
        user = texts[sample.text].user_id
        seen[user] += 1
        if seen[user] % 4:
            learned.append(sample)
        elif user_split(user) == "development":
            kept.append(sample)
    trained = artifacts.open_artifact(join(run, "adapters"), stages.ADAPTERS)
    return Data(
        texts,
        positions,
        stages.read_assignment(artifacts.open_artifact(join(run, "clusters"))),
        people,
        learned,
        kept,
        stages.read_feature_map(artifacts.open_artifact(join(run, "contrast", "statistics"))),
        stages.output_embeddings(load_causal_lm(trained.read_json("base.json")["model"])),
    )


def with_candidates(positions: Positions, top_k: int) -> Positions:
    """The positions with the ``top_k`` likeliest of their candidates, which stand first."""
    beyond_N = positions.target_N >= top_k
    return replace(
        positions,
        candidates_Nk=positions.candidates_Nk[:, :top_k],
        log_probs_Nk=positions.log_probs_Nk[:, :top_k],
        target_N=torch.where(beyond_N, ABSENT, positions.target_N),
    )


def measure(data: Data, change: Change, strength: Strength) -> dict[str, list[float]]:
    """Mean and interval of each figure."""
    config = replace(PreferConfig(), **change.prefer)
    if change.top_k:
        data = replace(data, positions=with_candidates(data.positions, change.top_k))
    numbers = torch.tensor([sample.text for sample in data.learned])
    learned_N = torch.isin(data.positions.text_N, numbers)
    features, positions = heads.final_features(data.statistics, data.positions, learned_N, config.feature_power)
    embeddings = heads.whiten_embeddings(data.embeddings_Ve, config.embedding_power)
    with tempfile.TemporaryDirectory() as folder:
        model = heads.train_head(data.learned, positions, embeddings, len(data.people), config, strength, folder)
    if config.reward == "additive":
        vectors_UJ = model.vectors  # there is no likelihood to fit exactly
    else:
        own = {text: row for row, user in enumerate(data.people) for text in _own(data, user)}
        rows_N = torch.tensor([own.get(text, -1) for text in range(len(data.texts))])[positions.text_N]
        head = model.head(features, positions.candidates_Nk.shape[1])
        split = [positions.select(rows_N == row) for row in range(len(data.people))]
        vectors_UJ = torch.stack([fit.vector_J for fit in fit_vectors(split, head, heads.prior(config, strength))])
    gains, accuracies = _score(data, positions, model, vectors_UJ, change.beta)
    users = sorted(gains)
    table = np.array([gains[user] for user in users])
    accuracy = np.array([accuracies[user] for user in users])
    figures = {
        "own": table[:, 0],
        "own - permuted": table[:, 0] - table[:, 1],
        "own - mean": table[:, 0] - table[:, 2],
        "mean": table[:, 2],
        "pairs, own": accuracy[:, 0],
        "pairs, own - permuted": accuracy[:, 0] - accuracy[:, 1],
    }
    return {name: _interval(values, users) for name, values in figures.items()}


def _own(data: Data, user: str) -> list[int]:
    return [sample.text for sample in data.learned if data.texts[sample.text].user_id == user]


def _score(
    data: Data, positions: Positions, model: heads.HeadModel, vectors_UJ: torch.Tensor, beta: float
) -> tuple[dict, dict]:
    """Per development user: gain a token, and pair accuracy, with own, permuted and mean vectors."""
    names = list(data.people)
    mean_J = vectors_UJ.mean(0)
    gains: dict[str, list] = {}
    accuracies: dict[str, list] = {}
    for sample in data.kept:
        user = data.texts[sample.text].user_id
        mates = [row for row, n in enumerate(names) if n != user and data.clusters[n] == data.clusters[user]]
        vectors = [vectors_UJ[sample.person], mean_J, *(vectors_UJ[row] for row in mates or range(len(names)))]
        rewards, tokens = [], []
        for text in (sample.text, *sample.other_texts):
            here = positions.select(positions.text_N == text)
            deltas = [model.delta(here, vector_J) for vector_J in vectors]
            ratios = [log_ratios(delta, here.log_probs_Nk, here.target_N, beta).sum() for delta in deltas]
            rewards.append(torch.stack(ratios))
            tokens.append(len(here.target_N))
        own, mean, permuted = rewards[0][0], rewards[0][1], rewards[0][2:].mean()
        gains.setdefault(user, []).append((float(own), float(permuted), float(mean), tokens[0]))
        for other in rewards[1:]:
            won = (rewards[0] > other).float()
            accuracies.setdefault(user, []).append((float(won[0]), float(won[2:].mean())))
    totals = {user: np.array(rows).sum(0) for user, rows in gains.items()}
    return (
        {user: total[:3] / total[3] for user, total in totals.items()},
        {user: np.array(accuracies.get(user, [(np.nan, np.nan)])).mean(0) for user in gains},
    )


def _interval(values: np.ndarray, users: Sequence[str]) -> list[float]:
    there = ~np.isnan(values)
    found = estimate(values[there], [user for user, is_there in zip(users, there, strict=True) if is_there])
    return [found.value, found.low, found.high]


def main() -> None:
    config = configs.parse(HeadBenchmark, __doc__)
    data = read(config.run)
    print(f"{len(data.people)} people, {len(data.learned)} texts to learn from, {len(data.kept)} scored")
    found = {}
    for change in CHANGES:
        if config.only and change.name not in config.only:
            continue
        strength = Strength(
            change.head_precision or config.head_precision, change.vector_deviation or config.vector_deviation
        )
        figures = found[change.name] = measure(data, change, strength)
        if len(found) == 1:
            print("| change | " + " | ".join(figures) + " |\n|---|" + "---|" * len(figures))
        cells = " | ".join(f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" for value, low, high in figures.values())
        print(f"| {change.name} | {cells} |", flush=True)
    path = Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": configs.to_dict(config), "changes": found}, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
