"""The loop from feedback to the next model, round by round, through the real store: images, then text.

    python benchmarks/feedback_loop.py images --corpus CORPUS --base RUN/tuned/pipeline --out benchmarks/out/loop-images
    python benchmarks/feedback_loop.py text --run RUN --out benchmarks/out/loop-text

Images: CORPUS is ``jobs/prepare.py shapes`` with one group, the base what ``jobs/lpo.py --train-on images`` trained on
it. In a round the current model draws four images of each of some training captions, simulated annotators rank them
(Plackett-Luce over their own utility), the rankings go over HTTP into the store of an image server, ``jobs/prepare.py
feedback`` makes all that there are by then into lists, and LPO tunes the current model on them. Then it draws held-out
captions at the base's seeds, and the win rate by the annotators' mean utility says how much better it is. The control
does the same with every ranking in random order, and the arms are compared with each other, too: tuning on anything
moves a model.

Text: RUN is a run of ``jobs/card.py`` on ``personas``, which new people of the same world meet. Of each, 1, 2, 4 and 8
edited answers go into the store as ``POST /v1/feedback`` puts them there, the server's fit follows, and bits a token of
other texts of theirs say how well it knows them. The control's edits are another new person's, of another family of
styles; those of ``same family`` are of somebody who differs in personal traits alone.
"""

import base64
import io
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
from fastapi.testclient import TestClient
from matplotlib.figure import Figure
from PIL import Image
from tyro.conf import subcommand

from palate import artifacts, progress
from palate import config as configs
from palate.card import features, fitting
from palate.card.correction import candidate_rows
from palate.card.preferences import Positions, log_ratios
from palate.card.prompts import prompt_ids
from palate.config import scale
from palate.corpora.schema import RANKED_LISTS
from palate.corpora.worlds import personas, shapes
from palate.evaluation.images import crossed, win_rate, wins
from palate.evaluation.statistics import estimate, paired_difference
from palate.lpo.encoding import EncodeConfig
from palate.lpo.networks import WeightsConfig
from palate.lpo.sampling import SampleConfig, generate
from palate.lpo.stages import LpoConfig, pipeline
from palate.lpo.training import ObjectiveConfig, TuneConfig
from palate.models.causal_lm import answer_ids
from palate.models.diffusion import load_diffusion
from palate.models.shape_classifier import sees, trained_classifier
from palate.serving.image_http import create_image_app
from palate.serving.image_service import ImageService, ImageSettings
from palate.serving.served_run import Personal, ServedRun, Written, fit_person, load_run, prepare_fit
from palate.serving.service import written
from palate.training.parallel import World
from palate.users.preparation import FeedbackConfig
from palate.users.preparation import prepare as prepare_feedback
from palate.users.records import Fitted, Person
from palate.users.store import Store, open_store

ARMS = ("feedback", "control")
TENANT = "default"
NOBODY = "nobody 0"
TEXT_ARMS = ("feedback", "same family", "control")
COLOURS = {"feedback": "#0f766e", "same family": "#7c3aed", "control": "#a16207"}


@dataclass(frozen=True, kw_only=True)
class ImagesLoop:
    """Rankings of images and LPO."""

    corpus: str
    """Prepared by jobs/prepare.py shapes, with one group."""
    base: str
    """Folder of the base pipeline."""
    out: str = scale("benchmarks/out/loop-images")
    """Runs, one JSON file a round, the table and the plot."""
    rounds: int = 4
    """Of drawing, ranking and tuning."""
    rankings: int = 32
    """Of a round, each of four images."""
    steps: int = 10
    """Of tuning in a round."""
    lists: int = 8
    """Of a step."""
    learning_rate: float = 2e-4
    """AdamW's, all weights."""
    kl_beta: float = 2000.0
    """Against the model of the round before."""
    comparisons: int = 72
    """Of a model with the base, at one seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of captions, noise, rankings and training."""
    sample: SampleConfig = field(default_factory=partial(SampleConfig, sampler_steps=10, guidance=2.0, batch=72))
    workers: int = scale(1)
    """Processes, of one thread each."""


@dataclass(frozen=True, kw_only=True)
class TextLoop:
    """Edited answers and the fit of a vector."""

    run: str
    """A run of jobs/card.py on personas."""
    out: str = scale("benchmarks/out/loop-text")
    """The store, the table and the plot."""
    people: int = 8
    """New people."""
    tests: int = 3
    """Held-out texts of each."""
    rounds: tuple[int, ...] = (1, 2, 4, 8)
    """Edited answers of a person by the end of each round."""
    seed: int = 1000
    """Of the new people; another than that of the run's corpus."""


