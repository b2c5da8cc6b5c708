"""The evaluation of tuned image generators: same prompts, same seeds, side by side with the base model.

    OUT/images/<system>/<part>   drawn images, 256 a part, with their prompts and seeds
    OUT/drift/<system>           denoising errors on held-out real images, at noise and timesteps that all share
    OUT/report                   report.json, report.md, categories.json, plots, images.png

Each is an artifact of its own: another scorer draws nothing again. Runs of one name are one method at several training
seeds. A win rate is the share of images that score above the other's at the same prompt and seed, ties half.

Symbols: N images a run (prompts times seeds), K runs of a name, U units (prompts, or people), C columns.
"""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from palate import artifacts, progress
from palate import config as configs
from palate.artifacts import Artifact, ArtifactMismatch, Writer, join
from palate.config import scale
from palate.corpora.pictures import DECODED, read_images
from palate.corpora.schema import LISTS, RANKED_LISTS
from palate.evaluation import report
from palate.evaluation.prompts import Prompt, PromptError, corpus_prompts, read_prompts
from palate.evaluation.report import Cell, Report, System
from palate.evaluation.scorers import Drawn, Scorer, ScorerConfig, checked, scorers
from palate.evaluation.statistics import Combine, Estimate, first_column
from palate.lpo.denoising import Conditioning, draw_timesteps, noise_schedule
from palate.lpo.encoding import Picture, read_picture
from palate.lpo.networks import TRAINED, load_lora
from palate.lpo.personal import load_branch, set_people
from palate.lpo.sampling import SampleConfig, grid
from palate.lpo.stages import TUNED, base_weights, check_base
from palate.lpo.training import Denoiser, Images
from palate.models.diffusion import LoadedDiffusion, encode_images, encode_text, load_diffusion
from palate.serving.images import ImageModel, ImageRequest, draw

Array = NDArray[np.float64]

BASE = "base"
DRAWN, ERRORS = "evaluation-images", "denoising-errors"
PART = 256  # images of a part
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")

PICTURES = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),  # Prompt.key
        pa.field("number", pa.int32(), nullable=False),  # of the prompt's seeds
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("png", pa.binary(), nullable=False),
    ]
)

