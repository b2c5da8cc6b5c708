"""A comparison of systems as report.json, report.md and forest plots.

report.json   {"metrics": {"<metric>/<system>": {value, low, high, n, ...}}, "config": {...}, "notes": [...]}
              a difference is called "<metric>/<system> - <other>" and has its smallest_detectable_difference
report.md     the same as tables, with the plots
systems.png   a panel a metric, a row a system, with 95% intervals
differences.png  a panel a metric, a row a comparison, with zero and what the sample could have detected
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from palate.evaluation.statistics import Average, Estimate, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["baseline", "method", "control"]

DEFINITIONS = (
    "Each value is the mean over users of a user's mean, with a 95% percentile interval from a bootstrap that "
    "resamples users (all items of a drawn user come along). A difference is paired: both systems on the same users "
    "and items in every resample.",
    "The smallest detectable difference (SDD) is the true difference that such an experiment finds significant "
    "(two-sided, 5%) 4 times in 5: (z_0.975 + z_0.8) = 2.80 bootstrap standard errors of the paired difference.",
)

_COLORS: dict[Kind, str] = {"baseline": "#5b7083", "method": "#c2410c", "control": "#a3a3a3"}
_GREY, _BAND, _INK = "#9ca3af", "#eceff3", "#1f2937"


@dataclass(frozen=True)
class System:
    """One system's scores by metric; a metric that could not be computed is a string that says why.

    ``name`` is its key in report.json, ``label`` what tables and plots call it.
    """

    name: str
    label: str
    metrics: Mapping[str, Scores | str]
    kind: Kind = "baseline"


@dataclass(frozen=True)
class Cell:
    """One entry of ``Report.metrics``: a system's value, or a difference of two, or the reason why there is none."""

    metric: str
    system: str
    minus: str | None
    estimate: Estimate | None
    over_items: float
    unit: str
    higher_is_better: bool
    chance: float | None
    reason: str

    @property
    def name(self) -> str:
        return f"{self.metric}/{self.system}" + (f" - {self.minus}" if self.minus else "")


@dataclass(frozen=True)
class Report:
    """All numbers of a comparison; ``cells`` in the order of metrics, then systems, then comparisons."""

    title: str
    systems: tuple[System, ...]
    cells: tuple[Cell, ...]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    sections: Mapping[str, str] = field(default_factory=dict)  # further Markdown, by heading
    definitions: tuple[str, ...] = DEFINITIONS
    resampled: str = "users"  # what the bootstrap resamples, as tables name it

    def cell(self, metric: str, system: str, minus: str | None = None) -> Cell | None:
        """The cell of a metric and system (or difference), or None where it does not apply."""
        found = (c for c in self.cells if (c.metric, c.system, c.minus) == (metric, system, minus))
        return next(found, None)

    @property
    def metrics(self) -> list[str]:
        """Metrics with a number for at least one system, in order."""
        return list(dict.fromkeys(cell.metric for cell in self.cells if cell.estimate is not None))

    @property
    def not_computed(self) -> dict[str, str]:
        """Why a metric has no number for any system, by metric."""
        computed = set(self.metrics)
        return {cell.metric: cell.reason for cell in self.cells if cell.metric not in computed}


def compare(
    title: str,
    systems: Sequence[System],
    comparisons: Sequence[tuple[str, str]],
    config: Mapping[str, Any],
    *,
    notes: Sequence[str] = (),
    sections: Mapping[str, str] | None = None,
    average: Average = "users",
    resamples: int = 10_000,
    seed: int = 0,
) -> Report:
    """Every system under each of its metrics, and the paired difference of each comparison that both sides have.

    Args:
        comparisons: (system, other) names; the difference is system minus other.

    Raises:
        ValueError: a name is not unique, or a comparison names a system that is not there.
    """
    by_name = {system.name: system for system in systems}
    if len(by_name) != len(systems):
        raise ValueError(f"systems need names of their own, found {[system.name for system in systems]}")
    if unknown := sorted({name for pair in comparisons for name in pair} - by_name.keys()):
        raise ValueError(f"a comparison names {unknown[0]!r}, which is none of the systems {sorted(by_name)}")
    cells = []
    for metric in dict.fromkeys(name for system in systems for name in system.metrics):
        for system in systems:
            if metric in system.metrics:
                cells.append(_value(metric, system, average, resamples, seed))
        for left, right in comparisons:
            if metric in by_name[left].metrics and metric in by_name[right].metrics:
                cells.append(_difference(metric, by_name[left], by_name[right], average, resamples, seed))
    return Report(title, tuple(systems), tuple(cells), config, tuple(notes), dict(sections or {}))


