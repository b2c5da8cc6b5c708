"""The three papers' experiments at a chosen size, and one report: claim, test, result, interval, verdict.

    OUT/card        CARD on synthetic writers: its own vectors against others', cluster and shared adapters
    OUT/lpo         Diffusion-LPO on synthetic scenes: whole lists against the base, pairs and winners
    OUT/unihetero   UniHetero on synthetic scenes: generation inside, more data, what is predicted
    OUT/report.md   all claims

Everything is an artifact: started again, the command goes on where it was. On data of your own, run the single
jobs (docs/results says what was measured how).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from palate import config as configs
from palate import progress
from palate.artifacts import ArtifactError, join, open_artifact, os_errors
from palate.card.adaptation import AdaptConfig
from palate.card.heads import PreferConfig
from palate.card.stages import CardConfig, PromptConfig
from palate.card.stages import pipeline as card_pipeline
from palate.config import scale
from palate.corpora.schema import TEXT_CORPUS
from palate.corpora.worlds import personas, scenes, shapes
from palate.distributed.launch import launch
from palate.evaluation import claims, images, reproduction
from palate.evaluation.comparison import Comparison, TextConfig
from palate.evaluation.reproduction import Line
from palate.evaluation.subject import read_run
from palate.evaluation.text_report import make_report
from palate.lpo.encoding import EncodeConfig
from palate.lpo.networks import WeightsConfig
from palate.lpo.sampling import SampleConfig
from palate.lpo.stages import LpoConfig
from palate.lpo.stages import pipeline as lpo_pipeline
from palate.lpo.training import ObjectiveConfig, TuneConfig
from palate.serving.answers import sample_answers
from palate.training.guards import TrainingStopped
from palate.unihetero.parts import PartsConfig, make_parts
from palate.unihetero.runs import RunConfig
from palate.unihetero.sweep import SweepConfig, read_runs, sweep


@dataclass(frozen=True)
class Size:
    """How large the experiments are. Fixed beforehand: nothing here was chosen by a verdict."""

    model: str
    people: int
    asked: int
    epochs: int
    base_steps: int
    steps: int
    lists: int
    lpo_seeds: int
    prompts: int
    scenes: int
    encoder_steps: int
    samples: int
    arms: tuple[str, ...]
    seeds: int
    about: str


ARMS = ("understanding", "embedding", "encoder", "pixel", "decoder", "isolated")
CONTROLS = ("capacity", "shuffled")  # which claim 1 asks for
SIZES = {
    "smoke": Size(
        model="tiny",
        people=16,
        asked=6,
        epochs=1,
        base_steps=10,
        steps=3,
        lists=24,
        lpo_seeds=1,
        prompts=4,
        scenes=128,
        encoder_steps=25,
        samples=64,
        arms=ARMS[:3],
        seeds=2,
        about="shows that all runs, and nothing of the claims",
    ),
    "small": Size(
        model="smollm2",
        people=64,
        asked=24,
        epochs=3,
        base_steps=6000,
        steps=40,
        lists=1200,
        lpo_seeds=3,
        prompts=48,
        scenes=20_000,
        encoder_steps=16_000,
        samples=8192,
        arms=ARMS[:5],
        seeds=3,
        about="three to four core hours on CPUs; docs/results/reproduction.md has what it said once",
    ),
    "full": Size(
        model="smollm2",
        people=160,
        asked=60,
        epochs=3,
        base_steps=12_000,
        steps=80,
        lists=3000,
        lpo_seeds=5,
        prompts=96,
        scenes=26_000,
        encoder_steps=16_000,
        samples=16_384,
        arms=ARMS,
        seeds=5,
        about="about a day of two cores, by the single experiments' times; not run as a whole yet",
    ),
}


# CARD's systems; metrics of its report, and what each claims.
SYSTEMS = ("base", "shared", "cluster", "card", "card-permuted", "card-mean")
CARD = (
    ("bits per token/card - card-permuted", "a person's own vector fits their texts better than another's"),
    ("trait accuracy/card - card-permuted", "answers show the person's own traits, and not just anybody's"),
    ("bits per token/card - cluster", "the vector adds to the cluster's adapter"),
    ("bits per token/cluster - shared", "an adapter a cluster beats one for everybody"),
    ("bits per token/card - base", "the whole beats the base model"),
)
OBJECTIVES = {
    "dpo": ObjectiveConfig(objective="dpo", pairs="random", kl_beta=2000.0),
    "gp-dpo": ObjectiveConfig(objective="gp-dpo", kl_beta=2000.0),
    "sft": ObjectiveConfig(objective="sft", kl_beta=2000.0),
    "lpo": ObjectiveConfig(kl_beta=2000.0),  # last: compared with those before it
}
LPO = (
    ("utility win rate/lpo", "tuning on whole lists beats the base"),
    ("utility win rate/lpo against dpo", "whole lists beat one pair of each"),
    ("utility win rate/lpo against gp-dpo", "whole lists beat all their pairs"),
    ("utility win rate/lpo against sft", "whole lists beat learning the winners"),
)
UNIHETERO = {
    1: "generation helps understanding only if what is generated inside is semantic",
    2: "the unified model gains more from more data",
    3: "predicting input embeddings beats predicting encoder outputs",
}


@dataclass(frozen=True)
class ReproduceConfig:
    """Run the papers' experiments on synthetic worlds whose truth is known."""

    out: str = scale()
    """Folder of everything."""
    size: Literal["smoke", "small", "full"] = "small"
    """smoke: minutes, to see that all runs; small: three to four core hours; full: a day, by estimate."""
    papers: tuple[Literal["card", "lpo", "unihetero"], ...] = ("card", "lpo", "unihetero")
    """Which of them."""
    workers: int = scale(2)
    """Processes of UniHetero's runs."""


