"""The world of coloured shapes: what is drawn, what is measured of it, and rankings by the stated model."""

import itertools
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from palate.corpora.schema import IMAGES, LISTS
from palate.corpora.streams import CorpusError
from palate.corpora.worlds import shapes

SMALL = {"scenes": 40, "pool": 10, "lists": 60, "examples": 3, "tests": 2, "users": 8}


@pytest.fixture(scope="module", params=[False, True], ids=["images", "edits"])
def corpus(request, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("shapes") / "corpus")
    return shapes.prepare(shapes.ShapesConfig(out=out, edits=request.param, lengths=(2, 4, 8), **SMALL))


def rows(corpus, prefix):
    return [row for path in corpus.paths(prefix, ".parquet") for row in pq.read_table(corpus.local(path)).to_pylist()]


def pictures(corpus):
    return {row["image_uid"]: shapes.decode_png(row["bytes"]) for row in rows(corpus, "images/")}


# Drawing


def scene(shape="circle", radius=4.0, x=8.0, y=8.0, colour="red", **others):
    asked = shapes.Asked(shape, colour, "large", "black")
    values = {"hue": shapes.HUES[colour], "saturation": 1.0, "value": 1.0, "light": 0.0} | others
    return shapes.Scene(asked, x, y, radius, **values)


@pytest.mark.parametrize("radius", [2.5, 4.0, 5.1])
@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_shapes_are_what_pillow_draws_many_times_larger(shape, radius):
    fine = 32
    image = Image.new("L", (shapes.SIDE * fine, shapes.SIDE * fine))
    draw = ImageDraw.Draw(image)

    def points(*corners):
        return [((8 + x * radius) * fine, (8 + y * radius) * fine) for x, y in corners]

    if shape == "circle":
        draw.ellipse(points((-1, -1), (1, 1)), fill=255)
    elif shape == "square":
        draw.rectangle(points((-0.89, -0.89), (0.89, 0.89)), fill=255)
    elif shape == "triangle":
        draw.polygon(points((0, -2 * 0.78), (3**0.5 * 0.78, 0.78), (-(3**0.5) * 0.78, 0.78)), fill=255)
    else:
        draw.rectangle(points((-1.25, -0.42), (1.25, 0.42)), fill=255)
        draw.rectangle(points((-0.42, -1.25), (0.42, 1.25)), fill=255)
    reference = np.asarray(image, dtype=float).reshape(shapes.SIDE, fine, shapes.SIDE, fine).mean((1, 3)) / 255
    drawn = shapes.paint([scene(shape, radius)])[0, 0]
    # Distances stand for coverage: exact on straight edges along the axes, near it elsewhere.
    assert np.abs(drawn - reference).max() < 0.3
    assert abs(drawn.sum() - reference.sum()) < 0.04 * reference.sum()


def test_scenes_are_inside_and_as_their_caption_says():
    random = np.random.default_rng(0)
    for asked in shapes.ASKED:
        drawn = shapes.draw_scene(asked, random)
        image = shapes.paint([drawn])[0]
        outside = shapes.paint([replace(drawn, radius=1e-6, x=-99.0)])[0]
        low, high = shapes.RADII[asked.size]
        assert low <= drawn.radius <= high
        assert abs(image[:, 0, 0] - drawn.light).max() < 1e-9
        edge = np.ones((shapes.SIDE, shapes.SIDE), bool)
        edge[1:-1, 1:-1] = False
        # Half a pixel of antialiasing may touch the border; a shape cut off by it would cover it.
        assert (np.abs(image - outside)[:, edge].max(0) > 0.5 * np.abs(image - outside).max()).mean() < 0.2


def test_captions_and_their_words():
    captions = [asked.caption for asked in shapes.ASKED]
    assert len(set(captions)) == len(captions) == 144
    assert "a small red circle on grey" in captions
    assert {word for caption in captions for word in caption.split()} <= set(shapes.vocabulary())


