import json
import random
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate import artifacts
from palate.corpora import entries, jsonl, people, preparation, schema
from palate.corpora.entries import QUESTION, entry
from palate.corpora.people import Rules
from palate.corpora.streams import CorpusError

TASK = schema.Task("test", "text")


def finished(rows, **rules):
    table = pa.Table.from_pylist(rows, schema=entries.ENTRIES)
    return people.finish(table, Rules(TASK, **rules))


def text(row, place, identity, source, output="o", user="u", date=None):
    return entry(row, place, identity, source, user_id=user, output=output, date=date)


# ---- users from shared items


def components_by_search(pairs):
    """Breadth-first search over rows and links: which rows are connected."""
    neighbours = defaultdict(set)
    for row, link in pairs:
        neighbours["row", row].add(("link", link))
        neighbours["link", link].add(("row", row))
    found, groups = set(), set()
    for start in neighbours:
        if start in found:
            continue
        group, queue = {start}, [start]
        while queue:
            for node in neighbours[queue.pop()] - group:
                group.add(node)
                queue.append(node)
        found |= group
        groups.add(frozenset(name for kind, name in group if kind == "row"))
    return groups


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(-6, 15)), min_size=1, max_size=40))
def test_users_are_the_connected_components(pairs):
    rows, links = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    users = people.recover_users(rows, links)
    groups = defaultdict(set)
    for row, user in users.items():
        groups[user].add(row)
    assert {frozenset(group) for group in groups.values()} == components_by_search(pairs)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(-6, 15)), min_size=1, max_size=40), st.randoms())
def test_recovered_ids_depend_on_the_items_and_not_on_order_or_row_numbers(pairs, shuffler):
    users = people.recover_users(*(np.array(c, dtype=np.int64) for c in zip(*pairs, strict=True)))
    shuffler.shuffle(pairs)
    moved = [(row + 1000, link) for row, link in pairs]
    again = people.recover_users(*(np.array(c, dtype=np.int64) for c in zip(*moved, strict=True)))
    assert {row + 1000: user for row, user in users.items()} == again


def test_no_rows_no_users():
    assert people.recover_users(np.array([], dtype=np.int64), np.array([], dtype=np.int64)) == {}


# ---- the leak guard

SOURCES = st.sampled_from(["", "Apple pie", "apple  PIE", "plum", "ＰＬＵＭ", "fig"])
OUTPUTS = st.sampled_from(["good", "Good ", "bad"])
IDS = st.sampled_from(["1", "2", "3", "4"])


@st.composite
def records(draw):
    rows = []
    for row in range(draw(st.integers(1, 4))):
        source, output = draw(SOURCES), draw(st.one_of(st.none(), OUTPUTS))
        rows.append(text(row, QUESTION, f"q{row}" if draw(st.booleans()) else draw(IDS), source, output))
        rows += [text(row, place, draw(IDS), draw(SOURCES), draw(OUTPUTS)) for place in range(draw(st.integers(0, 5)))]
    return rows


@given(records(), st.booleans())
def test_no_question_finds_its_own_text_in_any_history(rows, own_output):
    result = finished(rows, own_output=own_output)
    asked = [row for row in rows if row["place"] == QUESTION]
    written = {(row["id"], row["source"], row["output"]) for row in rows if row["place"] != QUESTION}
    ids = {row["id"] for row in asked}
    sources = {schema.normalized(row["source"]) for row in asked if row["source"]}
    golds = {schema.normalized(row["output"]) for row in asked if row["output"]}
    expected = [
        (identity, source, output)
        for identity, source, output in written
        if identity not in ids
        and schema.normalized(source) not in sources
        and not (own_output and schema.normalized(output) in golds)
    ]
    items = result.items.to_pylist()
    assert Counter((item["source"], item["output"]) for item in items) == Counter(one[1:] for one in expected)
    assert result.counts["items"] == len(expected)
    leaked = sum(count for name, count in result.counts.items() if name.startswith("leaked_items"))
    assert leaked == len(written) - len(expected)
    equal = sum(schema.normalized(output) in golds for _, _, output in expected)
    assert result.counts["items_with_an_equal_label"] == (0 if own_output else equal)
    known = {item["item_id"] for item in items}
    assert len(known) == len(items)
    for question in result.questions.to_pylist():
        assert set(question["profile"]) <= known


