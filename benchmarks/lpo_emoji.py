"""Diffusion-LPO and its comparators on real images, small: do the signs agree with what ``shapes`` says?

    git clone https://github.com/googlefonts/noto-emoji
    python benchmarks/lpo_emoji.py --emoji noto-emoji/png/128 --out benchmarks/out/lpo_emoji

Noto emoji (Apache-2.0) with their Unicode names as captions; or a Parquet file with columns key, caption and image. A
base is trained from nothing on those of 80% of the base code points. For captions of these it draws lists of images,
which are ranked by a scorer stated in advance, colourfulness (Hasler and Suesstrunk, 2003). Each method learns from
these lists and is compared with the base at the same noise, on captions of the other code points:

    win rate    share of captions and noises at which the tuned image is more colourful, ties half
    drift       denoising error on the real emoji of these code points, relative to the base's, less 1

The base is far from good, and one scorer is no person: this checks signs, and nothing is said about scale.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from emoji import read_emoji, split_of
from PIL import Image
from ranked_corpus import picture, ranked_list, write_corpus

from palate import artifacts, progress
from palate import config as configs
from palate.artifacts import Artifact
from palate.config import scale
from palate.corpora.pictures import decode_image
from palate.corpora.schema import RANKED_LISTS
from palate.corpora.worlds.shapes import SCENES
from palate.evaluation.scorers import colourfulness
from palate.evaluation.statistics import estimate
from palate.lpo.denoising import noise_schedule
from palate.lpo.encoding import EncodeConfig
from palate.lpo.networks import WeightsConfig
from palate.lpo.samples import image_source
from palate.lpo.sampling import SampleConfig, generate
from palate.lpo.stages import LpoConfig, drawing_of, encode_lists, pipeline
from palate.lpo.training import Denoiser, ObjectiveConfig, TuneConfig, images_of
from palate.models.diffusion import load_diffusion
from palate.models.small_diffusion import build_small_pipeline
from palate.training.parallel import World

SIDE = 16
METHODS = {
    "sft": (ObjectiveConfig(objective="sft"), 1),
    "dpo-random": (ObjectiveConfig(objective="dpo", pairs="random"), 2),
    "dpo-extreme": (ObjectiveConfig(objective="dpo", pairs="extreme"), 2),
    "gp-dpo": (ObjectiveConfig(objective="gp-dpo"), 8),
    "lpo": (ObjectiveConfig(objective="lpo"), 8),
}


@dataclass(frozen=True)
class EmojiBenchmark:
    """What to measure; see the module's text."""

    emoji: str
    """Folder of Noto's PNG files, or a Parquet file of captioned emoji."""
    out: str = scale("benchmarks/out/lpo_emoji")
    """Base, lists, runs and the table."""
    base_steps: int = 6000
    """Of training the base, with batches of 32."""
    captions: int = 300
    """Whose images are ranked, eight each."""
    steps: int = 60
    """Of tuning."""
    images: int = 48
    """Images through the network a step."""
    kl_beta: float = 2000.0
    """Of all methods but sft."""
    learning_rate: float = 2e-4
    """AdamW's, the same for every method."""
    comparisons: int = 400
    """Of a method at one seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the tuning and of the images that are compared."""
    sample: SampleConfig = field(default_factory=partial(SampleConfig, sampler_steps=20, guidance=2.0, batch=100))
    workers: int = scale(2)
    """Processes, of one thread each."""


def scene_table(scenes: Sequence[dict[str, Any]]) -> dict[str, pa.Table]:
    return {"scenes/part-00000.parquet": pa.Table.from_pylist(list(scenes), schema=SCENES)}


def settings(config: EmojiBenchmark, corpus: Artifact, out: str, **changes: Any) -> LpoConfig:
    return LpoConfig(
        lists=corpus.url,
        out=f"{config.out}/{out}",
        encode=EncodeConfig(resolution=SIDE, latent_dtype="float32", encode_batch=256),
        weights=WeightsConfig(weights="full"),
        grid=0,
        sample=config.sample,
        **changes,
    )


def base_of(config: EmojiBenchmark) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """The trained base, the emoji with their splits, their images and their scenes."""
    rows = read_emoji(config.emoji)
    for row in rows:
        row["split"] = split_of(row["key"])
    small = [decode_image(row["image"]).resize((SIDE, SIDE), Image.Resampling.BOX) for row in rows]
    pictures = [picture(row["key"], image) for row, image in zip(rows, small, strict=True)]
    scenes = [{"image_uid": row["key"], "caption": row["caption"], "split": row["split"]} for row in rows]
    corpus = write_corpus(f"{config.out}/corpus", pictures, [], scene_table(scenes))
    words = {"".join(filter(str.isascii, word)) for row in rows for word in row["caption"].split()}
    fresh = Path(config.out) / "fresh"
    if not fresh.exists():
        deviation = float(np.std([np.asarray(image) / 127.5 - 1 for image in small]))
        letters = [word for word in sorted(words) if word.isalpha()]
        build_small_pipeline(letters, 0, side=SIDE, pixel_std=deviation).save_pretrained(fresh)
    base = settings(
        config,
        corpus,
        "base",
        model=str(fresh),
        train_on="images",
        learn=ObjectiveConfig(objective="denoising"),
        tune=TuneConfig(
            steps=config.base_steps,
            batch=32,
            micro_batch=32,
            learning_rate=2e-3,
            schedule="cosine",
            checkpoint_every=1000,
        ),
    )
    return str(pipeline(base, World()).local_folder("pipeline")), rows, pictures, scenes