DEFINITIONS = (
    "A win rate is the share of images that score above the other system's image of the same prompt and seed; ties "
    "count half. Chance is 0.5. Every value is a mean over prompts (or people) of the mean over their images.",
    "Intervals are 95% percentile intervals of a bootstrap that resamples prompts (or people; all their seeds come "
    "along) and, independently, the runs of a name (Owen 2007); differences are paired. Where every comparison went "
    "the same way, the interval is Clopper and Pearson's over the prompts.",
    "The smallest detectable difference (SDD) is the true difference that such an experiment finds significant "
    "(two-sided, 5%) 4 times in 5: (z_0.975 + z_0.8) = 2.80 bootstrap standard errors; of a win rate, from 0.5.",
)


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Compare runs of jobs/lpo.py with their base model and with one another, at the same prompts and seeds."""

    run: tuple[str, ...] = scale()
    """NAME=FOLDER of each run; runs of one name are one method at several training seeds."""
    out: str = scale()
    """Folder or URL for the results; the report is in OUT/report."""
    corpus: str | None = scale(None)
    """Ranked lists: whose held-out captions, or edits, are drawn without --prompts; whose images tell the drift."""
    prompts: str | None = scale(None)
    """PartiPrompts .tsv, HPSv2 .json or a folder of them, .txt, or .jsonl."""
    split: Literal["test", "validation", "examples"] = "test"
    """Of the corpus' lists. Choose settings on others than test; report on test, once."""
    people: bool = False
    """Draw each held-out caption of the corpus for the people who ranked it."""
    max_prompts: int | None = None
    """At most so many prompts, chosen by a hash of their text."""
    images: int = 4
    """Images of each prompt, each with a seed of its own."""
    size: int | None = None
    """Pixels of a side; the model's own by default."""
    seed: int = 0
    """Of images, noise and the bootstrap."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    score: ScorerConfig = field(default_factory=ScorerConfig)
    drift_images: int = 256
    """Held-out images that the drift is measured on; 0: none."""
    drift_draws: int = 2
    """Noises and timesteps of each."""
    resamples: int = 10_000
    """Of the bootstrap."""
    shown: int = 6
    """Prompts whose first image is shown side by side; 0: none."""
    device: str = scale("cpu")
    """Where the models run."""
    fresh: bool = scale(False)
    """Discard what --out holds, drawn images too, and begin anew."""


@dataclass(frozen=True)
class Method:
    """A name and its finished runs; none of the base."""

    name: str
    runs: tuple[Artifact, ...] = ()

    @property
    def folders(self) -> list[tuple[str, Artifact | None]]:
        """Where the images of each run lie, and the run."""
        if not self.runs:
            return [(self.name, None)]
        return [(f"{self.name}-{number}", run) for number, run in enumerate(self.runs)]


class Comparison:
    """One evaluation: its prompts, its systems and the artifacts of what they draw.

    Raises:
        ValueError: settings that do not go together, or a prompt file that cannot be used.
        ArtifactError: a run or the corpus is not there, or runs were tuned from different models.
    """

    def __init__(self, config: ImagesConfig) -> None:
        for name in ("images", "resamples", "drift_draws", "max_prompts", "size"):
            if (value := getattr(config, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        self.config = config
        self.methods = (Method(BASE), *read_methods(config.run))
        first = self.methods[1].runs[0]
        self.model, self.base_weights = str(first.config["model"]), base_weights(first)
        for run in (run for method in self.methods for run in method.runs):
            if base_weights(run) != self.base_weights:
                raise ArtifactMismatch(
                    f"{run.url} was tuned from {run.config['model']!r}, and {first.url} from {self.model!r}, with "
                    "other weights: only runs of one base model are compared"
                )
        self.corpus = artifacts.open_artifact(config.corpus, RANKED_LISTS) if config.corpus else None
        self.prompts = self._prompts()
        self.units = np.unique([prompt.unit for prompt in self.prompts], return_inverse=True)[1].repeat(config.images)
        uids = {uid for prompt in self.prompts for uid in (prompt.source, prompt.target) if uid}
        self._pictures = read_images(self.corpus, uids) if self.corpus and uids and not config.prompts else None

    def discard(self) -> None:
        """Remove what OUT holds of these systems."""
        for method in self.methods:
            for name, _ in method.folders:
                for folder in artifacts.folders(join(self.config.out, "images", name)):
                    artifacts.discard(folder)
                artifacts.discard(join(self.config.out, "drift", name))
        artifacts.discard(join(self.config.out, "report"))

    @property
    def requests(self) -> list[tuple[Prompt, int]]:
        """Every image of a run: the prompt and the number of its seed."""
        return [(prompt, number) for prompt in self.prompts for number in range(self.config.images)]

    def drawn(self, name: str, run: Artifact | None) -> list[Artifact]:
        """The parts of a system's images, those drawn that are not there."""
        requests, parts = self.requests, []
        inputs = {"run": run} if run else {}
        if self._pictures is not None and self.corpus is not None:
            inputs["corpus"] = self.corpus
        load = _Once(partial(load_model, run, self.model, self.config.device))
        for start in progress.track(range(0, len(requests), PART), f"draw {name}"):
            some = requests[start : start + PART]
            identity = {
                "model": self.base_weights,
                "sample": configs.identity(self.config.sample),
                "size": self.config.size,
                "seed": self.config.seed,
                "requests": digest([[prompt.key, number] for prompt, number in some]),
            }
            parts.append(
                artifacts.ensure(
                    join(self.config.out, "images", name, f"{start // PART:05d}"),
                    partial(self._draw, some=some, load=load),
                    kind=DRAWN,
                    config=identity,
                    inputs=inputs,
                )
            )
        return parts

    def errors(self, name: str, run: Artifact | None) -> Artifact | None:
        """Denoising errors of a system on held-out images; None without a corpus that has such."""
        rows = held_out(self.corpus, self.config) if self.corpus and self.config.drift_images else []
        if not rows or self.corpus is None:
            return None
        identity = {
            "model": self.base_weights,
            "size": self.config.size,
            "seed": self.config.seed,
            "draws": self.config.drift_draws,
            "rows": digest(rows),
        }

        def produce(writer: Writer) -> None:
            model = load_model(run, self.model, self.config.device)
            errors = denoising_errors(model, rows, self.corpus, self.config)  # type: ignore[arg-type]
            pq.write_table(pa.table({"error": errors}), writer.folder / "errors.parquet")

        inputs = {"corpus": self.corpus} | ({"run": run} if run else {})
        url = join(self.config.out, "drift", name)
        return artifacts.ensure(url, produce, kind=ERRORS, config=identity, inputs=inputs)

    def read(self, number: int, part: Artifact) -> list[Drawn]:
        """The images of a part with their prompts, in the order of ``requests``."""
        requests = self.requests[number * PART : (number + 1) * PART]
        rows = pq.read_table(part.local("images.parquet")).to_pylist()
        return [
            Drawn(_opened(row["png"]), prompt, self.picture(prompt.target) if prompt.target else None)
            for row, (prompt, _) in zip(rows, requests, strict=True)
        ]

    def picture(self, place: str) -> Image.Image:
        """An image of the corpus by uid, or a file."""
        if self._pictures is not None:
            return _opened(self._pictures[place])
        filesystem, path = artifacts.locate(place)
        try:
            return _opened(filesystem.cat_file(path))
        except OSError as error:
            raise PromptError(f"--prompts {self.config.prompts}: the image {place} cannot be read: {error}") from None

    def _prompts(self) -> list[Prompt]:
        config = self.config
        if config.prompts:
            if config.people:
                raise PromptError("--people is about a corpus' lists; in a .jsonl, give each prompt its user_id")
            found = read_prompts(config.prompts)
        elif self.corpus is not None:
            found = corpus_prompts(self.corpus, people=config.people, split=config.split)
        else:
            raise PromptError("give --prompts, or --corpus with held-out lists")
        if config.max_prompts is not None:
            ordered = sorted(found, key=lambda prompt: digest([config.seed, prompt.key]))
            chosen = {prompt.key for prompt in ordered[: config.max_prompts]}
            found = [prompt for prompt in found if prompt.key in chosen]
        return found

    def _draw(self, writer: Writer, some: Sequence[tuple[Prompt, int]], load: Callable[[], ImageModel]) -> None:
        model, config = load(), self.config
        if model.editing != (some[0][0].source is not None):
            what = "edits images: its prompts need a source" if model.editing else "edits no images, and prompts do"
            raise PromptError(f"the base model {self.model} {what}; choose other --prompts or another --corpus")
        size = (config.size, config.size) if config.size else model.size
        rows = []
        batches = range(0, len(some), config.sample.batch)
        for start in progress.track(batches, "draw"):
            batch = some[start : start + config.sample.batch]
            asked = [self._request(model, prompt, number, size) for prompt, number in batch]
            for (prompt, number), request, image in zip(batch, asked, draw(asked, lambda *_: None), strict=True):
                if not isinstance(image, Image.Image):
                    raise ValueError(f"{self.model}, tuned or not, gave NaN for {prompt.text!r}, seed {request.seed}")
                rows.append({"prompt": prompt.key, "number": number, "seed": request.seed, "png": _png(image)})
        table = pa.Table.from_pylist(rows, schema=PICTURES)
        pq.write_table(table, writer.folder / "images.parquet", compression="none")

    def _request(self, model: ImageModel, prompt: Prompt, number: int, size: tuple[int, int]) -> ImageRequest:
        source = self.picture(prompt.source).resize(size) if prompt.source else None
        seed = seed_of(self.config.seed, prompt.key, number)
        return ImageRequest(model, prompt.text, seed, size, self.config.sample, prompt.user_id, source)


