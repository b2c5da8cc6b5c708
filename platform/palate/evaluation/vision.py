"""Evaluation of unified models: multiple choice by likelihood on published question files, and the loss of plain text.

Each option is an answer whose likelihood the model tells; the likeliest is its choice, a tie is none. Answers of every
question are kept. Models are compared on the same questions; intervals are over images, for questions on one image
are not independent. Symbols: Q questions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import AutoProcessor

from palate import artifacts, progress
from palate.artifacts import Artifact, Writer, join
from palate.config import require, require_at_least, scale
from palate.corpora.pictures import decode_image
from palate.corpora.questions import Choice, read_tsv
from palate.evaluation.report import Kind, System, compare, write
from palate.evaluation.statistics import Scores
from palate.unihetero.model import UniHeteroModel
from palate.unihetero.phrasing import Phrasing
from palate.unihetero.processing import UniHeteroProcessor
from palate.unihetero.samples import Sample
from palate.unihetero.scoring import Asked, choose, correct, text_loss
from palate.unihetero.stages import KIND

REPORT = "vision-report"


@dataclass(frozen=True)
class VisionConfig:
    """Ask unified models multiple-choice questions on images, by likelihood."""

    run: tuple[str, ...] = scale()
    """NAME=FOLDER of each run of jobs/unihetero.py train; the others are compared with the first."""
    out: str = scale()
    """Folder or URL of the report."""
    questions: tuple[str, ...] = ()
    """VLMEvalKit TSV files, paths or URLs; each is a benchmark of its file's name."""
    images: str = ""
    """Folder or URL of the files that a TSV's image_path names; by default its own."""
    texts: str | None = None
    """A text file, a document a line, whose loss is measured without images."""
    max_questions: int | None = None
    """At most so many of each file, the first ones."""
    resamples: int = 10_000
    """Of the bootstrap."""
    seed: int = 0
    """Of the bootstrap."""
    batch: int = scale(16)
    """Images at once."""
    device: str = scale("cpu")
    """Where the models run."""
    fresh: bool = scale(False)
    """Discard what is at --out, finished or not."""

    def __post_init__(self) -> None:
        require(self, bool, "NAME=FOLDER of at least one run", "run")
        require_at_least(self, 1, "batch", "resamples")
        if not self.questions and self.texts is None:
            raise ValueError("nothing to evaluate on: give --questions, --texts or both")


@dataclass(frozen=True)
class Benchmark:
    """A file of questions."""

    name: str
    choices: tuple[Choice, ...]

    @cached_property
    def images(self) -> list[tuple[bytes, list[Choice]]]:
        """Each image with its questions, in the order of the file."""
        found: dict[bytes, list[Choice]] = {}
        for choice in self.choices:
            found.setdefault(choice.image, []).append(choice)
        return list(found.items())

    @property
    def chance(self) -> float:
        return float(np.mean([1 / len(choice.options) for choice in self.choices]))


@dataclass(frozen=True)
class Answer:
    """What a model chose, with the log-likelihoods of the options (nats)."""

    id: str
    benchmark: str
    category: str
    image: int
    likelihoods: tuple[float, ...]
    right: bool


