"""The systems that a CARD run is compared with, and the controls of its user vectors.

A system is an adapter, a number of retrieved items in the prompt, and perhaps a vector a person. Controls keep
everything but whose vector it is: another person's of the same cluster (``permuted``), everybody's mean, or a random
one from the prior. What is personal is own minus permuted; what is merely "write like people" stays in both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from palate.card.correction import Head
from palate.card.preferences import Positions, Prior, log_ratios
from palate.card.words import correction_of_positions
from palate.evaluation import likelihood
from palate.evaluation.report import Kind
from palate.evaluation.statistics import Scores

AdapterSet = Literal["base", "shared", "cluster", "user"]
Vectors = Literal["none", "own", "permuted", "mean", "random"]


@dataclass(frozen=True)
class Spec:
    """One system.

    Attributes:
        adapters: the bare base model, one adapter for everybody, one a cluster, or one a person.
        history_k: retrieved items in the prompt.
        vectors: whose vector corrects the logits.
        reference: the system that its implicit reward is measured against; None for the base model itself. Systems
            with vectors are measured against the same model without.
    """

    name: str
    label: str
    adapters: AdapterSet = "base"
    history_k: int = 0
    vectors: Vectors = "none"
    kind: Kind = "baseline"
    reference: str | None = None

    @property
    def passes(self) -> tuple[AdapterSet, int]:
        """What decides the forward passes; systems that share it differ in vectors only."""
        return self.adapters, self.history_k

    @property
    def drawn(self) -> bool:
        """Whether its vectors are drawn, so that several draws are averaged."""
        return self.vectors in ("permuted", "random")


def standard(history_k: int, retrieval_k: Sequence[int], per_user_start: AdapterSet) -> list[Spec]:
    """The systems of a report, in its order.

    Args:
        history_k: retrieved items in the prompts that the run was trained with; all its adapters keep it.
        retrieval_k: numbers of retrieved items of the retrieval baselines; the largest also for CARD with retrieval.
        per_user_start: what the adapters of single people started from, "base" or "shared".
    """
    most = max(retrieval_k)
    start = {"base": "base", "shared": "shared"}[per_user_start]
    own = "CARD" if history_k == 0 else f"CARD ({history_k} retrieved)"
    return [
        Spec("base", "Base model"),
        *(
            Spec(f"retrieval-{k}", f"BM25 retrieval, {k} item{'s' * (k > 1)}", history_k=k, reference="base")
            for k in retrieval_k
        ),
        Spec("shared", "One shared adapter", "shared", history_k, reference="base"),
        Spec("per-user", "One LoRA per user", "user", history_k, reference=start),
        Spec("cluster", "Cluster adapter", "cluster", history_k, reference="base"),
        Spec("card", own, "cluster", history_k, "own", "method"),
        Spec("card-retrieval", f"CARD with {most} retrieved", "cluster", most, "own", "method"),
        Spec("card-permuted", "CARD, permuted vectors", "cluster", history_k, "permuted", "control"),
        Spec("card-mean", "CARD, mean vector", "cluster", history_k, "mean", "control"),
        Spec("card-random", "CARD, random vectors", "cluster", history_k, "random", "control"),
    ]


def comparisons(retrieval_k: Sequence[int]) -> list[tuple[str, str]]:
    """The differences of a report, first those that say whether anything personal was learned."""
    retrieval = f"retrieval-{max(retrieval_k)}"
    others = ("card-permuted", "cluster", "card-mean", "card-random", "base", retrieval, "shared", "per-user")
    return [
        *(("card", other) for other in others),
        ("card-retrieval", "card"),
        ("card-retrieval", retrieval),
        ("cluster", "base"),
        ("cluster", "shared"),
        ("per-user", "shared"),
    ]


def assigned_vectors(
    kind: Vectors,
    users: Sequence[str],
    vectors: Mapping[str, Tensor],
    clusters: Mapping[str, int],
    prior: Prior,
    seed: int,
) -> dict[str, Tensor]:
    """The vector that each of ``users`` is served with; ``seed`` numbers the draws.

    permuted: a derangement among the people of the same cluster, because a vector corrects its own cluster's model
    (among everybody where the cluster has no other). random: from the prior. mean: over everybody's vectors.

    Raises:
        ValueError: a person has no vector, or there is nobody to swap with.
    """
    if absent := [user for user in users if user not in vectors]:
        raise ValueError(
            f"user {absent[0]!r} has no vector in the run ({len(absent)} of {len(users)} have none): was it trained on "
            "this corpus?"
        )
    match kind:
        case "own":
            return {user: vectors[user] for user in users}
        case "mean":
            mean_J = torch.stack(list(vectors.values())).mean(0)
            return dict.fromkeys(users, mean_J)
        case "random":
            deviation_J = prior.precision_J.rsqrt()
            draw = np.random.default_rng([seed, 1])
            noise = draw.standard_normal((len(users), len(deviation_J)))
            return {
                user: prior.mean_J + deviation_J * torch.from_numpy(row).float()
                for user, row in zip(users, noise, strict=True)
            }
        case "permuted":
            donors = derangement(vectors, clusters, seed)
            return {user: vectors[donors[user]] for user in users}
        case "none":
            raise ValueError("a system without vectors has none to assign")


def derangement(people: Sequence[str] | Mapping[str, object], groups: Mapping[str, int], seed: int) -> dict[str, str]:
    """Somebody else of the same group for each person, nobody twice within a group; deterministic in the seed.

    Raises:
        ValueError: there is one person only.
    """
    everybody = sorted(people)
    if len(everybody) < 2:
        raise ValueError(
            "permuted vectors need at least two people with a vector, and this run has one: name the systems to "
            "compare, such as --systems base cluster card"
        )
    draw = np.random.default_rng([seed, 0])
    members: dict[int, list[str]] = {}
    for person in everybody:
        members.setdefault(groups.get(person, -1), []).append(person)
    donors: dict[str, str] = {}
    for _, group in sorted(members.items()):
        # A random cycle: whoever comes next in a random order, so nobody gets their own.
        order = [group[index] for index in draw.permutation(len(group))]
        donors.update(zip(order, [*order[1:], order[0]], strict=True))
    for person in everybody:
        if donors[person] == person:
            others = [other for other in everybody if other != person]
            donors[person] = others[draw.integers(len(others))]
    return donors


@dataclass(frozen=True)
class TextTable:
    """One scored text a row: an answer of a question, the person's own (``number`` 0) or a negative (1, 2, ...)."""

    questions: tuple[str, ...]
    users: tuple[str, ...]
    numbers: tuple[int, ...]
    tokens: np.ndarray  # (S,) answer tokens, the end token included
    log_probs: np.ndarray  # (S,) summed, in nats, under the system

    def with_log_probs(self, log_probs: np.ndarray) -> "TextTable":
        return TextTable(self.questions, self.users, self.numbers, self.tokens, log_probs)