def make_report(comparison: Comparison) -> Artifact:
    """The report at OUT/report, with all that it needs made first; a report of other settings is replaced."""
    config = comparison.config
    if config.fresh:
        comparison.discard()
    parts: dict[str, list[list[Artifact]]] = {}
    errors: dict[str, list[Artifact]] = {}
    for method in comparison.methods:
        parts[method.name] = [comparison.drawn(*folder) for folder in method.folders]
        found = [comparison.errors(*folder) for folder in method.folders]
        errors[method.name] = [artifact for artifact in found if artifact is not None]
    inputs = {} if comparison.corpus is None else {"corpus": comparison.corpus}
    for name in parts:
        for number, run in enumerate(parts[name]):
            inputs |= {f"images {name}-{number}/{place}": part for place, part in enumerate(run)}
        inputs |= {f"drift {name}-{number}": found for number, found in enumerate(errors[name])}

    def produce(writer: Writer) -> None:
        _write(comparison, parts, errors, writer)

    url, kind = join(config.out, "report"), "images-report"
    asked = [dataclasses.asdict(prompt) for prompt in comparison.prompts]
    identity = {**configs.identity(config), "prompts": digest(asked)}
    replaced = False
    if artifacts.exists(url):
        before = artifacts.open_artifact(url, kind)
        try:
            artifacts.finished(before.url, kind=kind, config=identity, inputs=inputs)
        except ArtifactMismatch:
            replaced = True
    return artifacts.ensure(url, produce, kind=kind, config=identity, inputs=inputs, fresh=replaced)


