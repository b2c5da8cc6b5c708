import json

import pytest

from palate.corpora import jsonl, preparation, schema
from palate.corpora.streams import CorpusError


def prepared(tmp_path, lines, **options):
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    config = jsonl.JsonlConfig(input=(str(tmp_path / "texts.jsonl"),), out=str(tmp_path / "corpus"), **options)
    return preparation.prepare(jsonl.recipe(config), config)


def line(number, **fields):
    return {"user_id": "u", "input": f"in {number}", "output": f"out {number}", **fields}


def test_lines_become_pairs_and_the_latest_become_questions(tmp_path):
    dated = [line(number, date=f"2021-01-{9 - number}") for number in range(5)]
    corpus = prepared(tmp_path, dated, questions_per_user=2, instruction="Reply to: {source}")
    items = schema.read_items(corpus)
    assert [(item.source, item.input, item.output) for item in items] == [
        (f"in {number}", f"Reply to: in {number}", f"out {number}") for number in (4, 3, 2)
    ]
    assert {question.output for question in schema.read_questions(corpus)} == {"out 1", "out 0"}


def test_without_dates_the_lines_are_the_order(tmp_path):
    corpus = prepared(tmp_path, [line(number) for number in range(4)], questions_per_user=1)
    assert [item.source for item in schema.read_items(corpus)] == ["in 0", "in 1", "in 2"]


def test_one_person_with_one_text_in_another_script(tmp_path):
    corpus = prepared(tmp_path, [{"user_id": 7, "input": "дом", "output": "家がある"}])
    (item,) = schema.read_items(corpus)
    assert (item.user_id, item.source, item.output) == ("7", "дом", "家がある")
    assert schema.read_questions(corpus) == []


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("{", "the line is no JSON"),
        ("[1]", "the line is no object"),
        ({"input": "x", "output": "y"}, "the line has no user_id"),
        ({"user_id": "u", "output": "y"}, "the line has no input"),
        ({"user_id": "u", "input": "x", "output": " "}, "the line has no output"),
    ],
)
def test_broken_lines_are_quarantined(tmp_path, broken, reason):
    corpus = prepared(tmp_path, [line(0), broken], max_quarantined=0.5)
    assert corpus.read_json("report.json")["quarantined_by_reason"] == {reason: 1}


def test_an_instruction_without_a_place_for_the_input(tmp_path):
    with pytest.raises(CorpusError, match=r"--instruction 'Reply' must hold \{source\}"):
        prepared(tmp_path, [line(0)], instruction="Reply")
