"""What a vector promotes, against the softmax that decoding uses."""

import pytest
import torch

from palate.card import words
from palate.card.correction import FeatureMap, Head, correct
from palate.card.preferences import ABSENT, Positions
from palate.models.causal_lm import LoadedModel, load_causal_lm

WIDTH, FEATURES, TOP_K, COUNT = 5, 6, 12, 40


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_causal_lm("tiny")


@pytest.fixture(scope="module")
def made(tiny: LoadedModel) -> tuple[Head, Positions, torch.Tensor]:
    """A head, positions, and the logits (N, V) that they came from."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = tiny.fingerprint["vocab_size"]
    features = FeatureMap((1,), torch.zeros(1, FEATURES), torch.ones(1, FEATURES), torch.eye(FEATURES))
    head = Head(
        features,
        torch.randn(FEATURES, WIDTH, generator=generator),
        torch.randn(vocabulary, WIDTH, generator=generator),
        TOP_K,
    )
    logits = 2 * torch.randn(COUNT, vocabulary, generator=generator)
    log_probs, candidates = logits.log_softmax(-1).topk(TOP_K, dim=-1)
    positions = Positions(
        features_Nd=torch.randn(COUNT, FEATURES, generator=generator),
        candidates_Nk=candidates,
        log_probs_Nk=log_probs,
        target_N=torch.full((COUNT,), ABSENT),
        target_log_prob_N=torch.zeros(COUNT),
        text_N=torch.zeros(COUNT, dtype=torch.long),
    )
    return head, positions, logits


def test_the_change_is_that_of_the_softmaxes(made: tuple[Head, Positions, torch.Tensor]) -> None:
    head, positions, logits = made
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
    corrected = correct(logits, [positions.features_Nd], vector.expand(COUNT, -1), torch.full((COUNT,), 0.6), head)
    difference = corrected.softmax(-1) - logits.softmax(-1)
    among = torch.zeros_like(difference).scatter(1, positions.candidates_Nk, 1.0)
    found = words.probability_change(head, positions, vector, 0.6)
    torch.testing.assert_close(found, (difference * among).mean(0), atol=1e-6, rtol=1e-5)
    # What candidates lose together, the rest of the vocabulary gains.
    assert float(found.sum()) == pytest.approx(-float((difference * (1 - among)).sum(1).mean()), abs=1e-6)


def test_chunks_and_vectors_of_their_own_do_not_matter(
    made: tuple[Head, Positions, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    head, positions, _ = made
    vectors = torch.randn(COUNT, WIDTH, generator=torch.Generator().manual_seed(3))
    whole = words.correction_of_positions(head, positions, vectors)
    monkeypatch.setattr(words, "_CHUNK", 7)
    torch.testing.assert_close(words.correction_of_positions(head, positions, vectors), whole)
    expected = head.output_VJ[positions.candidates_Nk[9, 4]] @ (
        vectors[9] * (positions.features_Nd[9] @ head.project_dJ)
    )
    torch.testing.assert_close(whole[9, 4], expected)


def test_a_vector_that_favours_a_token_names_it(tiny: LoadedModel, made: tuple[Head, Positions, torch.Tensor]) -> None:
    _, positions, _ = made
    token = tiny.tokenizer("Z", add_special_tokens=False).input_ids[0]
    features = FeatureMap((1,), torch.zeros(1, 1), torch.ones(1, 1), torch.eye(1))
    output = torch.zeros(tiny.fingerprint["vocab_size"], 1)
    output[token], output[tiny.eos_ids[0]] = 2.0, -2.0
    candidates = positions.candidates_Nk.clone()
    candidates[:, 0], candidates[:, 1] = token, tiny.eos_ids[0]
    contexts = Positions(
        torch.ones(COUNT, 1),
        candidates,
        *(getattr(positions, name) for name in list(Positions.__dataclass_fields__)[2:]),
    )
    found = words.words(tiny, Head(features, torch.ones(1, 1), output, TOP_K), contexts, torch.ones(1), count=3)
    assert found.promoted[0].text == "Z"
    assert found.demoted[0].text == words.END
    assert found.promoted[0].change > 0 > found.demoted[0].change


def test_a_zero_vector_changes_nothing(tiny: LoadedModel, made: tuple[Head, Positions, torch.Tensor]) -> None:
    head, positions, _ = made
    assert words.probability_change(head, positions, torch.zeros(WIDTH), 1.0).abs().max() < 1e-6


def test_white_space_and_spellings(tiny: LoadedModel) -> None:
    space, newline = tiny.tokenizer(" ", add_special_tokens=False).input_ids[0], tiny.tokenizer("\n").input_ids[0]
    the = tiny.tokenizer(" the", add_special_tokens=False).input_ids[0]
    assert words._texts(tiny, [space, newline, the]) == ["␣", "⏎", "the"]