def test_an_equal_label_on_another_text_stays_and_is_counted():
    rows = [text(0, QUESTION, "q", "a film", "comedy"), text(0, 0, "1", "another film", "Comedy")]
    result = finished(rows)
    assert [item["output"] for item in result.items.to_pylist()] == ["Comedy"]
    assert result.counts["items_with_an_equal_label"] == 1


def test_another_persons_question_does_not_remove_an_item():
    rows = [
        text(0, QUESTION, "q", "plum", user="a"),
        text(1, QUESTION, "r", "fig", user="b"),
        text(1, 0, "1", "plum", user="b"),
    ]
    assert [item["source"] for item in finished(rows).items.to_pylist()] == ["plum"]


def test_another_persons_copy_of_a_gold_goes_but_an_equal_label_stays():
    rows = [
        text(0, QUESTION, "q", "Plum", "good", user="a"),
        text(1, 0, "1", "plum", "Good", user="b"),
        text(1, 1, "2", "plum", "bad", user="b"),
        text(1, 2, "3", "fig", "good", user="b"),
    ]
    table = pa.Table.from_pylist(rows, schema=entries.ENTRIES)
    for metric, kept in [("text", ["2", "3"]), ("classification", ["1", "2", "3"])]:
        rules = Rules(schema.Task("test", metric))
        result = people.finish(table, rules, people.gold_pairs(table, rules))
        assert [item["item_id"] for item in result.items.to_pylist()] == [f"b/{identity}" for identity in kept]
        assert result.counts["leaked_items_of_another_person"] == 3 - len(kept)


def test_held_out_texts_of_others_are_golds_too(tmp_path):
    shared = {"input": "the same", "output": "words"}
    lines = [{"user_id": "a", "input": str(number), "output": "x"} for number in range(3)]
    lines += [{"user_id": "a", **shared}, {"user_id": "b", **shared}]
    lines += [{"user_id": "b", "input": f"b{number}", "output": "y"} for number in range(3)]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    corpus = prepared(tmp_path / "all.jsonl", tmp_path / "out")
    assert "words" in {question.output for question in schema.read_questions(corpus)}
    assert "words" not in {item.output for item in schema.read_items(corpus)}
    assert corpus.read_json("report.json")["leaked_items_of_another_person"] == 1


# ---- order, duplicates, holding out


def test_dates_order_the_history_where_every_text_has_one():
    dates = ["2015-10-1", "2015-9-30", "2014-12-31"]
    rows = [text(0, place, str(place), f"s{place}", date=date) for place, date in enumerate(dates)]
    assert [item["date"] for item in finished(rows).items.to_pylist()] == ["2014-12-31", "2015-9-30", "2015-10-1"]
    rows[0]["date"] = None
    assert [item["source"] for item in finished(rows).items.to_pylist()] == ["s0", "s1", "s2"]


def test_an_item_in_two_profiles_is_kept_once_and_seen_by_both_questions():
    rows = [
        text(0, QUESTION, "q", "x"),
        text(0, 0, "1", "a"),
        text(1, QUESTION, "r", "y"),
        text(1, 0, "2", "b"),
        text(1, 1, "1", "a"),
    ]
    result = finished(rows)
    profiles = {row["question_id"]: row["profile"] for row in result.questions.to_pylist()}
    assert profiles == {"q": ["u/1"], "r": ["u/1", "u/2"]}
    assert result.counts["duplicate_items"] == 1


def test_an_id_on_two_texts_keeps_both_under_different_names():
    result = finished([text(0, 0, "1", "a"), text(0, 1, "1", "b")])
    assert [item["item_id"] for item in result.items.to_pylist()] == ["u/1", "u/1~2"]
    assert result.counts["item_ids_used_again"] == 1


def test_the_latest_texts_become_questions_about_the_earlier_ones():
    rows = [text(row, 0, str(row), f"s{row}", date=f"2020-01-{row + 1}") for row in range(6)]
    result = finished(rows, hold_out=2, max_texts=5)
    assert [item["item_id"] for item in result.items.to_pylist()] == ["u/1", "u/2", "u/3"]
    assert [(q["question_id"], q["profile"]) for q in result.questions.to_pylist()] == [
        ("4", ["u/1", "u/2", "u/3"]),
        ("5", ["u/1", "u/2", "u/3"]),
    ]
    assert result.counts["texts_over_max_texts"] == 1


