"""Streamed text: whole characters, no part of a stop string, and the same as decoding at once."""

import pytest

from palate.models.causal_lm import load_causal_lm
from palate.models.small_lm import word_tokenizer
from palate.serving.text import TextStream, decode

TEXTS = [
    "plain the and of ing",
    "naïve café – ½",
    "日本語のテキスト",
    "emoji 👩‍👩‍👧 and 🇦🇶 mixed",
    "\n\n  spaces\tand\nlines  ",
    "a\ufffdb",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_causal_lm("tiny").tokenizer


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def run(tokenizer, ids, stop=()):
    """Deltas and the final text, as the engine drives a stream; how many tokens it took."""
    stream, deltas = TextStream(tokenizer, stop), []
    for used, token in enumerate(ids, start=1):
        stream.push(token)
        if stream.stopped or used == len(ids):
            text, rest = stream.finish(ids[:used])
            return [*deltas, rest], text, used, stream.stopped
        deltas.append(stream.take())
    raise AssertionError("no tokens")


@pytest.mark.parametrize("text", TEXTS)
def test_deltas_add_up_and_never_show_half_a_character(tokenizer, text):
    ids = ids_of(tokenizer, text)
    deltas, final, _, _ = run(tokenizer, ids)
    assert final == decode(tokenizer, ids) == text
    assert "".join(deltas) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta for delta in deltas)
    assert sum(bool(delta) for delta in deltas) > 1  # it does stream


@pytest.mark.parametrize("text", TEXTS)
def test_every_stop_string_cuts_at_its_first_occurrence_with_the_fewest_tokens(tokenizer, text):
    ids = ids_of(tokenizer, text)
    for start in range(len(text)):
        for end in range(start + 1, min(len(text), start + 6) + 1):
            stop = text[start:end]
            if "\ufffd" in stop:
                continue
            deltas, final, used, stopped = run(tokenizer, ids, (stop,))
            assert stopped
            assert final == text[: text.index(stop)]
            assert "".join(deltas) == final
            fewest = next(n for n in range(1, len(ids) + 1) if stop in decode(tokenizer, ids[:n]))
            assert used == fewest


def test_the_earliest_of_several_stop_strings_wins_and_its_beginning_is_held_back(tokenizer):
    ids = ids_of(tokenizer, "one two three")
    assert run(tokenizer, ids, ("three", "two t"))[1] == "one "
    stream = TextStream(tokenizer, ("ne x",))
    shown = ""
    for token in ids_of(tokenizer, "one"):
        stream.push(token)
        shown += stream.take()
    assert shown == "o"  # "ne" may still become the stop string
    for token in ids_of(tokenizer, " y"):
        stream.push(token)
        shown += stream.take()
    assert shown == "one y"


def test_bytes_that_are_no_character_come_out_at_the_end(tokenizer):
    broken = ids_of(tokenizer, "a日")[:-1]
    deltas, final, _, _ = run(tokenizer, broken)
    assert "".join(deltas) == final == decode(tokenizer, broken)
    assert "\ufffd" in final


def test_special_tokens_are_not_text(tokenizer):
    ids = [*ids_of(tokenizer, "a"), tokenizer.convert_tokens_to_ids("<|im_start|>"), *ids_of(tokenizer, "b")]
    deltas, final, _, _ = run(tokenizer, ids)
    assert final == "".join(deltas) == "ab"


def test_special_tokens_within_a_text_leave_the_space_between_words():
    words = word_tokenizer(["red", "left"])
    ids = [words.convert_tokens_to_ids(word) for word in ("red", "<unknown>", "left", "<unknown>", "<unknown>", "red")]
    deltas, final, _, _ = run(words, ids)
    assert "".join(deltas) == final == "red left red"