def write(report: Report, folder: Path) -> None:
    """Write report.json, report.md and the plots into ``folder``."""
    content = {
        "title": report.title,
        "metrics": {cell.name: _entry(cell) for cell in report.cells},
        "config": report.config,
        "systems": {system.name: system.label for system in report.systems},
        "definitions": list(report.definitions),
        "notes": list(report.notes),
    }
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    for name, figure in (("systems.png", plot_systems(report)), ("differences.png", plot_differences(report))):
        if figure is not None:
            figure.savefig(folder / name, dpi=150, facecolor="white")


def markdown(report: Report) -> str:
    """The report as Markdown: a table of systems, a table of differences, notes and the configuration."""
    labels = {system.name: system.label for system in report.systems}
    lines = [f"# {report.title}", "", *(f"{definition}\n" for definition in report.definitions)]
    lines += ["## Systems", "", _table(_system_rows(report)), ""]
    if any(_plottable(cell) for cell in report.cells if cell.minus is None):
        lines += ["![Systems with 95% intervals](systems.png)", ""]
    lines += [f"`{metric}`: {reason}\n" for metric, reason in report.not_computed.items()]
    differences = [cell for cell in report.cells if cell.minus is not None and cell.metric in report.metrics]
    if differences:
        rows = [["metric", "difference", "value [95%]", "SDD", report.resampled, "items"]]
        for cell in differences:
            estimate = cell.estimate
            detectable = estimate.smallest_detectable_difference if estimate else math.nan
            rows.append(
                [
                    _metric_title(cell),
                    f"{labels[cell.system]} − {labels[cell.minus or '']}",
                    _shown(cell, bold=estimate is not None and estimate.excludes_zero),
                    "–" if math.isnan(detectable) else _number(detectable),
                    str(estimate.n if estimate else 0),
                    str(estimate.questions if estimate else 0),
                ]
            )
        lines += ["## Differences", "", "Bold: the interval excludes zero.", "", _table(rows), ""]
        if any(_plottable(cell) for cell in differences):
            lines += ["![Differences with 95% intervals](differences.png)", ""]
    for heading, body in report.sections.items():
        lines += [f"## {heading}", "", body.strip(), ""]
    if report.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in report.notes), ""]
    configuration = json.dumps(report.config, indent=2, sort_keys=True, ensure_ascii=False)
    lines += ["## Configuration", "", "```json", configuration, "```", ""]
    return "\n".join(lines)


