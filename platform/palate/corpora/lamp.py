"""LaMP 1 to 7, user-based and time-based: question and output files in, entries of a text corpus out.

Files, fields and instructions are those of the LaMP release. Questions are a bare list or wrapped like outputs
(LaMP-6's builder does that for the test split). Rows of the user-based split carry no user: people are recovered from
the items that their profiles share. A history item becomes a pair by putting the task's instruction around its source;
LaMP-7 items have no source, so their instruction is the one that OPPU trains on ("tweet:"), and LaMP-1 items ask for
the abstract of a title, as LaMP's own per-user training does.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from palate.config import scale
from palate.corpora.entries import QUESTION, ROW_BITS, Chunk, chunked, entry, link_of, text_of, unusable
from palate.corpora.people import Rules
from palate.corpora.preparation import PrepareConfig, Recipe
from palate.corpora.schema import Task
from palate.corpora.streams import CorpusError, absolute, first_byte, json_records, sha256_of, wrapper_task

_FIRST_ROWS = 20  # if none of these is of the task, the file is of another task

MOVIE_TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic", "psychology",
    "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
)  # fmt: skip
NEWS_CATEGORIES = (
    "women", "religion", "politics", "style & beauty", "entertainment", "culture & arts", "sports",
    "science & technology", "travel", "business", "crime", "education", "healthy living", "parents", "food & drink",
)  # fmt: skip


@dataclass(frozen=True)
class LampTask:
    """One task: how its questions are recognized and which fields of a profile item are the person's text.

    ``pattern`` finds the source in a question's input, as its group 1. ``source`` may be "": items then have none.
    """

    task: Task
    pattern: re.Pattern[str]
    item_template: str
    source: str
    output: str


def _task(name: str, metric: Any, pattern: str, template: str, source: str, output: str, **fields: Any) -> LampTask:
    return LampTask(
        Task(name, metric, **fields), re.compile(pattern, re.DOTALL | re.IGNORECASE), template, source, output
    )


_MOVIE = "Which tag does this movie relate to among the following tags?"
_NEWS = "Which category does this article relate to among the following categories?"
_SCORE = "What is the score of the following review on a scale of 1 to 5?"
_TITLE_IS = '"{output}" is the title for "{source}"'

TASKS: dict[str, LampTask] = {
    "LaMP_1": _task(
        "LaMP_1",
        "classification",
        r'\bpaper with the title "(.*)", which reference is related\?',
        'Write the abstract of the paper with the title "{source}"',
        "title",
        "abstract",
        labels=("[1]", "[2]"),
        title_template='"{source}"',
    ),
    "LaMP_2": _task(
        "LaMP_2",
        "classification",
        r"which tag does this movie relate to.*?\bdescription:(.*)",
        f"{_MOVIE} Just answer with the tag name without further explanation. "
        f"tags: [{', '.join(MOVIE_TAGS)}] description: {{source}}",
        "description",
        "tag",
        labels=MOVIE_TAGS,
        title_template='the tag for the movie: "{source}" is "{output}"',
    ),
    "LaMP_2N": _task(
        "LaMP_2N",
        "classification",
        r"which category does this article relate to.*?\barticle:(.*)",
        f"{_NEWS} Just answer with the category name without further explanation. "
        f"categories: [{', '.join(NEWS_CATEGORIES)}] article: {{source}}",
        "text",
        "category",
        labels=NEWS_CATEGORIES,
        title_template='the category for the article: "{source}" is "{output}"',
    ),
    "LaMP_3": _task(
        "LaMP_3",
        "rating",
        r"what is the score of the following review.*?\breview:(.*)",
        f"{_SCORE} just answer with 1, 2, 3, 4, or 5 without further explanation. review: {{source}}",
        "text",
        "score",
        title_template='{output} is the score for "{source}"',
    ),
    "LaMP_4": _task(
        "LaMP_4",
        "text",
        r"generate a headline for the following article:(.*)",
        "Generate a headline for the following article: {source}",
        "text",
        "title",
        title_template=_TITLE_IS,
    ),
    "LaMP_5": _task(
        "LaMP_5",
        "text",
        r"generate a title for the following abstract of a paper:(.*)",
        "Generate a title for the following abstract of a paper: {source}",
        "abstract",
        "title",
        title_template='"{output}" is a title for "{source}"',
    ),
    "LaMP_6": _task(
        "LaMP_6",
        "text",
        r"generate a subject for the following email:(.*)",
        "Generate a subject for the following email: {source}",
        "text",
        "title",
        title_template=_TITLE_IS,
    ),
    "LaMP_7": _task(
        "LaMP_7",
        "text",
        r"paraphrase the following tweet without any explanation before or after it:(.*)",
        "tweet:",
        "",
        "text",
        title_template='"{output}"',
    ),
}


@dataclass(frozen=True, kw_only=True)
class LampConfig(PrepareConfig):
    """LaMP's question and output files, or any files in their shape."""

    task: str  # LaMP_1 to LaMP_7; LaMP_2N for the news categories of the first release
    questions: tuple[str, ...] = scale()  # question files of this task, all splits that belong together
    outputs: tuple[str, ...] = scale(())  # output files with the golds; questions without one are kept, gold withheld


