"""Diffusion-LPO and its comparators on ``shapes``, whose truth is known: win rate against drift, over seeds.

    python benchmarks/lpo_shapes.py --corpus CORPUS --base RUN/tuned/pipeline --out benchmarks/out/lpo_shapes

CORPUS is what ``jobs/prepare.py shapes`` wrote (with --edits: lists of edits), the base what ``jobs/lpo.py --train-on
images`` trained on it. Every method learns from the same lists, with as many images, or as many lists, in a step. A
cell is a method, a beta and a number of steps; each is run at every seed, from the base, and compared with the base at
the same noise, on test captions, or on the test lists' sources and instructions:

    win rate    share of test prompts and noises at which the tuned image has the higher true utility, ties half
    drift       denoising error on real held-out scenes, relative to the base's, less 1
    seen        share of tuned images that an independent classifier sees the asked shape and colour in
    distance    of edits: mean absolute difference from the target
"""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from PIL import Image
from ranked_corpus import picture, ranked_list, write_corpus

from palate import artifacts, progress
from palate import config as configs
from palate.config import scale
from palate.corpora.pictures import decode_image, read_images
from palate.corpora.schema import LISTS, RANKED_LISTS
from palate.corpora.worlds import shapes
from palate.evaluation.images import crossed, win_rate, wins
from palate.lpo.encoding import EncodeConfig, Encoded, encode
from palate.lpo.networks import WeightsConfig, tuned
from palate.lpo.samples import DrawConfig, Drawing, ListSource, image_source, read_lists
from palate.lpo.sampling import SampleConfig, generate
from palate.lpo.stages import drawing_of
from palate.lpo.training import Denoiser, ObjectiveConfig, TuneConfig, images_of, tune
from palate.models.diffusion import LoadedDiffusion, load_diffusion
from palate.models.shape_classifier import sees, trained_classifier
from palate.training.parallel import World


@dataclass(frozen=True)
class Method:
    """A way to learn from lists of m images, and how many of a list's images it takes through the network."""

    name: str
    learn: ObjectiveConfig
    images: int


def methods(length: int) -> dict[str, Method]:
    found = [
        Method("sft", ObjectiveConfig(objective="sft"), 1),
        Method("dpo-random", ObjectiveConfig(objective="dpo", pairs="random"), 2),
        Method("dpo-adjacent", ObjectiveConfig(objective="dpo", pairs="adjacent"), length),
        Method("dpo-extreme", ObjectiveConfig(objective="dpo", pairs="extreme"), 2),
        Method("gp-dpo", ObjectiveConfig(objective="gp-dpo"), length),
        Method("lpo", ObjectiveConfig(objective="lpo"), length),
        Method("lpo-sum", ObjectiveConfig(objective="lpo", reduction="sum"), length),
    ]
    return {method.name: method for method in found}


@dataclass(frozen=True)
class ShapesMatrix:
    """The matrix to measure; see the module's text."""

    corpus: str
    """Prepared by jobs/prepare.py shapes."""
    base: str
    """Folder of the base pipeline."""
    out: str = scale("benchmarks/out/lpo_shapes")
    """One JSON file a cell, the table and the plot."""
    only: tuple[str, ...] = ("sft", "dpo-random", "dpo-adjacent", "dpo-extreme", "gp-dpo", "lpo")
    """Methods to measure; lpo-sum differs from lpo on lists of mixed lengths alone."""
    length: int = 8
    """Images of a list: the corpus' lists are cut at random into shorter ones of the same images; 0: into one of four
    and two of two, so that lengths are mixed."""
    betas: tuple[float, ...] = (500.0, 2000.0, 8000.0)
    """Strengths of the KL term, for all methods but sft."""
    steps: tuple[int, ...] = (40, 120)
    """Numbers of steps after which a run is measured."""
    images: int = 96
    """Images through the network a step, for every method, or for those that take whole lists."""
    own: bool = False
    """Rank images that the base draws of the training lists' captions, rather than the corpus' own scenes."""
    matched: Literal["images", "lists"] = "images"
    """What is equal in a step: the images that go through the network, so that methods which take a part of each list
    see more lists; or the lists, so that these take fewer images."""
    learning_rate: float = 2e-4
    """AdamW's, the same for every method."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the order of lists, of noise in training, and of the images that are compared."""
    comparisons: int = 800
    """Of a cell at one seed."""
    sample: SampleConfig = field(default_factory=partial(SampleConfig, sampler_steps=20, guidance=2.0, batch=100))
    workers: int = scale(2)
    """Processes, of one thread each."""


