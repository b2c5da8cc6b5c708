"""Image-text shards in the formats that publish them, read sample by sample.

    tar       WebDataset: members key.jpg|jpeg|png|webp, key.txt, key.json, those of one key in a row
    parquet   img2dataset, LAION, DataComp, COYO, Hugging Face: a column of encoded images and one of captions
    llava     LLaVA: a JSON list or JSON Lines of {id, image, conversations}, images in files

A reader yields what is whole and then raises ``Damaged`` where the shard is not. A sample that cannot be used carries
the reason. Memory: a sample, or ``PARQUET_ROWS`` rows of a Parquet file.
"""

import codecs
import errno
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from palate.artifacts import is_local, locate
from palate.corpora.streams import CorpusError

FormatName = Literal["tar", "parquet", "llava"]
SUFFIXES: dict[str, FormatName] = {".tar": "tar", ".parquet": "parquet", ".json": "llava", ".jsonl": "llava"}
IMAGES = ("jpg", "jpeg", "png", "webp")  # members of a tar, in the order in which one is taken
PARQUET_ROWS = 32
MAX_BYTES = 1 << 28  # of one member, cell or file: more is no photograph
MAX_HEADER = 1 << 20  # of a tar: of names and PAX fields, and of the record that its end is filled up to

# The columns that published data sets have, the first that is there counts.
IMAGE_COLUMNS = ("jpg", "image", "bytes", "jpeg", "png", "webp", "image_bytes", "img")
CAPTION_COLUMNS = ("caption", "TEXT", "text", "txt")
KEY_COLUMNS = ("key", "__key__", "uid", "id", "SAMPLE_ID", "sample_id")

# Why a sample cannot be used. All but ``NOT_ONE_IMAGE`` mean that it is broken.
CUT_OFF = "cut off with its shard"
RECORD = "a record that cannot be read"
MEMBERS = "members that do not make one sample"
NO_IMAGE = "no image"
NOT_UTF8 = "a caption that is not UTF-8"
NO_CAPTION = "no caption"
TOO_LARGE = f"a file of more than {MAX_BYTES >> 20} MiB"
NOT_ONE_IMAGE = "a record without an image, or with several"
FORM = "conversations or questions of another form"

LEARNED = ("conversations", "questions")  # of a record: what training takes from it
HUMAN = ("human", "user")  # who begins a conversation


class Damaged(Exception):
    """The rest of a shard cannot be read; the message says why. ``blank``: what precedes may have lost its end, too,
    to zeros."""

    def __init__(self, message: str, *, blank: bool = False) -> None:
        super().__init__(message)
        self.blank = blank


@dataclass(frozen=True)
class Found:
    """A sample of a shard. ``place`` has the index's columns that say where it is, ``columns`` what filters look at."""

    key: str
    image: bytes = b""
    length: int = 0  # of the caption, in characters
    columns: Mapping[str, Any] = field(default_factory=dict)
    place: Mapping[str, int] = field(default_factory=dict)
    said: bytes | None = None  # of conversations: what tells those about one image apart
    reason: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Shard:
    """A file of samples. ``version`` changes when the file does."""

    url: str
    format: FormatName
    version: str
    root: str = ""  # llava: what image paths are relative to


@dataclass(frozen=True)
class Columns:
    """Of Parquet shards: where the image and the caption are."""

    image: str
    caption: str


def expand(inputs: Sequence[str], images: str) -> list[Shard]:
    """The shards that paths and patterns name, each once, in the order of their names.

    Raises:
        CorpusError: nothing is there, or it is none of the formats.
    """
    found: dict[str, Shard] = {}
    for given in inputs:
        filesystem, path = locate(given)
        names = filesystem.glob(path) if any(sign in given for sign in "*?[") else [path]
        if not names or not filesystem.exists(names[0]):
            raise CorpusError(f"--input {given}: there is no such file")
        for name in sorted(names):
            if filesystem.isdir(name):
                raise CorpusError(
                    f"--input {name}: found a folder, expected files: give a pattern such as '{name}/*.tar'"
                )
            url = name if is_local(filesystem) else str(filesystem.unstrip_protocol(name))
            format_ = _format(url)
            if format_ == "llava" and not images:
                raise CorpusError(
                    f"--input {url}: LLaVA records name image files: say under which folder, --images ROOT"
                )
            root = images if format_ == "llava" else ""
            found[url] = Shard(url, format_, version_of(filesystem, name), root)
    return [found[url] for url in sorted(found)]