def test_png_keeps_eight_bits():
    image = np.random.default_rng(0).integers(0, 256, (3, 16, 16)) / 255
    assert np.array_equal(shapes.decode_png(shapes.encode_png(image)), image)


# Edits


def test_an_edit_changes_what_it_says_and_nothing_else():
    random = np.random.default_rng(0)
    seen = Counter()
    for asked in shapes.ASKED:
        source = shapes.draw_scene(asked, random)
        words, target = shapes.instruct(source, random)
        assert set(words.split()) <= set(shapes.vocabulary())
        names = ("shape", "colour", "size", "background")
        (changed,) = [name for name in names if getattr(asked, name) != getattr(target.asked, name)]
        seen[changed] += 1
        assert words.endswith(f" {getattr(target.asked, changed)}")
        assert (target.saturation, target.value) == (source.saturation, source.value)
        assert (target.radius == source.radius) == (changed != "size")
        assert (target.light == source.light) == (changed != "background")
        assert (target.hue == source.hue) == (changed != "colour")
        if changed in ("colour", "background"):
            assert (target.x, target.y) == (source.x, source.y)
    assert min(seen.values()) > 20


def test_an_edit_that_does_what_was_asked_is_liked_more_than_one_further_away():
    random = np.random.default_rng(0)
    source = shapes.draw_scene(shapes.ASKED[0], random)
    _, target = shapes.instruct(source, random)
    exact, other = shapes.paint([target]), shapes.paint([source])
    weights = shapes.group_weights(tuple(shapes.GROUPS), 2.0)
    taste = shapes.utilities(shapes.measure(np.concatenate([exact, other])), weights) / 2
    found = shapes.edit_utilities(np.concatenate([exact, other]), exact, weights)
    assert np.allclose(found[0], taste[0])  # nothing is taken from the exact target
    distance = np.abs(other - exact).mean()
    assert np.allclose(taste[1] - found[1], 2.0 * distance / shapes.EDIT_SPREAD)


# Measuring


def features(**changes):
    return dict(zip(shapes.FEATURES, shapes.measure(shapes.paint([scene(**changes)]))[0], strict=True))


def test_every_attribute_is_measured_and_moves_as_it_should():
    usual = features(value=0.8, saturation=0.8)
    assert features(value=0.8, saturation=0.8, radius=5.0)["size"] > usual["size"] + 0.05
    assert features(value=1.0, saturation=0.8)["brightness"] > usual["brightness"] + 0.03
    assert features(value=0.8, saturation=1.0)["saturation"] > usual["saturation"] + 0.1
    assert features(value=0.8, saturation=0.8, x=5.0)["centredness"] < usual["centredness"] - 0.2
    assert features(value=0.8, saturation=0.8, light=0.5)["contrast"] < usual["contrast"] - 0.03
    assert usual["centredness"] > 0.99
    assert abs(features(radius=4.0)["size"] - np.pi * 16 / 256) < 0.05


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_sizes_of_different_shapes_are_about_equal(shape):
    assert abs(features(shape=shape)["size"] / features()["size"] - 1) < 0.25


def test_attributes_of_images_without_a_shape_are_finite_and_small():
    random = np.random.default_rng(0)
    blank = np.full((1, 3, 16, 16), 0.4)
    assert np.array_equal(shapes.measure(blank), np.zeros((1, 5)))
    for images in (
        random.uniform(size=(8, 3, 16, 16)),
        random.normal(size=(8, 3, 16, 16)) * 9,
        np.ones((2, 3, 32, 32)),
    ):
        measured = shapes.measure(images)
        assert np.isfinite(measured).all()
        assert (measured >= -1e-9).all()
        assert (measured <= 1 + 1e-9).all()


def test_standardization_is_that_of_images_of_one_caption():
    random = np.random.default_rng(0)
    found = np.array(
        [shapes.measure(shapes.paint([shapes.draw_scene(asked, random) for _ in range(16)])) for asked in shapes.ASKED]
    )
    assert np.allclose(found.mean((0, 1)), shapes.MEANS, rtol=0.04)
    assert np.allclose(found.std(1).mean(0), shapes.SPREADS, rtol=0.1)


