"""Reading large JSON files record by record, in memory bounded by one record.

Paths may be local or fsspec URLs. A file is a JSON list of objects, an object that wraps such a list (LaMP's
``{"task": ..., "golds": [...]}``), or JSON Lines.
"""

import codecs
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import ijson

from palate.artifacts import locate
from palate.progress import meter

_SPACE = b" \t\r\n"
_MEGABYTE = 1_000_000


class CorpusError(ValueError):
    """An input is not what the command says; the message names the file, what was found and what to change."""


@contextmanager
def opened(path: str, skip_mark: bool = True) -> Iterator[IO[bytes]]:
    """The file as a binary stream, past a byte order mark, with progress where reading takes long."""
    filesystem, inside = locate(path)
    if not filesystem.isfile(inside):
        found = "this is a folder, expected a file" if filesystem.isdir(inside) else "there is no such file"
        raise CorpusError(f"{path}: {found}")
    label = path.rpartition("/")[2]
    with filesystem.open(inside, "rb") as stream, meter(label, filesystem.size(inside) // _MEGABYTE, "MB") as bar:
        mark = stream.read(3)
        if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and skip_mark:
            raise CorpusError(f"{path}: found UTF-16, expected UTF-8: convert the file")
        if not skip_mark or mark != codecs.BOM_UTF8:
            stream.seek(0)
        yield io.BufferedReader(_Metered(stream, bar), buffer_size=1 << 18)


class _Metered(io.RawIOBase):
    """A stream that reports what was read to a progress bar, in megabytes."""

    def __init__(self, stream: Any, bar: Any) -> None:
        self.stream, self.bar, self.count = stream, bar, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self.stream.read(len(buffer))
        buffer[: len(block)] = block
        before, self.count = self.count, self.count + len(block)
        self.bar.update(self.count // _MEGABYTE - before // _MEGABYTE)
        return len(block)


def absolute(path: str) -> str:
    """A local path as it is found from any working folder, a worker's too; a URL as it is."""
    return path if "://" in path else os.path.abspath(path)  # noqa: PTH100


def sha256_of(path: str) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with opened(path, skip_mark=False) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def first_byte(path: str) -> bytes:
    """The first byte that is not white space; b"" for an empty file."""
    with opened(path) as stream:
        while block := stream.read(4096):
            if text := block.lstrip(_SPACE):
                return text[:1]
    return b""


def wrapper_task(path: str, key: str = "golds") -> str | None:
    """The value of ``"task"`` in a wrapped file, where it stands before the list ``key``; else None."""
    with opened(path) as stream, _json_errors(path):
        for prefix, event, value in ijson.parse(stream, use_float=True):
            if prefix == "task":
                return str(value)
            if prefix == key and event == "start_array":
                return None
    raise CorpusError(f"{path}: found an object without the list {key!r}, expected LaMP's {{'task', {key!r}}}")


def json_records(path: str, key: str = "golds") -> Iterator[Any]:
    """The elements of a JSON list, or of the list ``key`` that an object wraps.

    Raises:
        CorpusError: the file is empty, holds something else, is cut off or is no JSON.
    """
    start = first_byte(path)
    if start not in (b"[", b"{"):
        found = repr(start.decode(errors="replace")) if start else "an empty file"
        raise CorpusError(f"{path}: found {found}, expected a JSON list or an object with the list {key!r}")
    if start == b"{":
        wrapper_task(path, key)
    with opened(path) as stream, _json_errors(path):
        yield from ijson.items(stream, "item" if start == b"[" else f"{key}.item", use_float=True)


def json_lines(path: str) -> Iterator[Any]:
    """The value of each line, or the ``ValueError`` of a line that is no JSON. Blank lines are skipped."""
    with opened(path) as stream:
        for line in stream:
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    yield error


@contextmanager
def _json_errors(path: str) -> Iterator[None]:
    try:
        yield
    except ijson.IncompleteJSONError as error:
        raise CorpusError(f"{path} is cut off or broken JSON ({_first_line(error)}): fetch it again") from error
    except ijson.JSONError as error:
        raise CorpusError(
            f"{path} is not one JSON value ({_first_line(error)}): check the file; JSON Lines are for the jsonl command"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