def _format(url: str) -> FormatName:
    suffix = Path(url).suffix.lower()
    if suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst"):
        raise CorpusError(f"--input {url}: samples inside compressed files cannot be reached one by one: decompress it")
    if suffix not in SUFFIXES:
        raise CorpusError(f"--input {url}: found the suffix {suffix!r}, expected one of {', '.join(SUFFIXES)}")
    return SUFFIXES[suffix]


def version_of(filesystem: Any, path: str) -> str:
    """What changes when a file does, without reading it: its size and its time, or its ETag in an object store."""
    info = filesystem.info(path)
    mark = next((str(info[name]) for name in ("ETag", "etag", "mtime", "LastModified", "updated") if name in info), "")
    return f"{info['size']} {mark}"


@contextmanager
def local_file(url: str) -> Iterator[Path]:
    """The file on a local disk: where it is, or a copy for as long as the context lasts.

    Raises:
        CorpusError: it is not there.
    """
    filesystem, path = locate(url)
    if not filesystem.isfile(path):
        raise CorpusError(f"{url}: there is no such file")
    if is_local(filesystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="palate-") as folder:
        copy = Path(folder) / Path(path).name
        with filesystem.open(path, "rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        yield copy


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read(shard: Shard, file: Path, columns: Columns | None, wanted: Sequence[str]) -> Iterator[Found]:
    """The samples of a shard whose content is in ``file``.

    Args:
        columns: of Parquet shards.
        wanted: further columns of Parquet shards, where there are such.

    Raises:
        Damaged: after what is whole.
    """
    if shard.format == "tar":
        return read_tar(file)
    if shard.format == "llava":
        return read_llava(file, shard.root)
    assert columns is not None
    return read_parquet(file, columns, wanted)


# WebDataset


@dataclass(frozen=True)
class _Member:
    suffix: str
    offset: int
    size: int


def read_tar(file: Path) -> Iterator[Found]:
    """The samples of a tar: ustar, GNU or PAX. A key is a member's path up to the first dot of its name, as in
    ``webdataset``; a member called ``key.a.jpg`` is taken where there is no ``key.jpg`` and no other such.

    Raises:
        Damaged: after what is whole.
    """
    size = file.stat().st_size
    key, group, before = "", list[_Member](), list[_Member]()
    with file.open("rb") as stream:
        try:
            for name, member in _members(stream):
                split = split_name(name)
                if split is None:
                    continue
                if split[0] != key and group:
                    yield _tar_sample(stream, key, group)
                    before, group = group, []
                key = split[0]
                group.append(_Member(split[1], member.offset_data, member.size))
                if member.offset_data + member.size > size:
                    raise Damaged(f"it ends inside {name}, at byte {size}")
        except Damaged as damage:
            # The sample before the cut may lack members that lay behind it: compare with the one before.
            inside = bool(group) and group[-1].offset + group[-1].size > size
            if group and damage.blank and group[-1].size and not inside:
                stream.seek(group[-1].offset + group[-1].size - 1)
                inside = stream.read(1) == b"\0"
            if group and not inside and {one.suffix for one in group} == {one.suffix for one in before}:
                yield _tar_sample(stream, key, group)
            elif group:
                yield Found(key, reason=CUT_OFF)
            raise
        if group:
            yield _tar_sample(stream, key, group)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and suffix, in lower case, of a tar member's name; None where it belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or not suffix or (base.startswith("__") and base.endswith("__")):
        return None
    return folder + slash + stem, suffix.lower()


class _Headers:
    """A tar's stream for its headers: ``tarfile`` reads as much as a header says, were it less than nothing."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.seek, self.tell, self._stream = stream.seek, stream.tell, stream

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.HeaderError(f"a header of {size} bytes")
        return self._stream.read(size)


def _members(stream: IO[bytes]) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The regular files of a tar, up to the block that ends it. (``TarFile.next`` takes what is no header for an end.)

    Raises:
        Damaged: there is no such block, or more behind it than fills the last record.
    """
    broken = (tarfile.TarError, ValueError, OverflowError, RecursionError)
    try:
        # Opening reads the first header.
        tar = tarfile.open(  # noqa: SIM115
            fileobj=cast(IO[bytes], _Headers(stream)), mode="r:", encoding="utf-8", errors="replace"
        )
    except broken as error:
        raise Damaged(f"no tar file that can be read ({error})") from None
    offset = 0
    while True:
        stream.seek(offset)
        try:
            member = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            _require_end(stream, offset)
            return
        except broken as error:
            raise Damaged(f"found no header of a member at byte {offset} ({error})") from None
        if member.size < 0 or tar.offset <= offset:
            raise Damaged(f"found a member of {member.size} bytes at byte {offset}")
        offset = tar.offset
        if member.isreg():
            yield member.name, member


def _require_end(stream: IO[bytes], offset: int) -> None:
    """Look whether a tar ends with the block of zeros at ``offset``: a file that was made in its full length and not
    filled, or one tar behind another, has such a block, too.

    Raises:
        Damaged: it goes on.
    """
    size = stream.seek(0, os.SEEK_END)
    # Two blocks end a tar, and zeros fill the last record: of 10 KiB, or, with tar -b, of what divides the size.
    record = max(tarfile.RECORDSIZE, min(size & -size, MAX_HEADER))
    stream.seek(offset)
    while block := stream.read(_BLOCK):
        if block.strip(b"\0"):
            raise Damaged(f"there is more behind the block that ends it, at byte {offset}", blank=True)
    if size - offset >= record + 2 * tarfile.BLOCKSIZE:
        raise Damaged(f"nothing but zeros from byte {offset} to its end, at byte {size}", blank=True)


def _tar_sample(stream: IO[bytes], key: str, members: Sequence[_Member]) -> Found:
    suffixes = [member.suffix for member in members]
    if len(set(suffixes)) < len(suffixes):
        return Found(key, reason=MEMBERS, detail=f"found twice the same of {', '.join(suffixes)}")
    places = dict[str, int]()
    contents = dict[str, bytes]()
    for role, names in (("image", IMAGES), ("text", ("txt",)), ("json", ("json",))):
        chosen = [one for name in names for one in members if one.suffix == name][:1] or [
            one for one in members if one.suffix.rpartition(".")[2] in names
        ]
        if len(chosen) > 1:
            return Found(key, reason=MEMBERS, detail=f"found {', '.join(suffixes)} and none is just {names[0]}")
        if chosen and chosen[0].size > MAX_BYTES:
            return Found(key, reason=TOO_LARGE, detail=f"{chosen[0].suffix}: {chosen[0].size} bytes")
        places[f"{role}_offset"] = chosen[0].offset if chosen else -1
        places[f"{role}_size"] = chosen[0].size if chosen else -1
        if chosen:
            stream.seek(chosen[0].offset)
            contents[role] = stream.read(chosen[0].size)
    if "image" not in contents:
        return Found(key, reason=NO_IMAGE, detail=f"found {', '.join(suffixes)}")
    try:
        record = json.loads(contents.get("json", b"{}"))
        if not isinstance(record, dict):
            raise ValueError(f"found {type(record).__name__}, expected an object")
    except (ValueError, RecursionError) as error:
        return Found(key, reason=RECORD, detail=f"json: {error}")
    found = Found(key, contents["image"], columns=record, place=places)
    if "text" not in contents:
        return _told(found, record, "no txt")
    return _learned(_captioned(found, contents["text"]), record)


def _captioned(found: Found, caption: Any) -> Found:
    """With the caption's length, or with what is wrong with it."""
    try:
        text = caption.decode() if isinstance(caption, bytes) else caption
    except UnicodeDecodeError as error:
        return replace(found, reason=NOT_UTF8, detail=str(error))
    if text is not None and not isinstance(text, str):
        return replace(found, reason=RECORD, detail=f"caption: found {type(text).__name__}, expected text")
    if text is None or not text.strip():
        return replace(found, reason=NO_CAPTION)
    return replace(found, length=len(text))


def _told(found: Found, record: Mapping[str, Any], otherwise: str) -> Found:
    """A sample without a caption, which its conversations stand for; ``otherwise`` is said where there are none."""
    found = _learned(found, record)
    if found.reason is not None:
        return found
    length = sum(len(turn["value"]) for turn in record.get("conversations") or [])
    return replace(found, length=length) if length else replace(found, reason=NO_CAPTION, detail=otherwise)


def _learned(found: Found, record: Mapping[str, Any]) -> Found:
    """With what tells conversations apart, or with what training could not take from the record."""
    if found.reason is not None:
        return found
    if problem := _problem(record):
        return replace(found, reason=FORM, detail=problem)
    turns = [(turn["from"], turn["value"]) for turn in record.get("conversations") or []]
    return replace(found, said=json.dumps(turns).encode()) if turns else found


def _problem(record: Mapping[str, Any]) -> str:
    """What is wrong with a record's conversations or questions; nothing where there are none."""
    turns, questions = record.get("conversations"), record.get("questions")
    problem = _list_problem("conversations", turns, ("from", "value"))
    if not problem and turns and turns[0]["from"] not in HUMAN:
        problem = f"conversations: the first turn is from {turns[0]['from']!r}, expected {' or '.join(HUMAN)}"
    return problem or _list_problem("questions", questions, ("text", "answer"))


def _list_problem(name: str, values: Any, parts: tuple[str, str]) -> str:
    if values is None or values == []:
        return ""
    expected = f"{{{parts[0]}, {parts[1]}}} of text"
    if not isinstance(values, list):
        return f"{name}: found {type(values).__name__}, expected a list of {expected}"
    for number, value in enumerate(values):
        if not isinstance(value, dict) or not all(_is_text(value.get(part)) for part in parts):
            return f"{name}[{number}]: found {value!r}, expected {expected}"
    return ""


def storable(text: str) -> str:
    """The text with question marks for lone surrogates (``\\ud800`` in JSON), which no file or table can hold."""
    return text.encode(errors="replace").decode()


def _is_text(value: Any) -> bool:
    """Whether it is text that can be stored, and so tokenized."""
    return isinstance(value, str) and storable(value) == value


# Parquet


def image_column(url: str, given: str) -> str:
    """The name of the column of a Parquet file with the encoded images; one that is ``given`` is looked for.

    Raises:
        CorpusError: there is none; the message names those that there are.
        Damaged: it is no Parquet file.
    """
    schema = _schema(url)
    for name in [given] if given else IMAGE_COLUMNS:
        if name in schema.names and _holds_bytes(schema, name):
            return name
    raise CorpusError(
        f"{url}: found the columns {_listed(schema)}; expected encoded images in {given or ', '.join(IMAGE_COLUMNS)}. "
        "Where there are URLs only, fetch the images first (img2dataset); else name the column, --image-column"
    )


def caption_column(url: str, given: str) -> str:
    """The name of the column of a Parquet file with the captions; one that is ``given`` is looked for.

    Raises:
        CorpusError: there is none; the message names those that there are.
        Damaged: it is no Parquet file.
    """
    schema = _schema(url)
    for name in [given] if given else CAPTION_COLUMNS:
        if name in schema.names:
            return name
    raise CorpusError(
        f"{url}: found the columns {_listed(schema)}; expected text in {given or ', '.join(CAPTION_COLUMNS)}: name the "
        "column, --caption-column"
    )


def _schema(url: str) -> pa.Schema:
    filesystem, path = locate(url)
    try:
        with filesystem.open(path, "rb") as stream:
            return pq.read_schema(stream)
    except (pa.ArrowException, OSError) as error:
        _require_damage(error)
        raise Damaged(f"no Parquet file that can be read ({error})") from None


def _require_damage(error: Exception) -> None:
    """Raise again what is no fault of the file, which another try may read: no memory, or an error of the system's,
    with its number. Arrow's ``OSError`` of a page that it cannot decode has none."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
        raise error


def _listed(schema: pa.Schema) -> str:
    return ", ".join(f"{one.name} ({one.type})" for one in schema)


def _holds_bytes(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type
    if pa.types.is_struct(kind):  # Hugging Face's {bytes, path}
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def read_parquet(file: Path, columns: Columns, wanted: Sequence[str]) -> Iterator[Found]:
    """The rows of a Parquet file, with those of the ``wanted`` columns that it has.

    Raises:
        Damaged: after what is whole.
        CorpusError: it has no column of the images or captions.
    """
    try:
        # A row group's column is read as it is needed, not whole.
        with pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as parquet:
            names = parquet.schema_arrow.names
            if missing := {columns.image, columns.caption} - set(names):
                raise CorpusError(
                    f"{file}: found no column {min(missing)!r}, but {', '.join(names)}: all shards need it"
                )
            keys = [name for name in KEY_COLUMNS if name in names][:1]
            others = [name for name in wanted if name in names]
            read_now = list(dict.fromkeys([columns.image, columns.caption, *keys, *others]))
            row = 0
            for batch in parquet.iter_batches(PARQUET_ROWS, columns=read_now):
                for index in range(batch.num_rows):
                    values = {name: batch.column(name)[index].as_py() for name in read_now}
                    key = str(values[keys[0]]) if keys else f"{row:09d}"
                    yield _parquet_sample(key, row, values, columns, {name: values[name] for name in others})
                    row += 1
    except (pa.ArrowException, OSError) as error:
        _require_damage(error)
        raise Damaged(f"no Parquet file that can be read whole ({error})") from None


def _parquet_sample(
    key: str, row: int, values: Mapping[str, Any], columns: Columns, others: Mapping[str, Any]
) -> Found:
    image = cell_bytes(values[columns.image])
    found = Found(key, image or b"", columns=others, place={"row": row})
    if not image:
        return replace(found, reason=NO_IMAGE)
    if len(image) > MAX_BYTES:
        return replace(found, image=b"", reason=TOO_LARGE, detail=f"{len(image)} bytes")
    return _learned(_captioned(found, values[columns.caption]), others)


def cell_bytes(cell: Any) -> bytes | None:
    """The encoded image in a cell: bytes, or Hugging Face's {bytes, path}."""
    return cell.get("bytes") if isinstance(cell, dict) else cell


# LLaVA


def read_llava(file: Path, root: str) -> Iterator[Found]:
    """The records of a JSON list or of JSON Lines, with their images from files under ``root``.

    Raises:
        Damaged: after what is whole.
    """
    with file.open("rb") as stream:
        ranges = _list_ranges(stream) if _starts_with_list(stream) else _line_ranges(stream)
        for number, (offset, content) in enumerate(ranges):
            place = {"json_offset": offset, "json_size": len(content)}
            try:
                record = json.loads(content)
            except (ValueError, RecursionError) as error:
                yield Found(str(number), place=place, reason=RECORD, detail=str(error))
                continue
            if not isinstance(record, dict):
                detail = f"found {type(record).__name__}, expected an object"
                yield Found(str(number), place=place, reason=RECORD, detail=detail)
                continue
            key = storable(str(record.get("id", number)))
            yield _llava_sample(Found(key, columns=record, place=place), record, root)


def _llava_sample(found: Found, record: Mapping[str, Any], root: str) -> Found:
    image = record.get("image")
    if image is None or isinstance(image, list):
        return replace(found, reason=NOT_ONE_IMAGE)
    if not _is_text(image) or "\0" in image or image.startswith("/") or ".." in image.split("/"):
        return replace(found, reason=RECORD, detail=f"image: found {image!r}, expected a path under --images")
    found = _told(found, record, "expected conversations of {from, value}")
    if found.reason is not None:
        return found
    filesystem, inside = locate(root)
    try:
        content = filesystem.cat_file(f"{inside}/{image}", start=0, end=MAX_BYTES + 1)
    except OSError as error:
        if not isinstance(error, _ABSENT) and error.errno != errno.ENAMETOOLONG:
            raise
        return replace(found, reason=NO_IMAGE, detail=f"there is no file {image}")
    if len(content) > MAX_BYTES:
        return replace(found, reason=TOO_LARGE, detail=image)
    return replace(found, image=content)


def _starts_with_list(stream: IO[bytes]) -> bool:
    """Whether it is a JSON list; the stream then stands behind a byte order mark, if there is one."""
    start = 3 if stream.read(3) == codecs.BOM_UTF8 else 0
    stream.seek(start)
    while (block := stream.read(4096)) and not block.strip():
        pass
    stream.seek(start)
    return block.lstrip()[:1] == b"["


def _line_ranges(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    offset = stream.tell()
    for line in stream:
        if content := line.strip():
            yield offset + line.index(content), content
        offset += len(line)


def _list_ranges(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each element of a JSON list.

    Raises:
        Damaged: it is cut off, or broken.
    """
    decoder = json.JSONDecoder()
    # Latin-1 has one character a byte, and JSON's own signs are ASCII: ends of values are found without decoding.
    start = stream.tell()
    text = stream.read(_BLOCK).decode("latin-1")
    position = text.index("[") + 1
    while True:
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        if text[position : position + 1] == "]":
            return
        try:
            value_end = decoder.raw_decode(text, position)[1]
            behind = _SPACE.match(text, value_end).end()  # type: ignore[union-attr]
        except (ValueError, RecursionError) as error:
            problem, behind = str(error), len(text)
        else:
            problem = f"found {text[behind : behind + 1]!r} behind an element"
        if text[behind : behind + 1] in ("]", ","):
            yield start + position, text[position:value_end].encode("latin-1")
            position = behind + (text[behind] == ",")
            continue
        more = stream.read(max(_BLOCK, len(text) - position)) if len(text) - position <= MAX_BYTES else b""
        if not more:
            raise Damaged(f"the JSON list is cut off or broken at byte {start + position} ({problem})")
        start, text, position = start + position, text[position:] + more.decode("latin-1"), 0


_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_BLOCK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
