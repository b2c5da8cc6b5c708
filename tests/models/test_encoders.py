"""Sentence encoders: the mean over real tokens, whatever the batch; a tiny BERT of transformers' own classes."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from palate.models import encoders

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, "the", "night", "train", "an", "old", "cinema", "was", "late", "and", "loud", "поезд", "夜"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the hub has them."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    place = tmp_path_factory.mktemp("encoder")
    BertModel(config).save_pretrained(place)
    wrapped.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def encoder(folder) -> encoders.Encoder:
    return encoders.load_encoder(str(folder))


TEXTS = ["the night train was late", "", "loud", "an old cinema and the train and the night", "поезд", "夜 夜", "🚆"]


def test_an_embedding_is_the_mean_over_a_texts_own_tokens(folder, encoder):
    plain = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    for text, found in zip(TEXTS, encoder.embed(TEXTS), strict=True):
        ids = torch.tensor([encoder.tokenizer(text).input_ids])
        with torch.inference_mode():
            expected = plain(ids).last_hidden_state[0].mean(0)
        expected = expected / expected.norm()
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 12, 10_000])
def test_batches_change_nothing(encoder, batch_tokens):
    alone = np.concatenate([encoder.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(encoder.embed(TEXTS, batch_tokens), alone, atol=1e-5)


def test_batches_hold_every_text_once_within_the_limit():
    lengths = [3, 50, 7, 7, 0, 12, 1, 90]
    batches = encoders._batches(lengths, 60)
    assert sorted(number for batch in batches for number in batch) == [0, 1, 2, 3, 5, 6, 7]
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[number] for number in batch) <= 60


def test_the_norm_is_one_unless_it_shall_stay(folder, encoder):
    np.testing.assert_allclose(np.linalg.norm(encoder.embed(TEXTS), axis=1), 1.0, atol=1e-5)
    raw = encoders.load_encoder(str(folder), normalize=False).embed(TEXTS)
    norms = np.linalg.norm(raw, axis=1, keepdims=True)
    assert (np.abs(norms - 1) > 0.1).any()
    np.testing.assert_allclose(raw / norms, encoder.embed(TEXTS), atol=1e-5)


def test_a_person_is_the_mean_of_their_texts_and_zeros_without_any(encoder):
    embedded = encoder.embed(TEXTS)
    people = encoder.embed_histories([TEXTS[:2], [], TEXTS[2:]])
    np.testing.assert_allclose(people[0], embedded[:2].mean(0), atol=1e-5)
    np.testing.assert_allclose(people[2], embedded[2:].mean(0), atol=1e-5)
    assert not people[1].any()
    assert encoder.embed_histories([]).shape == (0, 16)
    assert encoder.embed_histories([[], []]).shape == (2, 16)


def test_long_texts_are_cut_at_what_the_model_has_positions_for(encoder):
    assert encoder.max_length == 32
    long = encoder.embed(["train " * 500])
    np.testing.assert_allclose(long, encoder.embed(["train " * 30]), atol=1e-6)


def test_padding_has_no_weight_in_the_mean():
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[5.0, 5.0], [7.0, 7.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    pooled = encoders.pool(states, mask, normalize=False)
    assert pooled.tolist() == [[2.0, 4.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", ["nobody/nothing", "./none"])
def test_an_encoder_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=rf"--encoder {name} cannot be loaded(?s:.*)stylometric"):
        encoders.load_encoder(name)


def test_an_incomplete_encoder_is_refused(folder, encoder, tmp_path):
    kept = {k: v.clone() for k, v in encoder.model.state_dict().items() if "layer.1.output.dense.weight" not in k}
    encoder.model.save_pretrained(tmp_path / "cut", state_dict=kept)
    encoder.tokenizer.save_pretrained(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as encoder\.layer\.1\.output\.dense\.weight"):
        encoders.load_encoder(str(tmp_path / "cut"))
