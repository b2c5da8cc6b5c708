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