Cell = tuple[str, float, int]  # method, beta, seed


class Judge:
    """Compares what a network draws with what the base drew at the same seeds."""

    def __init__(self, config: ShapesMatrix, loaded: LoadedDiffusion, drawing: Drawing, seed: int) -> None:
        corpus = artifacts.open_artifact(config.corpus, RANKED_LISTS)
        self.config, self.loaded, self.drawing = config, loaded, drawing
        rows = read_lists(corpus, "test").to_pylist()
        self.sources: list[Image.Image] | None = None
        self.targets: np.ndarray | None = None
        if drawing.editing:
            rows = [rows[place % len(rows)] for place in range(config.comparisons)]
            targets = pq.read_table(corpus.local("targets.parquet")).to_pylist()
            target_of = {row["list_id"]: row["target_uid"] for row in targets}
            uids = [target_of[row["list_id"]] for row in rows]
            images = read_images(corpus, {*uids, *(row["source_image"] for row in rows)})
            self.sources = [decode_image(images[row["source_image"]]) for row in rows]
            self.targets = np.stack([shapes.decode_png(images[uid]) for uid in uids])
            self.prompts = [row["instruction"] for row in rows]
            self.captions = [row["caption"] for row in rows]
        else:
            found = sorted({row["caption"] for row in rows})
            self.captions = self.prompts = [found[place % len(found)] for place in range(config.comparisons)]
        self.seeds = [1_000_000 * (seed + 1) + place for place in range(config.comparisons)]
        # The annotators' mean taste: lists are theirs together.
        self.weights_1F = np.mean([one.weights for one in shapes.read_annotators(corpus)], axis=0, keepdims=True)
        self.classifier = trained_classifier()
        scenes = image_source(corpus, "test", drawing)
        self.real = [scenes.load(place % len(scenes), 77 + place) for place in range(512)]

    def utilities(self, images_N3HW: np.ndarray) -> np.ndarray:
        if self.targets is not None:
            return shapes.edit_utilities(images_N3HW, self.targets, self.weights_1F)[:, 0]
        return shapes.utilities(shapes.measure(images_N3HW), self.weights_1F)[:, 0]

    def draw(self) -> np.ndarray:
        """What the network draws now, (N, 3, H, W) in [0, 1]."""
        config = self.config.sample
        made = generate(self.loaded.pipeline, self.prompts, self.seeds, config, sources=self.sources, label="draw")
        return np.stack([np.asarray(image, dtype=np.float64).transpose(2, 0, 1) / 255 for image in made])

    def error(self, denoiser: Denoiser) -> float:
        """Denoising error on held-out real scenes."""
        images = images_of(self.real, torch.device("cpu"))
        with torch.no_grad():
            return float(denoiser.errors(denoiser.network, images)[0].mean())

    def look(self, denoiser: Denoiser) -> dict[str, Any]:
        """Utility and recognition of each image, and the error on real scenes."""
        images = self.draw()
        seen = sees(self.classifier, torch.from_numpy(images).float(), self.captions)
        found = {
            "utilities": self.utilities(images).tolist(),
            "seen": [bool(one) for one in seen],
            "error": self.error(denoiser),
        }
        if self.targets is not None:
            found["distance"] = float(np.abs(images - self.targets).mean())
        return found


