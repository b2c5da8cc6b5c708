"""Captioned images with questions whose answers are known (visual question answering), in splits: what the experiment
of UniHetero runs on.

    SPLIT/*.tar       WebDataset shards: KEY.png, KEY.txt (the caption), KEY.json (the questions, and other facts)
    questions.tsv     the test split's questions as multiple choice (VLMEvalKit)
    vqa.json          ``Meta``: side of all images, the options of each kind of question, every word

Splits: ``encoder`` to train a vision encoder without labels, ``train``, ``validation`` and ``test`` for the model.
``test`` shares no image with the splits that something is trained on.
"""

import dataclasses
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from palate.artifacts import Artifact, Writer
from palate.corpora.questions import Choice, write_tsv
from palate.corpora.streams import CorpusError

KIND = "vqa"
SPLITS = ("encoder", "train", "validation", "test")
META = "vqa.json"


@dataclass(frozen=True)
class Question:
    """A question with its only right answer, one of the options of its kind."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Example:
    """An image (PNG) with its caption, questions about it, and what else is known of it."""

    image: bytes
    caption: str
    questions: tuple[Question, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Meta:
    """What holds for all splits: pixels of an image's side, the options of each kind of question, and every word of
    captions, questions and answers."""

    side: int
    options: Mapping[str, tuple[str, ...]]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """The examples of a split, in its order: pixels are (N, 3, side, side) uint8."""

    keys: list[str]
    images_N3HW: NDArray[np.uint8]
    captions: list[str]
    questions: list[list[Question]]
    facts: list[dict[str, Any]]


def write_shard(writer: Writer, split: str, number: int, start: int, examples: Sequence[Example]) -> None:
    """A shard of a split, whose first example is its ``start``-th."""
    path = writer.folder / split / f"{split}-{number:05d}.tar"
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, one in enumerate(examples):
            record = {**one.facts, "questions": [dataclasses.asdict(question) for question in one.questions]}
            members = {"png": one.image, "txt": one.caption.encode(), "json": json.dumps(record).encode()}
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{split}{start + place:07d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_meta(writer: Writer, meta: Meta, test: Sequence[Example]) -> None:
    """What stands beside the shards, the test split's questions as a benchmark among it."""
    writer.write_json(META, dataclasses.asdict(meta))
    choices = [choice for number, one in enumerate(test) for choice in _choices(str(number), one, meta)]
    write_tsv(str(writer.folder / "questions.tsv"), choices)


def read_meta(corpus: Artifact) -> Meta:
    found = corpus.read_json(META)
    options = {kind: tuple(options) for kind, options in found["options"].items()}
    return Meta(found["side"], options, tuple(found["words"]))


def read_split(corpus: Artifact, split: str) -> Split:
    """A split of a corpus: the images are in memory, decoded."""
    found = Split([], np.empty(0, np.uint8), [], [], [])
    images = []
    for path in corpus.paths(f"{split}/", ".tar"):
        with tarfile.open(corpus.local(path)) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                key, _, suffix = member.name.partition(".")
                if suffix == "png":
                    with Image.open(content, formats=("PNG",)) as image:
                        images.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
                elif suffix == "txt":
                    found.captions.append(content.read().decode())
                elif suffix == "json":
                    record = json.load(content)
                    found.keys.append(key)
                    found.questions.append([Question(**one) for one in record.pop("questions")])
                    found.facts.append(record)
    return dataclasses.replace(found, images_N3HW=np.array(images, dtype=np.uint8))


def _choices(name: str, example: Example, meta: Meta) -> list[Choice]:
    """An example's questions as multiple choice."""
    found = []
    for one in example.questions:
        options = meta.options[one.kind]
        if one.answer not in options:
            raise CorpusError(
                f"{one.answer!r} is no option of questions of the kind {one.kind!r}: {', '.join(options)}"
            )
        answer = options.index(one.answer)
        found.append(Choice(f"{name}-{one.kind}", example.image, one.text, "", options, answer, one.kind))
    return found
