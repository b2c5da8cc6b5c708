"""Multiple-choice questions on images, as VLMEvalKit publishes them: one TSV file a benchmark, images inside as base64.

Columns: ``index``, ``image`` (base64, or the index of the row that holds it: repeated and circular questions share
one), ``image_path``, ``question``, ``hint``, the options ``A``, ``B``, ``C``, ..., ``answer`` (a letter), ``category``,
``l2-category``, ``split``. Files without options whose answers are Yes or No (POPE, MME) become questions of two
options. The format is that of VLMEvalKit's ``ImageBaseDataset`` (github.com/open-compass/VLMEvalKit,
vlmeval/dataset/image_base.py). An empty cell is a missing value; unlike there, options that read "None" or "N/A" stay
options.
"""

import base64
import csv
import io
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from PIL import Image

from palate.artifacts import is_local, locate
from palate.corpora.pictures import DECODED
from palate.corpora.streams import CorpusError, opened

YES_NO: tuple[str, ...] = ("Yes", "No")
LONGEST_REFERENCE = 64  # characters; a longer image cell is an image
_LONGEST_CELL = 1 << 30  # the csv module's own limit, 128 KB, is below one photograph


@dataclass(frozen=True)
class Choice:
    """A question on one image with its options, of which ``answer`` is the position of the right one.

    ``image`` is encoded as the file has it (JPEG, PNG, ...). Texts that the file lacks are empty.
    """

    id: str
    image: bytes
    question: str
    hint: str
    options: tuple[str, ...]
    answer: int
    category: str = ""
    split: str = ""
    l2_category: str = ""


@dataclass(frozen=True)
class _Row:
    """A row before images are shared: ``image`` is the content, or the index of the row that has it."""

    where: str
    cells: Mapping[str, str]
    image: bytes | str


def read_tsv(path: str, *, images: str = "", skipped: list[str] | None = None) -> list[Choice]:
    """The questions of a VLMEvalKit TSV file, in its order. All its images are in memory, each once.

    Args:
        path: a local path or URL.
        images: folder or URL that holds the files of ``image_path``, used where a row has no ``image``; the file's own
            folder by default.
        skipped: takes the reasons of rows that cannot be asked, such as several images or no answer; without it they
            raise.

    Raises:
        CorpusError: naming row and column, what was found and what was expected.
    """
    root = images or path.rpartition("/")[0] or "."
    rows: list[_Row] = []
    seen: dict[str, bytes | str] = {}
    for number, cells in _rows(path):
        where = f"{path}, row {number}"
        index = cells["index"].strip()
        if not index:
            raise CorpusError(f"{where}, column 'index': it is empty, expected an id")
        where += f" (index {index})"
        if index in seen:
            raise CorpusError(f"{where}, column 'index': the index is there already; each row needs its own")
        try:
            seen[index] = _image(cells, where, root)
        except CorpusError as error:
            seen[index] = b""  # so that the rows which share this image say so too
            _skip(error, skipped)
            continue
        rows.append(_Row(where, cells, seen[index]))
    choices = []
    for row in rows:
        try:
            choices.append(_choice(row, _shared(row, seen)))
        except CorpusError as error:
            _skip(error, skipped)
    return choices


