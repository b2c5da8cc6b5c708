"""What a comparison writes: JSON as the design states it, Markdown, plots."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from palate.evaluation import report
from palate.evaluation.statistics import Scores

USERS = tuple(f"u{n // 2}" for n in range(20))
QUESTIONS = tuple(f"q{n}" for n in range(20))
ABSENT = "not computed: WordNet is absent"


def scores(shift: float, seed: int = 0, **keywords: object) -> Scores:
    values = np.random.default_rng(seed).normal(size=20) + shift
    return Scores(QUESTIONS, USERS, values, **keywords)  # type: ignore[arg-type]


@pytest.fixture
def compared() -> report.Report:
    systems = [
        report.System("base", "Base | model", {"rouge-L": scores(0.0), "meteor": ABSENT, "pair accuracy": "no vector"}),
        report.System(
            "card",
            "CARD",
            {"rouge-L": scores(1.0), "meteor": ABSENT, "pair accuracy": scores(0.5, chance=0.5)},
            kind="method",
        ),
        report.System("own", "Per user", {"rouge-L": scores(2.0, seed=3).select(QUESTIONS[:6])}, kind="control"),
    ]
    return report.compare("A title", systems, [("card", "base"), ("own", "card")], {"seed": 7}, notes=["a note"])


def test_values_and_differences_are_those_of_the_bootstrap(compared: report.Report) -> None:
    own, difference = compared.cell("rouge-L", "card"), compared.cell("rouge-L", "card", "base")
    assert own is not None
    assert own.estimate == scores(1.0).estimate()
    assert difference is not None
    assert difference.estimate is not None
    assert difference.estimate.value == pytest.approx(1.0)
    on_a_sample = compared.cell("rouge-L", "own", "card")
    assert on_a_sample is not None
    assert on_a_sample.estimate == scores(2.0, seed=3).select(QUESTIONS[:6]).minus(scores(1.0))
    assert (on_a_sample.estimate.n, on_a_sample.estimate.questions) == (3, 6)


def test_the_json_is_as_the_design_states_it(compared: report.Report, tmp_path: Path) -> None:
    report.write(compared, tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    found = json.loads(text)
    assert found["config"] == {"seed": 7}
    entry = found["metrics"]["rouge-L/card"]
    expected = scores(1.0).estimate()
    assert (entry["value"], entry["low"], entry["high"], entry["n"]) == (
        expected.value,
        expected.low,
        expected.high,
        10,
    )
    assert entry["value_over_items"] == pytest.approx(scores(1.0).values.mean())
    sampled = found["metrics"]["rouge-L/own - card"]
    own, card = scores(2.0, seed=3).select(QUESTIONS[:6]), scores(1.0)
    assert sampled["smallest_detectable_difference"] == pytest.approx(own.minus(card).smallest_detectable_difference)
    assert (sampled["n"], sampled["items"]) == (3, 6)


def test_what_was_not_computed_says_so_everywhere(compared: report.Report, tmp_path: Path) -> None:
    report.write(compared, tmp_path)
    entry = json.loads((tmp_path / "report.json").read_text())["metrics"]["meteor/card"]
    assert entry["value"] is None
    assert entry["reason"] == ABSENT
    markdown = (tmp_path / "report.md").read_text()
    assert f"`meteor`: {ABSENT}" in markdown
    row = next(line for line in markdown.splitlines() if line.startswith("| Base"))
    assert row.endswith("| no vector | 10 |")
    assert row.startswith("| Base \\| model |")


def test_markdown_states_values_differences_and_configuration(compared: report.Report) -> None:
    text = report.markdown(compared)
    estimate = scores(1.0).estimate()
    assert f"| CARD | {estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}] |" in text
    assert "| rouge-L ↑ | CARD − Base \\| model | +1.000 (" not in text
    assert "CARD − Base \\| model | **+1.000** [1.000, 1.000]" in text
    assert '"seed": 7' in text
    assert "- a note" in text


def test_plots_are_pictures_with_ink(compared: report.Report, tmp_path: Path) -> None:
    report.write(compared, tmp_path)
    for name in ("systems.png", "differences.png"):
        picture = imread(tmp_path / name)
        assert picture.shape[0] > 200
        assert picture.shape[1] > 400
        assert picture[..., :3].std() > 0.02


def test_a_panel_has_a_mark_for_every_system_with_a_number(compared: report.Report) -> None:
    figure = report.plot_systems(compared)
    assert figure is not None
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_visible()}
    assert set(panels) == {"rouge-L", "pair accuracy"}
    marks = [line.get_xdata()[0] for line in panels["rouge-L"].lines if line.get_marker() == "o"]
    assert marks == pytest.approx([c.estimate.value for c in compared.cells[:3] if c.estimate])


def test_one_user_and_no_numbers_are_reported_without_plots(tmp_path: Path) -> None:
    one = Scores(("q",), ("u",), np.ones(1))
    systems = [report.System("a", "A", {"m": one, "k": "why"}), report.System("b", "B", {"m": one, "k": "why"})]
    report.write(report.compare("One", systems, [("a", "b")], {}), tmp_path)
    entry = json.loads((tmp_path / "report.json").read_text())["metrics"]["m/a - b"]
    assert (entry["value"], entry["low"], entry["smallest_detectable_difference"]) == (0.0, None, None)
    assert "one user" in entry["reason"]
    empty = report.compare("None", [report.System("a", "A", {"k": "why"})], [], {})
    assert report.plot_systems(empty) is None
    assert report.plot_differences(empty) is None
    assert "`k`: why" in report.markdown(empty)


def test_names_must_be_known_and_unique() -> None:
    system = report.System("a", "A", {"m": scores(0.0)})
    with pytest.raises(ValueError, match="of their own"):
        report.compare("t", [system, system], [], {})
    with pytest.raises(ValueError, match="'z'"):
        report.compare("t", [system], [("a", "z")], {})


def test_numbers_are_finite_or_null() -> None:
    broken = Scores(("q", "r"), ("u", "v"), np.array([1.0, math.nan]))
    found = report.compare("t", [report.System("a", "A", {"m": broken})], [], {})
    assert "not finite" in report.markdown(found)
