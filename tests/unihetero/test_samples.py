"""Samples, packs and phrasing: what is supervised, what sees what."""

import pytest
import torch

from palate.unihetero.phrasing import Phrasing, text_first
from palate.unihetero.samples import IGNORED, Sample, Segment, collate, visible
from toy_unihetero import PLACES, phrasing, samples, tokenizer


def test_what_is_supervised():
    said = phrasing()
    sample = samples(1)[0]
    batch = collate([[sample]])
    told = [
        said.tokenizer.decode([t])
        for t, label in zip(batch.input_ids[0], batch.labels[0], strict=True)
        if label != IGNORED
    ]
    assert told == ["a", "red", "circle", "left", "<end>", "circle", "<end>", "left", "<end>"]
    assert sample.supervised == len(told)
    # A label stands at its own token's place.
    marked = batch.labels != IGNORED
    assert torch.equal(batch.labels[marked], batch.input_ids[marked])


def test_text_first_supervises_the_caption_and_the_start_of_the_image():
    sample = samples(3)[2]
    batch = collate([[sample]])
    told = [phrasing().tokenizer.decode([t]) for t in batch.labels[0] if t != IGNORED]
    assert told == ["a", "blue", "square", "<image_start>"]
    assert sample.supervised == 4


def test_positions_start_anew_in_each_sample_and_go_on_from_the_prefix_in_each_segment():
    first, second = samples(2)
    places = collate([[first, second]]).position_ids[0].tolist()
    prefix = len(first.prefix)
    expected = [*range(prefix)]
    for segment in first.segments:
        expected += range(prefix, prefix + len(segment.ids))
    assert places == [*expected, *expected]


def test_who_sees_whom_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    owners = torch.randint(-1, 3, (4, 12), generator=generator).sort(1).values
    segments = torch.randint(0, 3, (4, 12), generator=generator)
    found = visible(owners, segments)
    for row in range(4):
        for query in range(12):
            for key in range(12):
                expected = query == key or (
                    key <= query
                    and owners[row, query] >= 0
                    and owners[row, query] == owners[row, key]
                    and segments[row, key] in (0, segments[row, query])
                )
                assert bool(found[row, 0, query, key]) == bool(expected)


def test_seeds_of_images_differ_by_sample_and_place():
    images = torch.zeros(2, PLACES, 3)
    first, second = (Sample("a", tuple(phrasing().image() * 2), (), images, True, seed=seed) for seed in (5, 6))
    alone, together = collate([[first]]).seeds, collate([[second], [first]]).seeds
    assert len(set(together)) == 4
    assert together[2:] == alone


def test_a_segment_cannot_supervise_its_first_token():
    with pytest.raises(ValueError, match="none for the first"):
        Segment((1, 2), (1, 2))


def test_samples_of_a_batch_bring_the_same():
    with pytest.raises(ValueError, match="make a source's samples alike"):
        collate([[samples(1)[0]], [samples(1, encoded=False)[0]]])
    with pytest.raises(ValueError, match="make a source's samples alike"):
        collate([[samples(1)[0]], [samples(1, latents=False)[0]]])


def test_what_people_write_never_becomes_a_special_token():
    said = phrasing()
    special = set(said.tokenizer.convert_tokens_to_ids(["<image_start>", "<image>", "<image_end>"]))
    assert not special & set(said.ids("a <image> red <image_start>"))


def test_conversations_supervise_the_answers_only():
    said = phrasing()
    segment = said.conversation(
        [("human", "<image>\nwhat is it"), ("gpt", "circle"), ("human", "where"), ("gpt", "left")]
    )
    told = said.tokenizer.decode([label for label in segment.labels if label != IGNORED])
    assert told == "circle <end> left <end>"
    assert said.tokenizer.decode(segment.ids) == (
        "Question: what is it Answer: circle <end> Question: where Answer: left <end>"
    )
    with pytest.raises(ValueError, match="begins with one of"):
        said.conversation([("gpt", "circle")])


def test_the_share_that_is_written_text_first():
    share = sum(text_first(seed, 0.25) for seed in range(4000)) / 4000
    assert share == pytest.approx(0.25, abs=0.03)
    assert not any(text_first(seed, 0.0) for seed in range(100))


def test_image_tokens_are_added_once():
    known = tokenizer()
    from palate.unihetero.phrasing import add_image_tokens

    size = len(known)
    add_image_tokens(known)
    assert len(known) == size
    assert len(Phrasing(known, PLACES).image()) == PLACES + 2
