"""Which strength: LPO's KL beta (a training each), or CARD's decoding beta and top-k (one run, not trained again).

    python tune/betas.py lpo       OUT/trials/NAME/steps-N, a run of jobs/lpo.py; OUT/evaluation, images and win rates
    python tune/betas.py decoding  OUT/evaluation, likelihoods once; OUT/answers/NAME, with --answers

Both write OUT/report and OUT/best.json, which jobs/lpo.py or jobs/evaluate.py text takes by --config. Values are
compared on data that no report uses: validation captions, development people.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from palate import config as configs
from palate.artifacts import ArtifactError, join, open_artifact, os_errors
from palate.config import scale
from palate.corpora.schema import RANKED_LISTS, TEXT_CORPUS
from palate.distributed.launch import launch_job
from palate.distributed.tuning import Reported, SearchConfig, budgets_of, search, sweep_runs
from palate.evaluation import images, sweeps, text
from palate.evaluation.comparison import Comparison, TextConfig
from palate.evaluation.prompts import corpus_prompts
from palate.evaluation.scorers import ScorerConfig
from palate.evaluation.statistics import Estimate, Scores
from palate.evaluation.subject import read_run
from palate.evaluation.text_report import likelihood_metrics
from palate.lpo.stages import LpoConfig, pipeline
from palate.training.guards import TrainingStopped

# Diffusion-LPO's KL beta


@dataclass(frozen=True)
class KlBetas:
    """Sweep LPO's KL beta: win rates against the base at the same seeds, on validation captions."""

    lpo: LpoConfig
    try_kl_betas: tuple[float, ...] = (500.0, 2000.0, 5000.0, 8000.0)
    """Values of --kl-beta."""
    try_seeds: int = 1
    """Trainings of each value, with seeds 0, 1, ...; one training says little (docs/results/lpo.md)."""
    compare_at: tuple[int, ...] = ()
    """Steps after which the worse trials end; they count where they are fewer than --steps."""
    scorer: str = "utility"
    """Whose win rate compares the runs, such as pickscore; only the world `shapes` has utility."""
    score: ScorerConfig = field(default_factory=ScorerConfig)
    captions_of: Literal["validation", "examples"] = "validation"
    """Lists whose captions are drawn; the world `shapes` has none for validation, and examples of other captions than
    those of training and test."""
    max_prompts: int | None = 64
    """Captions."""
    images_per_prompt: int = 4
    """Each with a seed of its own."""
    search: SearchConfig = field(default_factory=SearchConfig)

    @property
    def win_rate(self) -> str:
        """The metric's name in reports of images."""
        return f"{self.scorer} win rate"


def sweep_kl(config: KlBetas) -> str:
    lpo = config.lpo
    corpus_prompts(open_artifact(lpo.lists, RANKED_LISTS), split=config.captions_of)  # there are some
    return sweep_runs(
        lpo,
        [{"kl_beta": b, "seed": seed} for seed in range(config.try_seeds) for b in config.try_kl_betas],
        budgets_of(lpo.tune.steps, config.compare_at),
        train=partial(train_kl, config),
        measure=partial(measure_kl, config),
        compare=partial(compare_kl, config),
        trial=partial(trial_kl, config),
        metric=sweeps.Metric(config.win_rate, higher_is_better=True, over="captions and runs", chance=0.5),
        figure="win_rate",
        config=config.search,
        identity=configs.identity(config),
        title=f"LPO's KL beta on {lpo.lists}",
        budget="steps",
        then=[
            f"python jobs/lpo.py --config {join(lpo.out, 'best.json')} --out RUN",
            f"python jobs/evaluate.py images --run RUN --corpus {lpo.lists} --out RESULTS",
        ],
    )


def trial_kl(config: KlBetas, values: Mapping[str, Any], steps: int) -> LpoConfig:
    """The run of one value, as the job takes it."""
    lpo = config.lpo
    name = f"kl-beta-{values['kl_beta']:g}-seed-{values['seed']}"
    return replace(
        lpo,
        out=join(lpo.out, "trials", name, f"steps-{steps}"),
        seed=values["seed"],
        learn=replace(lpo.learn, kl_beta=values["kl_beta"]),
        tune=replace(lpo.tune, steps=steps),
    )


def train_kl(config: KlBetas, values: Mapping[str, Any], steps: int) -> None:
    run = trial_kl(config, values, steps)
    launch_job(pipeline, run)