def main() -> None:
    config = configs.parse(ReproduceConfig, __doc__)
    size = SIZES[config.size]
    parts: dict[str, Callable[[str, Size, int], list[Line]]] = {"card": card, "lpo": lpo, "unihetero": unihetero}
    lines: list[Line] = []
    try:
        for paper in config.papers:
            with progress.stage(paper), os_errors():
                lines += parts[paper](join(config.out, paper), size, config.workers)
        said = [f"size {config.size}: {size.about}", "on synthetic worlds; docs/results has real data and larger runs"]
        report = reproduction.write(lines, config.out, "Three papers' claims, tested", said)
    except (ArtifactError, TrainingStopped, ValueError, OSError) as error:
        raise SystemExit(f"reproduce: {error}") from None
    print(said[0])
    for line in lines:
        print(f"{line.paper:>9}: {line.claim}: {line.outcome} ({line.result})")
    print(f"report: {report}")


def card(out: str, size: Size, workers: int) -> list[Line]:
    """CARD: what is personal, and what clusters are worth."""
    corpus = personas.prepare(
        personas.PersonasConfig(out=join(out, "corpus"), people=size.people, items=10, questions=2)
    )
    config = CardConfig(
        corpus=corpus.url,
        out=join(out, "run"),
        model=size.model,
        learn_from="development",
        prompt=PromptConfig(max_prompt_tokens=160, max_answer_tokens=48),
        adapt=AdaptConfig(epochs=size.epochs, learning_rate=2e-3),
        prefer=PreferConfig(head_precision=(60.0,), vector_deviation=(1.0,)),
    )
    launch(partial(card_pipeline, sampler=sample_answers), config, launcher="local", folder=config.out)
    asked = TextConfig(
        run=config.out,
        corpus=corpus.url,
        out=join(out, "evaluation"),
        users="test",
        systems=SYSTEMS,
        max_users=size.asked,
        max_new_tokens=48,
    )
    opened = open_artifact(corpus.url, TEXT_CORPUS)
    report = make_report(Comparison(asked, opened, read_run(config.out, opened)))
    return read(json.loads(report.local("report.json").read_text()), "CARD", CARD, join(report.url, "report.md"))


