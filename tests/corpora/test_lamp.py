import json

import pytest

from lamp_files import write_large
from palate.corpora import lamp, preparation, schema
from palate.corpora.streams import CorpusError

TAGS = (
    "sci-fi, based on a book, comedy, action, twist ending, dystopia, dark comedy, classic, psychology, fantasy, "
    "romance, thought-provoking, social commentary, violence, true story"
)
CATEGORIES = (
    "women, religion, politics, style & beauty, entertainment, culture & arts, sports, science & technology, travel, "
    "business, crime, education, healthy living, parents, food & drink"
)
# task: (a question's input as released, its source, gold, a profile item, the pair it makes: source, input, output)
EXAMPLES = {
    "LaMP_1": (
        'For an author who has written the paper with the title "A "quoted" title", which reference is related? Just '
        'answer with [1] or [2] without explanation. [1]: "One" [2]: "Two"',
        'A "quoted" title',
        "[2]",
        {"title": "T", "abstract": "A"},
        ("T", 'Write the abstract of the paper with the title "T"', "A"),
    ),
    "LaMP_2": (
        "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
        f"explanation. tags: [{TAGS}] description: A description: of a film",
        "A description: of a film",
        "true story",
        {"description": "D", "tag": "sci-fi"},
        (
            "D",
            "Which tag does this movie relate to among the following tags? Just answer with the tag name without "
            f"further explanation. tags: [{TAGS}] description: D",
            "sci-fi",
        ),
    ),
    "LaMP_2N": (
        "Which category does this article relate to among the following categories? Just answer with the category name "
        f"without further explanation. categories: [{CATEGORIES}] article: An\narticle",
        "An\narticle",
        "food & drink",
        {"text": "X", "title": "T", "category": "crime"},
        (
            "X",
            "Which category does this article relate to among the following categories? Just answer with the category "
            f"name without further explanation. categories: [{CATEGORIES}] article: X",
            "crime",
        ),
    ),
    "LaMP_3": (
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
        "further explanation. review: Nice",
        "Nice",
        "4",
        {"text": "R", "score": 5},
        (
            "R",
            "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
            "further explanation. review: R",
            "5",
        ),
    ),
    "LaMP_4": (
        "Generate a headline for the following article: News: today",
        "News: today",
        "Head",
        {"text": "X", "title": "T"},
        ("X", "Generate a headline for the following article: X", "T"),
    ),
    "LaMP_5": (
        "Generate a title for the following abstract of a paper: Abs",
        "Abs",
        "Title",
        {"title": "T", "abstract": "A"},
        ("A", "Generate a title for the following abstract of a paper: A", "T"),
    ),
    "LaMP_6": (
        "Generate a subject for the following email: Mail",
        "Mail",
        "Subject",
        {"text": "X", "title": "T"},
        ("X", "Generate a subject for the following email: X", "T"),
    ),
    "LaMP_7": (
        "Paraphrase the following tweet without any explanation before or after it: Tweet",
        "Tweet",
        "tw33t",
        {"text": "X"},
        ("", "tweet:", "X"),
    ),
}


def write(path, value):
    path.write_text(json.dumps(value))
    return str(path)


def prepared(folder, task, questions, golds=None, **options):
    """The corpus of question files (rows each) and golds {id: output}."""
    paths = tuple(write(folder / f"questions-{index}.json", rows) for index, rows in enumerate(questions))
    outputs = ()
    if golds is not None:
        named = [{"id": identity, "output": output} for identity, output in golds.items()]
        outputs = (write(folder / "outputs.json", {"task": lamp.lamp_task(task).task.name, "golds": named}),)
    config = lamp.LampConfig(task=task, questions=paths, outputs=outputs, out=str(folder / "corpus"), **options)
    return preparation.prepare(lamp.recipe(config), config)


def row(identity, text="an article", profile=(), **fields):
    instruction = "Generate a headline for the following article:"
    return {"id": identity, "input": f"{instruction} {text}", "profile": list(profile), **fields}


def article(identity, text=None, **fields):
    return {"id": identity, "text": text or f"text {identity}", "title": f"title {identity}", **fields}


@pytest.mark.parametrize("split", ["user", "time"])
@pytest.mark.parametrize("task", list(EXAMPLES))
def test_every_task_in_both_splits(tmp_path, task, split):
    text, source, gold, item, pair = EXAMPLES[task]
    time = {"date": "2020-3-1"} if split == "time" else {}
    question = {"id": "q", "input": text, "profile": [{"id": "i", **item, **time}]}
    if split == "time":
        question["user_id"] = 17
    corpus = prepared(tmp_path, task, [[question]], {"q": gold})
    (asked,) = schema.read_questions(corpus)
    (written,) = schema.read_items(corpus)
    assert (asked.question_id, asked.input, asked.source, asked.output) == ("q", text, source, gold)
    assert (written.source, written.input, written.output) == pair
    assert written.date == ("2020-3-1" if split == "time" else None)
    assert asked.profile == (written.item_id,)
    assert asked.user_id == written.user_id
    assert (asked.user_id == "17") == (split == "time")
    assert schema.read_task(corpus).name == task


