"""The classifier of authors on people with a habit each."""

import random

import pytest

from palate.corpora.schema import Item
from palate.evaluation import authorship

WORDS = ["report", "parser", "cache", "socket", "update", "header", "buffer", "memory", "thread", "option", "branch"]
HABITS = {"low": str.lower, "loud": str.upper, "dots": lambda text: f"{text}...", "tag": lambda text: f"[fix] {text}"}


def texts(user: str, count: int, seed: int) -> list[str]:
    draw = random.Random(f"{user}{seed}")
    return [HABITS[user](" ".join(draw.choices(WORDS, k=5))) for _ in range(count)]


def items(count: int = 25) -> list[Item]:
    return [
        Item(user, f"{user}{n}", n, "", "", text) for user in HABITS for n, text in enumerate(texts(user, count, 0))
    ]


def by_question(users: dict[str, str], seed: int) -> dict[str, str]:
    return {question: texts(user, 1, seed + n)[0] for n, (question, user) in enumerate(users.items())}


@pytest.fixture(scope="module")
def classifier() -> authorship.Classifier:
    return authorship.train(items(), [])


def test_texts_with_the_habit_are_recognized_and_others_are_not(classifier: authorship.Classifier) -> None:
    users = {f"q{n}": user for n, user in enumerate(list(HABITS) * 8)}
    own = authorship.score(classifier, by_question(users, 100), users)
    assert own["authorship"].value() > 0.95
    assert own["authorship rank"].value() > 0.98
    rotated = {question: list(HABITS)[(list(HABITS).index(user) + 1) % 4] for question, user in users.items()}
    other = authorship.score(classifier, by_question(rotated, 100), users)
    assert other["authorship"].value() < 0.05
    assert own["authorship"].chance == 0.25


def test_a_rank_is_the_share_of_people_who_are_less_likely(classifier: authorship.Classifier) -> None:
    text = texts("loud", 1, 77)[0]
    order = sorted(classifier.users, key=lambda u: classifier.decisions([text])[0][classifier.users.index(u)])
    ranks = [authorship.score(classifier, {"q": text}, {"q": user})["authorship rank"].value() for user in order]
    assert ranks == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_scored_texts_are_not_learned_from() -> None:
    everything = items()
    leaked = [item.output for item in everything if item.user_id == "low"][:10]
    found = authorship.train(everything, [f"  {text.upper()} " for text in leaked])
    # "loud" may hold equal words in capitals too: equality ignores case.
    assert found.texts <= len(everything) - 10
    assert found.texts >= len(everything) - 12
    with pytest.raises(ValueError, match="at least two people, found 1"):
        authorship.train([item for item in everything if item.user_id == "low"], [])


def test_two_people_and_people_it_does_not_know() -> None:
    two = authorship.train([item for item in items() if item.user_id in ("low", "loud")], [])
    users = {"q1": "low", "q2": "loud", "q3": "stranger"}
    found = authorship.score(two, {"q1": "some words here", "q2": "SOME WORDS", "q3": "x"}, users)
    assert found["authorship"].questions == ("q1", "q2")
    assert found["authorship"].values.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="has learned"):
        authorship.score(two, {"q3": "x"}, users)


def test_a_text_in_another_script_is_scored(classifier: authorship.Classifier) -> None:
    found = authorship.score(classifier, {"q": "日本語", "r": ""}, {"q": "low", "r": "low"})
    assert 0 <= found["authorship rank"].value() <= 1
