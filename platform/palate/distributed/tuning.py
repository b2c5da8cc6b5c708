"""Sweeps by Ray Tune: the same pipeline at several values, each measured on data that chooses and does not report.

A trial goes through growing budgets (epochs, steps). At each it makes a run as the job would make it, from its start
and with that budget alone, measures it and reports; ASHA (Li et al. 2020, arXiv 1810.05934) ends the trials that stand
worst at a budget before they spend the next one. All that a trial makes are artifacts: what Tune keeps (under
``OUT/tune-*``) is the order of the trials and their reports, and a trial that is begun anew finds what it has made.

A trial that trains on Ray workers needs no CPU itself. If it did, a few trials could hold all CPUs while their own
workers wait for one, for ever; so drivers stand on the head node, and there are only as many at a time as have workers.

On retry: started again, a sweep goes on: trials that are finished by Tune's state, written every ten seconds, are kept
(``Tuner.restore``), others go on from their artifacts.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from palate import artifacts
from palate.config import require_at_least, scale, to_dict
from palate.distributed.launch import Job
from palate.evaluation import sweeps

Values = Mapping[str, Any]
Train = Callable[[Values, int], None]
Measure = Callable[[Values, int], Mapping[str, float]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchConfig:
    """How trials share the machines."""

    concurrent: int = scale(0)
    """Trials at a time; 0: as many as the cluster has room for."""
    trial_cpus: float = scale(1.0)
    """CPUs of a trial that trains in its own process (--launcher local)."""
    trial_gpus: float = scale(0.0)
    """GPUs of such a trial, or of the measuring of one that trains on Ray's workers."""
    halving: int = 2
    """Of so many trials, one goes on to the next budget (ASHA's reduction factor)."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "concurrent", "trial_gpus")
        require_at_least(self, 2, "halving")


@dataclass(frozen=True)
class Reported:
    """What a trial reported at a budget."""

    values: dict[str, Any]
    budget: int
    figures: dict[str, float]


def search(
    train: Train,
    measure: Measure,
    grid: Sequence[Values],
    budgets: Sequence[int],
    *,
    out: str,
    metric: str,
    higher_is_better: bool,
    config: SearchConfig,
    workers: int = 0,
    cpus_per_worker: float | None = None,
    identity: Mapping[str, Any] | None = None,
) -> tuple[list[Reported], list[str]]:
    """Run a trial for each of the ``grid``'s values; returns what they reported, and the errors of those that failed.

    Args:
        train, measure: of values and a budget; module-level functions or partials of such.
        budgets: growing; with a single one no trial is ended early.
        workers, cpus_per_worker: that ``train`` launches by Ray Train; no workers: it trains in the trial's process.
        identity: what else decides the trials: a sweep that differs in it does not go on from this one's state.
    """
    import ray
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if list(budgets) != sorted(set(budgets)) or not budgets or not grid:
        raise ValueError(f"a sweep needs values, and budgets that grow; got {len(grid)} values and {list(budgets)}")
    print(f"watch: tensorboard --logdir {out}", flush=True)
    if not ray.is_initialized():
        ray.init()
    fit = concurrency(ray.cluster_resources(), config, workers, cpus_per_worker)
    described = json.dumps([list(map(dict, grid)), list(budgets), dict(identity or {})], sort_keys=True, default=str)
    name = f"tune-{hashlib.sha256(described.encode()).hexdigest()[:12]}"
    filesystem, root = artifacts.locate(out)
    storage = PyFileSystem(FSSpecHandler(filesystem))
    trial = partial(
        _trial,
        train=train,
        measure=measure,
        budgets=tuple(budgets),
        cwd=os.getcwd(),  # noqa: PTH109
        apart=(config.trial_gpus if workers else None),
    )
    trial.__name__ = "sweep"  # type: ignore[attr-defined]
    needs = {"node:__internal_head__": 0.001} if workers else {"CPU": config.trial_cpus, "GPU": config.trial_gpus}
    bundle = {key: value for key, value in needs.items() if value}
    trainable = tune.with_resources(trial, tune.PlacementGroupFactory([bundle]))
    if tune.Tuner.can_restore(f"{root}/{name}", storage_filesystem=storage):
        log.info("going on with the sweep in %s/%s", out, name)
        tuner = tune.Tuner.restore(
            f"{root}/{name}", trainable, resume_unfinished=True, restart_errored=True, storage_filesystem=storage
        )
    else:
        mode = "max" if higher_is_better else "min"
        scheduler: Any = FIFOScheduler()
        if len(budgets) > 1:
            scheduler = ASHAScheduler(
                time_attr="budget",
                max_t=budgets[-1],
                grace_period=budgets[0],
                reduction_factor=config.halving,
            )
        tuner = tune.Tuner(
            trainable,
            param_space={"values": tune.grid_search([dict(values) for values in grid])},
            tune_config=tune.TuneConfig(
                metric=metric, mode=mode, scheduler=scheduler, max_concurrent_trials=fit, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=root,
                storage_filesystem=storage,
                failure_config=tune.FailureConfig(max_failures=1),
                verbose=1,
            ),
        )
    results = tuner.fit()
    found, failed = [], []
    for result in results:
        values = dict((result.config or {}).get("values", {}))
        if result.error is not None:
            failed.append(f"{values}: {_cause(result.error)}")
        table = result.metrics_dataframe
        # A trial that was begun anew reports its first budgets again; the last report of each is kept.
        rows = {} if table is None else {int(row["budget"]): row for row in table.to_dict("records") if "budget" in row}
        for budget, row in sorted(rows.items()):
            figures = {key: float(row[key]) for key in row if key.startswith("figures/")}
            found.append(Reported(values, budget, {key.removeprefix("figures/"): v for key, v in figures.items()}))
    order = {json.dumps(dict(values), sort_keys=True): place for place, values in enumerate(grid)}
    found.sort(key=lambda one: (order[json.dumps(one.values, sort_keys=True)], one.budget))
    return found, sorted(failed)


class Run(Job, Protocol):
    """What a sweep reads of a job's config."""

    @property
    def fresh(self) -> bool: ...