# Taste


def test_rankings_have_the_plackett_luce_probabilities():
    liked = np.array([1.0, 0.2, -0.5])
    random = np.random.default_rng(0)
    draws = 20_000
    found = Counter(tuple(shapes.rank(liked, random)) for _ in range(draws))
    for order in itertools.permutations(range(3)):
        strength = np.exp(liked[list(order)])
        expected = np.prod([strength[place] / strength[place:].sum() for place in range(3)])
        assert abs(found[order] / draws - expected) < 4 * np.sqrt(expected * (1 - expected) / draws)


def test_groups_disagree_and_annotators_vary_around_their_group():
    directions = shapes.group_weights(tuple(shapes.GROUPS), 1.0)
    assert np.allclose(np.linalg.norm(directions, axis=1), 1)
    assert (directions @ directions.T).min() < -0.4
    config = shapes.ShapesConfig(out="", users=400)
    annotators = shapes.draw_annotators(config, np.random.default_rng(0))
    assert np.allclose([np.linalg.norm(one.weights) for one in annotators], config.sharpness)
    for group, direction in zip(shapes.GROUPS, directions, strict=True):
        cosines = np.array([one.weights for one in annotators if one.group == group]) @ direction / config.sharpness
        assert 0.8 < cosines.mean() < 0.95
        assert cosines.std() > 0.02
    held_out = Counter(one.group for one in annotators if one.held_out)
    assert held_out == dict.fromkeys(shapes.GROUPS, 25)
    (alone,) = shapes.draw_annotators(replace(config, users=1, held_out=0, variation=0), np.random.default_rng(0))
    assert np.allclose(alone.weights, config.sharpness * directions[0])


# The corpus


def test_lists_fit_the_schema_and_name_images_that_are_there(corpus):
    assert all(pq.read_schema(corpus.local(path)) == LISTS for path in corpus.paths("lists/", ".parquet"))
    assert all(pq.read_schema(corpus.local(path)) == IMAGES for path in corpus.paths("images/", ".parquet"))
    images, lists = pictures(corpus), rows(corpus, "lists/")
    assert len(lists) == SMALL["lists"] + SMALL["users"] * (SMALL["examples"] + SMALL["tests"])
    assert {len(one["items"]) for one in lists} == {2, 4, 8}
    for one in lists:
        uids = [item["image_uid"] for item in one["items"]]
        assert len(set(uids)) == len(uids)
        assert set(uids) <= set(images)
        assert [(edge["winner"], edge["loser"]) for edge in one["edges"]] == list(itertools.pairwise(range(len(uids))))
        assert one["caption"] in shapes.BY_CAPTION


def test_splits_share_neither_captions_nor_images_nor_held_out_people(corpus):
    splits = defaultdict(set)
    for one in rows(corpus, "lists/"):
        found = {one["caption"], *(item["image_uid"] for item in one["items"])}
        splits[one["split"]] |= found | ({one["source_image"]} - {None})
    assert set(splits) == {"train", "examples", "test"}
    for one, other in itertools.combinations(splits.values(), 2):
        assert not one & other
    held_out = {one.user_id for one in shapes.read_annotators(corpus) if one.held_out}
    assert len(held_out) == 2
    trained = Counter(one["user_id"] for one in rows(corpus, "lists/") if one["split"] == "train")
    assert not held_out & set(trained)
    assert max(trained.values()) - min(trained.values()) <= 1
    for split in ("examples", "test"):
        assert held_out <= {one["user_id"] for one in rows(corpus, "lists/") if one["split"] == split}