def test_labels_are_lamps():
    assert [len(lamp.lamp_task(name).task.labels) for name in ("LaMP_1", "LaMP_2", "LaMP_2N", "LaMP_4")] == [
        2,
        15,
        15,
        0,
    ]
    assert lamp.lamp_task("LaMP_2").task.labels == tuple(TAGS.split(", "))
    assert lamp.lamp_task("LaMP_2N").task.labels == tuple(CATEGORIES.split(", "))
    assert lamp.lamp_task("LaMP_3").task.metric == "rating"


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("LaMP_4", "LaMP_4"), ("LaMP-4", "LaMP_4"), ("lamp4", "LaMP_4"), ("LaMP_2M", "LaMP_2"), ("LaMP-2N", "LaMP_2N")],
)
def test_spellings_of_a_task(spelling, name):
    assert lamp.lamp_task(spelling).task.name == name


def test_an_unknown_task_is_named():
    with pytest.raises(CorpusError, match=r"--task LaMP_9.*LaMP_2N"):
        lamp.lamp_task("LaMP_9")


def test_people_are_recovered_through_chains_of_shared_items(tmp_path):
    rows = [
        row("a1", "one", [article("1"), article("2")]),
        row("a2", "two", [article("3"), article("2")]),
        row("b", "three", [article("9"), article("1", text="the same id on another text")]),
        row("a3", "four", [article("3")]),
        row("lonely", "five"),
    ]
    corpus = prepared(tmp_path, "LaMP_4", [rows])
    users = {question.question_id: question.user_id for question in schema.read_questions(corpus)}
    assert users["a1"] == users["a2"] == users["a3"]
    assert len(set(users.values())) == 3
    assert corpus.read_json("report.json")["users_recovered"] == 3
    (tmp_path / "again").mkdir()
    again = prepared(tmp_path / "again", "LaMP_4", [rows[::-1][:2], rows[::-1][2:]])
    assert {question.question_id: question.user_id for question in schema.read_questions(again)} == users


def test_questions_without_gold_are_kept(tmp_path):
    corpus = prepared(tmp_path, "LaMP_4", [[row("q"), row("r", "other")]], {"r": "head"})
    assert {question.question_id: question.output for question in schema.read_questions(corpus)} == {
        "q": None,
        "r": "head",
    }
    assert corpus.read_json("report.json")["questions_without_gold"] == 1


def test_wrapped_questions_and_golds_inside_the_rows(tmp_path):
    text = EXAMPLES["LaMP_6"][0]
    wrapped = {"task": "LaMP_6", "golds": [{"id": "q", "input": text, "profile": [], "output": "Subject"}]}
    corpus = prepared(tmp_path, "LaMP-6", [wrapped])
    (question,) = schema.read_questions(corpus)
    assert (question.input, question.output) == (text, "Subject")


def test_a_later_splits_profile_does_not_bring_back_an_earlier_gold(tmp_path):
    train = row("train", "the first", [article("1")], user_id="u")
    leaks = [article("1"), article("train", text="something"), article("2", text=" THE  first")]
    dev = row("dev", "the second", leaks, user_id="u")
    corpus = prepared(tmp_path, "LaMP_4", [[train], [dev]], {"train": "head", "dev": "line"})
    assert [item.source for item in schema.read_items(corpus)] == ["text 1"]
    assert {question.profile for question in schema.read_questions(corpus)} == {("u/1",)}
    report = corpus.read_json("report.json")
    assert (report["leaked_items_same_id"], report["leaked_items_same_source"]) == (1, 1)


def test_a_tweet_that_is_the_gold_is_no_history(tmp_path):
    question = {
        "id": "q",
        "input": EXAMPLES["LaMP_7"][0],
        "profile": [{"id": "1", "text": "TW33T"}, {"id": "2", "text": "b"}],
    }
    corpus = prepared(tmp_path, "LaMP_7", [[question]], {"q": "tw33t"})
    assert [item.output for item in schema.read_items(corpus)] == ["b"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("text", "the record is no object"),
        ({"input": "x", "profile": []}, "no id or no input"),
        (row("x") | {"profile": "none"}, "no profile list"),
        (row("x") | {"input": "Something else"}, "not this task's instruction"),
        (row("x", profile=["item"]), "the profile item is no object"),
        (row("x", profile=[{"id": "1", "title": "t"}]), "the profile item has no text"),
        (row("x", profile=[article("1") | {"title": " "}]), "the profile item has no title"),
        (row("x") | {"output": "  "}, None),
    ],
)
def test_broken_records_are_quarantined(tmp_path, record, reason):
    corpus = prepared(tmp_path, "LaMP_4", [[record, row("good")]], max_quarantined=1.0)
    lines = [json.loads(line) for line in corpus.local("quarantine.jsonl").read_text().splitlines()]
    assert len(lines) == (reason is not None)
    assert all(reason in line["reason"] and line["record"] == 0 for line in lines)
    assert "good" in {question.question_id for question in schema.read_questions(corpus)}