def measure_kl(config: KlBetas, values: Mapping[str, Any], steps: int) -> dict[str, float]:
    run = trial_kl(config, values, steps)
    found = estimates(config, {"tuned": [run.out]}, join(run.out, "evaluation"))["tuned"]
    if config.win_rate not in found:
        known = sorted(metric.removesuffix(" win rate") for metric in found if metric.endswith(" win rate"))
        raise ValueError(f"--scorer {config.scorer} is not there: of these captions and weights are {known}")
    return {"win_rate": found[config.win_rate].value} | ({"drift": found["drift"].value} if "drift" in found else {})


def estimates(config: KlBetas, runs: Mapping[str, list[str]], out: str) -> dict[str, dict[str, Estimate]]:
    """Metrics by name, several seeds of it together: win rates against the base, drift, mean scores; by "NAME against
    NAME", win rates against each other."""
    asked = images.ImagesConfig(
        run=tuple(f"{name}={folder}" for name, folders in runs.items() for folder in folders),
        out=out,
        corpus=config.lpo.lists,
        split=config.captions_of,
        max_prompts=config.max_prompts,
        images=config.images_per_prompt,
        sample=config.lpo.sample,
        score=config.score,
    )
    metrics = images.make_report(images.Comparison(asked)).read_json("report.json")["metrics"]
    found: dict[str, dict[str, Estimate]] = {name: {} for name in runs}
    for full, one in metrics.items():
        metric, _, system = full.rpartition("/")
        if one["value"] is not None:
            low, high = (float("nan") if one[end] is None else one[end] for end in ("low", "high"))
            estimate = Estimate(one["value"], low, high, one["n"], one["n"], float("nan"))
            found.setdefault(system, {})[metric] = estimate
    return found


def against(found: Mapping[str, Mapping[str, Estimate]], one: str, other: str, metric: str) -> Estimate:
    """The win rate of one's images over the other's at the same seeds; what was estimated is either's."""
    if f"{one} against {other}" in found:
        return found[f"{one} against {other}"][metric]
    back = found[f"{other} against {one}"][metric]
    return replace(back, value=1 - back.value, low=1 - back.high, high=1 - back.low)


def compare_kl(config: KlBetas, reported: Sequence[Reported]) -> list[sweeps.Point]:
    """A point for each value and number of steps, its seeds together; fewer of them where trials ended early. Beside it
    drift, and the win rate against the best value of as many steps and seeds."""
    runs: dict[tuple[int, float], list[str]] = {}
    for one in reported:
        runs.setdefault((one.budget, one.values["kl_beta"]), []).append(trial_kl(config, one.values, one.budget).out)
    groups: dict[tuple[int, int], dict[float, list[str]]] = {}
    for (steps, kl_beta), folders in runs.items():
        groups.setdefault((steps, len(folders)), {})[kl_beta] = folders
    points = []
    for (steps, count), values in groups.items():
        named = {f"kl-beta-{kl_beta:g}": folders for kl_beta, folders in values.items()}
        found = estimates(config, named, join(config.lpo.out, "evaluation", f"steps-{steps}-runs-{count}"))
        best = max(named, key=lambda name: found[name][config.win_rate].value)
        for kl_beta, name in zip(values, named, strict=True):
            others = {"drift": found[name]["drift"]} if "drift" in found[name] else {}
            if name != best:
                others["win rate against the best"] = against(found, name, best, config.win_rate)
            points.append(sweeps.Point({"kl_beta": kl_beta}, steps, count, found[name][config.win_rate], others=others))
    return points


# CARD's decoding beta and top-k


@dataclass(frozen=True)
class DecodingBetas:
    """Sweep how strongly, and on how many tokens, CARD corrects: one finished run, which is not trained again."""

    run: str
    """Folder or URL of the run that jobs/card.py made."""
    corpus: str
    """Folder or URL of its corpus."""
    out: str = scale()
    """Folder or URL of the sweep."""
    try_betas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    """Strengths; the run learned at one of its own, and 0 is the cluster's model alone."""
    try_top_k: tuple[int, ...] = ()
    """Likeliest tokens that are corrected; by default the run's number, which is the most."""
    answers: bool = False
    """Decode answers at every value too, and report what they score; takes a decoding each."""
    choose_by: str = "bits per token"
    """Metric that chooses: bits per token, pair accuracy, or with --answers one of theirs, such as rouge-L."""
    max_users: int | None = None
    """At most so many development people, drawn at random."""
    max_new_tokens: int = 64
    """Longest answer."""
    search: SearchConfig = field(default_factory=SearchConfig)


