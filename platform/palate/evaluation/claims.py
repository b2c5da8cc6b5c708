"""The report of the experiment on scenes: curves, paired differences over seeds, and what becomes of the paper's
claims.

Intervals are over seeds, not over questions: those of one model are not independent, and intervals over them exclude
zero with opposite signs from seed to seed. Symbols: S seeds, K counts of samples.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from palate import artifacts
from palate.evaluation.scaling import (
    Crossover,
    SeedEstimate,
    Verdict,
    claim_1,
    claim_2,
    claim_3,
    crossover,
    difference_at_equal_flops,
    over_seeds,
    paired_difference,
    samples_at_equal_flops,
    slope_difference,
)
from palate.unihetero.sweep import BASELINE, check_same_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
MARGIN = 0.01  # of accuracy: what "not worse" means in claim 3; fixed before any run
LOSSES = ("text_loss", "text_only_loss")


@dataclass(frozen=True)
class Curves:
    """An arm's scores at K counts of samples for S seeds."""

    arm: str
    seeds: tuple[int, ...]
    sizes: tuple[int, ...]
    scores: dict[str, Floats]  # by name, (S, K)
    flops: float
    runs: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Findings:
    """All that the report says."""

    curves: dict[str, Curves]
    differences: dict[str, dict[str, SeedEstimate]]  # by arm and score, at the largest size, against the baseline
    equal_flops: dict[str, SeedEstimate]
    slopes: dict[str, SeedEstimate]
    crossings: dict[str, Crossover]
    free_run: dict[str, dict[int, SeedEstimate]]  # by what is measured, embedding less encoder, by k
    probes: dict[str, dict[str, SeedEstimate]]
    verdicts: tuple[Verdict, ...]


def curves_of(runs: Sequence[dict[str, Any]]) -> dict[str, Curves]:
    """By arm. Runs of an arm are cut to the sizes that all of them measured."""
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for one in sorted(runs, key=lambda one: one["seed"]):
        by_arm.setdefault(one["arm"], []).append(one)
    found = {}
    for arm, members in by_arm.items():
        sizes = sorted(set.intersection(*({p["samples"] for p in one["points"]} for one in members)))
        points = [{p["samples"]: p for p in one["points"]} for one in members]
        kinds = members[0]["points"][0]["accuracy"]
        scores = {kind: np.array([[p[n]["accuracy"][kind] for n in sizes] for p in points]) for kind in kinds}
        scores |= {name: np.array([[p[n][name] for n in sizes] for p in points]) for name in LOSSES}
        seeds = tuple(one["seed"] for one in members)
        found[arm] = Curves(arm, seeds, tuple(sizes), scores, float(members[0]["flops_per_sample"]), tuple(members))
    return found


def analyse(runs: Sequence[dict[str, Any]]) -> Findings:
    """What the runs say.

    Raises:
        ArtifactMismatch: they did not see the same data.
        ValueError: there is no baseline.
    """
    check_same_data(runs)
    curves = curves_of(runs)
    if BASELINE not in curves:
        raise ValueError(f"no run of {BASELINE} is finished: it is what the others are compared with")
    differences, equal, slopes, crossings = {}, {}, {}, {}
    for arm, mine in curves.items():
        if arm == BASELINE:
            continue
        theirs, sizes = curves[BASELINE], common(mine, curves[BASELINE])
        differences[arm] = {name: difference(mine, theirs, name, sizes[-1]) for name in mine.scores}
        pair = [paired(mine, theirs, "all", sizes), paired(theirs, mine, "all", sizes)]
        slopes[arm] = slope_difference(pair[0], pair[1], sizes, kind="local")
        crossings[arm] = crossover(pair[0], pair[1], sizes)
        wanted = samples_at_equal_flops(sizes[-1], mine.flops, theirs.flops)
        if wanted <= theirs.sizes[-1]:
            seeds = [s for s in mine.seeds if s in theirs.seeds]
            rows = [theirs.seeds.index(s) for s in seeds]
            last = pair[0][:, -1]
            equal[arm] = difference_at_equal_flops(
                last, sizes[-1], mine.flops, theirs.scores["all"][rows], theirs.sizes, theirs.flops
            )
    free = _free_runs(curves)
    probes = _probes(curves)
    verdicts = (
        claim_1(
            differences.get("embedding", {}).get("all"),
            differences.get("pixel", {}).get("all"),
            _between(curves, "pixel", "decoder"),
            _between(curves, "embedding", "capacity"),
            _between(curves, "embedding", "shuffled"),
            slopes.get("embedding"),
        ),
        claim_2(slopes.get("embedding"), crossings.get("embedding")),
        claim_3(free.get("error", {}), _claim_3_scores(curves, probes), margin=MARGIN),
    )
    return Findings(curves, differences, equal, slopes, crossings, free, probes, verdicts)


