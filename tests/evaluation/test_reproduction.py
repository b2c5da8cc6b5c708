"""Verdicts on claims, and their report."""

import json
import math

import pytest

from palate.evaluation.reproduction import Line, markdown, of_metric, of_verdict, verdict, write
from palate.evaluation.scaling import Verdict

METRICS = {
    "bits/a - b": {"value": -0.2, "low": -0.3, "high": -0.1, "n": 9, "higher_is_better": False},
    "win rate/a": {"value": 0.6, "low": 0.45, "high": 0.75, "n": 9, "higher_is_better": True},
    "win rate/b": {"value": 0.3, "low": 0.2, "high": 0.4, "n": 9, "higher_is_better": True},
    "alone": {"value": 0.3, "low": None, "high": None, "n": 1, "higher_is_better": True},
}
METRICS = {name: {**one, "smallest_detectable_difference": 0.21} for name, one in METRICS.items()}


def test_a_verdict_follows_from_the_interval():
    assert verdict(0.1, 0.2) == "supported"
    assert verdict(-0.2, -0.1) == "refuted"
    assert verdict(-0.1, 0.1) == "undecided"
    assert verdict(0.0, 0.1) == "undecided"  # none is not excluded
    assert verdict(0.4, 0.6, none=0.5) == "undecided"
    assert verdict(0.51, 0.6, none=0.5) == "supported"
    assert verdict(-0.2, -0.1, higher_is_better=False) == "supported"
    assert verdict(0.1, 0.2, higher_is_better=False) == "refuted"
    assert verdict(0.6, 0.7, none=0.5, higher_is_better=False) == "refuted"


def test_claims_are_read_from_a_reports_metrics():
    found = [of_metric(METRICS, name, "P", "c", "r", none) for name, none in (("bits/a - b", 0), ("win rate/a", 0.5))]
    assert [line.outcome for line in found] == ["supported", "undecided"]
    assert found[0].result == "-0.200 [-0.300, -0.100], less is better, n = 9"
    assert of_metric(METRICS, "win rate/b", "P", "c", "r", 0.5).outcome == "refuted"
    assert of_metric(METRICS, "alone", "P", "c", "r").outcome == "undecided"
    with pytest.raises(ValueError, match=r"r has no metric 'x'; it has \['alone', 'bits/a - b'"):
        of_metric(METRICS, "x", "P", "c", "r")


def test_a_claim_that_lacks_a_comparison_is_not_measured_but_may_be_refuted():
    reasons = ("a - b: +1", "a - c: +2", "a - d: not measured")
    for outcome, said in (("undecided", "not measured"), ("refuted", "refuted"), ("supported", "supported")):
        line = of_verdict(Verdict(1, outcome, reasons, 0.2, ("a - d",)), "P", "c", "r")
        assert (line.outcome, line.result) == (said, "a - b: +1; a - c: +2; a - d: not measured")
    whole = of_verdict(Verdict(1, "undecided", reasons[:2], 0.2), "P", "c", "r")
    assert whole.outcome == "undecided"
    text = markdown(
        [line, whole, of_verdict(Verdict(1, "undecided", reasons, 0.2, ("a - d",)), "P", "c", "r")], "C", []
    )
    assert "1 supported, 0 refuted, 1 undecided, 1 not measured." in text
    assert "**not measured** |" in text


def test_the_report_has_all_claims(tmp_path):
    lines = [
        of_metric(METRICS, "win rate/a", "LPO", "lists win", "lpo/report.md", 0.5),
        Line("CARD", "own fits", "bits", "-0.2", "supported", math.nan, "card/report.md"),
    ]
    text = markdown(lines, "Claims", ["small"])
    assert "1 supported, 0 refuted, 1 undecided." in text
    assert "**undecided**; smallest detectable 0.21 |" in text
    assert "| CARD | own fits | bits | -0.2 | **supported** |" in text
    assert text.index("- lpo/report.md") < text.index("- card/report.md")
    where = write(lines, (tmp_path / "out").as_uri(), "Claims", ["small"])
    assert where.endswith("out/report.md")
    claims = json.loads((tmp_path / "out/report.json").read_text())["claims"]
    assert [one["paper"] for one in claims] == ["LPO", "CARD"]