def make_report(config: VisionConfig) -> Artifact:
    """The report at ``config.out``, unless it is there.

    Raises:
        ArtifactMissing: a run is not finished.
        CorpusError: a file of questions cannot be read; the message names row and column.
    """
    runs = read_runs(config.run)
    benchmarks = [read_benchmark(path, config) for path in config.questions]
    texts = [] if config.texts is None else read_texts(config.texts)

    def produce(writer: Writer) -> None:
        systems: list[System] = []
        for name, run in runs.items():
            with progress.stage(name):
                model, processor = load(run, config.device)
                answers = [one for b in benchmarks for one in ask(model, processor, b, config.batch)]
                losses = text_losses(model, processor.phrasing, texts)
            rows = [asdict(answer) for answer in answers]
            (writer.folder / f"answers-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            kind: Kind = "baseline" if not systems else "method"
            systems.append(System(name, name, scores(answers, losses, benchmarks), kind))
        pairs = [(system.name, systems[0].name) for system in systems[1:]]
        described = {"questions": list(config.questions), "texts": config.texts}
        notes = ["Options are scored by likelihood; intervals are over images (texts: over documents)."]
        report = compare("Vision", systems, pairs, described, notes=notes, resamples=config.resamples, seed=config.seed)
        write(report, writer.folder)
        for cell in report.cells:
            if cell.estimate is not None:
                writer.summary[cell.name] = [cell.estimate.value, cell.estimate.low, cell.estimate.high]

    return artifacts.ensure(config.out, produce, kind=REPORT, config=config, inputs=runs, fresh=config.fresh)


def read_runs(given: Sequence[str]) -> dict[str, Artifact]:
    """The models of ``NAME=FOLDER``; without a name, the folder's."""
    found: dict[str, Artifact] = {}
    for one in given:
        name, _, folder = one.rpartition("=")
        name = name or folder.rstrip("/").rpartition("/")[2]
        if name in found:
            raise ValueError(f"--run has two models called {name!r}: name them, NAME=FOLDER")
        found[name] = artifacts.open_artifact(join(folder, "model"), KIND)
    return found


def read_benchmark(path: str, config: VisionConfig) -> Benchmark:
    name = path.rstrip("/").rpartition("/")[2].removesuffix(".tsv")
    choices = read_tsv(path, images=config.images)
    return Benchmark(name, tuple(choices[: config.max_questions]))


def read_texts(path: str) -> list[str]:
    """The lines of a text file that are not blank."""
    filesystem, inside = artifacts.locate(path)
    lines = filesystem.cat_file(inside).decode().splitlines()
    return [line for line in lines if line.strip()]


def load(run: Artifact, device: str) -> tuple[UniHeteroModel, UniHeteroProcessor]:
    folder = run.local_folder()
    model = UniHeteroModel.from_pretrained(folder, use_safetensors=True).to(device).eval()
    return model, AutoProcessor.from_pretrained(folder)


def ask(model: UniHeteroModel, processor: UniHeteroProcessor, benchmark: Benchmark, batch: int) -> list[Answer]:
    """What a model chooses for every question."""
    found = []
    for start in progress.track(range(0, len(benchmark.images), batch), benchmark.name):
        part = benchmark.images[start : start + batch]
        pixels = [processor.pixels([decode_image(image)]).to(model.device) for image, _ in part]
        asked = [[_asked(choice) for choice in choices] for _, choices in part]
        told = choose(model, processor.phrasing, pixels, asked, encoded=False, batch=batch)
        for place, ((_, choices), likelihoods, hits) in enumerate(zip(part, told, correct(told, asked), strict=True)):
            for choice, values, hit in zip(choices, likelihoods, hits, strict=True):
                category = choice.category
                found.append(Answer(choice.id, benchmark.name, category, start + place, tuple(values), hit))
    return found


def text_losses(model: UniHeteroModel, phrasing: Phrasing, texts: Sequence[str]) -> list[tuple[float, int]]:
    """Nats a token and tokens of each text, without an image: what pretraining must not have cost the language
    model."""
    found = []
    with torch.inference_mode():
        for number, text in enumerate(texts):
            sample = Sample(str(number), (), (phrasing.caption(text),), None)
            found.append((text_loss(model, [sample]), sample.supervised))
    return found


def scores(
    answers: Sequence[Answer], losses: Sequence[tuple[float, int]], benchmarks: Sequence[Benchmark]
) -> Mapping[str, Scores | str]:
    """Accuracy by benchmark and by its categories, and the loss of texts."""
    found: dict[str, Scores | str] = {}
    for benchmark in benchmarks:
        mine = [answer for answer in answers if answer.benchmark == benchmark.name]
        found[benchmark.name] = _accuracy(mine, benchmark.chance)
        categories = dict.fromkeys(answer.category for answer in mine)
        for category in categories if len(categories) > 1 else ():
            found[f"{benchmark.name}: {category}"] = _accuracy([one for one in mine if one.category == category], None)
    if losses:
        names = tuple(f"text {number}" for number in range(len(losses)))
        values, tokens = np.array([value for value, _ in losses]), np.array([float(count) for _, count in losses])
        found["text loss"] = Scores(names, names, values, tokens, unit="nats/token", higher_is_better=False)
    return found


def _accuracy(answers: Sequence[Answer], chance: float | None) -> Scores:
    return Scores(
        tuple(f"{answer.benchmark}/{answer.id}" for answer in answers),
        tuple(f"image {answer.image}" for answer in answers),
        np.array([float(answer.right) for answer in answers]),
        chance=chance,
    )


def _asked(choice: Choice) -> Asked:
    question = " ".join(part for part in (choice.hint, choice.question) if part)
    return Asked(question, choice.options, choice.answer, choice.category)