def own_lists(config: ShapesMatrix) -> str:
    """The corpus with images of the base in its training lists: as many of each caption, ranked by the same people."""
    corpus = artifacts.open_artifact(config.corpus, RANKED_LISTS)
    folder = f"{config.out}/own"
    if artifacts.exists(folder):
        return folder
    loaded = load_diffusion(config.base)
    if loaded.family == "ip2p":
        raise SystemExit("--own draws images of captions: leave it out with a base that edits")
    rows = read_lists(corpus, "train").to_pylist()
    caption_of = {item["image_uid"]: row["caption"] for row in rows for item in row["items"]}
    uids = sorted(caption_of)
    made = generate(
        loaded.pipeline, [caption_of[uid] for uid in uids], list(range(len(uids))), config.sample, label="to rank"
    )
    pixels = np.stack([np.asarray(image, dtype=np.float64).transpose(2, 0, 1) / 255 for image in made])
    features = dict(zip(uids, shapes.measure(pixels), strict=True))
    weights = {one.user_id: one.weights for one in shapes.read_annotators(corpus)}
    random = np.random.default_rng(0)
    lists = []
    for row in rows:
        shown = [item["image_uid"] for item in row["items"]]
        liked = shapes.utilities(np.stack([features[uid] for uid in shown]), np.array([weights[row["user_id"]]]))[:, 0]
        best_first = [shown[place] for place in shapes.rank(liked, random)]
        lists.append(ranked_list(row["list_id"], row["caption"], best_first, row["user_id"]))
    tests = read_lists(corpus, "test").to_pylist()
    scenes = pq.read_table(corpus.local("scenes/part-00000.parquet"))
    kept = {*scenes["image_uid"].to_pylist(), *(item["image_uid"] for row in tests for item in row["items"])}
    images = [picture(uid, decode_image(content)) for uid, content in read_images(corpus, kept).items()]
    images += [picture(uid, image) for uid, image in zip(uids, made, strict=True)]
    users = pq.read_table(corpus.local("users.parquet"))
    write_corpus(folder, images, [*lists, *tests], {"scenes/part-00000.parquet": scenes, "users.parquet": users})
    return folder


def prepared(config: ShapesMatrix) -> tuple[LoadedDiffusion, Drawing]:
    loaded = load_diffusion(config.base)
    corpus = artifacts.open_artifact(config.corpus, RANKED_LISTS)
    settings = EncodeConfig(resolution=shapes.SIDE, latent_dtype="float32", encode_batch=256)
    encoded: Encoded = encode(corpus, config.base, f"{config.out}/encoded", settings)
    return loaded, drawing_of(loaded, encoded, DrawConfig())


def run(cell: Cell, config: ShapesMatrix) -> None:
    """Tune at one method, beta and seed, and look at the network after each number of steps."""
    torch.set_num_threads(1)
    name, beta, seed = cell
    if cell_file(config, name, beta, config.steps[-1] if name != "base" else 0, seed).exists():
        return
    loaded, drawing = prepared(config)
    corpus = artifacts.open_artifact(config.corpus, RANKED_LISTS)
    parameters, reference = tuned(loaded, WeightsConfig(weights="full"))
    denoiser = Denoiser(loaded.denoiser, loaded.family, drawing.schedule, reference)
    judge = Judge(config, loaded, drawing, seed)
    if name == "base":
        write(cell_file(config, name, beta, 0, seed), {**judge.look(denoiser), "captions": judge.prompts})
        return
    table = cut(read_lists(corpus, "train"), config.length)
    lists = ListSource("lists-train", table, f"{corpus.digest} {config.length}", drawing)
    method = methods(round(np.mean([len(items) for items in table["items"].to_pylist()])))[name]
    batch = config.images // (method.images if config.matched == "images" else config.length or 8)
    settings = TuneConfig(
        steps=config.steps[-1],
        batch=batch,
        learning_rate=config.learning_rate,
        warmup_ratio=0.05,
        micro_batch=batch,
        checkpoint_every=math.gcd(*config.steps),
    )

    def report(figures: Any) -> None:
        if figures["step"] in config.steps:
            loaded.denoiser.eval()
            found = judge.look(denoiser)
            loaded.denoiser.train()
            signals = {key: value for key, value in figures.items() if "/" not in key}
            write(cell_file(config, name, beta, int(figures["step"]), seed), {**found, "signals": signals})

    with TemporaryDirectory() as folder:
        learn = replace(method.learn, kl_beta=beta) if name != "sft" else method.learn
        tune(denoiser, parameters, lists, learn, settings, folder, World(report=report), seed=seed)