def test_annotators_rank_by_their_own_weights_what_the_files_show(corpus):
    """Log-likelihood of all lists under each one's weights, against another's: the truth must win by far."""
    images, annotators = pictures(corpus), shapes.read_annotators(corpus)
    weights = {one.user_id: one.weights for one in annotators}
    targets = {}
    if "targets.parquet" in corpus.paths():
        targets = {
            row["list_id"]: row["target_uid"] for row in pq.read_table(corpus.local("targets.parquet")).to_pylist()
        }

    def likelihood(one, vector):
        shown = np.array([images[item["image_uid"]] for item in one["items"]])
        if targets:
            liked = shapes.edit_utilities(shown, images[targets[one["list_id"]]][None], np.array([vector]))[:, 0]
        else:
            liked = shapes.utilities(shapes.measure(shown), np.array([vector]))[:, 0]
        return sum(liked[place] - np.log(np.exp(liked[place:]).sum()) for place in range(len(liked)))

    lists = rows(corpus, "lists/")
    own = sum(likelihood(one, weights[one["user_id"]]) for one in lists)
    contrary = sum(likelihood(one, -np.array(weights[one["user_id"]])) for one in lists)
    even = sum(likelihood(one, np.zeros(5)) for one in lists)
    assert own > even + len(lists) > contrary
    if not targets:
        swapped = dict(zip(weights, [*list(weights.values())[1:], annotators[0].weights], strict=True))
        assert own > sum(likelihood(one, swapped[one["user_id"]]) for one in lists) + len(lists)


def test_pretraining_shows_what_its_captions_say_and_no_image_that_is_ranked(corpus):
    images = pictures(corpus)
    ranked = {item["image_uid"] for one in rows(corpus, "lists/") for item in one["items"]}
    plain = rows(corpus, "scenes/") + rows(corpus, "edits/")
    assert len(plain) == SMALL["scenes"]
    assert Counter(one["split"] for one in plain) == {"train": 32, "validation": 4, "test": 4}
    for one in plain:
        uids = [value for name, value in one.items() if name.endswith("_uid")]
        assert set(uids) <= set(images) - ranked
        asked = shapes.BY_CAPTION[one["caption"]]
        light = np.median(images[uids[-1]][:, [0, 0, -1, -1], [0, -1, 0, -1]])
        assert abs(light - shapes.LIGHT[asked.background]) < 0.05


def test_edits_say_what_is_edited_how_and_what_would_be_right(corpus):
    lists = rows(corpus, "lists/")
    if not corpus.paths("edits/"):
        assert {(one["source_image"], one["instruction"]) for one in lists} == {(None, None)}
        return
    images = pictures(corpus)
    targets = {row["list_id"]: row["target_uid"] for row in rows(corpus, "targets")}
    for one in lists:
        assert one["instruction"].startswith("make the ")
        assert not np.array_equal(images[one["source_image"]], images[targets[one["list_id"]]])


def test_the_corpus_is_a_function_of_the_seed(corpus, tmp_path):
    values = {**SMALL, "lengths": (2, 4, 8), "edits": bool(corpus.paths("edits/"))}
    again = shapes.prepare(shapes.ShapesConfig(out=str(tmp_path / "again"), **values))
    other = shapes.prepare(shapes.ShapesConfig(out=str(tmp_path / "other"), seed=1, **values))
    assert again.digest == corpus.digest
    assert other.digest != corpus.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": ("bold", "nobody")}, "--groups bold nobody: there are bold, delicate"),
        ({"groups": ()}, "--groups"),
        ({"lengths": (1,)}, r"--lengths \(1,\): a list has at least 2 images"),
        ({"lengths": ()}, "--lengths"),
        ({"pool": 4}, "--pool 4: lists of 8 need as many"),
        ({"users": 2, "held_out": 0.9}, "nobody is left"),
        ({"held_out": 1.5}, "--held-out 1.5"),
        ({"lists": -1}, "--lists -1"),
        ({"sharpness": -1.0}, "--sharpness"),
    ],
)
def test_what_cannot_be_made_is_an_error(tmp_path, changes, message):
    with pytest.raises(CorpusError, match=message):
        shapes.prepare(shapes.ShapesConfig(out=str(tmp_path / "corpus"), **changes))
