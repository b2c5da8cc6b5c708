"""The report of a sweep: the metric at each value with its interval, as table, plot and JSON, and what was chosen.

What is chosen is the value whose metric is best after the whole budget. The best of several is better on the data that
chose it than it will be elsewhere, so the report ends with the command that measures it on data that chose nothing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from palate import artifacts
from palate.artifacts import join
from palate.evaluation.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Metric:
    """What values are compared by."""

    name: str
    higher_is_better: bool
    over: str  # what intervals are over, such as people
    chance: float | None = None


@dataclass(frozen=True)
class Point:
    """One combination of values after one budget.

    ``runs``: training seeds behind it. ``to_best``: the metric less that of the chosen combination, paired. ``others``:
    further metrics by name.
    """

    values: Mapping[str, Any]
    budget: int
    runs: int
    metric: Estimate
    to_best: Estimate | None = None
    others: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.values.items())


def best(points: Sequence[Point], metric: Metric) -> Point:
    """The point with the best metric among those of the largest budget; ties go to the earlier one.

    Raises:
        ValueError: there is none with a number.
    """
    whole = max((point.budget for point in points), default=0)
    able = [point for point in points if point.budget == whole and not math.isnan(point.metric.value)]
    if not able:
        raise ValueError("no trial came to the end of its budget with a number: see the errors of the trials")
    return (max if metric.higher_is_better else min)(able, key=lambda point: point.metric.value)


def write(
    points: Sequence[Point],
    metric: Metric,
    out: str,
    *,
    title: str,
    budget: str,
    chosen: Mapping[str, Any],
    then: Sequence[str],
    notes: Sequence[str] = (),
) -> Point:
    """Write OUT/report/{report.md, report.json, sweep.png} and OUT/best.json; returns the chosen point.

    Args:
        budget: what budgets count, such as epochs; empty where there is none.
        chosen: the config of the best run, as JSON values, that its job takes by ``--config``.
        then: commands that go on from here.
    """
    winner = best(points, metric)
    others = sorted({name for point in points for name in point.others})
    swept = list(winner.values)
    ordered = sorted(points, key=lambda point: (point.budget, *(_key(point.values[name]) for name in swept)))
    paired = ["less the best"] if any(point.to_best for point in points) else []
    head = [*swept, *filter(None, [budget]), "runs", metric.name, *paired, *others]
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for point in ordered:
        cells = [str(point.values[name]) for name in swept]
        cells += [f"{point.budget:,}"] if budget else []
        cells += [str(point.runs), _shown(point.metric, mark=point is winner)]
        cells += [_shown(point.to_best) if point.to_best and point is not winner else "" for _ in paired]
        cells += [_shown(point.others[name]) if name in point.others else "" for name in others]
        rows.append(f"| {' | '.join(cells)} |")
    better = "more" if metric.higher_is_better else "less"
    text = [
        f"# {title}",
        "",
        f"{metric.name} ({better} is better), with 95% intervals over {metric.over}. Chosen: **{winner.name}**.",
        "Intervals are of single values; the best of several looks better on what chose it than it is.",
        *[f"- {note}" for note in notes],
        "",
        *rows,
        "",
        "![The metric at each value](sweep.png)",
        "",
        "Go on:",
        "",
        *[f"    {line}" for line in then],
        "",
    ]
    described = {
        "metric": asdict(metric),
        "budget": budget,
        "best": dict(winner.values),
        "points": [{**asdict(point), "values": dict(point.values)} for point in ordered],
        "then": list(then),
    }
    filesystem, root = artifacts.locate(out)
    filesystem.makedirs(f"{root}/report", exist_ok=True)
    with filesystem.open(f"{root}/report/sweep.png", "wb") as file:
        _plot(ordered, winner, metric, budget).savefig(file, dpi=120, format="png")
    filesystem.pipe_file(f"{root}/report/report.json", (json.dumps(_finite(described), indent=2) + "\n").encode())
    filesystem.pipe_file(f"{root}/report/report.md", "\n".join(text).encode())
    filesystem.pipe_file(f"{root}/best.json", (json.dumps(dict(chosen), indent=2) + "\n").encode())
    return winner


def summary(points: Sequence[Point], winner: Point, metric: Metric, out: str) -> str:
    """What a command prints at its end."""
    lines = [f"{metric.name} after the whole budget, 95% intervals over {metric.over}:"]
    for point in points:
        if point.budget == winner.budget:
            lines.append(f"  {point.name:>30}: {_shown(point.metric)}{'  <- chosen' if point is winner else ''}")
    return "\n".join([*lines, f"report: {join(out, 'report/report.md')}", f"best: {join(out, 'best.json')}"])


def _plot(points: Sequence[Point], winner: Point, metric: Metric, budget: str) -> "Figure":
    """The metric over the first swept value, a line for each combination of the others, pale for smaller budgets; and
    beside it the paired differences, which tell values apart whose own intervals overlap."""
    from matplotlib.figure import Figure

    compared = [point for point in points if point.to_best is not None and point.budget == winner.budget]
    figure = Figure(figsize=(12 if compared else 7, 4.2), layout="constrained")
    left, *right = figure.subplots(1, 2 if compared else 1, squeeze=False)[0]
    _lines(left, [(point, point.metric) for point in points], winner, budget)
    left.set_ylabel(f"{metric.name} ({'more' if metric.higher_is_better else 'less'} is better)")
    if metric.chance is not None:
        left.axhline(metric.chance, color="black", lw=0.8, ls=":")
    for axes in right:
        _lines(axes, [(point, point.to_best) for point in compared if point.to_best], winner, budget)
        axes.set_ylabel(f"{metric.name}, less the chosen one's, paired")
        axes.axhline(0, color="black", lw=0.8)
    # Outside, where it covers no interval; one for both, which show the same lines.
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    return figure


def _lines(axes: Any, shown: Sequence[tuple[Point, Estimate]], winner: Point, budget: str) -> None:
    axis, *rest = winner.values
    ticks = sorted({point.values[axis] for point, _ in shown}, key=_key)
    places = {value: place for place, value in enumerate(ticks)}
    lines: dict[tuple[Any, ...], list[tuple[Point, Estimate]]] = {}
    for point, estimate in shown:
        key = (point.budget, *(point.values[name] for name in rest))
        lines.setdefault(key, []).append((point, estimate))
    labels = list(dict.fromkeys(key[1:] for key in lines))
    for key, members in lines.items():
        said = ", ".join(f"{name} {value}" for name, value in zip(rest, key[1:], strict=True))
        shift = 0.06 * (labels.index(key[1:]) - (len(labels) - 1) / 2)
        bounds = np.array([[e.value - e.low, e.high - e.value] for _, e in members]).T
        axes.errorbar(
            [places[point.values[axis]] + shift for point, _ in members],
            [estimate.value for _, estimate in members],
            np.nan_to_num(bounds).clip(0),
            marker="o",
            ms=4,
            capsize=3,
            color=f"C{labels.index(key[1:])}",
            alpha=1.0 if key[0] == winner.budget else 0.35,
            label=", ".join(filter(None, [said, f"{budget} {key[0]:,}" if budget else ""])) or None,
        )
        for point, estimate in members:
            if point is winner:
                axes.plot(places[point.values[axis]] + shift, estimate.value, "k*", ms=12, label="chosen")
    axes.set_xticks(range(len(ticks)), [f"{value:g}" if isinstance(value, float) else str(value) for value in ticks])
    axes.set_xlabel(axis)
    axes.grid(alpha=0.3)


def _shown(estimate: Estimate, mark: bool = False) -> str:
    value = (
        f"{estimate.value:.3f}"
        if math.isnan(estimate.low)
        else (f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]")
    )
    return f"**{value}**" if mark else value


def _key(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def _finite(value: Any) -> Any:
    """JSON has no NaN: null in its place."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
