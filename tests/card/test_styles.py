import json

import numpy as np
import pytest

from palate.card import styles

LOUD = ["WHAT A DAY!!! Loved it!", "SO GOOD!!! Would go AGAIN!", "BEST ever!!! 10 of 10!"]
QUIET = ["it was fine, i think...", "quite nice, perhaps...", "not bad at all, i suppose..."]
TOPICS = ["the harbour cafe", "a chess club", "the night train", "an old cinema", "the city museum", "a new bakery"]


def people() -> dict[str, list[str]]:
    """Two styles over the same topics: only style can tell them apart."""
    found = {}
    for number in range(12):
        texts = LOUD if number % 2 else QUIET
        found[f"p{number:02d}"] = [f"{TOPICS[(number // 2 + shift) % 6]}: {text}" for shift, text in enumerate(texts)]
    return found


def embeddings() -> dict[str, np.ndarray]:
    histories = people()
    style = styles.fit_style_map(list(histories.values()), styles.StyleConfig(dimensions=4))
    return dict(zip(histories, style(list(histories.values())), strict=True))


def test_clusters_follow_style_not_topic():
    assignment = styles.cluster(embeddings(), 2, seed=0).assignment
    assert len({assignment[f"p{n:02d}"] for n in range(0, 12, 2)}) == 1
    assert assignment["p00"] != assignment["p01"]


def test_auto_finds_the_two_styles_and_reports_the_curve():
    found = styles.cluster(embeddings(), None, seed=0)
    assert len(found.centroids_KE) == 2
    assert [row["clusters"] for row in found.curve] == list(map(float, range(2, 12)))
    assert found.curve[0]["stability"] == pytest.approx(1.0)


def test_more_clusters_than_people_one_person_and_nobody():
    few = dict(list(embeddings().items())[:3])
    assert len(styles.cluster(few, 10, seed=0).centroids_KE) == 3
    alone = {"only": np.ones(4, np.float32)}
    assert styles.cluster(alone, None, seed=0).assignment == {"only": 0}
    with pytest.raises(ValueError, match="nobody"):
        styles.cluster({}, 2, seed=0)
    with pytest.raises(ValueError, match="empty corpus"):
        styles.fit_style_map([[]], styles.StyleConfig())


def test_one_text_one_person_and_non_latin_text_embed_to_finite_numbers():
    style = styles.fit_style_map([["ただの文です。"]], styles.StyleConfig())
    embedded = style([["ただの文です。"], [], ["другой текст"]])
    assert np.isfinite(embedded).all()
    assert not embedded[1].any()


def test_equal_texts_embed_equally_whoever_else_is_in_the_batch():
    histories = list(people().values())
    style = styles.fit_style_map(histories, styles.StyleConfig(dimensions=4))
    np.testing.assert_allclose(style(histories)[3], style([histories[3]])[0], atol=1e-6)


def words(seed: int, topic: str) -> str:
    """Words of one topic in random order: the content of a text, without any style."""
    vocabulary = {
        "sea": ["harbour", "boats", "anchor", "tide", "captain", "sails", "coast", "storm", "island", "lighthouse"],
        "chess": ["opening", "bishop", "endgame", "clock", "tournament", "pawn", "rook", "defence", "gambit", "master"],
        "trains": [
            "platform",
            "carriage",
            "signal",
            "express",
            "tunnel",
            "conductor",
            "ticket",
            "junction",
            "freight",
            "rails",
        ],
    }[topic]
    return " ".join(np.random.default_rng(seed).permutation(vocabulary)[:6])


WAYS = {
    "loud": lambda text: f"{text.upper()}!!! WOW!!!",
    "careful": lambda text: f"Well, I think that the {text}; it was, perhaps, not so bad.",
    "terse": lambda text: f"{text.replace(' ', '-')}",
}


