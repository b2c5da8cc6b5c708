"""Progress: every item once, lines in a log, time left, and silence about what takes no time."""

import re

import pytest

from palate import progress


@pytest.fixture
def quick(monkeypatch):
    """Lines every 10 ms instead of every 10 s. Pytest's captured standard error is no terminal: a log."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)


def slowly(count: int):
    import time

    for number in range(count):
        time.sleep(0.015)
        yield number


def test_track_yields_every_item_once_in_order():
    assert list(progress.track(range(5), "counting")) == [0, 1, 2, 3, 4]
    assert list(progress.track([], "nothing")) == []


def test_what_ends_soon_leaves_no_line(capsys):
    list(progress.track(range(1000), "quick"))
    assert capsys.readouterr().err == ""


def test_a_log_gets_lines_with_the_share_done_and_the_time_left(quick, capsys):
    list(progress.track(slowly(8), "slow", total=8))
    written = capsys.readouterr().err
    assert "\r" not in written
    lines = written.splitlines()
    assert len(lines) >= 3
    assert all(line.startswith("slow:") for line in lines)
    assert re.search(r"\d/8 \[\d\d:\d\d<\d\d:\d\d", lines[1])
    assert "8/8" in lines[-1]


def test_an_unknown_total_counts_up(quick, capsys):
    list(progress.track(slowly(4), "stream"))
    assert re.search(r"stream: \d+it", capsys.readouterr().err)


def test_a_meter_shows_what_is_reported_by_hand(quick, capsys):
    with progress.meter("train", total=30, unit="tok") as bar:
        for _ in slowly(3):
            bar.set_postfix(loss=0.25, refresh=False)
            bar.update(10)
    assert "loss=0.25" in capsys.readouterr().err


def test_nested_meters_stay_lines_of_their_own(quick, capsys):
    for _ in progress.track(slowly(3), "outer", total=3):
        list(progress.track(slowly(3), "inner", total=3))
    written = capsys.readouterr().err
    assert "\x1b" not in written
    assert all(line.startswith(("outer:", "inner:")) for line in written.splitlines())


def test_a_failure_passes_through_the_bar():
    with pytest.raises(ZeroDivisionError):
        list(progress.track((1 / zero for zero in [0]), "fails"))


def test_a_stage_says_its_name_and_its_time(capsys):
    with progress.stage("adapt"):
        pass
    first, last = capsys.readouterr().out.splitlines()
    assert first == "== adapt"
    assert re.fullmatch(r"== adapt: \d+\.\d s", last)