def text_sums(values_N: Tensor, positions: Positions, texts: int) -> np.ndarray:
    """Sums of a value a position over each text, shape (texts,)."""
    return torch.zeros(texts, dtype=torch.float64).index_add_(0, positions.text_N, values_N.double()).numpy()


def vector_rewards(
    head: Head, positions: Positions, table: TextTable, vectors: Mapping[str, Tensor], beta: float
) -> np.ndarray:
    """The implicit reward of each text (S,): sum of log pi_u - log pi_c under its person's assigned vector."""
    if not beta:  # the cluster's model itself; sums would leave rounding errors, which rank texts by their length
        return np.zeros(len(table.users))
    by_text = torch.stack([vectors[user] for user in table.users])
    delta_Nk = correction_of_positions(head, positions, by_text[positions.text_N])
    ratios_N = log_ratios(delta_Nk, positions.log_probs_Nk, positions.target_N, beta)
    return text_sums(ratios_N, positions, len(table.users))


def likelihood_scores(table: TextTable, rewards: np.ndarray | None) -> dict[str, Scores]:
    """Bits per token of own texts, policy accuracy and, with ``rewards`` (S,), pair accuracy."""
    own = {question: row for row, question in enumerate(table.questions) if table.numbers[row] == 0}
    rows = list(own.values())
    scores = {
        "bits per token": likelihood.bits_per_token(
            -table.log_probs[rows], table.tokens[rows], list(own), [table.users[row] for row in rows]
        )
    }
    pairs = [(own[q], row) for row, q in enumerate(table.questions) if table.numbers[row] > 0]
    if not pairs:
        return scores
    chosen, rejected = map(list, zip(*pairs, strict=True))
    names = [f"{table.questions[row]}#{table.numbers[row]}" for row in rejected]
    people = [table.users[row] for row in rejected]
    if rewards is not None:
        scores["pair accuracy"] = likelihood.pair_accuracy(rewards[chosen], rewards[rejected], names, people)
    scores["policy accuracy"] = likelihood.policy_accuracy(
        table.log_probs[chosen],
        table.log_probs[rejected],
        names,
        people,
        chosen_tokens_N=table.tokens[chosen],
        rejected_tokens_N=table.tokens[rejected],
    )
    return scores


def averaged(draws: Sequence[Mapping[str, Scores | str]]) -> dict[str, Scores | str]:
    """Scores averaged over draws, question by question."""
    result: dict[str, Scores | str] = {}
    for name, first in draws[0].items():
        if isinstance(first, str):
            result[name] = first
            continue
        found = [draw[name] for draw in draws]
        values = np.mean([scores.values for scores in found if isinstance(scores, Scores)], axis=0)
        result[name] = Scores(
            first.questions,
            first.users,
            values,
            first.weights,
            first.combine,
            first.unit,
            first.higher_is_better,
            first.chance,
        )
    return result
