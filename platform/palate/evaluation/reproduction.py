"""What becomes of the papers' claims: one line each, with the test, its result, the interval and the verdict.

A claim about a difference is supported where the 95% interval lies on its side of "none", refuted where it lies on the
other, and undecided in between; then the smallest detectable difference says what such an experiment could have seen.
What the size of an experiment leaves out is not measured, which is another thing than undecided.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from palate import artifacts
from palate.artifacts import join
from palate.evaluation.scaling import Verdict

Outcome = Literal["supported", "refuted", "undecided", "not measured"]


@dataclass(frozen=True)
class Line:
    """One claim of one paper, tested."""

    paper: str
    claim: str
    test: str
    result: str
    outcome: Outcome
    smallest_detectable: float | None = None
    report: str = ""


def verdict(low: float, high: float, none: float = 0.0, higher_is_better: bool = True) -> Outcome:
    """What an interval says of "better than ``none``"."""
    if not higher_is_better:
        low, high, none = -high, -low, -none
    return "supported" if low > none else "refuted" if high < none else "undecided"


def of_metric(
    metrics: Mapping[str, Mapping[str, Any]], name: str, paper: str, claim: str, report: str, none: float = 0.0
) -> Line:
    """The claim that a report's metric, a difference or a win rate, is better than ``none``.

    Raises:
        ValueError: the report has no such metric.
    """
    if name not in metrics:
        raise ValueError(f"{report} has no metric {name!r}; it has {sorted(metrics)}")
    one = metrics[name]
    value, low, high = one["value"], one["low"], one["high"]
    if None in (value, low, high) or not all(math.isfinite(number) for number in (value, low, high)):
        return Line(paper, claim, name, "no interval: too few of what is resampled", "undecided", None, report)
    better = "more" if one["higher_is_better"] else "less"
    shown = f"{value:+.3f} [{low:+.3f}, {high:+.3f}], {better} is better, n = {one['n']}"
    outcome = verdict(low, high, none, one["higher_is_better"])
    return Line(paper, claim, name, shown, outcome, one["smallest_detectable_difference"], report)


def of_verdict(found: Verdict, paper: str, claim: str, report: str) -> Line:
    """A claim of several comparisons, by its rule in ``scaling``; where one is missing, no verdict but a refutation."""
    outcome: Outcome = "not measured" if found.outcome == "undecided" and found.missing else found.outcome
    result = "; ".join(found.reasons)
    return Line(paper, claim, "differences over seeds", result, outcome, found.smallest_detectable, report)


def markdown(lines: Sequence[Line], title: str, said: Sequence[str]) -> str:
    """The report: a table of all claims, then how each was tested."""
    rows = ["| paper | claim | test | result, 95% | verdict |", "|---|---|---|---|---|"]
    for line in lines:
        small = line.smallest_detectable
        told = line.outcome == "undecided" and small is not None and math.isfinite(small)
        detectable = f"; smallest detectable {small:.2g}" if told else ""
        cells = (line.paper, line.claim, line.test, line.result, f"**{line.outcome}**{detectable}")
        rows.append(f"| {' | '.join(cells)} |")
    outcomes = [line.outcome for line in lines]
    counted = [outcome for outcome in get_args(Outcome) if outcome != "not measured" or outcome in outcomes]
    summary = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in counted)
    reports = dict.fromkeys(line.report for line in lines if line.report)
    return "\n".join(
        [
            f"# {title}",
            "",
            *[f"- {one}" for one in said],
            "",
            f"{summary}. Intervals are of single tests, not corrected for their number.",
            "",
            *rows,
            "",
            "Reports:",
            "",
            *[f"- {one}" for one in reports],
            "",
        ]
    )


def write(lines: Sequence[Line], out: str, title: str, said: Sequence[str]) -> str:
    """Write OUT/report.md and OUT/report.json; returns where the former is."""
    filesystem, root = artifacts.locate(out)
    filesystem.makedirs(root, exist_ok=True)
    known = [{name: None if value != value else value for name, value in asdict(line).items()} for line in lines]
    content = {"claims": known, "about": list(said)}  # JSON has no NaN
    filesystem.pipe_file(f"{root}/report.json", (json.dumps(content, indent=2) + "\n").encode())
    filesystem.pipe_file(f"{root}/report.md", markdown(lines, title, said).encode())
    return join(out, "report.md")