def read_methods(given: Sequence[str]) -> list[Method]:
    """The runs of ``NAME=FOLDER``; without a name, the folder's.

    Raises:
        ValueError: no run, a name that cannot be a folder's, or other numbers of runs.
        ArtifactMissing: a run is not finished.
    """
    found: dict[str, list[Artifact]] = {}
    for one in given:
        name, _, folder = one.partition("=") if _NAME.fullmatch(one.partition("=")[0]) else ("", "", one)
        if not folder:  # a folder with a simple name
            name, folder = "", one
        name = name or folder.rstrip("/").rpartition("/")[2]
        if not _NAME.fullmatch(name) or name == BASE:
            raise ValueError(f"--run {one}: expected NAME=FOLDER, the name of letters and digits and not {BASE!r}")
        found.setdefault(name, []).append(artifacts.open_artifact(join(folder, "tuned"), TUNED))
    counts = {name: len(runs) for name, runs in found.items() if len(runs) > 1}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ValueError(f"--run: names with several runs need as many, and {shown}")
    if not found:
        raise ValueError("--run is missing: NAME=FOLDER of at least one run of jobs/lpo.py")
    return [Method(name, tuple(runs)) for name, runs in found.items()]


def load_model(run: Artifact | None, base: str, device: str) -> ImageModel:
    """The base model, or what a run made of it.

    Raises:
        ArtifactMismatch: the run holds nothing that draws, or was tuned from other weights than the base has now.
    """
    if run is None:
        return ImageModel(load_diffusion(base, device=device))
    if run.paths("pipeline/"):
        return ImageModel(load_diffusion(str(run.local_folder("pipeline")), device=device))
    loaded = load_diffusion(base, device=device)
    check_base(loaded, run)
    if run.paths("lora/"):
        load_lora(loaded, str(run.local_folder("lora")), TRAINED)
        loaded.denoiser.eval()
        return ImageModel(loaded, TRAINED)
    if run.paths("person/"):
        people = load_branch(loaded.denoiser, run.local_folder("person")).to(loaded.device)
        loaded.denoiser.eval()
        return ImageModel(loaded, people=people)
    raise ArtifactMismatch(f"{run.url} has neither lora/, pipeline/ nor person/: is it a run of jobs/lpo.py?")


# Statistics