def lpo(out: str, size: Size, workers: int) -> list[Line]:
    """Diffusion-LPO: whole lists against less of them, at the same images a step."""
    lists = shapes.prepare(
        shapes.ShapesConfig(
            out=join(out, "lists"),
            scenes=8000 if size.base_steps > 100 else 200,
            pool=16,
            lists=size.lists,
            examples=2,
            tests=6,
            users=8,
            groups=("bold",),
            held_out=0,
        )
    )
    base = LpoConfig(
        lists=lists.url,
        out=join(out, "base"),
        train_on="images",
        encode=EncodeConfig(resolution=shapes.SIDE, latent_dtype="float32", encode_batch=256),
        learn=ObjectiveConfig(objective="denoising"),
        weights=WeightsConfig(weights="full"),
        tune=TuneConfig(
            steps=size.base_steps, batch=16, micro_batch=16, learning_rate=2e-3, schedule="cosine", checkpoint_every=500
        ),
        grid=0,
    )
    launch(lpo_pipeline, base, launcher="local", folder=base.out)
    runs = []
    for name, objective in OBJECTIVES.items():
        for seed in range(size.lpo_seeds):
            tuned = replace(
                base,
                out=join(out, f"{name}-{seed}"),
                model=join(base.out, "tuned", "pipeline"),
                train_on="lists",
                seed=seed,
                weights=WeightsConfig(),
                learn=objective,
                tune=TuneConfig(steps=size.steps, batch=12, micro_batch=4, learning_rate=4e-4),
                sample=SampleConfig(sampler_steps=20, guidance=2.0),
            )
            launch(lpo_pipeline, tuned, launcher="local", folder=tuned.out)
            runs.append(f"{name}={tuned.out}")
    asked = images.ImagesConfig(
        run=tuple(runs),
        out=join(out, "evaluation"),
        corpus=lists.url,
        max_prompts=size.prompts,
        sample=SampleConfig(sampler_steps=20, guidance=2.0),
    )
    report = images.make_report(images.Comparison(asked))
    return read(
        json.loads(report.local("report.json").read_text()),
        "Diffusion-LPO",
        LPO,
        join(report.url, "report.md"),
        none=0.5,
    )


def unihetero(out: str, size: Size, workers: int) -> list[Line]:
    """UniHetero's three claims, by the rules of ``evaluation/scaling.py``."""
    corpus = scenes.prepare(
        scenes.ScenesConfig(
            out=join(out, "scenes"),
            encoder=min(20_000, size.scenes),
            train=2 * size.scenes,
            validation=8,
            test=500 if size.samples > 1000 else 40,
        )
    )
    parts = make_parts(
        PartsConfig(
            corpus=corpus.url,
            out=join(out, "parts"),
            encoder_steps=size.encoder_steps,
            autoencoder_steps=1000 if size.samples > 1000 else 25,
        )
    )
    config = experiment(join(out, "experiment"), size, corpus.url, parts.url, workers)
    sweep(config)
    folder = join(out, "report")
    found = claims.analyse(read_runs(config.out))
    claims.write(found, folder)
    return verdicts(found, join(folder, "report.md"))


def experiment(out: str, size: Size, corpus: str, parts: str, workers: int) -> SweepConfig:
    """UniHetero's arms and controls: all that its claims ask for, but in smoke."""
    return SweepConfig(
        corpus=corpus,
        parts=parts,
        out=out,
        runs=RunConfig(
            samples=size.samples,
            stops=tuple(size.samples // share for share in (4, 2, 1)),
            batch=min(32, size.samples // 8),
        ),
        arms=size.arms,
        controls=CONTROLS,
        seeds=size.seeds,
        control_seeds=size.seeds,
        calibration_samples=min(6400, size.samples),
        workers=workers,
    )


def verdicts(found: claims.Findings, report: str) -> list[Line]:
    """UniHetero's lines."""
    return [reproduction.of_verdict(one, "UniHetero", UNIHETERO[one.claim], report) for one in found.verdicts]


def read(
    report: Mapping[str, Any], paper: str, tested: Sequence[tuple[str, str]], where: str, none: float = 0.0
) -> list[Line]:
    """The lines of a paper whose claims are metrics of one report."""
    return [reproduction.of_metric(report["metrics"], name, paper, claim, where, none) for name, claim in tested]


if __name__ == "__main__":
    main()
