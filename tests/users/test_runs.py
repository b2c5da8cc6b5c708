"""The registry of runs: states, promotion, rolling back."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from palate.users import schema
from palate.users.runs import (
    RunError,
    RunState,
    add_run,
    live_run,
    promote,
    remove_run,
    roll_back,
    runs,
    start_refit,
)


def add(store, *names):
    for name in names:
        add_run(store, name, f"s3://bucket/{name}", f"head-{name}", "smollm2")


def states(store):
    return {run.name: str(run.state) for run in runs(store)}


def test_the_way_of_a_run(store):
    assert live_run(store) is None
    add(store, "a")
    assert states(store) == {"a": "added"}
    assert start_refit(store, "a").state is RunState.REFITTING
    live = promote(store, "a")
    assert (live.name, live.url, live.head, live.base) == ("a", "s3://bucket/a", "head-a", "smollm2")
    assert live.state is RunState.LIVE
    assert live.promoted >= live.added
    assert live_run(store) == live
    add(store, "b")
    start_refit(store, "b")
    assert live_run(store).name == "a"
    promote(store, "b")
    assert states(store) == {"a": "retired", "b": "live"}
    assert [run.name for run in runs(store)] == ["a", "b"]


def test_a_live_run_that_is_refitted_stays_live(store):
    add(store, "a")
    promote(store, "a")
    assert start_refit(store, "a").state is RunState.LIVE


def test_adding_the_same_again_changes_nothing_and_another_is_refused(store):
    add(store, "a")
    promote(store, "a")
    live = live_run(store)
    assert add_run(store, "a", "s3://bucket/a", "head-a", "smollm2") == live
    with pytest.raises(RunError, match=r"run 'a' is s3://bucket/a \(head head-a.*needs another name"):
        add_run(store, "a", "s3://bucket/a", "head-other", "smollm2")
    assert runs(store) == [live]


def test_a_name_that_is_no_id_is_refused(store):
    with pytest.raises(ValueError, match=r"name of the run is '\.\./a'"):
        add_run(store, "../a", "url", "head", "base")
    with pytest.raises(ValueError, match="head of the run is ''"):
        add_run(store, "a", "url", "", "base")
    with pytest.raises(ValueError, match="URL of the run"):
        add_run(store, "a", "\0", "head", "base")
    assert runs(store) == []


@pytest.mark.parametrize("change", [promote, start_refit, remove_run])
def test_an_unknown_run_is_named_with_those_that_there_are(store, change):
    add(store, "a", "b")
    with pytest.raises(RunError, match=r"there is no run 'c'; there are \['a', 'b'\]"):
        change(store, "c")


def test_rolling_back_twice_goes_back_twice(store):
    add(store, "a", "b", "c")
    for name in ("a", "b", "c"):
        promote(store, name)
    assert roll_back(store).name == "b"
    assert states(store) == {"a": "retired", "b": "live", "c": "retired"}
    assert roll_back(store).name == "a"
    assert live_run(store).name == "a"
    with pytest.raises(RunError, match="'a' is live and no other run was before it; promote a run by name"):
        roll_back(store)
    assert live_run(store).name == "a"


def test_what_was_rolled_back_from_is_not_returned_to(store):
    add(store, "a", "b", "c")
    promote(store, "a")
    promote(store, "b")
    roll_back(store)
    promote(store, "c")
    assert roll_back(store).name == "a"
    promote(store, "b")  # but it can be promoted anew
    promote(store, "c")
    assert roll_back(store).name == "b"


def test_promoting_the_live_run_is_no_step(store):
    add(store, "a", "b")
    for name in ("a", "b", "b"):
        promote(store, name)
    assert roll_back(store).name == "a"


def test_a_run_may_be_live_twice(store):
    add(store, "a", "b")
    for name in ("a", "b", "a"):
        promote(store, name)
    assert [roll_back(store).name, roll_back(store).name] == ["b", "a"]


def test_nothing_to_roll_back_to(store):
    with pytest.raises(RunError, match="no run is live"):
        roll_back(store)


def test_the_live_run_is_not_removed_and_removed_ones_are_passed_over(store):
    add(store, "a", "b", "c")
    for name in ("a", "b", "a", "c"):
        promote(store, name)
    with pytest.raises(RunError, match="run 'c' is live and cannot be removed"):
        remove_run(store, "c")
    remove_run(store, "b")
    assert states(store) == {"a": "retired", "c": "live"}
    assert roll_back(store).name == "a"
    with pytest.raises(RunError, match="no other run was before it"):  # b is gone, and a is a
        roll_back(store)


def test_a_new_run_of_a_removed_ones_name_was_never_live(store):
    add(store, "a", "b")
    promote(store, "a")
    promote(store, "b")
    remove_run(store, "a")
    add(store, "a")
    assert runs(store)[-1].promoted is None
    with pytest.raises(RunError, match="no other run was before it"):
        roll_back(store)


def test_the_history_of_promotions_is_kept(store):
    add(store, "a", "b")
    promote(store, "a")
    promote(store, "b")
    roll_back(store)
    remove_run(store, "b")
    with store.read() as connection:
        rows = connection.execute(select(schema.promotions).order_by(schema.promotions.c.id)).all()
    assert [(row.name, row.rolled_back is not None) for row in rows] == [("a", False), ("b", True)]


def test_one_run_is_live_however_many_promote_at_once(store):
    names = [f"run-{number}" for number in range(12)]
    add(store, *names)
    start = threading.Barrier(6)

    def change(thread):
        start.wait(timeout=30)
        lives = []
        for name in names[thread::6] * 6:
            promote(store, name)
            lives.append(list(states(store).values()).count("live"))
        return lives

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(change, range(6))) == [[1] * 12] * 6
    assert sorted(states(store).values()) == ["live"] + ["retired"] * 11
    with store.read() as connection:
        promoted = connection.execute(select(schema.promotions).order_by(schema.promotions.c.id)).all()
    assert live_run(store).name == promoted[-1].name
    assert roll_back(store).name == promoted[-2].name