def sweep_runs(
    job: Run,
    grid: Sequence[Values],
    budgets: Sequence[int],
    *,
    train: Train,
    measure: Measure,
    compare: Callable[[Sequence[Reported]], list[sweeps.Point]],
    trial: Callable[[Values, int], Any],
    metric: sweeps.Metric,
    figure: str,
    config: SearchConfig,
    identity: Mapping[str, Any],
    **written: Any,
) -> str:
    """A sweep whose trials are runs of ``job``, from the search to its report; returns what there is to say.

    Args:
        budgets: at which trials are compared; the last is the job's own.
        compare: what was reported, as the report's points.
        trial: the job's config of values (a seed among them) and a budget.
        metric, figure: what values are compared by, in the report and as ``measure`` calls it.
        written: title, budget and then of ``sweeps.write``.

    Raises:
        ValueError: some trials failed; the report is of the others, if there are any.
    """
    if job.fresh:
        raise ValueError("--fresh would discard trials that are finished: choose another --out, or delete this one")
    reported, failed = search(
        train,
        measure,
        grid,
        budgets,
        out=job.out,
        metric=figure,
        higher_is_better=metric.higher_is_better,
        config=config,
        workers=job.workers if job.launcher == "ray" else 0,
        cpus_per_worker=job.cpus_per_worker,
        identity=identity,
    )
    if failed and not reported:
        raise ValueError(f"all {len(failed)} trials failed; the same command tries them again: {failed[0]}")
    points = compare(reported)
    winner = sweeps.best(points, metric)
    chosen = to_dict(trial({**winner.values, "seed": 0}, winner.budget))
    notes = [f"failed: {error}" for error in failed]
    sweeps.write(points, metric, job.out, chosen=chosen, notes=notes, **written)
    if failed:
        raise ValueError(f"{len(failed)} trials failed, and the report is of the others; first: {failed[0]}")
    return sweeps.summary(points, winner, metric, job.out)


def budgets_of(whole: int, compare_at: Sequence[int]) -> list[int]:
    """The whole budget, after those of ``compare_at`` that are smaller."""
    return [*sorted({budget for budget in compare_at if budget < whole}), whole]


def concurrency(
    resources: Mapping[str, float], config: SearchConfig, workers: int, cpus_per_worker: float | None = None
) -> int:
    """How many trials run at a time on a cluster with these resources, such as {"CPU": 8, "GPU": 2}."""
    if config.concurrent:
        return config.concurrent
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    if workers:
        on_gpus = gpus >= workers
        each = cpus_per_worker or (0.0 if on_gpus else 1.0)
        fit = int(min(cpus / (workers * each) if each else float("inf"), gpus / workers if on_gpus else float("inf")))
    else:
        fit = int(min(cpus / config.trial_cpus, gpus / config.trial_gpus if config.trial_gpus else float("inf")))
    if fit < 1:
        log.warning(
            "the cluster has %g CPUs and %g GPUs now, less than a trial needs: it waits until nodes come; on a cluster "
            "that does not grow, lower --workers, --cpus-per-worker, --trial-cpus or --trial-gpus",
            cpus,
            gpus,
        )
    return max(1, fit)


def _trial(
    settings: Mapping[str, Any],
    *,
    train: Train,
    measure: Measure,
    budgets: Sequence[int],
    cwd: str,
    apart: float | None,
) -> None:
    """All budgets of one trial; Tune may end it after any. ``apart``: GPUs of a task of its own that measures."""
    import ray
    from ray import tune

    values = settings["values"]
    for budget in budgets:
        _go_to(cwd)
        train(values, budget)
        if apart is None:
            figures = measure(values, budget)
        else:
            # Of the cluster, and not of the bundle that the trial stands on, which holds nothing.
            remote = ray.remote(num_cpus=1, num_gpus=apart, max_retries=3, scheduling_strategy="DEFAULT")
            work = remote(_measured)
            figures = ray.get(work.remote(measure, values, budget, cwd))
        metrics = {"budget": budget, "figures": dict(figures), **figures}
        tune.report(metrics)


def _measured(measure: Measure, values: Values, budget: int, cwd: str) -> dict[str, float]:
    _go_to(cwd)
    return dict(measure(values, budget))


def _go_to(cwd: str) -> None:
    # Tune moves a trial into a folder of its own; relative paths are meant from where the driver stands.
    if Path(cwd).is_dir():
        os.chdir(cwd)


def _cause(error: BaseException) -> str:
    """The line of an error that says what happened, without Ray's frames."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
