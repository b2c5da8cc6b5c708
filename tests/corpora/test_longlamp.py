import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palate.corpora import longlamp, preparation, schema
from palate.corpora.streams import CorpusError

REVIEW = (
    'Generate the review text written by a reviewer who has a given an overall rating of "{0}" for a product with '
    'description "{1}". The summary of the review text is "{2}".'
)
# task: (user field, a question's input as published, a profile item, the item's input and output)
EXAMPLES = {
    "abstract_generation": (
        "name",
        'Generate an abstract for the title "On "things"" using the following items: 1. one\n2. two',
        {"title": "T", "abstract": "A", "id": "5390", "year": 2011},
        ('Generate an abstract for the title "T"', "A"),
    ),
    "product_review": (
        "reviewerId",
        REVIEW.format("5.0", 'A 7" tablet. Good', "Fine"),
        {"overall": 4.0, "summary": "S", "description": "D. E", "reviewText": "R"},
        (REVIEW.format("4.0", "D. E", "S"), "R"),
    ),
    "topic_writing": (
        "author",
        'Generate the content for a reddit post "a summary".',
        {"summary": "S", "content": "C"},
        ('Generate the content for a reddit post "S".', "C"),
    ),
}


def written(folder, rows, form, name="train"):
    path = folder / f"{name}.{form}"
    if form == "json":
        path.write_text(json.dumps(rows))
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def prepared(folder, config_name, paths, **options):
    config = longlamp.LongLampConfig(config=config_name, input=tuple(paths), out=str(folder / "corpus"), **options)
    return preparation.prepare(longlamp.recipe(config), config)


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("split", ["user", "temporal"])
@pytest.mark.parametrize("task", list(EXAMPLES))
def test_every_configuration_in_every_form(tmp_path, task, split, form):
    user, text, item, pair = EXAMPLES[task]
    rows = [{user: name, "input": text, "output": f"gold {name}", "profile": [item]} for name in ("a", "b")]
    corpus = prepared(tmp_path, f"{task}_{split}", [written(tmp_path, rows, form)])
    questions = schema.read_questions(corpus)
    assert [(q.question_id, q.user_id, q.input, q.output) for q in questions] == [
        ("train-0", "a", text, "gold a"),
        ("train-1", "b", text, "gold b"),
    ]
    items = schema.read_items(corpus)
    assert [(one.user_id, one.input, one.output) for one in items] == [("a", *pair), ("b", *pair)]
    assert items[0].date == ("2011" if task == "abstract_generation" else None)
    assert corpus.read_json("report.json")["quarantined"] == 0


@pytest.mark.parametrize("task", list(EXAMPLES))
def test_the_source_of_a_question_equals_that_of_the_same_item(tmp_path, task):
    user, _, item, (item_input, _) = EXAMPLES[task]
    text = f"{item_input} using the following items: 1. x" if task == "abstract_generation" else item_input
    row = {user: "a", "input": text, "output": "the gold", "profile": [item]}
    corpus = prepared(tmp_path, f"{task}_user", [written(tmp_path, [row], "json")])
    assert schema.read_items(corpus) == []
    assert corpus.read_json("report.json")["leaked_items_same_source"] == 1


def test_an_item_with_the_golds_text_is_no_history(tmp_path):
    row = {"author": "a", "input": "x", "output": "The Text", "profile": [{"summary": "S", "content": "the  text"}]}
    corpus = prepared(tmp_path, "topic_writing_user", [written(tmp_path, [row], "json")])
    assert schema.read_items(corpus) == []
    assert corpus.read_json("report.json")["leaked_items_same_output"] == 1


def test_topic_items_of_the_repositorys_form(tmp_path):
    item = {"input": 'Generate the content for a reddit post "S".', "output": "C"}
    row = {"author": "a", "input": "x", "output": "o", "profile": [item]}
    (read,) = schema.read_items(prepared(tmp_path, "topic_writing_user", [written(tmp_path, [row], "json")]))
    assert (read.source, read.output) == ("S", "C")


def test_a_profile_in_columns(tmp_path):
    row = {"author": "a", "input": "x", "output": "o", "profile": {"summary": ["S", "T"], "content": ["C", "D"]}}
    items = schema.read_items(prepared(tmp_path, "topic_writing_user", [written(tmp_path, [row], "parquet")]))
    assert [(item.source, item.output) for item in items] == [("S", "C"), ("T", "D")]


def test_splits_keep_their_names_in_the_question_ids(tmp_path):
    row = {"author": "a", "input": "x", "output": "o", "profile": []}
    paths = [written(tmp_path, [row], "json", name) for name in ("train", "val")]
    corpus = prepared(tmp_path, "topic_writing_user", paths)
    assert [question.question_id for question in schema.read_questions(corpus)] == ["train-0", "val-0"]
    with pytest.raises(CorpusError, match="different names"):
        longlamp.recipe(longlamp.LongLampConfig(config="topic_writing_user", input=(paths[0], paths[0]), out="unused"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"author": None}, "the row has no author"),
        ({"input": ""}, "the row has no input"),
        ({"profile": None}, "the row has no profile list"),
        ({"output": "x" * 101}, "the text is longer than --max-characters"),
        ({"profile": [{"title": "t"}]}, "the profile item lacks summary+content or input+output"),
        ({"profile": [{"summary": "t", "content": ""}]}, "the profile item is empty"),
        ({"profile": [{"summary": "t", "content": "x" * 101}]}, "the text is longer than --max-characters"),
    ],
)
def test_broken_rows_are_quarantined(tmp_path, fields, reason):
    row = {"author": "a", "input": "x", "output": "o", "profile": []}
    path = written(tmp_path, [row | fields, row], "json")
    corpus = prepared(tmp_path, "topic_writing_user", [path], max_quarantined=0.5, max_characters=100)
    assert corpus.read_json("report.json")["quarantined_by_reason"] == {reason: 1}


def test_a_file_of_another_configuration_names_the_missing_field(tmp_path):
    row = {"reviewerId": "a", "input": "x", "output": "o", "profile": []}
    with pytest.raises(CorpusError, match="the row has no author"):
        prepared(tmp_path, "topic_writing_user", [written(tmp_path, [row], "json")])
