"""Taste of one's own against everybody's, on ``shapes`` with groups that disagree: for people the training saw and not.

    python benchmarks/lpo_personal.py --corpus CORPUS --base RUN/tuned/pipeline --out benchmarks/out/lpo_personal

CORPUS is ``jobs/prepare.py shapes`` with several groups and held-out people. For each seed two runs learn from the same
training lists: ``pooled`` tunes all weights for everybody, ``personal`` the branch that reads a vector, computed from
each person's example lists. Then images of test captions are drawn at the same noise and judged by each person's true
utility:

    pooled        the pooled model
    own           the personal model with the person's vector
    another's     the same with the vector of somebody of another group: what is not personal stays in both

Win rates count signs; gain is the mean difference in utility, whose deviation among images of a caption is about 2.5.
Drift: denoising error on real test scenes, people's vectors in turn, relative to the base's, less 1.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palate import artifacts, progress
from palate import config as configs
from palate.artifacts import Artifact
from palate.config import scale
from palate.corpora.schema import RANKED_LISTS
from palate.corpora.worlds import shapes
from palate.evaluation.statistics import estimate
from palate.lpo.denoising import noise_schedule
from palate.lpo.encoding import EncodeConfig, Encoded, encode
from palate.lpo.networks import WeightsConfig
from palate.lpo.personal import load_branch, set_people
from palate.lpo.samples import DrawConfig, image_source, read_lists
from palate.lpo.sampling import SampleConfig, generate
from palate.lpo.stages import LpoConfig, PersonalConfig, drawing_of, pipeline
from palate.lpo.training import Denoiser, ObjectiveConfig, TuneConfig, images_of
from palate.models.diffusion import LoadedDiffusion, load_diffusion
from palate.models.shape_classifier import sees, trained_classifier
from palate.training.parallel import World


@dataclass(frozen=True)
class PersonalBenchmark:
    """What to measure; see the module's text."""

    corpus: str
    """Prepared by jobs/prepare.py shapes, with several groups and held-out people."""
    base: str
    """Folder of the base pipeline."""
    out: str = scale("benchmarks/out/lpo_personal")
    """Runs, figures and the table."""
    pooled_steps: int = 60
    """Of twelve lists, in which all weights are tuned for everybody."""
    pooled_rate: float = 2e-4
    """AdamW's."""
    personal_steps: int = 300
    """Of twelve lists, in which the branch is trained."""
    personal_rate: float = 2e-3
    """AdamW's."""
    kl_beta: float = 2000.0
    """Of both."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of training and of the images."""
    images: int = 40
    """Images of each person, system and seed."""
    sample: SampleConfig = field(default_factory=partial(SampleConfig, sampler_steps=20, guidance=2.0, batch=100))
    workers: int = scale(2)
    """Processes, of one thread each."""


def settings(config: PersonalBenchmark, seed: int, kind: str) -> LpoConfig:
    personal = kind == "personal"
    return LpoConfig(
        lists=config.corpus,
        out=f"{config.out}/{kind}-{seed}",
        model=config.base,
        seed=seed,
        encode=EncodeConfig(resolution=shapes.SIDE, latent_dtype="float32", encode_batch=256),
        learn=ObjectiveConfig(kl_beta=config.kl_beta),
        weights=WeightsConfig() if personal else WeightsConfig(weights="full"),
        tune=TuneConfig(
            steps=config.personal_steps if personal else config.pooled_steps,
            learning_rate=config.personal_rate if personal else config.pooled_rate,
            batch=12,
            micro_batch=12,
        ),
        personal=PersonalConfig(personal="examples" if personal else "none"),
        grid=0,
    )