def common(left: Curves, right: Curves) -> list[int]:
    """Counts of samples that both arms measured."""
    return [size for size in left.sizes if size in right.sizes]


def paired(curves: Curves, other: Curves, name: str, sizes: Sequence[int]) -> Floats:
    """Scores (S, K) of the seeds that both arms have."""
    rows = [curves.seeds.index(seed) for seed in curves.seeds if seed in other.seeds]
    columns = [curves.sizes.index(size) for size in sizes]
    return curves.scores[name][np.ix_(rows, columns)]


def difference(curves: Curves, other: Curves, name: str, size: int) -> SeedEstimate:
    """At one count of samples, over the seeds that both have."""
    return paired_difference(paired(curves, other, name, [size])[:, 0], paired(other, curves, name, [size])[:, 0])


def _between(curves: Mapping[str, Curves], left: str, right: str, name: str = "all") -> SeedEstimate | None:
    if left not in curves or right not in curves:
        return None
    return difference(curves[left], curves[right], name, common(curves[left], curves[right])[-1])


def _final(curves: Curves) -> list[dict[str, Any]]:
    """What each run measured once all arms had ended: the baseline goes on for longer."""
    return [next(p["final"] for p in one["points"] if "final" in p) for one in curves.runs]


def _free_runs(curves: Mapping[str, Curves]) -> dict[str, dict[int, SeedEstimate]]:
    """Embedding less encoder, paired: the error (share of the variance of x_s that is lost beside what is read from the
    arm's own true embeddings) and the loss of captions that are read from what was made, over that from true images.
    """
    if not {"embedding", "encoder"} <= curves.keys():
        return {}
    made: dict[str, dict[int, list[float]]] = {"error": {}, "caption_loss": {}}
    pair = curves["embedding"], curves["encoder"]
    shared = [seed for seed in pair[0].seeds if seed in pair[1].seeds]
    for seed in shared:
        runs = [_final(one)[one.seeds.index(seed)]["free_run"] for one in pair]
        for place, k in enumerate(runs[0]["k"]):
            errors = [one["explained_of_true"] - one["explained"][place] for one in runs]
            losses = [one["caption_loss"][place] - one["true_caption_loss"] for one in runs]
            made["error"].setdefault(k, []).append(errors[0] - errors[1])
            made["caption_loss"].setdefault(k, []).append(losses[0] - losses[1])
    return {name: {k: over_seeds(values) for k, values in by_k.items()} for name, by_k in made.items()}


def _probes(curves: Mapping[str, Curves]) -> dict[str, dict[str, SeedEstimate]]:
    """Each arm less the baseline, paired, by probe; at the depth where both together are best."""
    found: dict[str, dict[str, SeedEstimate]] = {}
    base = dict(zip(curves[BASELINE].seeds, _final(curves[BASELINE]), strict=True))
    depths = list(next(iter(base.values()))["probes"])
    if not depths:  # of images about which too little is known
        return found
    for arm, mine in curves.items():
        if arm == BASELINE:
            continue
        finals = {seed: final for seed, final in zip(mine.seeds, _final(mine), strict=True) if seed in base}
        for probe in next(iter(base.values()))["probes"][depths[0]]:
            both = [*base.values(), *finals.values()]
            best = max(depths, key=lambda depth: float(np.mean([f["probes"][depth][probe] for f in both])))
            values = [finals[s]["probes"][best][probe] - base[s]["probes"][best][probe] for s in finals]
            found.setdefault(arm, {})[probe] = over_seeds(values)
    return found