def crossed(
    values_KNC: Array,
    units_N: NDArray[np.int_],
    *,
    combine: Combine = first_column,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """A metric of means over units and runs, with the bootstrap that resamples both, independently.

    Args:
        values_KNC: (K, N) or (K, N, C) for K runs on the same N images.
        units_N: the unit, such as the prompt, of each image; units weigh alike.
        combine: means of the columns to the metric.

    With one run this is the bootstrap over units of ``statistics.estimate``.
    """
    values = np.asarray(values_KNC, dtype=np.float64)
    values = values[..., None] if values.ndim == 2 else values
    runs, _, columns = values.shape
    units, index_N = np.unique(units_N, return_inverse=True)
    means_UKC = np.zeros((len(units), runs, columns))
    np.add.at(means_UKC, index_N, values.transpose(1, 0, 2))
    means_UKC /= np.bincount(index_N)[:, None, None]
    value = float(combine(means_UKC.mean(axis=(0, 1))[None])[0])
    nan = float("nan")
    if len(units) < 2:
        return Estimate(value, nan, nan, len(units), values.size // columns, nan, "one prompt: nothing to resample")
    generator = np.random.default_rng(seed)
    replicates = np.empty(resamples)
    rows = max(1, (1 << 22) // len(units))
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        units_RU = _counts(generator, count, len(units))
        runs_RK = _counts(generator, count, runs) if runs > 1 else np.ones((count, 1))
        means_RKC = np.tensordot(units_RU, means_UKC, axes=1) / len(units)
        replicates[start : start + count] = combine((means_RKC * runs_RK[:, :, None]).sum(axis=1) / runs)
    low, high = np.quantile(replicates, [0.025, 0.975])
    spread = float(np.std(replicates, ddof=1))
    return Estimate(value, float(low), float(high), len(units), values.size // columns, spread)


def win_rate(wins_KN: Array, units_N: NDArray[np.int_], *, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """The mean of wins (0, 0.5, 1) by ``crossed``; Clopper and Pearson's interval over the units where all are 0 or 1
    alike, which no resampling can tell from certainty."""
    found = crossed(wins_KN, units_N, resamples=resamples, seed=seed)
    if found.value in (0.0, 1.0):
        edge = 0.025 ** (1 / found.n)  # the quantile of Beta(n, 1)
        bounds = (edge, 1.0) if found.value == 1 else (0.0, 1 - edge)
        return dataclasses.replace(found, low=bounds[0], high=bounds[1], reason="every comparison went the same way")
    return found


def wins(ours_KN: Array, theirs_KN: Array, higher_is_better: bool = True) -> Array:
    """1 where ours is better, 0.5 for ties, 0 where it is worse; one run is compared with each of several.

    Raises:
        ValueError: the numbers of runs differ, and none is one.
    """
    if len(ours_KN) != len(theirs_KN) and 1 not in (len(ours_KN), len(theirs_KN)):
        raise ValueError(f"runs are compared in pairs, found {len(ours_KN)} and {len(theirs_KN)}: give as many of each")
    sign = np.sign(ours_KN - theirs_KN)
    return (1 + (sign if higher_is_better else -sign)) / 2


def relative_error(means: Array) -> Array:
    """(…, 2) mean errors, the tuned and the base's -> (…) how much larger the tuned one is."""
    return means[..., 0] / means[..., 1] - 1


# Drift


def held_out(corpus: Artifact, config: ImagesConfig) -> list[dict[str, Any]]:
    """Real images of the split with what they show: the corpus' plain scenes or edits, else the best image of
    each list; at most ``drift_images``, chosen by hash. None where the corpus has no images."""
    if not corpus.paths("images/", ".parquet"):
        return []
    tables = {"scenes": "image_uid", "edits": "target_uid"}
    rows = []
    plain = "test" if config.split == "test" else "validation"
    for folder, column in tables.items():
        for path in corpus.paths(f"{folder}/", ".parquet"):
            found = pq.read_table(corpus.local(path))
            for row in found.filter(pc.equal(found["split"], plain)).to_pylist():
                text = row.get("instruction") or row["caption"]
                rows.append({"image": row[column], "text": text, "source": row.get("source_uid")})
    if not rows:
        for path in corpus.paths("lists/", ".parquet"):
            found = pq.read_table(corpus.local(path), schema=LISTS)
            for row in found.filter(pc.equal(found["split"], config.split)).to_pylist():
                text = row["instruction"] or row["caption"]
                rows.append({"image": row["items"][0]["image_uid"], "text": text, "source": row["source_image"]})
    unique = {json.dumps(row, sort_keys=True): row for row in rows}
    chosen = sorted(unique, key=lambda key: digest([config.seed, key]))[: config.drift_images]
    return [unique[key] for key in chosen]


@torch.inference_mode()
def denoising_errors(
    model: ImageModel, rows: Sequence[Mapping[str, Any]], corpus: Artifact, config: ImagesConfig
) -> Array:
    """Mean squared error (rows * draws,) of the prediction on real images, row after row.

    Noise and timesteps are functions of the seed, the row and the draw, so two models see the same. A model with people
    is told of them in turn, one a row.
    """
    loaded = model.loaded
    side = config.size or model.size[0]
    uids = {uid for row in rows for uid in (row["image"], row["source"]) if uid}
    pictures = {uid: read_picture(content, side) for uid, content in read_images(corpus, uids).items()}
    schedule = noise_schedule(loaded.scheduler)
    denoiser = Denoiser(loaded.denoiser, loaded.family, schedule, lambda: nullcontext(loaded.denoiser))
    found = []
    for start in progress.track(range(0, len(rows), config.sample.batch), "drift"):
        some = rows[start : start + config.sample.batch]
        latents, given = _conditioned(loaded, [pictures[row["image"]] for row in some], some, pictures, side)
        if model.people is not None:
            everybody_UJ = model.people.embeddings_UJ
            places = [place % len(everybody_UJ) for place in range(start, start + len(some))]
            given = replace(given, user_NJ=everybody_UJ[places])
            set_people(loaded.denoiser, torch.ones(len(some)))
        errors_D = []
        for number in range(config.drift_draws):
            seeds = [seed_of(config.seed, json.dumps(row, sort_keys=True), number) for row in some]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            index_N = torch.cat([draw_timesteps(schedule, 1, generator) for generator in generators])
            noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
            images = Images(latents, noise.to(latents), index_N.to(latents.device), given)
            errors_D.append(denoiser.errors(loaded.denoiser, images)[0].double().cpu().numpy())
        found.append(np.stack(errors_D, axis=1).ravel())
    return np.concatenate(found)


def _conditioned(
    loaded: LoadedDiffusion,
    shown: Sequence[Picture],
    rows: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Picture],
    side: int,
) -> tuple[torch.Tensor, Conditioning]:
    """Latents as the denoiser sees them, and what it is told of them."""
    vae: Any = loaded.vae.config
    mean, _ = encode_images(loaded, torch.stack([picture.pixels for picture in shown]))
    latents = (mean - float(vae.get("shift_factor") or 0.0)) * float(vae.get("scaling_factor") or 1.0)
    text = encode_text(loaded, [row["text"] for row in rows])
    sizes = [[*picture.original, *picture.crop, side, side] for picture in shown]
    source = None
    if loaded.family == "ip2p":
        source, _ = encode_images(loaded, torch.stack([pictures[row["source"]].pixels for row in rows]))
    given = Conditioning(
        text_NLD=text["prompt_embeds"],
        pooled_NP=text.get("pooled_prompt_embeds"),
        time_ids_N6=torch.tensor(sizes, dtype=latents.dtype).to(latents) if loaded.family == "sdxl" else None,
        source_NCHW=source,
    )
    return latents, given


# The report


def _write(
    comparison: Comparison,
    parts: Mapping[str, list[list[Artifact]]],
    errors: Mapping[str, list[Artifact]],
    writer: Writer,
) -> None:
    config = comparison.config
    judges = scorers(config.score, comparison.corpus, comparison.prompts, config.device)
    scores: dict[str, dict[str, Array]] = {judge.name: {} for judge in judges}
    shown: dict[str, list[Image.Image]] = {}
    for name, runs in parts.items():
        values: dict[str, list[list[Array]]] = {judge.name: [[] for _ in runs] for judge in judges}
        for which, run in enumerate(runs):
            for number, part in enumerate(run):  # one part in memory at a time
                drawn = comparison.read(number, part)
                if which == 0:
                    firsts = [one.image for place, one in enumerate(drawn, number * PART) if place % config.images == 0]
                    shown[name] = [*shown.get(name, []), *firsts][: config.shown]
                for judge in judges:
                    values[judge.name][which].append(checked(judge, drawn))
        for judge in judges:
            scores[judge.name][name] = np.stack([np.concatenate(of_run) for of_run in values[judge.name]])
    cells = [cell for judge in judges for cell in _cells(judge, scores[judge.name], comparison)]
    cells += _drift_cells(errors, config)
    categories = _categories(judges, scores, comparison)
    found = Report(
        f"{', '.join(method.name for method in comparison.methods[1:])} against {comparison.model}",
        _systems(comparison, cells),
        tuple(cells),
        {**configs.to_dict(config), "model": comparison.model},
        tuple(_notes(judges, comparison, errors)),
        {"By category": _category_table(categories)} if categories else {},
        definitions=DEFINITIONS,
        resampled="people" if config.people else "prompts",
    )
    report.write(found, writer.folder)
    if categories:
        writer.write_json("categories.json", {name: dataclasses.asdict(one) for name, one in categories.items()})
    if config.shown:
        captions = [prompt.text for prompt in comparison.prompts[: config.shown]]
        grid(captions, shown).save(writer.folder / "images.png")
        with (writer.folder / "report.md").open("a") as stream:
            stream.write("\n## Images\n\nThe first seed of some prompts, not chosen.\n\n![Side by side](images.png)\n")
    for cell in cells:
        if cell.chance is not None and cell.estimate is not None:
            writer.summary[cell.name] = [cell.estimate.value, cell.estimate.low, cell.estimate.high]


def _cells(judge: Scorer, scores: Mapping[str, Array], comparison: Comparison) -> Iterator[Cell]:
    """Mean scores, their differences from the base, and win rates against the base and against each other."""
    config, units_N = comparison.config, comparison.units
    give = partial(crossed, units_N=units_N, resamples=config.resamples, seed=config.seed)
    cell = partial(_cell, unit=judge.unit, higher_is_better=judge.higher_is_better)
    for name, values_KN in scores.items():
        yield cell(judge.name, name, give(values_KN))
    for name, values_KN in scores.items():
        if name != BASE:
            yield cell(judge.name, name, give(values_KN - scores[BASE]), minus=BASE)
    if not judge.compares:
        return
    for metric, name, wins_KN in _compared(judge, scores):
        rate = win_rate(wins_KN, units_N, resamples=config.resamples, seed=config.seed)
        yield _cell(metric, name, rate, chance=0.5)


def _compared(judge: Scorer, scores: Mapping[str, Array]) -> Iterator[tuple[str, str, Array]]:
    """Each comparison of systems: metric, its name, and the wins (K, N)."""
    for other, name in combinations(scores, 2):  # the base comes first
        label = name if other == BASE else f"{name} against {other}"
        yield f"{judge.name} win rate", label, wins(scores[name], scores[other], judge.higher_is_better)


def _drift_cells(errors: Mapping[str, list[Artifact]], config: ImagesConfig) -> Iterator[Cell]:
    if not errors[BASE]:
        return
    read = {name: np.stack([_errors(one) for one in found]) for name, found in errors.items() if found}
    units_N = np.arange(read[BASE].shape[1]) // config.drift_draws
    for name, errors_KN in read.items():
        if name != BASE:
            both_KN2 = np.stack([errors_KN, np.broadcast_to(read[BASE], errors_KN.shape)], axis=2)
            found = crossed(both_KN2, units_N, combine=relative_error, resamples=config.resamples, seed=config.seed)
            yield _cell("drift", name, found, higher_is_better=False)


def _errors(artifact: Artifact) -> Array:
    return np.array(pq.read_table(artifact.local("errors.parquet"))["error"].to_pylist())


def _cell(
    metric: str,
    system: str,
    estimate: Estimate,
    *,
    minus: str | None = None,
    unit: str = "",
    higher_is_better: bool = True,
    chance: float | None = None,
) -> Cell:
    return Cell(metric, system, minus, estimate, estimate.value, unit, higher_is_better, chance, estimate.reason)


def _systems(comparison: Comparison, cells: Sequence[Cell]) -> tuple[System, ...]:
    """The rows of the report: the base, the methods, and the methods against each other."""
    labels = {BASE: comparison.model}
    for method in comparison.methods[1:]:
        labels[method.name] = method.name + (f" ({len(method.runs)} runs)" if len(method.runs) > 1 else "")
    names = dict.fromkeys(cell.system for cell in cells)
    return tuple(System(name, labels.get(name, name), {}, "baseline" if name == BASE else "method") for name in names)


def _categories(
    judges: Sequence[Scorer], scores: Mapping[str, Mapping[str, Array]], comparison: Comparison
) -> dict[str, Estimate]:
    """Win rates against the base by "<metric>/<system>/<category>", where there is more than one category."""
    config = comparison.config
    categories_N = np.array([prompt.category for prompt, _ in comparison.requests])
    names = sorted(set(categories_N))
    found = {}
    if len(names) > 1:
        for judge in judges:
            for metric, system, wins_KN in _compared(judge, scores[judge.name]) if judge.compares else ():
                for name in names:
                    of_N = categories_N == name
                    rate = win_rate(
                        wins_KN[:, of_N], comparison.units[of_N], resamples=config.resamples, seed=config.seed
                    )
                    found[f"{metric}/{system}/{name or 'none'}"] = rate
    return found


def _category_table(found: Mapping[str, Estimate]) -> str:
    lines = ["| metric | system | category | value [95%] | SDD | prompts |", "|---|---|---|---|--:|--:|"]
    for name, one in found.items():
        metric, system, category = name.split("/", 2)
        interval = f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"
        lines.append(
            f"| {metric} | {system} | {category.replace('|', '/')} | {interval} | "
            f"{one.smallest_detectable_difference:.3f} | {one.n} |"
        )
    return "\n".join(lines)


def _notes(judges: Sequence[Scorer], comparison: Comparison, errors: Mapping[str, Sequence[Artifact]]) -> Iterator[str]:
    config = comparison.config
    yield from (f"{judge.name}: {judge.about}" for judge in judges)
    yield f"{len(comparison.prompts)} prompts, {config.images} images each, {config.sample.sampler_steps} steps"
    if all(len(method.runs) == 1 for method in comparison.methods[1:]):
        yield "One run a method: the intervals do not hold what another training seed would change"
    if errors[BASE]:
        yield (
            f"drift: denoising error on {config.drift_images} or fewer held-out real images, relative to the base's, "
            "less 1; the same noise and timesteps for all. Win rates at unequal drift crown whoever drifts most"
        )
    else:
        yield "drift: not measured; it needs --corpus with images"
    if any(run.paths("person/") for method in comparison.methods for run in method.runs):
        yield "drift of a personal model is with its people in turn, one an image"


def seed_of(seed: int, *parts: object) -> int:
    """The seed of an image: a function of the prompt and its number alone, whatever else is drawn."""
    return int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode()).digest()[:4], "little")


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class _Once:
    """What is loaded when it is first needed, and kept."""

    def __init__(self, load: Callable[[], ImageModel]) -> None:
        self._load, self._found = load, []  # type: ignore[var-annotated]

    def __call__(self) -> ImageModel:
        if not self._found:
            self._found.append(self._load())
        return self._found[0]


def _counts(generator: np.random.Generator, rows: int, among: int) -> Array:
    """(rows, among): how often each is drawn when as many as there are are drawn with replacement."""
    drawn = generator.integers(among, size=(rows, among))
    drawn += among * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)


def _opened(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content), formats=DECODED) as image:
        return image.convert("RGB")


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
