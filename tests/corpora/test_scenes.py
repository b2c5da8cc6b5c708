"""The world of scenes: what is drawn is what is said, and every answer is right."""

import tarfile
from collections import Counter

import numpy as np
import pytest

from palate.corpora import vqa
from palate.corpora.questions import read_tsv
from palate.corpora.streams import CorpusError
from palate.corpora.worlds import scenes
from palate.corpora.worlds.shapes import HUES, decode_png

SMALL = {"encoder": 5, "train": 30, "validation": 3, "test": 10, "per_shard": 8}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return scenes.prepare(scenes.ScenesConfig(out=f"{tmp_path_factory.mktemp('scenes')}/corpus", **SMALL))


def drawn(count, seed=0):
    random = np.random.default_rng(seed)
    return [scenes.draw(random) for _ in range(count)], random


def test_objects_stand_in_places_of_their_own_and_inside_the_image():
    found, _ = drawn(300)
    for scene in found:
        places = [one.place for one in scene.objects]
        assert 1 <= len(places) == len(set(places)) <= scenes.MOST
        assert places == sorted(places, key=scenes.PLACES.index)
        for one in scene.objects:
            row, column = divmod(scenes.PLACES.index(one.place), scenes.GRID)
            step = scenes.SIDE / scenes.GRID
            assert abs(one.x - (column + 0.5) * step) <= 2.5
            assert abs(one.y - (row + 0.5) * step) <= 4.5
    counts = Counter(len(scene.objects) for scene in found)
    assert all(counts[count] == pytest.approx(75, abs=30) for count in range(1, 5))


def test_scenes_may_be_of_fewer_objects(tmp_path):
    one = scenes.prepare(scenes.ScenesConfig(out=f"{tmp_path}/one", objects=1, **SMALL))
    assert {len(example["objects"]) for example in vqa.read_split(one, "train").facts} == {1}
    with pytest.raises(CorpusError, match="--objects is 1 to 4"):
        scenes.ScenesConfig(out="x", objects=5)


def test_pictures_show_the_colours_where_they_are_said():
    found, _ = drawn(100, seed=1)
    pictures = scenes.paint(found)
    hits = total = 0
    for scene, picture in zip(found, pictures, strict=True):
        for one in scene.objects:
            red, green, blue = picture[:, min(31, int(one.y)), min(31, int(one.x))]
            channels = np.array([red, green, blue])
            hue = one.hue % 360
            strongest = {0: 0, 120: 1, 240: 2}
            nearest = min(strongest, key=lambda angle: min(abs(hue - angle), 360 - abs(hue - angle)))
            hits += int(channels.argmax() == strongest[nearest] or one.colour in ("yellow", "cyan", "purple"))
            total += 1
    assert hits / total > 0.97  # a neighbour may cover a centre


def test_captions_name_all_objects_in_order():
    found, _ = drawn(20)
    for scene in found:
        parts = scene.caption.split(" and ")
        assert parts == [f"a {one.colour} {one.shape} at {one.place}" for one in scene.objects]


def answer(question, scene):
    """The answer by another reading of the question."""
    words = question.text.split()
    objects = scene.objects
    if question.kind == "shape":
        return {one.shape for one in objects if one.colour == words[3]}
    if question.kind == "colour":
        return {one.colour for one in objects if one.shape == words[4]}
    if question.kind == "place":
        return {one.place for one in objects if (one.colour, one.shape) == (words[3], words[4])}
    if question.kind == "at":
        return {one.shape for one in objects if one.place == words[3]} or {"nothing"}
    singular = {plural: shape for shape, plural in scenes.PLURALS.items()}
    wanted = singular.get(words[2])
    return {scenes.COUNTS[sum(wanted in (None, one.shape) for one in objects)]}