def _claim_3_scores(
    curves: Mapping[str, Curves], probes: Mapping[str, Mapping[str, SeedEstimate]]
) -> dict[str, SeedEstimate | None]:
    """Embedding less encoder: the questions, and the mean of all probes over all depths."""
    questions = _between(curves, "embedding", "encoder")
    if questions is None:
        return {}
    if not probes:
        return {"questions": questions, "probes": None}
    pair = curves["embedding"], curves["encoder"]
    means = []
    for seed in (seed for seed in pair[0].seeds if seed in pair[1].seeds):
        finals = [_final(one)[one.seeds.index(seed)]["probes"] for one in pair]
        means.append([np.mean([value for depth in one.values() for value in depth.values()]) for one in finals])
    gained = np.array(means)
    return {"questions": questions, "probes": over_seeds(gained[:, 0] - gained[:, 1])}


def write(found: Findings, folder: str | Path) -> None:
    """report.json, report.md and curves.png, in a folder or at a URL."""
    values = {
        "differences": {arm: {k: asdict(v) for k, v in by.items()} for arm, by in found.differences.items()},
        "equal_flops": {arm: asdict(value) for arm, value in found.equal_flops.items()},
        "slopes": {arm: asdict(value) for arm, value in found.slopes.items()},
        "crossings": {arm: asdict(value) for arm, value in found.crossings.items()},
        "free_run": {name: {str(k): asdict(v) for k, v in by.items()} for name, by in found.free_run.items()},
        "probes": {arm: {k: asdict(v) for k, v in by.items()} for arm, by in found.probes.items()},
        "verdicts": [asdict(verdict) for verdict in found.verdicts],
        "curves": {
            arm: {"sizes": c.sizes, "seeds": c.seeds, "flops": c.flops, **{k: v.tolist() for k, v in c.scores.items()}}
            for arm, c in found.curves.items()
        },
    }
    filesystem, root = artifacts.locate(folder)
    filesystem.makedirs(root, exist_ok=True)
    filesystem.pipe_file(f"{root}/report.json", (json.dumps(_finite(values), indent=1, sort_keys=True) + "\n").encode())
    filesystem.pipe_file(f"{root}/report.md", markdown(found).encode())
    with filesystem.open(f"{root}/curves.png", "wb") as file:
        _plot(found).savefig(file, dpi=120, format="png")