# Images


@dataclass(frozen=True)
class Judge:
    """Held-out captions at seeds, and the annotators' mean taste."""

    captions: list[str]
    seeds: list[int]
    weights_1F: np.ndarray

    def look(self, config: ImagesLoop, model: str, file: Path) -> None:
        """Draw the captions, and leave the images and their utilities in a cell."""
        images = draw(config, model, self.captions, self.seeds)
        liked = shapes.utilities(shapes.measure(pixels(images)), self.weights_1F)[:, 0]
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file.with_suffix(".npy"), np.stack([np.asarray(image) for image in images]))
        write(file, {"utilities": liked.tolist(), "captions": self.captions})


def judge_of(config: ImagesLoop, seed: int) -> Judge:
    corpus = artifacts.open_artifact(config.corpus, RANKED_LISTS)
    splits = shapes.caption_splits(corpus.config["seed"])
    found = sorted(caption for caption, split in splits.items() if split == "test")
    captions = [found[place % len(found)] for place in range(config.comparisons)]
    seeds = [1_000_000 * (seed + 1) + place for place in range(config.comparisons)]
    weights = np.mean([one.weights for one in shapes.read_annotators(corpus)], axis=0, keepdims=True)
    return Judge(captions, seeds, weights)


def draw(config: ImagesLoop, model: str, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    return generate(load_diffusion(model).pipeline, prompts, seeds, config.sample, label="draw")


def pixels(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.float64).transpose(2, 0, 1) / 255 for image in images])


def run_images(task: tuple[str, int], config: ImagesLoop) -> None:
    """All rounds of one arm at one seed; goes on where it was."""
    arm, seed = task
    torch.set_num_threads(1)
    judge = judge_of(config, seed)
    if arm == "base":
        if not cell(config, arm, 0, seed).exists():
            judge.look(config, config.base, cell(config, arm, 0, seed))
        return
    folder = Path(config.out) / f"{arm}-{seed}"
    settings = ImageSettings(
        database=f"sqlite:///{folder}/palate.db", feedback=f"{folder}/feedback", require_keys=False
    )
    service = ImageService(settings)
    client = TestClient(create_image_app(service))
    model = config.base
    for number in range(1, config.rounds + 1):
        done = cell(config, arm, number, seed).exists()
        if not done:
            send_rankings(config, client, model, arm, seed, number)
        lists = f"{folder}/lists-{number}"
        if not done:
            prepare_feedback(
                FeedbackConfig(
                    database=settings.database,
                    images=str(settings.feedback),
                    tenant=TENANT,
                    out=lists,
                    validation=0.0,
                    test=0.0,
                )
            )
        tuned = pipeline(tuning(config, lists, f"{folder}/run-{number}", model, seed), World())
        model = str(tuned.local_folder("pipeline"))
        if not done:
            judge.look(config, model, cell(config, arm, number, seed))
    service.stop()


def send_rankings(config: ImagesLoop, client: TestClient, model: str, arm: str, seed: int, number: int) -> None:
    """Draw, have people rank, and post; the arms draw the same captions at the same seeds."""
    corpus = artifacts.open_artifact(config.corpus, RANKED_LISTS)
    splits = shapes.caption_splits(corpus.config["seed"])
    captions = sorted(caption for caption, split in splits.items() if split == "train")
    people = shapes.read_annotators(corpus)
    random = np.random.default_rng([seed, number])
    asked = [captions[place] for place in random.integers(len(captions), size=config.rankings)]
    seeds = [10_000_000 * (seed + 1) + 100_000 * number + place for place in range(4 * config.rankings)]
    images = draw(config, model, [caption for caption in asked for _ in range(4)], seeds)
    measured_NF = shapes.measure(pixels(images))
    for place, caption in enumerate(asked):
        person = people[place % len(people)]
        shown, features_4F = images[4 * place : 4 * place + 4], measured_NF[4 * place : 4 * place + 4]
        order = shapes.rank(shapes.utilities(features_4F, np.array([person.weights]))[:, 0], random)
        if arm == "control":
            order = random.permutation(4).tolist()
        files = list(dict.fromkeys(png(shown[one]) for one in order))  # equal images have one place, their best
        if len(files) < 2:
            continue
        body = {"user": person.user_id, "prompt": caption, "id": f"{number}-{place}"}
        answer = client.post("/v1/feedback", json={**body, "images": [{"b64_json": one} for one in files]})
        if answer.status_code != 201:
            raise RuntimeError(answer.text)