def lamp_task(name: str) -> LampTask:
    """The task by any of its spellings: LaMP_4, LaMP-4, lamp4; LaMP_2M is LaMP_2."""
    short = re.sub(r"[^0-9A-Z]", "", name.upper()).removeprefix("LAMP").replace("2M", "2")
    try:
        return TASKS[f"LaMP_{short}"]
    except KeyError:
        raise CorpusError(f"--task {name}: there is no such task; use one of {', '.join(TASKS)}") from None


def recipe(config: LampConfig) -> Recipe:
    """What to read for ``config``.

    Raises:
        CorpusError: an outputs file is of another task, broken, or belongs to other questions.
    """
    task = lamp_task(config.task)
    if not config.questions:
        raise CorpusError("--questions: no file is given")
    golds = read_golds(config.outputs, task)
    rules = Rules(task=task.task, item_template=task.item_template, own_output=not task.source)
    inputs = {
        **{f"questions {index}": sha256_of(path) for index, path in enumerate(config.questions)},
        **{f"outputs {index}": sha256_of(path) for index, path in enumerate(config.outputs)},
    }
    return Recipe(
        rules=rules,
        units=list(enumerate(map(absolute, config.questions))),
        names=list(config.questions),
        read=partial(read, task=task, golds=golds),
        inputs=inputs,
        expected=frozenset(golds),
        counts={"golds": len(golds)},
    )


def read_golds(paths: Iterable[str], task: LampTask) -> dict[str, str]:
    """The gold output of each question id.

    Raises:
        CorpusError: a file states another task, a record is none, or two golds of one id differ.
    """
    golds: dict[str, str] = {}
    for path in paths:
        _check_wrapper(path, task, "--outputs")
        for record in json_records(path):
            if not isinstance(record, dict) or record.get("id") is None or "output" not in record:
                raise CorpusError(f"{path}: found {str(record)[:80]!r}, expected {{'id', 'output'}}: is it --outputs?")
            identity, output = str(record["id"]), text_of(record["output"])
            if golds.setdefault(identity, output) != output:
                raise CorpusError(f"{path}: question id {identity!r} has two golds, {golds[identity]!r} and {output!r}")
    return golds


def read(unit: tuple[int, str], *, task: LampTask, golds: Mapping[str, str]) -> Iterator[Chunk]:
    """The entries of one question file, in chunks."""
    index, path = unit
    _check_wrapper(path, task, "--questions")
    return chunked(_file_entries(path, index << ROW_BITS, task, golds))