def test_a_single_text_stays_history():
    result = finished([text(0, 0, "1", "a")], hold_out=4)
    assert (result.items.num_rows, result.questions.num_rows) == (1, 0)


def test_people_with_few_texts_are_dropped_and_counted():
    rows = [text(0, 0, "1", "a"), text(1, 0, "2", "b", user="v"), text(2, 0, "3", "c", user="v")]
    result = finished(rows, min_texts=2)
    assert set(result.items["user_id"].to_pylist()) == {"v"}
    assert (result.counts["users_below_min_texts"], result.counts["texts_of_dropped_users"]) == (1, 1)


def test_braces_in_a_text_are_no_placeholders():
    item = finished([text(0, 0, "1", "a {source} {0} {x}")], item_template="About: {source}").items.to_pylist()[0]
    assert item["input"] == "About: a {source} {0} {x}"


def test_text_of_takes_texts_and_numbers_only():
    assert [entries.text_of(value) for value in (" a ", 5, 5.0, 4.5, None, True, [1], float("nan"), "\ud800x")] == [
        "a", "5", "5", "4.5", "", "", "", "", "?x",
    ]  # fmt: skip


# ---- the whole preparation


def write_lines(path, people=7, texts=6, broken=0):
    source = random.Random(0)
    rows = [
        {"user_id": f"u{number % people}", "input": f"about {number}", "output": f"text {source.random()}"}
        for number in range(people * texts)
    ]
    lines = [json.dumps(row) for row in rows] + ["{"] * broken
    path.write_text("\n".join(lines))
    return rows


def prepared(path, out, runner=preparation.run_local, **options):
    config = jsonl.JsonlConfig(input=(str(path),), out=str(out), questions_per_user=2, **options)
    return preparation.prepare(jsonl.recipe(config), config, runner)


def content(corpus):
    return schema.read_items(corpus), schema.read_questions(corpus), schema.read_task(corpus)


def test_rows_do_not_depend_on_buckets_files_or_chunks(tmp_path, monkeypatch):
    rows = write_lines(tmp_path / "all.jsonl")
    one = prepared(tmp_path / "all.jsonl", tmp_path / "one", buckets=1)
    many = prepared(tmp_path / "all.jsonl", tmp_path / "many", buckets=64)
    monkeypatch.setattr(entries, "CHUNK_CHARACTERS", 1)
    fine = prepared(tmp_path / "all.jsonl", tmp_path / "fine", buckets=5)
    assert content(one) == content(many) == content(fine)
    assert one.read_json("report.json") == fine.read_json("report.json")
    assert len(one.paths("items/")) == 1
    assert len(many.paths("items/")) > 1
    items, questions, _ = content(one)
    assert len(items) + len(questions) == len(rows)


def test_the_corpus_is_written_and_read_by_url(tmp_path, any_url):
    write_lines(tmp_path / "all.jsonl")
    local = prepared(tmp_path / "all.jsonl", tmp_path / "local")
    remote = prepared(tmp_path / "all.jsonl", f"{any_url}/corpus")
    assert content(remote) == content(local)
    assert remote.digest == local.digest
    filesystem, root = artifacts.locate(any_url)
    assert {path.removeprefix(root).split("/")[1] for path in filesystem.find(root)} == {"corpus"}  # no work left


def test_broken_records_are_quarantined_with_their_reason(tmp_path):
    write_lines(tmp_path / "all.jsonl", broken=2)
    corpus = prepared(tmp_path / "all.jsonl", tmp_path / "out")
    lines = [json.loads(line) for line in corpus.local("quarantine.jsonl").read_text().splitlines()]
    assert [line["record"] for line in lines] == [42, 43]
    assert {line["reason"] for line in lines} == {"the line is no JSON"}
    report = corpus.read_json("report.json")
    assert (report["records"], report["quarantined"]) == (44, 2)
    assert report["quarantined_by_reason"] == {"the line is no JSON": 2}