def png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def tuning(config: ImagesLoop, lists: str, out: str, model: str, seed: int) -> LpoConfig:
    return LpoConfig(
        lists=lists,
        out=out,
        model=model,
        seed=seed,
        encode=EncodeConfig(resolution=shapes.SIDE, latent_dtype="float32", encode_batch=256),
        learn=ObjectiveConfig(kl_beta=config.kl_beta),
        weights=WeightsConfig(weights="full"),
        tune=TuneConfig(
            steps=config.steps, learning_rate=config.learning_rate, batch=config.lists, micro_batch=config.lists
        ),
        grid=0,
    )


def cell(config: ImagesLoop, arm: str, number: int, seed: int) -> Path:
    return Path(config.out) / "cells" / f"{arm}_{number}_{seed}.json"


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(file)


def settle(config: Any, *aside: str) -> None:
    """Say in OUT what decides its figures, and refuse to go on with others there."""
    decides = {name: value for name, value in configs.to_dict(config).items() if name not in ("out", *aside)}
    file = Path(config.out) / "settings.json"
    if file.exists() and (before := json.loads(file.read_text())) != decides:
        other = {name: (before.get(name), value) for name, value in decides.items() if before.get(name) != value}
        raise SystemExit(f"{config.out} holds figures of other settings, {other}: choose another --out")
    write(file, decides)


def images_table(config: ImagesLoop) -> list[dict[str, Any]]:
    """A row a round and arm over the seeds that all arms have finished; intervals over captions and seeds."""
    wanted = [("base", 0), *((arm, number) for arm in ARMS for number in range(1, config.rounds + 1))]
    seeds = [seed for seed in config.seeds if all(cell(config, *one, seed).exists() for one in wanted)]
    if not seeds:
        raise SystemExit(f"{config.out}: no seed is finished")

    classifier = trained_classifier()

    def read(arm: str, number: int) -> list[dict[str, Any]]:
        found = []
        for seed in seeds:
            one = json.loads((file := cell(config, arm, number, seed)).read_text())
            images_N3HW = torch.from_numpy(np.load(file.with_suffix(".npy"))).permute(0, 3, 1, 2).float() / 255
            found.append({**one, "seen": [bool(shown) for shown in sees(classifier, images_N3HW, one["captions"])]})
        return found

    def compared(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> np.ndarray:
        pairs = zip(ours, theirs, strict=True)
        return np.stack([wins(np.array([a["utilities"]]), np.array([b["utilities"]]))[0] for a, b in pairs])

    base = read("base", 0)
    units = np.unique(base[0]["captions"], return_inverse=True)[1]
    rows = [{"round": 0, "arm": "base", "seen": float(np.mean([one["seen"] for one in base])), "seeds": len(seeds)}]
    for number in range(1, config.rounds + 1):
        won, drawn = {}, {arm: read(arm, number) for arm in ARMS}
        for arm, cells in drawn.items():
            won[arm] = compared(cells, base)
            gain = np.mean([np.subtract(a["utilities"], b["utilities"]) for a, b in zip(cells, base, strict=True)])
            found = win_rate(won[arm], units)
            rows.append(
                {
                    "round": number,
                    "arm": arm,
                    **{"win": found.value, "low": found.low, "high": found.high},
                    "gain": float(gain),
                    "seen": float(np.mean([one["seen"] for one in cells])),
                    "win_by_seed": won[arm].mean(1).tolist(),
                    "seeds": len(seeds),
                }
            )
        gap = crossed(won["feedback"] - won["control"], units)
        rows.append({"round": number, "arm": "difference", "win": gap.value, "low": gap.low, "high": gap.high})
        direct = win_rate(compared(drawn["feedback"], drawn["control"]), units)
        interval = {"win": direct.value, "low": direct.low, "high": direct.high}
        rows.append({"round": number, "arm": "feedback against control", **interval})
    return rows


def images_loop(config: ImagesLoop) -> None:
    torch.set_num_threads(1)
    settle(config, "rounds", "seeds", "workers")
    # Seed by seed, so that what is there after a while is whole.
    tasks = [(arm, seed) for seed in config.seeds for arm in ("base", *ARMS)]
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(run_images, config=config), tasks))
    images_report(config)


def images_report(config: ImagesLoop) -> None:
    rows = images_table(config)
    print("| round | rankings | arm | win rate | gain | seen |\n|--:|--:|---|--:|--:|--:|")
    for row in rows:
        if row["arm"] == "base":
            print(f"| 0 | 0 | base | | | {row['seen']:.3f} |")
            continue
        interval = f"{row['win']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        rest = f"{row['gain']:+.2f} | {row['seen']:.3f}" if "gain" in row else " | "
        print(f"| {row['round']} | {row['round'] * config.rankings} | {row['arm']} | {interval} | {rest} |")
    report(config, rows, "round", "win", "win rate against the base, held-out captions", 0.5, Path(config.out))