def run(task: tuple[str, int], config: PersonalBenchmark) -> dict[str, Any]:
    """Train one model and draw with it; utilities by person, and what the classifier sees."""
    kind, seed = task
    torch.set_num_threads(1)
    tuned = pipeline(settings(config, seed, kind), World()) if kind != "base" else None
    corpus = artifacts.open_artifact(config.corpus, RANKED_LISTS)
    captions = sorted(set(read_lists(corpus, "test")["caption"].to_pylist()))
    people = shapes.read_annotators(corpus)
    folder = config.base if tuned is None or kind == "personal" else str(tuned.local_folder("pipeline"))
    loaded = load_diffusion(folder)
    random = np.random.default_rng(seed)
    others = {one.user_id: random.choice([two.user_id for two in people if two.group != one.group]) for one in people}
    vectors = None
    if kind == "personal" and tuned is not None:
        vectors = load_branch(loaded.denoiser, tuned.local_folder("person"))
        set_people(loaded.denoiser, torch.ones(1))
    found: dict[str, Any] = {"errors": {}}
    for place, person in enumerate(progress.track(people, f"{kind} {seed}")):
        prompts = [captions[(place + number) % len(captions)] for number in range(config.images)]
        seeds = [1_000_000 * (seed + 1) + 1000 * place + number for number in range(config.images)]
        systems = {kind: None} if vectors is None else {"own": person.user_id, "another's": others[person.user_id]}
        for name, whose in systems.items():
            given = None
            if vectors is not None:
                given = vectors.embeddings_UJ[vectors.places[whose]].detach().expand(len(prompts), -1)
            made = generate(loaded.pipeline, prompts, seeds, config.sample, embeddings=given, label=name)
            images = np.stack([np.asarray(image, dtype=np.float64).transpose(2, 0, 1) / 255 for image in made])
            liked = shapes.utilities(shapes.measure(images), np.array([person.weights]))[:, 0]
            seen = sees(trained_classifier(), torch.from_numpy(images).float(), prompts)
            found.setdefault(name, {})[person.user_id] = {
                "utilities": liked.tolist(),
                "seen": float(seen.float().mean()),
            }
    if vectors is None:
        found["errors"][kind] = error(config, loaded, corpus, None)
    else:
        users = [person.user_id for person in people]
        for name, order in (("own", users), ("another's", [others[user] for user in users])):
            rows = vectors.embeddings_UJ[[vectors.places[user] for user in order]].detach()
            found["errors"][name] = error(config, loaded, corpus, rows)
    return found


@torch.no_grad()
def error(config: PersonalBenchmark, loaded: LoadedDiffusion, corpus: Artifact, rows_UJ: Tensor | None) -> float:
    """Denoising error on real test scenes, of these people in turn."""
    scenes = image_source(corpus, "test", drawing_of(loaded, Encoded(f"{config.out}/encoded"), DrawConfig()))
    images = images_of([scenes.load(place % len(scenes), 77 + place) for place in range(480)], torch.device("cpu"))
    if rows_UJ is not None:
        turns = rows_UJ[torch.arange(len(images)) % len(rows_UJ)]
        images = replace(images, given=replace(images.given, user_NJ=turns))
        set_people(loaded.denoiser, torch.ones(len(images)))
    network = loaded.denoiser
    denoiser = Denoiser(network, loaded.family, noise_schedule(loaded.scheduler), lambda: nullcontext(network))
    return float(denoiser.errors(network, images)[0].mean())


def main() -> None:
    config = configs.parse(PersonalBenchmark, __doc__)
    lists = artifacts.open_artifact(config.corpus, RANKED_LISTS)
    encode(lists, config.base, f"{config.out}/encoded", settings(config, 0, "base").encode)
    tasks = [(kind, seed) for seed in config.seeds for kind in ("base", "pooled", "personal")]
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        done = dict(zip(tasks, pool.map(partial(run, config=config), tasks), strict=True))
    people = shapes.read_annotators(lists)
    rows = []
    pairs = (("pooled", "base"), ("own", "base"), ("own", "pooled"), ("own", "another's"))
    for held_out in (False, True):
        some = [one.user_id for one in people if one.held_out == held_out]
        for ours, theirs in pairs:
            wins, gaps, units = [], [], []
            for seed in config.seeds:
                found: dict[str, Any] = {}
                for kind in ("base", "pooled", "personal"):
                    found |= done[kind, seed]
                for user in some:
                    gap = np.subtract(found[ours][user]["utilities"], found[theirs][user]["utilities"])
                    wins += ((np.sign(gap) + 1) / 2).tolist()
                    gaps += gap.tolist()
                    units += [user] * len(gap)
            win = estimate(wins, units)  # intervals over people
            row = {"people": "held out" if held_out else "held in", "ours": ours, "theirs": theirs}
            row["gain"] = float(np.mean(gaps))
            rows.append(
                {**row, "win": win.value, "low": win.low, "high": win.high, "comparisons": len(wins), "n": len(some)}
            )
    seen = {
        name: float(
            np.mean([one["seen"] for result in done.values() if name in result for one in result[name].values()])
        )
        for name in ("base", "pooled", "own", "another's")
    }
    print("| people | images | over | win rate | gain | comparisons |\n|---|---|---|--:|--:|--:|")
    for row in rows:
        win_rate = f"{row['win']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        what = f"{row['people']} ({row['n']}) | {row['ours']} | {row['theirs']}"
        print(f"| {what} | {win_rate} | {row['gain']:+.3f} | {row['comparisons']} |")
    errors = {name: [r["errors"][name] for r in done.values() if name in r["errors"]] for name in seen}
    drift = {name: float(np.mean(np.divide(found, errors["base"]) - 1)) for name, found in errors.items()}
    print("\nseen:", ", ".join(f"{name} {value:.3f}" for name, value in seen.items()))
    print("drift:", ", ".join(f"{name} {value:+.3f}" for name, value in drift.items()))
    content = {"config": configs.to_dict(config), "rows": rows, "seen": seen, "drift": drift}
    (Path(config.out) / "table.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