def write_tsv(path: str, choices: Iterable[Choice]) -> None:
    """Write questions as VLMEvalKit reads them; an image that comes again is written as the index of its first row.

    Raises:
        CorpusError: a question that the format cannot hold, by its id.
    """
    questions = list(choices)
    letters = string.ascii_uppercase[: max((len(choice.options) for choice in questions), default=0)]
    first: dict[bytes, str] = {}
    ids: set[str] = set()
    filesystem, inside = locate(path)
    if is_local(filesystem):
        filesystem.makedirs(inside.rpartition("/")[0] or "/", exist_ok=True)
    with filesystem.open(inside, "wb") as raw, io.TextIOWrapper(raw, "utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        columns = ["index", "image", "question", "hint", *letters, "answer", "category", "l2-category", "split"]
        writer.writerow(columns)
        for choice in questions:
            _check(choice, ids)
            ids.add(choice.id)
            image = first.get(choice.image) or base64.b64encode(choice.image).decode()
            first.setdefault(choice.image, choice.id)
            options = [*choice.options, *[""] * (len(letters) - len(choice.options))]
            ends = [letters[choice.answer], choice.category, choice.l2_category, choice.split]
            writer.writerow([choice.id, image, choice.question, choice.hint, *options, *ends])


def _rows(path: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Data rows with their numbers from 1, by column."""
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    with opened(path) as stream:
        reader = csv.reader(_text(stream), delimiter="\t", strict=True)
        try:
            header = next(reader, [])
            missing = [name for name in ("index", "question", "answer") if name not in header]
            if "image" not in header and "image_path" not in header:
                missing.append("image")
            if missing:
                raise CorpusError(f"{path}: the header lacks the columns {missing}; it has {header[:40]}")
            number = 0
            for cells in reader:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(header):
                    raise CorpusError(
                        f"{path}, row {number} (line {reader.line_num}): {len(cells)} cells, expected {len(header)}"
                    )
                yield number, dict(zip(header, cells, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise CorpusError(f"{path}, line {reader.line_num}: not a UTF-8 TSV file: {error}") from None


def _text(stream: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(stream, "utf-8", newline="")


def _image(cells: Mapping[str, str], where: str, root: str) -> bytes | str:
    """The image of a row, or the index of the row that has it."""
    cell = cells.get("image", "").strip()
    if cell.startswith("["):
        raise CorpusError(f"{where}, column 'image': found a list of images, expected one")
    if cell and len(cell) <= LONGEST_REFERENCE:
        return cell
    if cell:
        try:
            content = base64.b64decode("".join(cell.split()), validate=True)
        except ValueError as error:
            raise CorpusError(f"{where}, column 'image': expected base64: {error}") from None
        return _opened(content, f"{where}, column 'image'")
    path = cells.get("image_path", "").strip()
    if not path:
        raise CorpusError(f"{where}, column 'image': it is empty, and there is no image_path")
    if path.startswith("["):
        raise CorpusError(f"{where}, column 'image_path': found a list of images, expected one")
    filesystem, folder = locate(root)
    # An absolute path may only name what lies in the folder anyway: the file comes from somebody else.
    inside = path.removeprefix(f"{folder}/")
    if inside.startswith("/") or ".." in inside.split("/"):
        raise CorpusError(f"{where}, column 'image_path': {path!r} leads out of {root}; give the folder of the images")
    try:
        content = bytes(filesystem.cat_file(f"{folder}/{inside}"))
    except FileNotFoundError:
        raise CorpusError(
            f"{where}, column 'image_path': {root} has no {inside!r}; give the folder of the images"
        ) from None
    return _opened(content, f"{where}, column 'image_path'")


def _opened(content: bytes, where: str) -> bytes:
    """The content, which begins as an image of one of ``DECODED`` does; pixels are decoded by who uses them."""
    try:
        with Image.open(io.BytesIO(content), formats=DECODED):
            return content
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CorpusError(f"{where}: not an image: {str(error).partition(' <')[0]}") from None


def _shared(row: _Row, images: Mapping[str, bytes | str]) -> bytes:
    if isinstance(row.image, bytes):
        return row.image
    found = images.get(row.image)
    if not isinstance(found, bytes) or not found:
        what = "no row has this index" if found is None else "that row has no image of its own"
        raise CorpusError(f"{row.where}, column 'image': found the index {row.image!r}, but {what}")
    return found


def _choice(row: _Row, image: bytes) -> Choice:
    cells = row.cells
    if not cells["question"].strip():
        raise CorpusError(f"{row.where}, column 'question': it is empty")
    letters = [name for name in string.ascii_uppercase if cells.get(name, "").strip()]
    answer = cells["answer"].strip()
    if not letters and answer.title() in YES_NO:
        options, position = YES_NO, YES_NO.index(answer.title())
    else:
        expected: Sequence[str] = letters or YES_NO
        if answer.upper() not in letters:
            found = repr(answer) if answer else "nothing (the answers of this split may be withheld)"
            raise CorpusError(f"{row.where}, column 'answer': found {found}, expected one of {', '.join(expected)}")
        if len(letters) < 2:
            raise CorpusError(f"{row.where}, column 'B': a question needs two options, found only {letters[0]}")
        options, position = tuple(cells[letter] for letter in letters), letters.index(answer.upper())
    return Choice(
        id=cells["index"].strip(),
        image=image,
        question=cells["question"],
        hint=cells.get("hint", ""),
        options=options,
        answer=position,
        category=cells.get("category", ""),
        split=cells.get("split", ""),
        l2_category=cells.get("l2-category", ""),
    )


def _skip(error: CorpusError, skipped: list[str] | None) -> None:
    if skipped is None:
        raise error
    skipped.append(str(error))


def _check(choice: Choice, ids: set[str]) -> None:
    """Refuse what a reader would read as something else."""
    if choice.id in ids or not 0 < len(choice.id.strip()) <= LONGEST_REFERENCE:
        raise CorpusError(f"question {choice.id!r}: an id is unique and has 1 to {LONGEST_REFERENCE} characters")
    if not 2 <= len(choice.options) <= len(string.ascii_uppercase) or not all(o.strip() for o in choice.options):
        raise CorpusError(f"question {choice.id!r}: expected 2 to 26 options with text, found {choice.options}")
    if not 0 <= choice.answer < len(choice.options):
        raise CorpusError(
            f"question {choice.id!r}: answer {choice.answer} is none of its {len(choice.options)} options"
        )
    if 4 * len(choice.image) <= 3 * LONGEST_REFERENCE:
        raise CorpusError(
            f"question {choice.id!r}: its image of {len(choice.image)} bytes is shorter than the format tells from an "
            "index: encode it as PNG"
        )
