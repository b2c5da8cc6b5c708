"""Captioned images with questions: what is read is what was written, and a benchmark stands beside it."""

import io

import numpy as np
import pytest
from PIL import Image

from palate import artifacts
from palate.corpora import vqa
from palate.corpora.questions import read_tsv
from palate.corpora.worlds.shapes import encode_png

META = vqa.Meta(4, {"what": ("a cat", "a dog"), "hue": ("red", "green", "blue")}, ("a", "cat", "dog", "red", "what"))


def example(number, facts=None):
    image = np.full((3, 4, 4), number / 10)
    questions = (vqa.Question("what", "what is it", "a dog"), vqa.Question("hue", "which hue", "blue"))
    return vqa.Example(encode_png(image), f"animal {number} \u00e4", questions[: number % 3], facts or {})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    def produce(writer):
        vqa.write_shard(writer, "train", 0, 0, [example(1), example(2, {"group": "pets"})])
        vqa.write_shard(writer, "train", 1, 2, [example(3)])
        vqa.write_shard(writer, "test", 0, 0, [example(4), example(5)])
        vqa.write_meta(writer, META, [example(4), example(5)])

    place = str(tmp_path_factory.mktemp("vqa") / "corpus")
    return artifacts.ensure(place, produce, kind=vqa.KIND, config={})


def test_what_is_read_is_what_was_written(corpus):
    split = vqa.read_split(corpus, "train")
    assert split.keys == ["train0000000", "train0000001", "train0000002"]
    assert split.captions == ["animal 1 \u00e4", "animal 2 \u00e4", "animal 3 \u00e4"]
    assert split.questions == [list(example(number).questions) for number in (1, 2, 3)]
    assert split.facts == [{}, {"group": "pets"}, {}]
    assert split.images_N3HW.shape == (3, 3, 4, 4)
    assert split.images_N3HW[:, 0, 0, 0].tolist() == [26, 51, 76]
    assert vqa.read_meta(corpus) == META
    assert vqa.read_split(corpus, "validation").keys == []


def test_the_test_questions_are_a_benchmark(corpus):
    choices = read_tsv(str(corpus.local("questions.tsv")))
    assert [(one.id, one.question, one.options, one.answer) for one in choices] == [
        ("0-what", "what is it", ("a cat", "a dog"), 1),
        ("1-what", "what is it", ("a cat", "a dog"), 1),
        ("1-hue", "which hue", ("red", "green", "blue"), 2),
    ]
    assert Image.open(io.BytesIO(choices[2].image)).size == (4, 4)


def test_an_answer_that_is_no_option_is_refused(tmp_path):
    wrong = vqa.Example(example(1).image, "x", (vqa.Question("hue", "which hue", "pink"),))
    with pytest.raises(ValueError, match="'pink' is no option of questions of the kind 'hue': red, green, blue"):
        artifacts.ensure(
            str(tmp_path / "bad"), lambda writer: vqa.write_meta(writer, META, [wrong]), kind=vqa.KIND, config={}
        )