def sweep_decoding(config: DecodingBetas) -> str:
    corpus = open_artifact(config.corpus, TEXT_CORPUS)
    subject = read_run(config.run, corpus)
    grid = [{"beta": b, "top_k": k} for k in config.try_top_k or (subject.head.top_k,) for b in config.try_betas]
    # The only pass through the model, which trials would each begin; and wrong names are found before Ray starts.
    first = scores(config, grid[0])
    if config.choose_by not in first:
        raise ValueError(f"--choose-by {config.choose_by}: there are {sorted(first)}")
    one = first[config.choose_by]
    metric = sweeps.Metric(config.choose_by, one.higher_is_better, "development people", one.chance)
    _, failed = search(
        nothing,
        partial(measure_decoding, config),
        grid,
        [1],
        out=config.out,
        metric="chosen_by",
        higher_is_better=metric.higher_is_better,
        config=config.search,
        identity=configs.identity(config),
    )
    if failed:
        raise ValueError(f"{len(failed)} of {len(grid)} trials failed; the same command tries them again: {failed[0]}")
    found = [scores(config, values) for values in grid]
    sign = 1 if metric.higher_is_better else -1
    top = max(found, key=lambda one: sign * one[config.choose_by].estimate().value)
    points = [
        sweeps.Point(
            values=values,
            budget=1,
            runs=1,
            metric=one[config.choose_by].estimate(),
            to_best=one[config.choose_by].minus(top[config.choose_by]),
            others={name: other.estimate() for name, other in one.items() if name != config.choose_by},
        )
        for values, one in zip(grid, found, strict=True)
    ]
    winner = sweeps.best(points, metric)
    report = replace(asked(config, winner.values), out=join(config.out, "chosen"), users="test", systems=())
    best = join(config.out, "best.json")
    winner = sweeps.write(
        points,
        metric,
        config.out,
        title=f"CARD's decoding beta and top-k: {config.run} on {config.corpus}",
        budget="",
        chosen=configs.to_dict(report),
        then=[f"python jobs/evaluate.py text --config {best}"],
        notes=[f"the run learned at beta {subject.beta:g}, with {subject.head.top_k} candidates"],
    )
    return sweeps.summary(points, winner, metric, config.out)


def asked(config: DecodingBetas, values: Mapping[str, Any]) -> TextConfig:
    """The evaluation of one value: likelihoods are shared, for they do not depend on it."""
    return TextConfig(
        run=config.run,
        corpus=config.corpus,
        out=join(config.out, "evaluation"),
        users="development",
        systems=("card",),
        max_users=config.max_users,
        decoding_beta=values["beta"],
        decoding_top_k=values["top_k"],
        max_new_tokens=config.max_new_tokens,
    )


def nothing(values: Mapping[str, Any], budget: int) -> None:
    """There is nothing to train."""


def measure_decoding(config: DecodingBetas, values: Mapping[str, Any], budget: int) -> dict[str, float]:
    found = {name: one.estimate().value for name, one in scores(config, values).items()}
    return {"chosen_by": found[config.choose_by], **{name.replace(" ", "_"): value for name, value in found.items()}}


def scores(config: DecodingBetas, values: Mapping[str, Any]) -> dict[str, Scores]:
    """All metrics at one value; answers are decoded where they are wanted and not there."""
    corpus = open_artifact(config.corpus, TEXT_CORPUS)
    comparison = Comparison(asked(config, values), corpus, read_run(config.run, corpus))
    spec = comparison.systems["card"]
    found = {name: one for name, one in likelihood_metrics(comparison, spec).items() if isinstance(one, Scores)}
    if config.answers:
        name = "beta-{beta:g}-top-k-{top_k}".format(**values)
        own = replace(comparison.config, out=join(config.out, "answers", name))
        answering = Comparison(own, corpus, comparison.subject)
        golds = {case.question.question_id: case.gold for case in answering.cases}
        users = {case.question.question_id: case.question.user_id for case in answering.cases}
        found |= text.evaluate(answering.task, answering.answers(spec)[0], golds, users).metrics
    return found


def main() -> None:
    config = configs.parse_command({"lpo": KlBetas, "decoding": DecodingBetas}, __doc__)
    try:
        with os_errors():
            print(sweep_kl(config) if isinstance(config, KlBetas) else sweep_decoding(config))
    except (ArtifactError, TrainingStopped, ValueError, OSError) as error:
        raise SystemExit(f"betas: {error}") from None


if __name__ == "__main__":
    main()