@pytest.mark.parametrize("topics", [("sea", "chess"), ("trains", "sea"), ("chess", "trains")])
def test_a_style_is_nearer_to_itself_on_another_topic_than_to_another_style_on_its_topic(topics):
    one, other = topics
    histories = {
        (style, topic, copy): [way(words(100 * copy + n, topic)) for n in range(6)]
        for style, way in WAYS.items()
        for topic in topics
        for copy in range(4)
    }
    embedded = dict(
        zip(
            histories,
            styles.fit_style_map(list(histories.values()), styles.StyleConfig())(list(histories.values())),
            strict=True,
        )
    )
    for style in WAYS:
        for another in WAYS.keys() - {style}:
            same_style = np.linalg.norm(embedded[style, one, 0] - embedded[style, other, 1])
            same_topic = np.linalg.norm(embedded[style, one, 0] - embedded[another, one, 1])
            assert same_style < 0.8 * same_topic, (style, another)


SCRIPTS = {
    "Cyrillic": (
        ["ВОТ ЭТО ДА!!!", "ПРОСТО КЛАСС!!!", "ЛУЧШЕ НЕ БЫВАЕТ!"],
        ["ну, неплохо…", "вроде ничего, да.", "так себе, но."],
    ),
    "Chinese": (
        ["太好了！！！", "真的很棒！", "我喜欢！！"],
        ["还可以，不算差。", "一般，也许再来。", "不错，有点贵。"],
    ),
    "Arabic": (["رائع جدا!!!", "ممتاز!", "أحببته!!"], ["لا بأس، ربما أعود.", "جيد، لكنه غال.", "عادي، لا أكثر."]),
    "emoji": (["good 😀😀😀", "nice 🎉🎉", "loved it 😍😍"], ["good enough", "nice place", "loved it"]),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_styles_are_told_apart_in_any_script(script):
    loud, quiet = SCRIPTS[script]
    histories = [[*texts[shift:], *texts[:shift]][:2] for texts in (loud, quiet) for shift in range(3)]
    embedded = styles.fit_style_map(histories, styles.StyleConfig())(histories)
    assert np.isfinite(embedded).all()
    found = styles.cluster({f"{n}": vector for n, vector in enumerate(embedded)}, 2, seed=0).assignment
    assert found["0"] == found["1"] == found["2"] != found["3"] == found["4"] == found["5"]


def test_the_same_marks_in_another_script_are_the_same_habit():
    plain, full_width = styles.surface_features(["a, b! c?"]), styles.surface_features(["a， b！ c？"])
    np.testing.assert_array_equal(plain, full_width)


def test_a_person_without_history_has_a_cluster_and_moves_no_one():
    found = embeddings()
    clustering = styles.cluster(found, 2, seed=0)
    nobody = styles.nearest(clustering.centroids_KE, np.zeros((1, found["p00"].size), np.float32))
    assert nobody[0] in (0, 1)
    assert styles.cluster(found, 2, seed=0).assignment == clustering.assignment


def test_nearest_is_the_least_distance():
    generator = np.random.default_rng(0)
    centroids, points = generator.normal(size=(5, 7)), generator.normal(size=(200, 7))
    expected = np.linalg.norm(points[:, None] - centroids[None], axis=2).argmin(1)
    np.testing.assert_array_equal(styles.nearest(centroids, points), expected)


def test_a_stored_map_and_stored_centroids_are_the_same_ones(tmp_path):
    histories = list(people().values())
    style = styles.fit_style_map(histories, styles.StyleConfig(dimensions=4))
    styles.save_style_map(style, tmp_path)
    loaded = styles.load_style_map(tmp_path / styles.STYLE_MAP)
    np.testing.assert_array_equal(loaded(histories), style(histories))
    found = styles.cluster(embeddings(), None, seed=0)
    styles.save_clustering(found, tmp_path)
    np.testing.assert_array_equal(styles.load_centroids(tmp_path / styles.CENTROIDS), found.centroids_KE)
    assert json.loads((tmp_path / "curve.json").read_text()) == list(found.curve)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "given").mkdir()
    styles.save_clustering(styles.cluster(embeddings(), 2, seed=0), tmp_path / "given")
    assert [file.name for file in (tmp_path / "given").iterdir()] == [styles.CENTROIDS]  # nothing was chosen


def test_the_choice_of_k_does_not_depend_on_the_order_of_people():
    found = embeddings()
    backwards = dict(reversed(found.items()))
    one, other = styles.cluster(found, None, seed=0), styles.cluster(backwards, None, seed=0)
    assert one.assignment == other.assignment
    np.testing.assert_array_equal(one.centroids_KE, other.centroids_KE)