def cut(lists: pa.Table, length: int) -> pa.Table:
    """Lists of ``length`` of the same images in the same order; see ``ShapesMatrix.length``."""
    made = []
    for number, row in enumerate(lists.to_pylist()):
        count = len(row["items"])
        order = np.random.default_rng(number).permutation(count)
        sizes = [4, 2, 2] if length == 0 else [length] * (count // length)
        for part, places in enumerate(np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])):
            items = [row["items"][place] | {"tie_group": rank} for rank, place in enumerate(sorted(places))]
            edges = [
                {"winner": rank, "loser": rank + 1, "votes": 1.0, "source_ids": [row["list_id"]]}
                for rank in range(len(items) - 1)
            ]
            made.append(row | {"list_id": f"{row['list_id']}-{part}", "items": items, "edges": edges})
    return pa.Table.from_pylist(made, schema=LISTS)


def cell_file(config: ShapesMatrix, name: str, beta: float, steps: int, seed: int) -> Path:
    return Path(config.out) / "cells" / f"{name}_{beta:g}_{steps}_{seed}.json"


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(file)


def settle(config: ShapesMatrix) -> None:
    """Say in OUT what decides its cells, and refuse to go on with others there."""
    aside = ("out", "only", "betas", "steps", "seeds", "workers")
    decides = {name: value for name, value in configs.to_dict(config).items() if name not in aside}
    file = Path(config.out) / "settings.json"
    if file.exists() and (before := json.loads(file.read_text())) != decides:
        other = {name: (before.get(name), value) for name, value in decides.items() if before.get(name) != value}
        raise SystemExit(f"{config.out} holds cells of other settings, {other}: choose another --out")
    write(file, decides)


def table(config: ShapesMatrix) -> list[dict[str, Any]]:
    """A row a cell; intervals are over the test captions and, independently, the seeds of the training."""
    rows = []
    bases = {seed: json.loads(cell_file(config, "base", 0, 0, seed).read_text()) for seed in config.seeds}
    for name, beta in pairs(config):
        for steps in config.steps:
            won, captions, seen, drifts, distances = [], [], [], [], []
            for seed in config.seeds:
                file = cell_file(config, name, beta, steps, seed)
                if not file.exists():
                    continue
                cell, base = json.loads(file.read_text()), bases[seed]
                won.append(wins(np.array([cell["utilities"]]), np.array([base["utilities"]]))[0])
                captions = base["captions"]  # the same at every seed
                seen += cell["seen"]
                drifts.append(cell["error"] / base["error"] - 1)
                if "distance" in cell:
                    distances.append(cell["distance"])
            if won:
                win = win_rate(np.stack(won), units_of(captions))
                rows.append(
                    {
                        "method": name,
                        "beta": beta,
                        "steps": steps,
                        "win": win.value,
                        "low": win.low,
                        "high": win.high,
                        "drift": float(np.mean(drifts)),
                        "drift_spread": float(np.std(drifts)),
                        "seen": float(np.mean(seen)),
                        "comparisons": len(won) * len(captions),
                        "win_by_seed": np.stack(won).mean(1).tolist(),
                        "won": np.stack(won),
                        "captions": captions,
                        "seeds": len(drifts),
                        "distance": float(np.mean(distances)) if distances else None,
                    }
                )
    return rows


def units_of(captions: Sequence[str]) -> np.ndarray:
    return np.unique(captions, return_inverse=True)[1]