def test_over_the_limit_the_job_stops_and_leaves_no_corpus(tmp_path):
    write_lines(tmp_path / "all.jsonl", broken=3)
    with pytest.raises(CorpusError, match=r"3 of 45 records cannot be used, more than --max-quarantined 0\.05"):
        prepared(tmp_path / "all.jsonl", tmp_path / "out")
    assert not artifacts.exists(tmp_path / "out")
    assert prepared(tmp_path / "all.jsonl", tmp_path / "out", max_quarantined=0.5)


def test_a_hopeless_file_is_not_read_to_its_end(tmp_path):
    (tmp_path / "all.jsonl").write_text("{\n" * 5000)
    with pytest.raises(CorpusError, match="most of the first 5000 records"):
        prepared(tmp_path / "all.jsonl", tmp_path / "out", max_quarantined=1.0)


def test_a_file_without_records_is_an_error(tmp_path):
    (tmp_path / "all.jsonl").touch()
    with pytest.raises(CorpusError, match="no usable record"):
        prepared(tmp_path / "all.jsonl", tmp_path / "out")


def test_a_finished_corpus_is_not_made_again_and_another_is_refused(tmp_path):
    write_lines(tmp_path / "all.jsonl")
    first = prepared(tmp_path / "all.jsonl", tmp_path / "out")

    def never(step):
        raise AssertionError(step.label)

    assert prepared(tmp_path / "all.jsonl", tmp_path / "out", never, buckets=3).created == first.created
    with pytest.raises(artifacts.ArtifactMismatch, match="min_texts"):
        prepared(tmp_path / "all.jsonl", tmp_path / "out", min_texts=3)
    write_lines(tmp_path / "all.jsonl", people=5)
    with pytest.raises(artifacts.ArtifactMismatch, match="input 0"):
        prepared(tmp_path / "all.jsonl", tmp_path / "out")
    assert (
        len({item.user_id for item in content(prepared(tmp_path / "all.jsonl", tmp_path / "out", fresh=True))[0]}) == 5
    )


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_a_stopped_preparation_goes_on_after_its_finished_tasks(tmp_path, stop_at):
    write_lines(tmp_path / "all.jsonl")
    whole = prepared(tmp_path / "all.jsonl", tmp_path / "whole")
    begun = []

    def stopping(step):
        begun.append(step.label)
        if len(begun) == stop_at:
            step.run(step.tasks[0])
            raise Stopped
        return preparation.run_local(step)

    with pytest.raises(Stopped):
        prepared(tmp_path / "all.jsonl", tmp_path / "out", stopping)
    assert not artifacts.exists(tmp_path / "out")
    read = tmp_path / "out.work" / "read" / "00000"
    before = artifacts.open_artifact(read).created, (read / "entries.parquet").stat().st_mtime_ns
    seen = []

    def watching(step):
        results = preparation.run_local(step)
        seen.append((artifacts.open_artifact(read).created, (read / "entries.parquet").stat().st_mtime_ns))
        return results

    assert prepared(tmp_path / "all.jsonl", tmp_path / "out", watching).digest == whole.digest
    assert set(seen) == {before}
    assert not (tmp_path / "out.work").exists()


def test_what_another_preparation_left_in_the_work_folder_is_not_used(tmp_path):
    write_lines(tmp_path / "all.jsonl")

    def stopping(step):
        preparation.run_local(step)
        raise Stopped

    with pytest.raises(Stopped):
        prepared(tmp_path / "all.jsonl", tmp_path / "out", stopping)
    write_lines(tmp_path / "all.jsonl", people=3)
    items, _, _ = content(prepared(tmp_path / "all.jsonl", tmp_path / "out"))
    assert {item.user_id for item in items} == {"u0", "u1", "u2"}


def test_a_question_id_in_two_files_is_refused(tmp_path):
    row = {"id": "7", "input": "Generate a headline for the following article: a", "profile": []}
    from palate.corpora import lamp

    for name in ("train.json", "dev.json"):
        (tmp_path / name).write_text(json.dumps([row]))
    config = lamp.LampConfig(
        task="LaMP_4", questions=(str(tmp_path / "train.json"), str(tmp_path / "dev.json")), out=str(tmp_path / "out")
    )
    with pytest.raises(CorpusError, match=r"'7' occurs twice: in .*train\.json \(record 0\) and in .*dev\.json"):
        preparation.prepare(lamp.recipe(config), config)