def record_entries(record: Any, row: int, task: LampTask, golds: Mapping[str, str]) -> list[dict[str, Any]]:
    """The entries of one question and its profile. A profile whose question is unusable goes with it."""
    question = _question(record, row, task, golds)
    if question["reason"] is not None:
        return [question]
    items = [_item(item, row, place, question["user_id"], task) for place, item in enumerate(record["profile"])]
    return [question, *items]


def _file_entries(path: str, start: int, task: LampTask, golds: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    others, number = 0, 0
    for number, record in enumerate(json_records(path), start=1):
        entries = record_entries(record, start + number - 1, task, golds)
        others += entries[0]["reason"] in (_OTHER_TASK, _NO_INPUT)
        if others == number == _FIRST_ROWS:
            break
        yield from entries
    if number and others == number:
        raise CorpusError(f"{path} is not of task {task.task.name}: {_looks_like(path)}. Check --questions and --task")


_OTHER_TASK = "the input is not this task's instruction"
_NO_INPUT = "the question has no id or no input"


def _question(record: Any, row: int, task: LampTask, golds: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(record, dict):
        return unusable(row, QUESTION, None, "the record is no object", record)
    refuse = partial(unusable, row, QUESTION, record.get("id"), found=record)
    text = text_of(record.get("input"))
    if record.get("id") is None or not text:
        return refuse(_NO_INPUT)
    found = task.pattern.search(text)
    if found is None:
        return refuse(_OTHER_TASK)
    if not isinstance(record.get("profile"), list):
        return refuse("the question has no profile list")
    identity = str(record["id"])
    gold = golds.get(identity, text_of(record.get("output")) or None)
    if gold is not None and (gold := _answer(gold, task)) is None:
        return refuse("the gold is empty or none of the task's labels")
    user = text_of(record.get("user_id")) or None
    return entry(
        row,
        QUESTION,
        identity,
        found.group(1).strip(),
        user_id=user,
        link=link_of("question", identity, text),
        input=text,
        output=gold,
        date=text_of(record.get("date")) or None,
    )


def _item(item: Any, row: int, place: int, user_id: str | None, task: LampTask) -> dict[str, Any]:
    if not isinstance(item, dict):
        return unusable(row, place, None, "the profile item is no object", item)
    source = text_of(item.get(task.source)) if task.source else ""
    output = text_of(item.get(task.output))
    if task.source and not source:
        return unusable(row, place, item.get("id"), f"the profile item has no {task.source}", item)
    if not output:
        return unusable(row, place, item.get("id"), f"the profile item has no {task.output}", item)
    link = link_of("item", text_of(item.get("id")), source, output)
    identity = text_of(item.get("id")) or f"{link & (2**64 - 1):016x}"
    date = text_of(item.get("date")) or None
    return entry(row, place, identity, source, user_id=user_id, link=link, output=output, date=date)


def _answer(text: str, task: LampTask) -> str | None:
    """The gold as the task writes it, or None where it cannot be one."""
    if task.task.metric == "rating":
        try:
            return text if 1 <= float(text) <= 5 else None
        except ValueError:
            return None
    if task.task.labels:
        return text if text in task.task.labels else None
    return text or None


def _check_wrapper(path: str, task: LampTask, flag: str) -> None:
    """A wrapped file says what task it is of; news categories are called LaMP_2 there, as tags are."""
    if first_byte(path) != b"{":
        return
    stated = wrapper_task(path)
    if stated is not None and lamp_task(stated).task.name.rstrip("N") != task.task.name.rstrip("N"):
        raise CorpusError(f"{flag} {path} says that it is of task {stated}, but --task is {task.task.name}")


def _looks_like(path: str) -> str:
    record = next(iter(json_records(path)), None)
    text = text_of(record.get("input")) if isinstance(record, dict) else ""
    for name, other in TASKS.items():
        if other.pattern.search(text):
            return f"its questions are {name}'s"
    if isinstance(record, dict) and "output" in record and not text:
        return "it holds outputs, not questions"
    return f"its first input is {text[:60]!r}"