@pytest.mark.parametrize(("task", "gold"), [("LaMP_2", "Comedy"), ("LaMP_1", "1"), ("LaMP_3", "7"), ("LaMP_3", "four")])
def test_a_gold_that_is_no_label_is_quarantined(tmp_path, task, gold):
    text, _, right, _, _ = EXAMPLES[task]
    rows = [{"id": identity, "input": text + identity, "profile": []} for identity in "ab"]
    corpus = prepared(tmp_path, task, [rows], {"a": gold, "b": right}, max_quarantined=0.5)
    assert [question.question_id for question in schema.read_questions(corpus)] == ["b"]


@pytest.mark.parametrize("other", [name for name in EXAMPLES if name != "LaMP_4"])
def test_a_file_of_another_task_stops_with_its_name(tmp_path, other):
    rows = [{"id": str(number), "input": EXAMPLES[other][0], "profile": []} for number in range(30)]
    with pytest.raises(CorpusError, match=f"is not of task LaMP_4: its questions are {other}'s"):
        prepared(tmp_path, "LaMP_4", [rows])


def test_outputs_given_as_questions(tmp_path):
    with pytest.raises(CorpusError, match="it holds outputs, not questions"):
        prepared(tmp_path, "LaMP_4", [[{"id": "1", "output": "x"}]])


def test_outputs_of_another_task(tmp_path):
    outputs = write(tmp_path / "outputs.json", {"task": "LaMP_5", "golds": []})
    config = lamp.LampConfig(task="LaMP_4", questions=("unread",), outputs=(outputs,), out="unused")
    with pytest.raises(CorpusError, match=r"says that it is of task LaMP_5, but --task is LaMP_4"):
        lamp.recipe(config)


def test_the_news_categories_call_themselves_lamp_2(tmp_path):
    text = EXAMPLES["LaMP_2N"][0]
    questions = write(tmp_path / "questions.json", [{"id": "q", "input": text, "profile": []}])
    outputs = write(tmp_path / "outputs.json", {"task": "LaMP_2", "golds": [{"id": "q", "output": "crime"}]})
    config = lamp.LampConfig(task="LaMP_2N", questions=(questions,), outputs=(outputs,), out=str(tmp_path / "corpus"))
    assert schema.read_questions(preparation.prepare(lamp.recipe(config), config))[0].output == "crime"


def test_outputs_of_other_questions(tmp_path):
    golds = {"q": "x", **{str(number): "y" for number in range(10)}}
    with pytest.raises(CorpusError, match=r"10 of 11 golds \(such as '0'\) .* do not belong together"):
        prepared(tmp_path, "LaMP_4", [[row("q")]], golds)


def test_a_train_and_a_test_split_together(tmp_path):
    corpus = prepared(tmp_path, "LaMP_4", [[row("train")], [row("test", "other")]], {"train": "head"})
    assert corpus.read_json("report.json")["questions_without_gold"] == 1


def test_two_golds_of_one_id(tmp_path):
    golds = [{"id": "q", "output": "x"}, {"id": "q", "output": "y"}]
    with pytest.raises(CorpusError, match="'q' has two golds, 'x' and 'y'"):
        lamp.read_golds([write(tmp_path / "outputs.json", {"golds": golds})], lamp.lamp_task("LaMP_4"))


def test_a_prediction_file_without_ids(tmp_path):
    with pytest.raises(CorpusError, match=r"expected \{'id', 'output'\}"):
        lamp.read_golds([write(tmp_path / "outputs.json", [{"output": "x"}])], lamp.lamp_task("LaMP_4"))


def test_a_cut_off_question_file(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([row("a"), row("b")])[:-30])
    config = lamp.LampConfig(task="LaMP_4", questions=(str(path),), out=str(tmp_path / "corpus"))
    with pytest.raises(CorpusError, match="cut off"):
        preparation.prepare(lamp.recipe(config), config)


def test_the_generated_large_file_is_read_in_full(tmp_path):
    questions, outputs, people = write_large(tmp_path, megabytes=2)
    config = lamp.LampConfig(
        task="LaMP_4", questions=(str(questions),), outputs=(str(outputs),), out=str(tmp_path / "corpus")
    )
    report = preparation.prepare(lamp.recipe(config), config).summary
    assert report["users_recovered"] == report["users"] == people
    assert report["items"] == 300 * people
    assert report["duplicate_items"] == 100 * people
    assert report["questions"] == 2 * people