def plot_systems(report: Report) -> "Figure | None":
    """Forest plot of the systems, a panel a metric; None without any number."""
    kinds = {system.name: system.kind for system in report.systems}
    labels = {system.name: system.label for system in report.systems}
    cells = [cell for cell in report.cells if cell.minus is None and _plottable(cell)]
    panels = _panels(cells)
    if not panels:
        return None
    rows = [name for name in labels if any(cell.system == name for cell in cells)]
    figure, axes = _frame(report.title, [labels[name] for name in rows], panels)
    for axis, (_, found) in zip(axes, panels.items(), strict=True):
        for cell in found:
            _interval(axis, rows.index(cell.system), cell, _COLORS[kinds[cell.system]])
        if found[0].chance is not None:
            axis.axvline(found[0].chance, color=_GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            axis.set_xlabel(f"{axis.get_xlabel()}   (dashed: chance)".strip())
    return figure


def plot_differences(report: Report) -> "Figure | None":
    """Forest plot of the differences, a panel a metric; colored where the interval excludes zero."""
    labels = {system.name: system.label for system in report.systems}
    cells = [cell for cell in report.cells if cell.minus is not None and _plottable(cell)]
    panels = _panels(cells)
    if not panels:
        return None
    rows = list(dict.fromkeys((cell.system, cell.minus or "") for cell in cells))
    names = [f"{labels[left]} − {labels[right]}" for left, right in rows]
    figure, axes = _frame(f"{report.title}: paired differences", names, panels)
    for axis, (_, found) in zip(axes, panels.items(), strict=True):
        axis.axvline(0, color=_INK, linewidth=0.9, zorder=1)
        for cell in found:
            row = rows.index((cell.system, cell.minus or ""))
            assert cell.estimate is not None
            detectable = cell.estimate.smallest_detectable_difference
            if not math.isnan(detectable):
                axis.barh(row, 2 * detectable, left=-detectable, height=0.56, color=_BAND, zorder=0)
            good = (cell.estimate.value > 0) == cell.higher_is_better
            color = ("#15803d" if good else "#b91c1c") if cell.estimate.excludes_zero else _GREY
            _interval(axis, row, cell, color)
    figure.text(
        0.995,
        0.004,
        "green: better, red: worse, interval excludes zero · band: smaller than this sample detects (80% power)",
        ha="right",
        va="bottom",
        fontsize=7.5,
        color="#6b7280",
    )
    return figure


def _value(metric: str, system: System, average: Average, resamples: int, seed: int) -> Cell:
    scores = system.metrics[metric]
    if isinstance(scores, str):
        return Cell(metric, system.name, None, None, math.nan, "", True, None, scores)
    estimate = scores.estimate(average, resamples, seed)
    return Cell(
        metric,
        system.name,
        None,
        estimate,
        scores.value("questions"),
        scores.unit,
        scores.higher_is_better,
        scores.chance,
        estimate.reason,
    )


def _difference(metric: str, left: System, right: System, average: Average, resamples: int, seed: int) -> Cell:
    ours, theirs = left.metrics[metric], right.metrics[metric]
    if isinstance(ours, str) or isinstance(theirs, str):
        reason = ours if isinstance(ours, str) else str(theirs)
        return Cell(metric, left.name, right.name, None, math.nan, "", True, None, reason)
    estimate = ours.minus(theirs, average, resamples, seed)
    answered = set(theirs.questions)
    shared = [question for question in ours.questions if question in answered]
    over_items = ours.select(shared).value("questions") - theirs.select(shared).value("questions")
    return Cell(
        metric,
        left.name,
        right.name,
        estimate,
        over_items,
        ours.unit,
        ours.higher_is_better,
        None,
        estimate.reason,
    )


def _entry(cell: Cell) -> dict[str, Any]:
    """A cell as JSON; what does not exist is null, with a reason."""
    estimate = cell.estimate
    entry: dict[str, Any] = {
        "value": _finite(estimate.value) if estimate else None,
        "low": _finite(estimate.low) if estimate else None,
        "high": _finite(estimate.high) if estimate else None,
        "n": estimate.n if estimate else 0,
        "items": estimate.questions if estimate else 0,
        "value_over_items": _finite(cell.over_items),
        "higher_is_better": cell.higher_is_better,
    }
    if cell.minus is not None or cell.chance is not None:
        entry["smallest_detectable_difference"] = _finite(estimate.smallest_detectable_difference) if estimate else None
    for key, value in (("unit", cell.unit), ("chance", cell.chance), ("reason", cell.reason)):
        if value not in ("", None):
            entry[key] = value
    return entry


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _system_rows(report: Report) -> list[list[str]]:
    titles = []
    for metric in report.metrics:
        titles.append(_metric_title(next(c for c in report.cells if c.metric == metric and c.estimate is not None)))
    rows = [["system", *titles, report.resampled]]
    for system in report.systems:
        cells_of = [report.cell(metric, system.name) for metric in report.metrics]
        users = max((cell.estimate.n for cell in cells_of if cell and cell.estimate), default=0)
        rows.append([system.label, *("–" if cell is None else _shown(cell) for cell in cells_of), str(users)])
    return rows


def _metric_title(cell: Cell) -> str:
    if cell.estimate is None:
        return cell.metric
    return f"{cell.metric} {'↑' if cell.higher_is_better else '↓'}"


def _shown(cell: Cell, bold: bool = False) -> str:
    if cell.estimate is None:
        return cell.reason
    if math.isnan(cell.estimate.value):
        return f"none: {cell.reason}"
    value = _number(cell.estimate.value, sign=cell.minus is not None)
    value = f"**{value}**" if bold else value
    if math.isnan(cell.estimate.low):
        return f"{value} ({cell.reason})"
    return f"{value} [{_number(cell.estimate.low)}, {_number(cell.estimate.high)}]"


def _number(value: float, sign: bool = False) -> str:
    digits = 3 if abs(value) < 100 else 1
    return f"{value:{'+' if sign else ''}.{digits}f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    head, *body = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *body])


def _plottable(cell: Cell) -> bool:
    return cell.estimate is not None and math.isfinite(cell.estimate.value)


def _panels(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells by metric."""
    panels: dict[str, list[Cell]] = {}
    for cell in cells:
        panels.setdefault(cell.metric, []).append(cell)
    return panels


def _frame(title: str, rows: Sequence[str], panels: Mapping[str, Sequence[Cell]]) -> "tuple[Figure, list[Axes]]":
    """An empty figure with a panel a metric, at most four beside one another, and its panels."""
    from matplotlib.figure import Figure

    lines = -(-len(panels) // 4)
    columns = -(-len(panels) // lines)
    margin = 0.075 * max(len(row) for row in rows) + 0.2  # inches for the row names
    width, height = margin + 2.5 * columns + 0.3, lines * (0.36 * len(rows) + 0.95) + 0.55
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(
        lines,
        columns,
        squeeze=False,
        sharey=True,
        gridspec_kw={
            "left": margin / width,
            "right": 1 - 0.15 / width,
            "top": 1 - 0.72 / height,
            "bottom": 0.68 / height,
            "wspace": 0.12,
            "hspace": 0.95 / (0.36 * len(rows) + 0.2),
        },
    )
    figure.suptitle(title, x=0.15 / width, y=1 - 0.14 / height, ha="left", va="top", fontsize=12, color=_INK)
    axes = [axis for line in grid for axis in line]
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (metric, cells) in zip(axes, panels.items(), strict=False):
        unit = f", {cells[0].unit}" if cells[0].unit and cells[0].unit not in metric else ""
        better = "higher is better" if cells[0].higher_is_better else "lower is better"
        axis.set_title(f"{metric}{unit}", loc="left", fontsize=9.5, fontweight="bold", color=_INK, pad=6)
        axis.set_xlabel(better, fontsize=8, color="#6b7280")
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_yticks(range(len(rows)), rows, fontsize=8.5, color=_INK)
        axis.tick_params(axis="x", labelsize=8, colors="#4b5563", length=3)
        axis.tick_params(axis="y", length=0)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x", color="#e5e7eb", linewidth=0.7, zorder=0)
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.spines["bottom"].set_color("#9ca3af")
    return figure, axes[: len(panels)]


def _interval(axis: "Axes", row: int, cell: Cell, color: str) -> None:
    from matplotlib.patheffects import withStroke

    assert cell.estimate is not None
    estimate = cell.estimate
    if math.isfinite(estimate.low):
        axis.plot([estimate.low, estimate.high], [row, row], color=color, linewidth=2, solid_capstyle="round", zorder=3)
    axis.plot(estimate.value, row, "o", color=color, markersize=5.5, markeredgecolor="white", zorder=4)
    text = _number(estimate.value, sign=cell.minus is not None)
    axis.annotate(
        text,
        (estimate.value, row),
        (0, 4.5),
        textcoords="offset points",
        ha="center",
        fontsize=7,
        color="#374151",
        path_effects=[withStroke(linewidth=2, foreground="white")],  # readable on lines and bands
        zorder=5,
    )
