"""What a sweep chooses and writes."""

import json
import math

import pytest
from PIL import Image

from palate.evaluation import sweeps
from palate.evaluation.statistics import Estimate

ACCURACY = sweeps.Metric("accuracy", higher_is_better=True, over="people", chance=0.5)


def estimate(value, spread=0.1):
    return Estimate(value, value - spread, value + spread, 20, 40, spread / 2)


def points():
    values = {(1, 4): 0.6, (2, 4): 0.8, (4, 4): 0.7, (1, 8): 0.5, (2, 8): 0.75, (4, 8): 0.65}
    whole = [
        sweeps.Point({"clusters": k, "rank": r}, 3, 2, estimate(v), estimate(v - 0.8), {"ROUGE-L": estimate(v / 2)})
        for (k, r), v in values.items()
    ]
    return [sweeps.Point({"clusters": 8, "rank": 4}, 1, 2, estimate(0.95)), *whole]  # ended early: cannot be chosen


def test_the_best_of_the_whole_budget_is_chosen():
    assert sweeps.best(points(), ACCURACY).values == {"clusters": 2, "rank": 4}
    loss = sweeps.Metric("loss", higher_is_better=False, over="people")
    assert sweeps.best(points(), loss).values == {"clusters": 1, "rank": 8}


def test_without_a_number_nothing_is_chosen():
    unknown = sweeps.Point({"beta": 1.0}, 1, 1, estimate(math.nan))
    known = sweeps.Point({"beta": 2.0}, 1, 1, estimate(0.1))
    assert sweeps.best([unknown, known], ACCURACY) is known
    with pytest.raises(ValueError, match="no trial came to the end"):
        sweeps.best([unknown], ACCURACY)


def test_table_plot_numbers_and_config_are_written(tmp_path):
    out = (tmp_path / "sweep").as_uri()
    single = Estimate(0.7, math.nan, math.nan, 1, 1, math.nan, "one person")
    some = [*points(), sweeps.Point({"clusters": 16, "rank": 4}, 3, 1, single)]
    chosen = {"out": "runs/a", "adapt": {"rank": 4}}
    winner = sweeps.write(
        some, ACCURACY, out, title="K", budget="epochs", chosen=chosen, then=["python x"], notes=["one failed"]
    )
    assert winner.values == {"clusters": 2, "rank": 4}
    assert json.loads((tmp_path / "sweep/best.json").read_text()) == chosen
    report = json.loads((tmp_path / "sweep/report/report.json").read_text())
    assert report["best"] == {"clusters": 2, "rank": 4}
    assert [point["budget"] for point in report["points"]] == [1, *[3] * 7]
    assert next(p for p in report["points"] if p["values"]["clusters"] == 16)["metric"]["low"] is None  # no NaN in JSON
    text = (tmp_path / "sweep/report/report.md").read_text()
    assert "| 2 | 4 | 3 | 2 | **0.800 [0.700, 0.900]** |  | 0.400 [0.300, 0.500] |" in text
    assert "| 1 | 8 | 3 | 2 | 0.500 [0.400, 0.600] | -0.300 [-0.400, -0.200] |" in text
    assert "| 16 | 4 | 3 | 1 | 0.700 |" in text
    assert "- one failed" in text
    assert "| less the best |" in text
    assert "    python x" in text
    with Image.open(tmp_path / "sweep/report/sweep.png") as picture:
        assert picture.width == 1440  # two panels: values, and paired differences
    said = sweeps.summary(some, winner, ACCURACY, out)
    assert "clusters 2, rank 4: 0.800 [0.700, 0.900]  <- chosen" in said
    assert "clusters 8" not in said


def test_a_column_that_nobody_fills_is_left_out(tmp_path):
    some = [sweeps.Point({"beta": float(beta)}, 3, 1, estimate(0.5 + beta / 10)) for beta in range(2)]
    sweeps.write(some, ACCURACY, (tmp_path / "sweep").as_uri(), title="K", budget="steps", chosen={}, then=[])
    text = (tmp_path / "sweep/report/report.md").read_text()
    assert "| beta | steps | runs | accuracy |\n|---|---|---|---|\n" in text
    assert "| 1.0 | 3 | 1 | **0.600 [0.500, 0.700]** |\n" in text