def differences(rows: Sequence[dict[str, Any]], ours: str) -> list[dict[str, Any]]:
    """Win rate of ``ours`` less that of each other method at the same beta (or none) and steps, paired by seed, caption
    and noise; intervals as in ``table``."""
    found = []
    for row in rows:
        mine = [r for r in rows if r["method"] == ours and r["steps"] == row["steps"]]
        mine = [r for r in mine if row["method"] == "sft" or r["beta"] == row["beta"]]
        if row["method"] == ours or not mine or mine[0]["won"].shape != row["won"].shape:
            continue
        gap = crossed(mine[0]["won"] - row["won"], units_of(row["captions"]))
        told = {name: row[name] for name in ("method", "beta", "steps")}
        found.append({**told, "difference": gap.value, "low": gap.low, "high": gap.high})
    return found


def pairs(config: ShapesMatrix) -> list[tuple[str, float]]:
    names = [name for name in methods(2) if name in config.only]
    return [(name, beta) for name in names for beta in ((0.0,) if name == "sft" else config.betas)]


def plot(rows: Sequence[dict[str, Any]], seen: float, file: Path) -> None:
    """Win rate over drift, a line a method and beta."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["method"] for row in rows))
    for name, color in zip(names, ("#64748b", "#a16207", "#0f766e", "#7c3aed", "#2563eb", "#c2410c"), strict=False):
        for beta in dict.fromkeys(row["beta"] for row in rows if row["method"] == name):
            some = [row for row in rows if (row["method"], row["beta"]) == (name, beta)]
            for axis, key in zip(axes, ("drift", "seen"), strict=True):
                label = name if beta == next(row["beta"] for row in rows if row["method"] == name) else None
                axis.plot([r[key] for r in some], [r["win"] for r in some], marker="o", ms=4, color=color, label=label)
    axes[0].set_xlabel("drift: error on real scenes, relative to the base's, less 1")
    axes[0].set_ylabel("win rate against the base")
    axes[1].set_xlabel("share of images that show what was asked")
    axes[1].axvline(seen, color="#94a3b8", lw=1)
    for axis in axes:
        axis.axhline(0.5, color="#94a3b8", lw=1)
        axis.grid(color="#e5e7eb")
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    config = configs.parse(ShapesMatrix, __doc__)
    torch.set_num_threads(1)
    settle(config)
    if config.own:
        config = replace(config, corpus=own_lists(config))
    prepared(config)  # the encodings, once
    work: list[Cell] = [("base", 0.0, seed) for seed in config.seeds]
    # Seed by seed, so that what is there after a while is whole over the methods.
    work += [(name, beta, seed) for seed in config.seeds for name, beta in pairs(config)]
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        for _ in progress.track(pool.map(partial(run, config=config), work), "cells", len(work)):
            pass
    rows = table(config)
    base = [json.loads(cell_file(config, "base", 0, 0, seed).read_text()) for seed in config.seeds]
    seen = float(np.mean([cell["seen"] for cell in base]))
    print(f"the base draws what is asked in {seen:.3f} of {sum(len(cell['seen']) for cell in base)} images")
    if "distance" in base[0]:
        print(f"and is {np.mean([cell['distance'] for cell in base]):.4f} away from the targets")
    print("\n| method | beta | steps | win rate | drift | seen | distance |\n|---|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        win = f"{row['win']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        beta = "" if row["method"] == "sft" else f"{row['beta']:g}"
        drift = f"{row['drift']:+.3f} ±{row['drift_spread']:.3f}"
        distance = "" if row["distance"] is None else f"{row['distance']:.4f}"
        print(f"| {row['method']} | {beta} | {row['steps']} | {win} | {drift} | {row['seen']:.3f} | {distance} |")
    gaps = differences(rows, "lpo")
    for gap in gaps:
        beta = "" if gap["method"] == "sft" else f", beta {gap['beta']:g}"
        interval = f"{gap['difference']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
        print(f"lpo minus {gap['method']}{beta}, {gap['steps']} steps: {interval}")
    rows = [{name: value for name, value in row.items() if name not in ("won", "captions")} for row in rows]
    out = Path(config.out)
    (out / "table.json").write_text(
        json.dumps({"config": configs.to_dict(config), "seen": seen, "rows": rows, "lpo_minus": gaps}, indent=2)
    )
    plot(rows, seen, out / "frontier.png")


if __name__ == "__main__":
    main()