# Text


@dataclass(frozen=True)
class Answer:
    """What somebody was asked, and what they would have written."""

    input: str
    output: str


@dataclass(frozen=True)
class NewPerson:
    """Texts of somebody whom no run has seen; the tests are about things that the others do not mention."""

    family: int
    texts: list[Answer]
    tests: list[Answer]


def new_people(config: TextLoop) -> list[NewPerson]:
    made = personas.prepare(
        personas.PersonasConfig(
            out=f"{config.out}/people",
            people=config.people,
            items=max(config.rounds),
            questions=config.tests,
            seed=config.seed,
        )
    )
    found: dict[str, dict[str, list[Answer]]] = {"items": {}, "questions": {}}
    for kind, by_user in found.items():
        for path in made.paths(kind, ".parquet"):
            for row in pq.read_table(made.local(path)).to_pylist():
                by_user.setdefault(row["user_id"], []).append(Answer(row["input"], row["output"]))
    known = personas.read_personas(made)
    return [
        NewPerson(known[user].family, found["items"][user], found["questions"][user]) for user in sorted(found["items"])
    ]


@dataclass
class Reader:
    """A run, and what its models have read: texts come again in later rounds, and in other people's hands."""

    run: ServedRun
    read: dict[tuple[Any, ...], Positions] = field(default_factory=dict)

    def positions(self, branch: features.Branches) -> Positions:
        key = (branch.adapter, tuple(branch.prompt_ids), *map(tuple, branch.answers))
        if key not in self.read:
            run = self.run
            self.read[key] = features.extract(run.loaded, run.rows, run.head.features, [branch], run.head.top_k)
        return self.read[key]

    def fit(self, texts: Sequence[Written]) -> Personal:
        """``fit_person`` without reading again what was read."""
        run, prepared = self.run, prepare_fit(self.run, texts)
        parts = [self.positions(branch) for some in prepared.passes for branch in some]
        numbered = [features.renumbered(part, number) for number, part in enumerate(parts)]
        found = fitting.fit_vector(features.concatenate(numbered), run.fitting_head, run.prior)
        return Personal(prepared.cluster, found.vector_J)

    def bits(self, personal: Personal, text: Answer) -> float:
        """Bits a token of a text as the run decodes for this person."""
        run = self.run
        prompt = prompt_ids(run.loaded, run.task, text.input, [], run.max_prompt_tokens)
        answer = answer_ids(run.loaded, text.output)[: run.max_answer_tokens]
        positions = self.positions(features.Branches(prompt, (answer,), personal.cluster))
        delta_Nk = candidate_rows(run.head, positions.features_Nd, positions.candidates_Nk) @ personal.vector_J
        ratios_N = log_ratios(delta_Nk, positions.log_probs_Nk, positions.target_N, run.beta)
        return float(-(positions.target_log_prob_N + ratios_N).mean() / np.log(2))


def fit(reader: Reader, store: Store, user: str) -> tuple[Person, Personal]:
    """The fit of somebody whose feedback waits for it, as the text server makes and keeps it."""
    version = reader.run.version
    (person,) = store.claim_stale(version, "benchmark", seconds=600)
    personal = reader.fit(written(person))
    vector_J = personal.vector_J.float().numpy()
    saved = store.save_fitted(
        TENANT, user, Fitted(version, person.version, personal.cluster, vector_J, len(person.texts))
    )
    if person.user_id != user or not saved:
        raise RuntimeError(f"the fit of {user} was not saved")
    return person, personal


def others(people: Sequence[NewPerson], place: int) -> dict[str, NewPerson]:
    """Whose edits each arm gets: the person's own, the next of the same family's, the next of another's."""
    turned = [people[(place + step) % len(people)] for step in range(1, len(people))]
    mine = people[place].family
    return {
        "feedback": people[place],
        "same family": next(one for one in turned if one.family == mine),
        "control": next(one for one in turned if one.family != mine),
    }