def ranked(config: EmojiBenchmark, base: str, rows: Sequence[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Images that the base draws for training captions, and the lists that the scorer makes of them."""
    captions = sorted({row["caption"] for row in rows if row["split"] == "train"})
    chosen = [captions[place * len(captions) // config.captions] for place in range(config.captions)]
    prompts = [caption for caption in chosen for _ in range(8)]
    made = generate(load_diffusion(base).pipeline, prompts, list(range(len(prompts))), config.sample, label="to rank")
    pictures, lists = [], []
    for number, caption in enumerate(chosen):
        drawn = {f"drawn-{number}-{place}": made[8 * number + place] for place in range(8)}
        best_first = sorted(drawn, key=lambda uid, drawn=drawn: -colourfulness(drawn[uid]))  # type: ignore[misc]
        pictures += [picture(uid, image) for uid, image in drawn.items()]
        lists.append(ranked_list(str(number), caption, best_first))
    return pictures, lists


def run(task: tuple[str, int], config: EmojiBenchmark, base: str) -> dict[str, Any]:
    """Tune by one method at one seed; colourfulness of what is drawn, and the error on real held-out emoji."""
    name, seed = task
    torch.set_num_threads(1)
    corpus = artifacts.open_artifact(f"{config.out}/ranked", RANKED_LISTS)
    folder, chosen = base, settings(config, corpus, "unused", model=base)
    if name != "base":
        learn, images = METHODS[name]
        batch = config.images // images
        tune = TuneConfig(
            steps=config.steps,
            batch=batch,
            micro_batch=batch,
            learning_rate=config.learning_rate,
            checkpoint_every=1000,
        )
        learn = replace(learn, kl_beta=config.kl_beta)
        chosen = settings(config, corpus, f"runs/{name}-{seed}", model=base, seed=seed, tune=tune, learn=learn)
        folder = str(pipeline(chosen, World()).local_folder("pipeline"))
    loaded = load_diffusion(folder)
    scenes = pq.read_table(corpus.local("scenes/part-00000.parquet")).to_pylist()
    captions = sorted({row["caption"] for row in scenes if row["split"] == "test"})
    prompts = [captions[place % len(captions)] for place in range(config.comparisons)]
    seeds = [1_000_000 * (seed + 1) + place for place in range(config.comparisons)]
    made = generate(loaded.pipeline, prompts, seeds, config.sample, label=name)
    shared = encode_lists(replace(chosen, out=f"{config.out}/shared", model=base), "cpu")
    held_out = image_source(corpus, "test", drawing_of(loaded, shared, chosen.draw))
    real = images_of([held_out.load(place, 77 + place) for place in range(len(held_out))], torch.device("cpu"))
    network = loaded.denoiser
    denoiser = Denoiser(network, loaded.family, noise_schedule(loaded.scheduler), lambda: nullcontext(network))
    with torch.no_grad():
        error = float(denoiser.errors(network, real)[0].mean())
    return {"scores": [colourfulness(image) for image in made], "error": error, "captions": prompts}


def main() -> None:
    config = configs.parse(EmojiBenchmark, __doc__)
    base, rows, pictures, scenes = base_of(config)
    if not artifacts.exists(f"{config.out}/ranked"):
        drawn, lists = ranked(config, base, rows)
        write_corpus(f"{config.out}/ranked", [*pictures, *drawn], lists, scene_table(scenes))
    corpus = artifacts.open_artifact(f"{config.out}/ranked", RANKED_LISTS)
    encode_lists(settings(config, corpus, "shared", model=base), "cpu")  # once, for all processes
    tasks = [(name, seed) for seed in config.seeds for name in ("base", *METHODS)]
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        results = pool.map(partial(run, config=config, base=base), tasks)
        done = dict(zip(tasks, progress.track(results, "runs", len(tasks)), strict=True))
    print("| method | win rate by colourfulness | drift |\n|---|--:|--:|")
    table = []
    for name in METHODS:
        wins, captions, drifts = [], [], []
        for seed in config.seeds:
            ours, theirs = done[name, seed], done["base", seed]
            wins += ((np.sign(np.subtract(ours["scores"], theirs["scores"])) + 1) / 2).tolist()
            captions += ours["captions"]
            drifts.append(ours["error"] / theirs["error"] - 1)
        win = estimate(wins, captions)
        table.append(
            {"method": name, "win": win.value, "low": win.low, "high": win.high, "drift": float(np.mean(drifts))}
        )
        print(f"| {name} | {win.value:.3f} [{win.low:.3f}, {win.high:.3f}] | {np.mean(drifts):+.3f} |")
    (Path(config.out) / "table.json").write_text(
        json.dumps({"config": configs.to_dict(config), "rows": table}, indent=2)
    )


if __name__ == "__main__":
    main()