def markdown(found: Findings) -> str:
    """The report as text."""
    base = found.curves[BASELINE]
    sizes = [size for size in base.sizes if all(size in c.sizes for c in found.curves.values())]
    lines = ["# Does generating semantics help understanding?", "", "## Verdicts", ""]
    for verdict in found.verdicts:
        lines.append(f"- **{str(verdict).capitalize()}**. " + "; ".join(verdict.reasons))
    lines += ["", "## Accuracy on questions, mean over seeds", ""]
    rows = [["arm", "seeds", "FLOPs", *(f"{size:,}" for size in sizes)]]
    for arm, curves in found.curves.items():
        means = curves.scores["all"].mean(0)
        shown = [f"{means[curves.sizes.index(size)]:.3f}" for size in sizes]
        rows.append([arm, str(len(curves.seeds)), f"{curves.flops / base.flops:.2f}", *shown])
    lines += _table(rows)
    lines += ["", f"## Against {BASELINE} after {sizes[-1]:,} samples, paired over seeds", ""]
    kinds = [name for name in base.scores if name not in LOSSES]
    rows = [["arm", *kinds, "text", "text only", "at equal FLOPs", "slope", "crossover"]]
    for arm, by in found.differences.items():
        shown = [_shown(by[name]) for name in (*kinds, *LOSSES)]
        needed = samples_at_equal_flops(sizes[-1], found.curves[arm].flops, base.flops)
        missing = f"needs {BASELINE} at {needed:,.0f}"
        equal = _shown(found.equal_flops[arm]) if arm in found.equal_flops else missing
        rows.append([arm, *shown, equal, _shown(found.slopes[arm]), str(found.crossings[arm])])
    lines += _table(rows)
    if found.free_run:
        lines += ["", "## Free running: embedding less encoder", ""]
        ks = list(found.free_run["error"])
        rows = [["", *(f"k = {k}" for k in ks)]]
        rows += [[name, *(_shown(by[k]) for k in ks)] for name, by in found.free_run.items()]
        lines += _table(rows)
        ceilings = [
            f"{np.mean([one['free_run']['explained_of_true'] for one in _final(found.curves[arm])]):.3f} ({arm})"
            for arm in ("embedding", "encoder")
        ]
        lines += ["", f"Read from true embeddings, of the variance of x_s: {', '.join(ceilings)}."]
    if found.probes:
        lines += ["", f"## Probes against {BASELINE}, at the depth where both together are best", ""]
        names = list(next(iter(found.probes.values())))
        rows = [["arm", *names]] + [[arm, *(_shown(by[name]) for name in names)] for arm, by in found.probes.items()]
        lines += _table(rows)
    lines += ["", "## How the gradients agree in the language model", ""]
    logged = [row["metrics"] for curves in found.curves.values() for one in curves.runs for row in one["log"]]
    layers = list(dict.fromkeys(name.split("/")[2] for row in logged for name in row if name.startswith("ratio/")))
    rows = [["arm", "loss, ratio of norms and cosine", *layers]]
    for arm, curves in found.curves.items():
        for loss in ("semantic", "pixel"):
            pairs = [[_logged(curves, f"{what}/{loss}/{layer}") for what in ("ratio", "cosine")] for layer in layers]
            if any(None not in pair for pair in pairs):
                shown = ["" if r is None or c is None else f"{r:.3f}, {c:+.3f}" for r, c in pairs]
                rows.append([arm, loss, *shown])
    return "\n".join([*lines, *_table(rows), ""])


def _logged(curves: Curves, name: str) -> float | None:
    """The mean over seeds and steps of what a run logged."""
    values = [row["metrics"][name] for one in curves.runs for row in one["log"] if name in row["metrics"]]
    return float(np.mean(values)) if values else None


def _shown(estimate: SeedEstimate) -> str:
    if np.isnan(estimate.low):
        return f"{estimate.value:+.3f}"
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0]), *(f"| {' | '.join(row)} |" for row in rows[1:])]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


def _plot(found: Findings) -> "Figure":
    """Accuracy over samples, and the difference to the baseline with intervals over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (arm, curves) in enumerate(found.curves.items()):
        style = "--" if len(curves.seeds) < len(found.curves[BASELINE].seeds) else "-"
        colour = f"C{number % 10}"
        marker = "os^"[number // 10 % 3]  # ten colours come again
        left.plot(curves.sizes, curves.scores["all"].mean(0), style, marker=marker, ms=4, color=colour, label=arm)
        if arm == BASELINE:
            continue
        sizes = common(curves, found.curves[BASELINE])
        estimates = [difference(curves, found.curves[BASELINE], "all", size) for size in sizes]
        values = np.array([e.value for e in estimates])
        bounds = np.nan_to_num(np.array([[e.value - e.low, e.high - e.value] for e in estimates]).T)
        shift = 1 + 0.02 * (number - len(found.curves) / 2)
        right.errorbar(
            np.array(sizes) * shift, values, bounds, fmt=style, marker=marker, ms=4, color=colour, lw=1, capsize=2
        )
    right.axhline(0, color="black", lw=0.8)
    measured = sorted({size for curves in found.curves.values() for size in curves.sizes})
    for axes, name in ((left, "accuracy"), (right, f"accuracy less that of {BASELINE}")):
        axes.set(xscale="log", xlabel="samples", ylabel=name)
        axes.set_xticks(measured, [f"{size:,}" for size in measured])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    return figure
