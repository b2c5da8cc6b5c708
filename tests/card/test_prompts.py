"""Retrieval over one person's history, and prompts that fit their budget."""

import math
import random

import pytest

from palate.card import prompts
from palate.corpora.schema import Item, Question, Task
from palate.models.causal_lm import LoadedModel, load_causal_lm, render_prompt

TEMPLATES = {
    "LaMP_1": '"{source}"',
    "LaMP_2": 'the tag for the movie: "{source}" is "{output}"',
    "LaMP_4": '"{output}" is the title for "{source}"',
    "LaMP_5": '"{output}" is a title for "{source}"',
    "LaMP_7": '"{output}"',
}


def lamp(name: str = "LaMP_4") -> Task:
    return Task(name, "text", title_template=TEMPLATES[name])


def item(order: int, source: str = "", output: str = "", user: str = "u") -> Item:
    return Item(user, f"i{order}", order, source, f"Instruction: {source}", output)


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_causal_lm("tiny")


def bm25_by_hand(query: list[str], documents: list[list[str]]) -> list[float]:
    """Lucene's BM25 as plain loops (Kamphuis et al., ECIR 2020, table 1; k1 = 1.5, b = 0.75)."""
    size, average = len(documents), sum(map(len, documents)) / len(documents)
    scores = [0.0] * size
    for word in query:
        frequency = sum(word in document for document in documents)
        for row, document in enumerate(documents):
            count = document.count(word)
            weight = math.log(1 + (size - frequency + 0.5) / (frequency + 0.5))
            scores[row] += weight * count / (count + 1.5 * (0.25 + 0.75 * len(document) / average))
    return scores


def test_ranking_equals_plain_loops_on_random_texts() -> None:
    draw = random.Random(0)
    for _ in range(30):
        items = [item(n, " ".join(draw.choices("abcdefgh", k=draw.randint(1, 12)))) for n in range(draw.randint(2, 9))]
        query = draw.choices("abcdefghxyz", k=6)
        scores = [round(s, 4) for s in bm25_by_hand(query, [prompts.searched_text(lamp(), i).split() for i in items])]
        if len(set(scores)) < len(scores):
            continue  # float32 sums may order equal scores either way
        expected = sorted(items, key=lambda i: -scores[i.order])
        assert prompts.Retriever(lamp(), items).retrieve(" ".join(query), 99) == expected


def test_equal_scores_go_to_the_most_recent() -> None:
    items = [item(0, "red fish"), item(2, "grey owl"), item(1, "blue bird")]
    found = prompts.Retriever(lamp(), items).retrieve("a red one", 3)
    assert [i.order for i in found] == [0, 2, 1]


@pytest.mark.parametrize(
    ("name", "expected"), [("LaMP_1", "t s"), ("LaMP_2", "s"), ("LaMP_4", "t s"), ("LaMP_7", "t s")]
)
def test_what_is_searched_is_what_the_official_code_searches(name: str, expected: str) -> None:
    assert prompts.searched_text(lamp(name), item(0, "s", "t")) == expected


def test_an_item_sees_neither_itself_nor_what_came_after() -> None:
    items = [item(n, f"same words {n}") for n in range(5)]
    retriever = prompts.Retriever(lamp(), list(reversed(items)))
    assert {i.order for i in retriever.for_item(items[3], 9)} == {0, 1, 2}
    assert retriever.for_item(items[0], 9) == []


def test_a_question_sees_its_profile_only() -> None:
    items = [item(n, f"text {n}") for n in range(4)]
    retriever = prompts.Retriever(lamp(), items)
    question = Question("q", "u", "text 3", "", None, None, ("i2", "i0"))
    assert {i.item_id for i in retriever.for_question(question, 9)} == {"i0", "i2"}
    with pytest.raises(ValueError, match="'i9'"):
        retriever.retrieve("text", 1, allowed=["i9"])


def test_borders_of_retrieval() -> None:
    retriever = prompts.Retriever(lamp(), [item(0, "a"), item(1, "b")])
    assert len(retriever.retrieve("a", 9)) == 2
    assert retriever.retrieve("a", 0) == []
    assert [i.order for i in retriever.retrieve("", 1)] == [1]  # nothing to search by: the most recent
    assert prompts.Retriever(lamp(), []).retrieve("a", 3) == []
    assert [i.order for i in prompts.Retriever(lamp("LaMP_2"), [item(0), item(1)]).retrieve("a", 1)] == [1]
    with pytest.raises(ValueError, match="found -1"):
        retriever.retrieve("a", -1)
    with pytest.raises(ValueError, match="one person's"):
        prompts.Retriever(lamp(), [item(0, user="u"), item(1, user="v")])


def test_building_an_index_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    prompts.Retriever(lamp(), [item(0, "a"), item(1, "b")])
    assert not caplog.records


