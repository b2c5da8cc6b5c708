"""Controls, implicit rewards and scores of systems, by hand and against plain softmaxes."""

import math

import numpy as np
import pytest
import torch

from palate.card.correction import FeatureMap, Head
from palate.card.preferences import ABSENT, Positions, Prior
from palate.evaluation import systems
from palate.evaluation.statistics import Scores

WIDTH, FEATURES, TOP_K, VOCABULARY = 3, 4, 6, 20


@pytest.mark.parametrize("seed", range(5))
def test_a_derangement_gives_everybody_another_one_of_the_group_each_once(seed: int) -> None:
    people = [f"u{n}" for n in range(30)]
    groups = {person: n % 3 for n, person in enumerate(people)}
    donors = systems.derangement(people, groups, seed)
    assert all(donors[person] != person and groups[donors[person]] == groups[person] for person in people)
    assert sorted(donors.values()) == sorted(people)
    assert donors == systems.derangement(list(reversed(people)), groups, seed)
    assert donors != systems.derangement(people, groups, seed + 1)


def test_who_is_alone_in_a_group_gets_anybody_else() -> None:
    donors = systems.derangement(["a", "b", "c"], {"a": 0, "b": 1, "c": 1}, 0)
    assert donors["a"] in ("b", "c")
    assert (donors["b"], donors["c"]) == ("c", "b")
    with pytest.raises(ValueError, match="at least two"):
        systems.derangement(["a"], {"a": 0}, 0)


def test_vectors_of_the_controls() -> None:
    vectors = {f"u{n}": torch.full((WIDTH,), float(n)) for n in range(4)}
    clusters, prior = dict.fromkeys(vectors, 0), Prior(torch.full((WIDTH,), 7.0), torch.full((WIDTH,), 4.0))

    def assigned(kind: systems.Vectors, users: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
        return systems.assigned_vectors(kind, users, vectors, clusters, prior, seed)

    assert torch.equal(assigned("own", ["u2"])["u2"], vectors["u2"])
    assert torch.equal(assigned("mean", ["u0"])["u0"], torch.full((WIDTH,), 1.5))
    assert not torch.equal(assigned("permuted", ["u1"])["u1"], vectors["u1"])
    many = torch.stack([assigned("random", ["u0", "u1"], seed)["u1"] for seed in range(2000)])
    # Standard errors: 0.5 / sqrt(6000) of the mean, 0.5 / sqrt(12000) of the deviation.
    assert float(many.mean()) == pytest.approx(7.0, abs=0.03)
    assert float(many.std()) == pytest.approx(0.5, abs=0.02)
    assert torch.equal(assigned("random", ["u0"], 3)["u0"], assigned("random", ["u0"], 3)["u0"])
    with pytest.raises(ValueError, match="'stranger' has no vector"):
        assigned("own", ["stranger"])


def made() -> tuple[Head, Positions, torch.Tensor, torch.Tensor]:
    """A head, positions of three texts of two tokens, their logits (N, V) and written tokens (N,)."""
    generator = torch.Generator().manual_seed(0)
    features = FeatureMap((1,), torch.zeros(1, FEATURES), torch.ones(1, FEATURES), torch.eye(FEATURES))
    project = torch.randn(FEATURES, WIDTH, generator=generator)
    head = Head(features, project, torch.randn(VOCABULARY, WIDTH, generator=generator), TOP_K)
    logits = 2 * torch.randn(6, VOCABULARY, generator=generator)
    tokens = torch.randint(0, VOCABULARY, (6,), generator=generator)
    log_probs, candidates = logits.log_softmax(-1).topk(TOP_K, dim=-1)
    found = candidates == tokens[:, None]
    positions = Positions(
        torch.randn(6, FEATURES, generator=generator),
        candidates,
        log_probs,
        torch.where(found.any(1), found.int().argmax(1), ABSENT),
        logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1),
        torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    return head, positions, logits, tokens


def test_rewards_are_log_ratios_of_softmaxes_summed_over_a_text() -> None:
    head, positions, logits, tokens = made()
    vectors = {"u": torch.tensor([1.0, -1.0, 0.5]), "v": torch.tensor([0.3, 2.0, -1.0])}
    table = systems.TextTable(("q", "q", "r"), ("u", "u", "v"), (0, 1, 0), np.full(3, 2), np.zeros(3))
    owner = torch.stack([vectors["u"]] * 4 + [vectors["v"]] * 2)
    corrected = logits.clone()
    gates = positions.features_Nd @ head.project_dJ
    for row in range(6):
        for token in positions.candidates_Nk[row]:
            corrected[row, token] += 0.5 * float(head.output_VJ[token] @ (owner[row] * gates[row]))
    ratios = (corrected.log_softmax(-1) - logits.log_softmax(-1)).gather(1, tokens[:, None]).squeeze(1)
    expected = [float(ratios[:2].sum()), float(ratios[2:4].sum()), float(ratios[4:].sum())]
    found = systems.vector_rewards(head, positions, table, vectors, 0.5)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(systems.vector_rewards(head, positions, table, vectors, 0.0), 0.0, atol=1e-6)


def test_scores_of_own_texts_and_pairs() -> None:
    table = systems.TextTable(
        questions=("q", "q", "q", "r", "r"),
        users=("u", "u", "u", "v", "v"),
        numbers=(0, 1, 2, 0, 1),
        tokens=np.array([2.0, 4.0, 1.0, 5.0, 5.0]),
        log_probs=np.array([-2.0, -2.0, -3.0, -5.0, -4.0]),
    )
    scores = systems.likelihood_scores(table, rewards=np.array([1.0, 0.0, 2.0, 3.0, 1.0]))
    assert scores["bits per token"].values.tolist() == pytest.approx([1 / math.log(2), 1 / math.log(2)])
    assert scores["bits per token"].questions == ("q", "r")
    assert scores["pair accuracy"].questions == ("q#1", "q#2", "r#1")
    assert scores["pair accuracy"].values.tolist() == [1.0, 0.0, 1.0]
    # Per token: -1 against -0.5 and -3; -1 against -0.8.
    assert scores["policy accuracy"].values.tolist() == [0.0, 1.0, 0.0]
    assert "pair accuracy" not in systems.likelihood_scores(table, None)


def test_draws_are_averaged_question_by_question() -> None:
    draws = [
        {"m": Scores(("q", "r"), ("u", "v"), np.array(values), higher_is_better=False), "k": "why"}
        for values in ([1.0, 2.0], [3.0, 4.0])
    ]
    found = systems.averaged(draws)
    assert found["k"] == "why"
    assert isinstance(found["m"], Scores)
    assert found["m"].values.tolist() == [2.0, 3.0]
    assert not found["m"].higher_is_better


def test_the_standard_systems_refer_to_one_another() -> None:
    specs = systems.standard(0, (1, 4), "shared")
    names = [spec.name for spec in specs]
    assert len(set(names)) == len(names)
    assert {name for pair in systems.comparisons((1, 4)) for name in pair} <= set(names)
    assert {spec.reference for spec in specs if spec.reference} <= set(names)
    by_name = {spec.name: spec for spec in specs}
    assert by_name["card-retrieval"].passes == ("cluster", 4)
    assert by_name["card"].passes == by_name["card-permuted"].passes == by_name["cluster"].passes
    assert by_name["per-user"].reference == "shared"
