"""Prompts to draw images for: benchmark files as they were published, plain files, and a corpus' held-out lists.

PartiPrompts   a .tsv with the columns Prompt, Category, Challenge, Note (google-research/parti)
HPSv2          a .json list of texts, its name the style (anime.json, photo.json, …), or a folder of such
               files, or one .json object of a list a style (what ``hpsv2.benchmark_prompts("all")`` returns)
.txt           a prompt a line
.jsonl         {"prompt", "category"?, "user_id"?}; of edits also "source" and "target"?, paths of images beside
               the file, and "caption"?, what the edited image shows
"""

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from palate.artifacts import Artifact
from palate.corpora.schema import LISTS

PARTI_COLUMNS = ("Prompt", "Category", "Challenge", "Note")
FORMS = (
    "a PartiPrompts .tsv, an HPSv2 .json or a folder of them, a .txt with a prompt a line, or a .jsonl with "
    '{"prompt": …} a line'
)
_JSONL_FIELDS = ("prompt", "category", "user_id", "source", "target", "caption")


class PromptError(ValueError):
    """A prompt file that cannot be used; the message names the file, the place and what was expected."""


@dataclass(frozen=True)
class Prompt:
    """What one image is drawn from.

    Attributes:
        text: the caption, or the instruction where an image is edited.
        category: of the file, for tables.
        user_id: whom the image is for; None: nobody.
        source, target: files, or uids of a corpus' images: what is edited, and what should come out.
        caption: of the image, where it is another text than the prompt (an edit's).
    """

    text: str
    category: str = ""
    user_id: str | None = None
    source: str | None = None
    target: str | None = None
    caption: str = ""

    @property
    def key(self) -> str:
        """What tells prompts apart, and what their seeds are drawn from."""
        return json.dumps([self.text, self.user_id, self.source, self.target], ensure_ascii=False)

    @property
    def unit(self) -> str:
        """What is resampled: the person, or the prompt."""
        return self.text if self.user_id is None else self.user_id

    @property
    def shown(self) -> str:
        """The text that the image should match."""
        return self.caption or self.text


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file or folder, each once, in order.

    Raises:
        PromptError: there is no such file, it is of no known form, or it holds something else than it should.
    """
    place = Path(path)
    if place.is_dir():
        files = sorted(place.glob("*.json"))
        if not files:
            raise PromptError(f"--prompts {path}: the folder has no .json file; expected {FORMS}")
        return _once([prompt for file in files for prompt in _hpsv2(file)], str(path))
    readers: Mapping[str, Callable[[Path], list[Prompt]]] = {
        ".tsv": _parti,
        ".json": _hpsv2,
        ".txt": _lines,
        ".jsonl": _jsonl,
    }
    if place.suffix not in readers:
        raise PromptError(f"--prompts {path}: files of the form {place.suffix!r} are not read; expected {FORMS}")
    if not place.is_file():
        raise PromptError(f"--prompts {path}: there is no such file")
    try:
        found = readers[place.suffix](place)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PromptError(f"--prompts {path}: {error}") from None
    return _once(found, str(path))


def corpus_prompts(lists: Artifact, *, people: bool = False, split: str = "test") -> list[Prompt]:
    """The captions of a corpus' held-out lists, or their edits, in the order of their text.

    Args:
        people: a prompt for each person and caption, of the category ``held-in`` where lists of the person are in
            the split ``train``, else ``held-out``.

    Raises:
        PromptError: the split has no list, or names no person though people are asked for.
    """
    columns = ["list_id", "caption", "user_id", "split", "source_image", "instruction"]
    rows: list[dict[str, Any]] = []
    for path in lists.paths("lists/", ".parquet"):
        rows += pq.read_table(lists.local(path), schema=LISTS).select(columns).to_pylist()
    learned = {row["user_id"] for row in rows if row["split"] == "train"}
    targets = _targets(lists)
    found = []
    for row in rows:
        if row["split"] != split or (people and row["user_id"] is None):
            continue
        edit = row["source_image"] is not None
        found.append(
            Prompt(
                row["instruction"] if edit else row["caption"],
                category=("held-in" if row["user_id"] in learned else "held-out") if people else "",
                user_id=row["user_id"] if people else None,
                source=row["source_image"],
                target=targets.get(row["list_id"]),
                caption=row["caption"] if edit else "",
            )
        )
    if not found:
        who = " of a person" if people else ""
        raise PromptError(f"{lists.url} has no list{who} in split {split!r}: prepare more data, or give --prompts")
    return _once(sorted(found, key=lambda prompt: prompt.key), lists.url)


def _targets(lists: Artifact) -> dict[str, str]:
    """What the edit of each list should give, where the corpus knows (``corpora/worlds/shapes.py``)."""
    if not lists.paths("targets.parquet"):
        return {}
    rows = pq.read_table(lists.local("targets.parquet")).to_pylist()
    return {row["list_id"]: row["target_uid"] for row in rows}


def _parti(file: Path) -> list[Prompt]:
    with file.open(encoding="utf-8", newline="") as stream:
        # Published without quoting: a quote sign is part of a prompt.
        rows = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        if missing := [name for name in PARTI_COLUMNS[:2] if name not in (rows.fieldnames or ())]:
            raise PromptError(
                f"--prompts {file}: there is no column {missing[0]}; PartiPrompts has {', '.join(PARTI_COLUMNS)}, "
                f"found {', '.join(rows.fieldnames or ())}"
            )
        return [_prompt(file, rows.line_num, row["Prompt"], category=row["Category"] or "") for row in rows]


def _hpsv2(file: Path) -> list[Prompt]:
    content = json.loads(file.read_text(encoding="utf-8"))
    styles = {file.stem: content} if isinstance(content, list) else content
    if not isinstance(styles, dict) or not all(isinstance(texts, list) for texts in styles.values()):
        raise PromptError(f"--prompts {file}: expected a list of texts, or an object with a list of texts a style")
    return [
        _prompt(file, number, text, category=str(style))
        for style, texts in styles.items()
        for number, text in enumerate(texts, 1)
    ]


def _lines(file: Path) -> list[Prompt]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [Prompt(line.strip()) for line in lines if line.strip()]


def _jsonl(file: Path) -> list[Prompt]:
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        row = json.loads(line)
        if not isinstance(row, dict) or "prompt" not in row:
            raise PromptError(f'--prompts {file}, line {number}: expected {{"prompt": …}}, found {line[:60]}')
        if unknown := sorted(row.keys() - set(_JSONL_FIELDS)):
            raise PromptError(f"--prompts {file}, line {number}: no field {unknown[0]!r}; there are {_JSONL_FIELDS}")
        given = {name: None if row.get(name) is None else str(row[name]) for name in _JSONL_FIELDS[1:]}
        for name in ("source", "target"):
            if (value := given[name]) is not None:
                given[name] = str(file.parent / value)
        if given["target"] and not given["source"]:
            raise PromptError(f"--prompts {file}, line {number}: a target needs the source that is edited")
        texts = {"category": given.pop("category") or "", "caption": given.pop("caption") or ""}
        found.append(_prompt(file, number, row["prompt"], **texts, **given))
    return found


def _prompt(file: Path, number: int, text: object, **given: Any) -> Prompt:
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"--prompts {file}, entry {number}: a prompt is a text that is not empty, found {text!r}")
    return Prompt(text.strip(), **given)


def _once(prompts: Iterable[Prompt], where: str) -> list[Prompt]:
    by_key: dict[str, Prompt] = {}
    for prompt in prompts:
        by_key.setdefault(prompt.key, prompt)
    found = list(by_key.values())
    if not found:
        raise PromptError(f"{where} has no prompt")
    if len({prompt.source is None for prompt in found}) > 1:
        raise PromptError(f"{where}: some prompts have a source image and some have none; give them in two files")
    return found