def text_loop(config: TextLoop) -> None:
    """Everybody's scores, going on after the people who are finished."""
    torch.set_num_threads(1)
    settle(config)
    run = load_run(config.run)
    if run.history_k:
        raise SystemExit(f"{config.run} quotes history in its prompts, which is not measured here: give another run")
    reader, people = Reader(run), new_people(config)
    file = Path(config.out) / "scores.json"
    scores: dict[str, list[float]] = json.loads(file.read_text()) if file.exists() else {}
    last = None
    with TemporaryDirectory() as folder, open_store(f"sqlite:///{folder}/palate.db") as store:
        done = len(scores.get(NOBODY, ())) // config.tests
        for place, person in enumerate(progress.track(people[done:], "people"), done):
            for text in person.tests:
                scores.setdefault(NOBODY, []).append(reader.bits(run.population, text))
            for arm, whose in others(people, place).items():
                user, sent = f"{place}-{arm.replace(' ', '-')}", 0
                for number in config.rounds:
                    for text in whose.texts[sent:number]:
                        store.add_feedback(TENANT, user, text.input, "", text.output)
                    sent = number
                    last = fit(reader, store, user)
                    found = [reader.bits(last[1], text) for text in person.tests]
                    scores.setdefault(f"{arm} {number}", []).extend(found)
            write(file, scores)
    if last is not None:
        check_fit(run, *last)
    text_table(config, scores)


def text_table(config: TextLoop, scores: dict[str, list[float]]) -> None:
    """The table and the plot; intervals are over people."""
    nobody = scores[NOBODY]
    users = [f"new-{place // config.tests}" for place in range(len(nobody))]
    rows: list[dict[str, Any]] = []
    for name, values in scores.items():
        arm, _, number = name.rpartition(" ")
        found, gap = estimate(values, users), paired_difference(values, nobody, users)
        rows.append(
            {
                "edits": int(number),
                "arm": arm,
                **{"bits": found.value, "low": found.low, "high": found.high},
                "change": {"value": gap.value, "low": gap.low, "high": gap.high},
            }
        )
    for arm in TEXT_ARMS[1:]:
        for number in config.rounds:
            gap = paired_difference(scores[f"feedback {number}"], scores[f"{arm} {number}"], users)
            row = {"edits": number, "arm": f"feedback - {arm}", "bits": gap.value, "low": gap.low, "high": gap.high}
            rows.append(row)
    rows.sort(key=lambda row: row["edits"])
    print(f"{len(set(users))} new people, {config.tests} held-out texts each")
    print("| edits | whose | bits a token | change from none |\n|--:|---|--:|--:|")
    for row in rows:
        change = row.get("change")
        interval = f"{row['bits']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        moved = "" if not change or not row["edits"] else "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**change)
        print(f"| {row['edits']} | {row['arm']} | {interval} | {moved} |")
    base = next(row["bits"] for row in rows if row["arm"] == "nobody")
    report(config, rows, "edits", "bits", "bits a token of held-out own texts", base, Path(config.out))


def check_fit(run: ServedRun, person: Person, personal: Personal) -> None:
    """Refuse to report if the server's own fit is another than the one that was measured."""
    fitting_slowly = fit_person(run, prepare_fit(run, written(person)))
    while True:
        try:
            next(fitting_slowly)
        except StopIteration as stopped:
            theirs: Personal = stopped.value
            break
    away = float((theirs.vector_J - personal.vector_J).norm() / personal.vector_J.norm())
    print(f"the server's own fit of the last person is {away:.1e} of its length away")
    if theirs.cluster != personal.cluster or away > 1e-2:
        raise SystemExit("the fit that was measured is not the server's")


def report(config: Any, rows: list[dict[str, Any]], x: str, y: str, label: str, line: float, out: Path) -> None:
    """The table as JSON, and a line an arm with its intervals."""
    write(out / "table.json", {"config": configs.to_dict(config), "rows": rows})
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for arm in COLOURS:
        some = [row for row in rows if row["arm"] == arm]
        if not some:
            continue
        values, at = [row[y] for row in some], [row[x] for row in some]
        spans = [[row[y] - row["low"] for row in some], [row["high"] - row[y] for row in some]]
        axes.errorbar(at, values, yerr=spans, marker="o", capsize=3, color=COLOURS[arm], label=arm)
    axes.axhline(line, color="#94a3b8", lw=1)
    axes.set_xticks(sorted({row[x] for row in rows if row["arm"] in COLOURS}))
    axes.set_xlabel({"round": "round", "edits": "edited answers of a person"}[x])
    axes.set_ylabel(label)
    axes.grid(color="#e5e7eb")
    axes.legend(frameon=False)
    figure.savefig(out / "loop.png", dpi=150)


def main() -> None:
    command = Annotated[ImagesLoop, subcommand("images")] | Annotated[TextLoop, subcommand("text")]
    config = configs.parse(command, __doc__)
    images_loop(config) if isinstance(config, ImagesLoop) else text_loop(config)


if __name__ == "__main__":
    main()
