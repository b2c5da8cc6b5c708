"""Features of texts: shared prompts against separate rows, and against transformers' own forward pass."""

from dataclasses import fields

import pytest
import torch

from palate.card import adapters, features
from palate.card.correction import FeatureMap
from palate.card.preferences import ABSENT, Positions
from palate.models.causal_lm import load_causal_lm

LAYERS = (1, 2)


@pytest.fixture(scope="module")
def packed():
    loaded = load_causal_lm("tiny")
    rows = adapters.pack(loaded.model, 2, adapters.LoraConfig(rank=4))
    generator = torch.Generator().manual_seed(1)
    for _, layer in adapters.packed_layers(loaded.model):
        for B in layer.B:
            B.data.copy_(torch.randn(B.shape, generator=generator) * 0.2)
    loaded.model.requires_grad_(False)
    return loaded, rows


def feature_map() -> FeatureMap:
    generator = torch.Generator().manual_seed(2)
    return FeatureMap(
        LAYERS, torch.randn(2, 64, generator=generator), torch.rand(2, 64, generator=generator), torch.eye(64)
    )


TEXTS = [
    features.Branches((1, 7, 9, 30, 31), ((40, 41, 2), (50, 2), (60, 61, 62, 63, 2)), adapter=0),
    features.Branches((1, 8), ((44, 45, 46, 2),), adapter=-1),
    features.Branches((1, 9, 12, 13, 14, 15, 16, 17), ((90, 2), (91, 92, 2)), adapter=1),
]


def test_answers_that_share_a_prompt_equal_separate_rows(packed):
    loaded, rows = packed
    shared = features.extract(loaded, rows, feature_map(), TEXTS, top_k=10)
    alone = [features.Branches(text.prompt_ids, (answer,), text.adapter) for text in TEXTS for answer in text.answers]
    separate = features.extract(loaded, rows, feature_map(), alone, top_k=10)
    assert shared.texts == 6
    for field in fields(Positions):
        torch.testing.assert_close(getattr(shared, field.name), getattr(separate, field.name), atol=2e-5, rtol=1e-4)


def test_positions_are_those_of_a_plain_forward_pass(packed):
    loaded, rows = packed
    positions = features.extract(loaded, rows, feature_map(), TEXTS, top_k=10)
    number = 0
    for text in TEXTS:
        for answer in text.answers:
            sequence = torch.tensor([[*text.prompt_ids, *answer]])
            rows.set(torch.tensor([text.adapter]))
            with torch.no_grad():
                output = loaded.model(input_ids=sequence, output_hidden_states=True)
            start, end = len(text.prompt_ids) - 1, sequence.shape[1] - 1
            log_probs = output.logits[0, start:end].log_softmax(-1)
            mine = positions.select(positions.text_N == number)
            expected = feature_map()([output.hidden_states[layer][0, start:end] for layer in LAYERS])
            torch.testing.assert_close(mine.features_Nd, expected, atol=2e-5, rtol=1e-4)
            written = log_probs[torch.arange(len(answer)), torch.tensor(answer)]
            torch.testing.assert_close(mine.target_log_prob_N, written, atol=2e-5, rtol=1e-4)
            found = mine.target_N != ABSENT
            chosen = mine.candidates_Nk.gather(1, mine.target_N.clamp(min=0)[:, None].long()).squeeze(1)
            assert chosen[found].tolist() == [token for token, is_found in zip(answer, found, strict=True) if is_found]
            assert (written[~found] < mine.log_probs_Nk[~found, -1]).all()
            number += 1


def test_standardization_is_that_of_the_answers(packed):
    loaded, rows = packed
    fitted = features.fit_standardization(loaded, rows, LAYERS, TEXTS)
    positions = features.extract(loaded, rows, fitted, TEXTS, top_k=5)
    torch.testing.assert_close(positions.features_Nd.mean(0), torch.zeros(64), atol=1e-4, rtol=0)


def test_saved_positions_come_back(packed, tmp_path):
    loaded, rows = packed
    positions = features.extract(loaded, rows, feature_map(), TEXTS, top_k=5)
    features.save_positions(positions, tmp_path / "p.safetensors")
    loaded_back = features.load_positions(tmp_path / "p.safetensors")
    assert all(torch.equal(getattr(positions, f.name), getattr(loaded_back, f.name)) for f in fields(Positions))


def test_a_layer_or_a_length_that_the_model_has_not_is_refused(packed):
    loaded, rows = packed
    with pytest.raises(ValueError, match="--layers 3"):
        features.fit_standardization(loaded, rows, (3,), TEXTS)
    with pytest.raises(ValueError, match="--max-prompt-tokens"):
        features.extract(loaded, rows, feature_map(), [features.Branches((1,) * 2050, ((2,),), 0)], top_k=5)