def test_every_question_has_one_right_answer_among_its_options():
    found, random = drawn(300, seed=2)
    kinds = Counter()
    for scene in found:
        for question in scenes.ask(scene, random):
            assert answer(question, scene) == {question.answer}
            assert question.answer in scenes.OPTIONS[question.kind]
            kinds[question.kind] += 1
    assert set(kinds) == set(scenes.KINDS)
    assert kinds["at"] == kinds["count"] == 300


def test_as_many_questions_about_something_as_about_nothing():
    found, random = drawn(600, seed=3)
    some = [scene for scene in found if len(scene.objects) < len(scenes.PLACES)]
    answers = [q.answer for scene in some for q in scenes.ask(scene, random) if q.kind == "at"]
    assert answers.count("nothing") / len(answers) == pytest.approx(0.5, abs=0.07)


def test_every_word_is_in_the_vocabulary():
    found, random = drawn(200, seed=4)
    known = set(scenes.vocabulary())
    for scene in found:
        texts = [scene.caption, *(f"{q.text} {q.answer}" for q in scenes.ask(scene, random))]
        assert not set(" ".join(texts).split()) - known


def test_the_artifact_is_webdataset_shards(corpus):
    shards = corpus.paths("train/", ".tar")
    assert len(shards) == 4
    with tarfile.open(corpus.local(shards[0])) as tar:
        names = tar.getnames()
    assert names[:3] == ["train0000000.png", "train0000000.txt", "train0000000.json"]
    assert len(names) == 24


def test_what_is_read_is_what_was_drawn(corpus):
    split = vqa.read_split(corpus, "train")
    assert (len(split.keys), split.images_N3HW.shape, split.images_N3HW.dtype) == (30, (30, 3, 32, 32), np.uint8)
    found = scenes.described(split.facts)
    painted = np.round(scenes.paint(found) * 255).astype(np.uint8)
    assert np.abs(split.images_N3HW.astype(int) - painted).max() <= 1
    assert all(len(questions) == 4 for questions in split.questions)
    assert split.captions == [scene.caption for scene in found]
    assert vqa.read_meta(corpus) == vqa.Meta(32, scenes.OPTIONS, tuple(scenes.vocabulary()))
    assert scenes.described([{"group": "animals"}]) == []


def test_the_test_scenes_questions_as_multiple_choice(corpus):
    split = vqa.read_split(corpus, "test")
    choices = read_tsv(str(corpus.local("questions.tsv")))
    expected = [(q.kind, q.text, q.answer) for questions in split.questions for q in questions]
    assert [(one.category, one.question, one.options[one.answer]) for one in choices] == expected
    pictures = {one.id.partition("-")[0]: decode_png(one.image) for one in choices}
    assert len(pictures) == 10
    assert np.abs(pictures["3"] * 255 - split.images_N3HW[3]).max() < 1e-6


def test_splits_are_of_other_scenes_and_runs_repeat(corpus, tmp_path):
    again = scenes.prepare(scenes.ScenesConfig(out=f"{tmp_path}/again", **SMALL))
    assert again.digest == corpus.digest
    other = scenes.prepare(scenes.ScenesConfig(out=f"{tmp_path}/other", seed=1, **SMALL))
    assert other.digest != corpus.digest
    images = [{image.tobytes() for image in vqa.read_split(corpus, name).images_N3HW} for name in vqa.SPLITS]
    assert sum(map(len, images)) == len(set().union(*images)) == 48
    # A smaller split is the beginning of a larger one: more data never changes what was there.
    shorter = scenes.prepare(scenes.ScenesConfig(out=f"{tmp_path}/less", **{**SMALL, "train": 8}))
    assert vqa.read_split(shorter, "train").keys == vqa.read_split(corpus, "train").keys[:8]
    assert vqa.read_split(shorter, "train").facts == vqa.read_split(corpus, "train").facts[:8]


def test_settings_out_of_range():
    with pytest.raises(CorpusError, match="--per-shard is at least 1"):
        scenes.ScenesConfig(out="x", per_shard=0)
    assert set(HUES) == set(scenes.OPTIONS["colour"])