def test_one_retriever_a_person() -> None:
    found = prompts.retrievers(lamp(), [item(0, user="u"), item(0, user="v"), item(1, user="u")])
    assert {user: len(retriever.items) for user, retriever in found.items()} == {"u": 2, "v": 1}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LaMP_2", 'the tag for the movie: "s1" is "o1", and the tag for the movie: "s2" is "o2". INPUT'),
        ("LaMP_4", '"o1" is the title for "s1", and "o2" is the title for "s2". INPUT'),
        ("LaMP_5", '"o1" is a title for "s1", and "o2" is a title for "s2". Following the given patterns INPUT'),
        ("LaMP_7", '"o1", and "o2" are written by a person. Following the given patterns INPUT'),
    ],
)
def test_phrasing(name: str, expected: str) -> None:
    assert prompts.history_prompt(lamp(name), "INPUT", [item(1, "s1", "o1"), item(2, "s2", "o2")]) == expected
    assert prompts.history_prompt(lamp(name), "INPUT", []) == "INPUT"


def test_citation_titles_go_after_the_word_title() -> None:
    text = 'the paper with the title "T", which title fits?'
    found = prompts.history_prompt(lamp("LaMP_1"), text, [item(1, "A"), item(2, "{B}")])
    assert found == 'the paper with the title, and "A", and "{B}" "T", which title fits?'


def test_a_prompt_that_fits_is_the_rendered_text(tiny: LoadedModel) -> None:
    assert prompts.prompt_ids(tiny, lamp(), "short", [], 100) == render_prompt(tiny, "short")
    history = [item(0, "s", "t")]
    expected = render_prompt(tiny, '"t" is the title for "s". short')
    assert prompts.prompt_ids(tiny, lamp(), "short", history, len(expected)) == expected
    assert prompts.prompt_ids(tiny, lamp(), "short", history, len(expected) - 1) != expected


def test_a_long_request_is_cut_at_a_token_at_its_end(tiny: LoadedModel) -> None:
    text = "Summarize: " + "the other thing in the end " * 40
    ids = prompts.prompt_ids(tiny, lamp(), text, [], 64)
    assert len(ids) == 64
    kept = tiny.tokenizer.decode(ids).split("user\n")[1].split("<|im_end|>")[0]
    assert text.startswith(kept)
    assert len(kept) > 60


def test_no_character_is_cut_in_parts(tiny: LoadedModel) -> None:
    for limit in range(20, 40):
        ids = prompts.prompt_ids(tiny, lamp(), "日本語のテキスト" * 20, [], limit)
        assert limit - 3 < len(ids) <= limit  # three bytes, three tokens a character
        assert "�" not in tiny.tokenizer.decode(ids)


def test_the_budget_keeps_the_request_and_splits_the_rest_equally(tiny: LoadedModel) -> None:
    history = [item(n, "xyzw" * 200, "qq") for n in range(3)]
    ids = prompts.prompt_ids(tiny, lamp(), "request here", history, 200)
    text = tiny.tokenizer.decode(ids)
    quoted = [part.split('"')[1].count("xyzw") for part in text.split(" is the title for ")[1:]]
    assert 190 <= len(ids) <= 200
    assert "request here" in text
    assert len(quoted) == 3
    assert max(quoted) - min(quoted) <= 1


def test_what_one_item_leaves_goes_to_the_next(tiny: LoadedModel) -> None:
    def last_quote(first: str) -> int:
        history = [item(0, first, "q"), item(1, "xyzw" * 200, "q")]
        return (
            tiny.tokenizer.decode(prompts.prompt_ids(tiny, lamp(), "request", history, 200))
            .split("title for")[2]
            .count("xyzw")
        )

    assert last_quote("brief") > last_quote("xyzw" * 200) + 10


def test_a_long_request_beside_history_keeps_its_share(tiny: LoadedModel) -> None:
    text = "Summarize: " + "pqrs" * 300
    ids = prompts.prompt_ids(tiny, lamp(), text, [item(0, "xyzw" * 300, "q")], 300)
    decoded = tiny.tokenizer.decode(ids)
    room = 300 - len(render_prompt(tiny, ""))
    assert len(ids) <= 300
    assert 4 * decoded.count("pqrs") >= 0.6 * room - 25
    assert 4 * decoded.count("xyzw") >= 0.3 * room


def test_an_item_without_room_is_left_out(tiny: LoadedModel) -> None:
    history = [item(n, "source", "a title that is far too long " * 9) for n in range(2)]
    limit = len(render_prompt(tiny, "abcdefgh")) + 6
    assert prompts.prompt_ids(tiny, lamp(), "abcdefgh", history, limit) == render_prompt(tiny, "abcdefgh")


def test_a_budget_below_the_template_is_refused_by_flag(tiny: LoadedModel) -> None:
    with pytest.raises(ValueError, match="--max-prompt-tokens 5"):
        prompts.prompt_ids(tiny, lamp(), "text", [], 5)


def test_the_budget_holds_for_any_history(tiny: LoadedModel) -> None:
    draw = random.Random(1)
    least = len(render_prompt(tiny, "")) + 1
    for _ in range(150):
        task = lamp(draw.choice(list(TEMPLATES)))
        history = [
            item(n, "wo rds é" * draw.randint(0, 20), "ti tle " * draw.randint(0, 9)) for n in range(draw.randint(0, 4))
        ]
        limit = draw.randint(least, 250)
        ids = prompts.prompt_ids(tiny, task, "the title: " + "in put " * draw.randint(0, 40), history, limit)
        assert len(ids) <= limit
