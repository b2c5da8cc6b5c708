"""How many clusters CARD should have, and which rank their adapters: a run for each, compared on development people.

    OUT/trials/NAME/epochs-N   a run of jobs/card.py with so many epochs, and its evaluation
    OUT/report                 report.md, report.json, sweep.png
    OUT/best.json              the chosen run's config: python jobs/card.py --config OUT/best.json --out RUN

Flags are those of jobs/card.py, and these. Run with --help.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from palate import config as configs
from palate.artifacts import ArtifactError, join, open_artifact, os_errors
from palate.card.stages import CardConfig, pipeline
from palate.corpora.schema import TEXT_CORPUS
from palate.distributed.launch import launch_job
from palate.distributed.tuning import Reported, SearchConfig, budgets_of, sweep_runs
from palate.evaluation import sweeps
from palate.evaluation.comparison import Comparison, TextConfig
from palate.evaluation.statistics import Scores
from palate.evaluation.subject import read_run
from palate.evaluation.systems import averaged
from palate.evaluation.text_report import likelihood_metrics
from palate.serving.answers import sample_answers
from palate.training.guards import TrainingStopped

METRIC = sweeps.Metric("bits per token", higher_is_better=False, over="development people")


@dataclass(frozen=True)
class ClustersConfig:
    """Sweep CARD's number of clusters and rank."""

    card: CardConfig
    try_clusters: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of clusters."""
    try_ranks: tuple[int, ...] = (8,)
    """Ranks of the adapters."""
    try_seeds: int = 1
    """Trainings of each combination, with seeds 0, 1, ..."""
    compare_at: tuple[int, ...] = (1,)
    """Epochs after which the worse trials end; they count where they are fewer than --epochs."""
    max_users: int | None = None
    """At most so many people, drawn at random, whose held-out texts compare the runs."""
    search: SearchConfig = field(default_factory=SearchConfig)


def main() -> None:
    config = configs.parse(ClustersConfig, __doc__)
    try:
        with os_errors():
            print(sweep(config))
    except (ArtifactError, TrainingStopped, ValueError, OSError) as error:
        raise SystemExit(f"clusters: {error}") from None


def sweep(config: ClustersConfig) -> str:
    """Run, compare, write; returns what there is to say."""
    card = config.card
    open_artifact(card.corpus, TEXT_CORPUS)
    grid = [
        {"clusters": clusters, "rank": rank, "seed": seed}
        for seed in range(config.try_seeds)
        for clusters in config.try_clusters
        for rank in config.try_ranks
    ]
    return sweep_runs(
        card,
        grid,
        budgets_of(card.adapt.epochs, config.compare_at),
        train=partial(train, config),
        measure=partial(measure, config),
        compare=partial(compare, config),
        trial=partial(trial, config),
        metric=METRIC,
        figure="bits",
        config=config.search,
        identity=configs.identity(config),
        title=f"CARD's clusters and rank on {card.corpus}",
        budget="epochs",
        then=[
            f"python jobs/card.py --config {join(card.out, 'best.json')} --out RUN",
            f"python jobs/evaluate.py text --run RUN --corpus {card.corpus} --users test --out RESULTS",
        ],
    )


def trial(config: ClustersConfig, values: Mapping[str, Any], epochs: int) -> CardConfig:
    """The run of one combination, as the job takes it."""
    card = config.card
    name = "clusters-{clusters}-rank-{rank}-seed-{seed}".format(**values)
    return replace(
        card,
        out=join(card.out, "trials", name, f"epochs-{epochs}"),
        seed=values["seed"],
        cluster=replace(card.cluster, clusters=values["clusters"]),
        adapt=replace(card.adapt, rank=values["rank"], epochs=epochs),
    )


def train(config: ClustersConfig, values: Mapping[str, Any], epochs: int) -> None:
    run = trial(config, values, epochs)
    worker = partial(pipeline, sampler=sample_answers)
    launch_job(worker, run)


def measure(config: ClustersConfig, values: Mapping[str, Any], epochs: int) -> dict[str, float]:
    found = scores(config, values, epochs)
    return {"bits": found["bits per token"].estimate().value, "pairs": found["pair accuracy"].estimate().value}


def scores(config: ClustersConfig, values: Mapping[str, Any], epochs: int) -> dict[str, Scores]:
    """What the run makes of the held-out texts of development people."""
    run = trial(config, values, epochs)
    corpus = open_artifact(run.corpus, TEXT_CORPUS)
    asked = TextConfig(
        run=run.out,
        corpus=run.corpus,
        out=join(run.out, "evaluation"),
        users="development",
        systems=("card",),
        max_users=config.max_users,
    )
    comparison = Comparison(asked, corpus, read_run(run.out, corpus))
    found = likelihood_metrics(comparison, comparison.systems["card"])
    return {name: one for name, one in found.items() if isinstance(one, Scores)}


def compare(config: ClustersConfig, reported: Sequence[Reported]) -> list[sweeps.Point]:
    """A point for each combination and budget, its seeds averaged."""
    seeds: dict[tuple[int, int, int], list[dict[str, Scores]]] = {}
    for one in reported:
        place = one.values["clusters"], one.values["rank"], one.budget
        seeds.setdefault(place, []).append(scores(config, one.values, one.budget))
    means = {place: averaged(found) for place, found in seeds.items()}
    points = []
    whole = max(place[2] for place in means)
    best = min((p for p in means if p[2] == whole), key=lambda place: means[place][METRIC.name].estimate().value)
    for (clusters, rank, epochs), found in means.items():
        points.append(
            sweeps.Point(
                values={"clusters": clusters, "rank": rank},
                budget=epochs,
                runs=len(seeds[clusters, rank, epochs]),
                metric=found[METRIC.name].estimate(),
                to_best=found[METRIC.name].minus(means[best][METRIC.name]),
                others={"pair accuracy": found["pair accuracy"].estimate()},
            )
        )
    return points


if __name__ == "__main__":
    main()
