import dataclasses
import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palate import artifacts
from palate.artifacts import ArtifactMismatch
from palate.corpora import preparation as steps
from palate.corpora import schema, splits
from palate.corpora.streams import CorpusError
from palate.lpo.preparation import RankingsConfig, bucket_of, prepare
from toy_rankings import comparisons, config_of, png

JOB = Path(__file__).parents[2] / "jobs" / "prepare.py"


def jsonl(folder, records, **options):
    (folder / "own.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return RankingsConfig(input=(str(folder / "own.jsonl"),), out=str(folder / "out"), **{"buckets": 2, **options})


def rows_of(artifact, folder="lists"):
    paths = artifact.paths(f"{folder}/", ".parquet")
    return pa.concat_tables([pq.read_table(artifact.local(path)) for path in paths]).to_pylist() if paths else []


def test_every_annotation_is_accounted_for_and_has_its_source(tmp_path):
    rows = comparisons()
    made = prepare(config_of(tmp_path, rows))
    report = made.read_json("report.json")
    assert report["annotations"] == report["records"] == len(rows)
    assert report["kept"] + report["tied"] + report["dropped"] + report["quarantined"] == len(rows)
    assert report["quarantined_by_reason"] == {"an empty caption": 15, "an image against itself": 15}
    assert report["dropped_by_reason"]["no label"] == sum(not row["has_label"] for row in rows)
    assert len(made.local("quarantine.jsonl").read_text().splitlines()) == 30
    lists = rows_of(made)
    in_lists = {source for one in lists for edge in one["edges"] for source in edge["source_ids"]}
    assert len(in_lists) == report["kept"]
    in_ties = Counter(source for one in rows_of(made, "ties") for source in one["source_ids"])
    assert (in_ties.total(), max(in_ties.values())) == (report["tied"], 1)
    assert len({one["list_id"] for one in lists}) == len(lists) == report["lists"]
    by_id = {str(row["ranking_id"]): row for row in rows}
    for one in lists:
        uids = [item["image_uid"] for item in one["items"]]
        assert [item["model"] for item in one["items"]] == [f"model {uid[-1]}" for uid in uids]
        for edge in one["edges"]:
            for source in edge["source_ids"]:
                row = by_id[source]
                sides = (0, 1) if row["label_0"] == 1 else (1, 0)
                assert row["caption"] == one["caption"]
                assert [row[f"image_{side}_uid"] for side in sides] == [uids[edge["winner"]], uids[edge["loser"]]]
    table = pq.read_table(made.local(made.paths("lists/")[0]))
    assert table.schema.equals(schema.LISTS)
    longer = {
        source for one in lists if len(one["items"]) > 2 for edge in one["edges"] for source in edge["source_ids"]
    }
    assert report["kept_in_lists_longer_than_2"] == len(longer)
    assert Counter(len(one["items"]) for one in lists) == {int(m): c for m, c in report["lists_by_length"].items()}


@pytest.mark.parametrize("group_by", ["caption", "caption-user"])
def test_the_lists_do_not_depend_on_how_the_input_is_cut_or_on_buckets(tmp_path, group_by):
    rows = comparisons()
    whole = prepare(config_of(tmp_path / "a", rows, group_by=group_by))
    cut = prepare(config_of(tmp_path / "b", rows, parts=4, buckets=5, group_by=group_by))
    assert rows_of(cut) == rows_of(whole)
    assert rows_of(cut, "ties") == rows_of(whole, "ties")
    assert cut.read_json("report.json") == whole.read_json("report.json")


def test_a_users_lists_hold_that_users_votes_only(tmp_path):
    rows = comparisons()
    made = prepare(config_of(tmp_path, rows, group_by="caption-user"))
    users = {str(row["ranking_id"]): str(row["user_id"]) for row in rows}
    lists = rows_of(made)
    assert {one["user_id"] for one in lists} == {"0", "1", "2", "3"}
    for one in lists:
        assert {users[source] for edge in one["edges"] for source in edge["source_ids"]} == {one["user_id"]}
    nameless = [{**row, "user_id": None} if row["ranking_id"] == 5 else row for row in rows]
    report = prepare(config_of(tmp_path / "n", nameless, group_by="caption-user")).read_json("report.json")
    assert report["quarantined_by_reason"]["no user id"] == 1


def test_people_who_are_held_out_and_examples_of_everybodys_taste(tmp_path):
    rows = [row | {"user_id": row["ranking_id"] % 40} for row in comparisons(2000, 60)]
    options = {"group_by": "caption-user", "test": 0.2, "validation": 0.1}
    plain = rows_of(prepare(config_of(tmp_path / "plain", rows, **options)))
    made = prepare(config_of(tmp_path / "made", rows, examples=0.3, held_out_people=0.25, **options))
    lists, before = rows_of(made), {one["list_id"]: one["split"] for one in plain}
    # Nothing but training lists becomes an example, and the lists are the same.
    assert {(before[one["list_id"]], one["split"]) for one in lists} == {
        *((split, split) for split in ("train", "validation", "test")),
        ("train", "examples"),
    }
    by_user = {user: Counter(one["split"] for one in lists if one["user_id"] == user) for user in map(str, range(40))}
    held_out = {user for user, splits in by_user.items() if not splits["train"]}
    assert 4 <= len(held_out) <= 17
    rest = sum((splits for user, splits in by_user.items() if user not in held_out), Counter())
    assert 0.2 < rest["examples"] / (rest["examples"] + rest["train"]) < 0.4
    assert made.read_json("report.json")["lists_by_split"]["examples"] == sum(s["examples"] for s in by_user.values())
    more = rows_of(prepare(config_of(tmp_path / "more", rows, held_out_people=0.5, **options)))
    assert held_out < {str(n) for n in range(40)} - {one["user_id"] for one in more if one["split"] == "train"}
    with pytest.raises(CorpusError, match="--group-by caption-user"):
        prepare(config_of(tmp_path / "pooled", rows, examples=0.3))


def test_lists_without_any_image_are_said_to_be_of_no_use(tmp_path, caplog):
    prepare(config_of(tmp_path, comparisons(60)))
    assert "no image was found, so nothing can be tuned" in caplog.text
    caplog.clear()
    prepare(config_of(tmp_path, comparisons(60), out="skipped", images="skip"))
    assert not caplog.text


def test_no_caption_and_no_image_is_in_two_splits(tmp_path):
    """Against networkx; some captions share images, so more than captions must hold together."""
    rows = comparisons(1500, 200)
    for row in rows[::7]:
        row["image_0_uid"] = f"shared {row['ranking_id'] % 90}"
    made = prepare(config_of(tmp_path, rows, validation=0.3, test=0.2))
    graph, split = nx.Graph(), {}
    for one in rows_of(made):
        split[one["caption"]] = one["split"]
        graph.add_edges_from((one["caption"], item["image_uid"]) for item in one["items"])
    parts = [{split[node] for node in part if node in split} for part in nx.connected_components(graph)]
    assert all(len(one) == 1 for one in parts)
    assert set(split.values()) == {"train", "validation", "test"}


def test_components_and_their_splits():
    generator = np.random.default_rng(0)
    caption, image = (
        generator.integers(0, 3000, 5000).astype(np.uint64),
        generator.integers(0, 9000, 5000).astype(np.uint64),
    )
    found = splits.components(splits.mix(caption), splits.mix(image), np.ones(5000, np.int64))
    graph = nx.Graph(
        (("c", int(a)), ("i", int(b))) for a, b in zip(splits.mix(caption), splits.mix(image), strict=True)
    )
    expected = {}
    for part in nx.connected_components(graph):
        names = [number for kind, number in part if kind == "c"]
        expected |= dict.fromkeys(names, min(names))
    assert dict(zip(found.captions.tolist(), found.component.tolist(), strict=True)) == expected
    assert found.count == nx.number_connected_components(graph)
    alone = splits.components(
        splits.mix(np.arange(20_000).astype(np.uint64)), np.arange(20_000).astype(np.uint64), np.ones(20_000, np.int64)
    )
    shares = np.bincount(alone.splits(0.2, 0.1, 0), minlength=3) / 20_000
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.012)  # four standard errors
    assert (alone.splits(0.2, 0.1, 0) != alone.splits(0.2, 0.1, 1)).any()
    assert alone.largest_share == 0


def test_hashes_are_of_texts_alone():
    texts = pa.chunked_array([pa.array(["a", None, "b"]), pa.array(["a", "é"]), pa.array([], pa.string())])
    found = splits.hash64(texts, "x")
    assert found[0] == found[3]
    assert len(set(found.tolist())) == 4
    assert found[0] != splits.hash64(texts, "y")[0]
    assert len(splits.hash64(pa.chunked_array([], pa.string()), "x")) == 0
    many = splits.hash64(pa.array([str(n) for n in range(20_000)]), "x")
    assert np.bincount(bucket_of(many, 7)) == pytest.approx(np.full(7, 20_000 / 7), rel=0.08)
    assert (np.diff(bucket_of(np.sort(many), 7)) >= 0).all()


def test_a_giant_component_is_refused_and_its_links_are_named(tmp_path):
    records = [{"caption": f"caption {n}", "items": [f"{n}-a", "the hub"]} for n in range(40)]
    records += [{"caption": f"other {n}", "items": [f"o{n}-a", f"o{n}-b"]} for n in range(20)]
    config = jsonl(tmp_path, records)
    with pytest.raises(CorpusError, match=r"67% of the annotations .*--max-component 0\.5.*: 'the hub'"):
        prepare(config)
    made = prepare(dataclasses.replace(config, max_component=0.9))
    assert made.read_json("report.json")["largest_component_share"] == pytest.approx(2 / 3, abs=1e-3)


def test_one_caption_with_most_annotations_is_no_giant_component(tmp_path):
    records = [{"caption": "popular", "items": [f"a{n}", f"b{n}"]} for n in range(100)]
    records += [{"caption": f"other {n}", "items": [f"o{n}-a", f"o{n}-b"]} for n in range(30)]
    assert prepare(jsonl(tmp_path, records)).summary["lists"] == 130


def test_bad_records_are_quarantined_with_their_place_and_over_a_limit_stop(tmp_path):
    records = [{"caption": f"c{n}", "items": [f"a{n}", f"b{n}"]} for n in range(8)]
    records += [{"caption": "", "items": ["x", "y"]}, {"caption": "c", "items": ["alone"]}]
    made = prepare(jsonl(tmp_path, records, max_quarantined=0.2))
    report = made.read_json("report.json")
    assert (report["quarantined"], report["dropped_by_reason"]) == (1, {"a list of one": 1})
    (line,) = map(json.loads, made.local("quarantine.jsonl").read_text().splitlines())
    assert (Path(line["input"]).name, line["record"], line["reason"]) == ("own.jsonl", 8, "an empty caption")
    with pytest.raises(CorpusError, match=r"1 of 10 annotations cannot be used.*an empty caption \(1\)"):
        prepare(jsonl(tmp_path, records, max_quarantined=0.05, fresh=True))


def test_all_ties_leave_nothing_to_rank(tmp_path):
    with pytest.raises(CorpusError, match="no list is left: tied"):
        prepare(jsonl(tmp_path, [{"caption": "c", "items": [["a", "b", "d"]]}]))
    with pytest.raises(CorpusError, match="no usable annotation"):
        prepare(jsonl(tmp_path, [{"caption": "c", "items": ["a"]}], fresh=True))


def test_formats_choose_how_ties_and_best_only_are_kept(tmp_path):
    made = prepare(jsonl(tmp_path, [{"caption": "c", "items": ["a", ["b", "d"], "e"]}]))
    (one,) = rows_of(made)
    assert [(item["image_uid"], item["tie_group"]) for item in one["items"]] == [("a", 0), ("b", 1), ("d", 1), ("e", 2)]
    rows = [{"ranking_id": 1, "user_id": 1, "prompt": "p", "best_image_uid": "c"}]
    rows[0] |= {f"image_{n}_uid": uid for n, uid in enumerate("abcd", 1)}
    (best,) = rows_of(prepare(config_of(tmp_path / "best", rows)))
    assert (best["kind"], best["top_k"], best["items"][0]["image_uid"], len(best["items"])) == ("topk", 1, "c", 4)


def test_edits_of_different_images_are_different_groups(tmp_path):
    base = {"caption": "a street", "instruction": "make it night"}
    records = [{**base, "source_image": name, "items": [f"{name}1", f"{name}2"]} for name in ("s", "t")]
    found = rows_of(prepare(jsonl(tmp_path, records)))
    assert {(one["source_image"], one["instruction"], one["items"][0]["image_uid"]) for one in found} == {
        ("s", "make it night", "s1"),
        ("t", "make it night", "t1"),
    }


# Images


def test_images_in_records_are_kept_once_and_broken_ones_leave_their_comparisons_out(tmp_path):
    rows = comparisons(120, 12, images=True)
    rows[10]["jpg_0"] = rows[10]["jpg_0"][:40]
    rows[11]["jpg_1"] = None
    for number in (10, 11):
        rows[number] |= {"has_label": True, "are_different": True}
    one = prepare(config_of(tmp_path / "a", rows))
    two = prepare(config_of(tmp_path / "b", rows, parts=3))
    report = one.read_json("report.json")
    assert report["quarantined_by_reason"]["an image that cannot be decoded"] == 1
    assert report["quarantined_by_reason"]["an unknown image"] == 1
    images = rows_of(one, "images")
    named = {item["image_uid"] for row in rows_of(one) for item in row["items"]}
    assert sorted(image["image_uid"] for image in images) == sorted(named)
    assert report["images"] == len(named)
    originals = {
        row[f"image_{side}_uid"]: row[f"jpg_{side}"]
        for row in rows
        for side in (0, 1)
        if row["ranking_id"] not in (10, 11)
    }
    assert all(image["bytes"] == originals[image["image_uid"]] for image in images)
    assert {(image["width"], image["height"]) for image in images} == {(6, 4)}
    assert pq.read_schema(one.local(one.paths("images/")[0])).equals(schema.IMAGES)
    assert rows_of(two, "images") == images
    assert not prepare(config_of(tmp_path / "c", rows, images="skip")).paths("images/")


@pytest.mark.parametrize("mode", ["reference", "embed"])
def test_images_in_files_are_found_under_their_root(tmp_path, mode):
    root = tmp_path / "pictures"
    root.mkdir()
    for name in ("a.png", "b.png", "s.png", "unused.png"):
        (root / name).write_bytes(png((9, 9, 9)))
    (root / "broken.jpg").write_bytes(b"\xff\xd8 no")
    records = [
        {"caption": "c", "items": ["a.png", "b"], "source_image": "s", "instruction": "i"},
        {"caption": "d", "items": ["a.png", "absent.png"]},
        {"caption": "e", "items": ["a.png", "broken.jpg"]},
    ]
    made = prepare(jsonl(tmp_path, records, images=mode, image_root=str(root), max_quarantined=0.7))
    reasons = made.read_json("report.json")["quarantined_by_reason"]
    assert reasons == {"an image that cannot be decoded": 1, "an unknown image": 1}
    images = {image["image_uid"]: image for image in rows_of(made, "images")}
    assert set(images) == {"a.png", "b", "s"}
    if mode == "embed":
        assert images["b"]["bytes"] == png((9, 9, 9))
        assert images["b"]["path"] is None
    else:
        assert images["b"]["bytes"] is None
        assert Path(images["b"]["path"]) == root / "b.png"


def test_a_folder_of_ranked_images(tmp_path):
    for name in ("pictures/red cat/1.png", "pictures/red cat/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png((1, 2, 3)))
    made = prepare(RankingsConfig(input=(str(tmp_path / "pictures"),), out=str(tmp_path / "out")))
    (one,) = rows_of(made)
    assert (one["caption"], [item["image_uid"] for item in one["items"]]) == (
        "red cat",
        ["red cat/1.png", "red cat/2.png"],
    )
    assert len(rows_of(made, "images")) == 2


# Artifacts


def test_a_stopped_preparation_goes_on_and_a_finished_one_is_reused(tmp_path):
    rows = comparisons(images=True, count=120)
    config = config_of(tmp_path, rows, parts=3)
    seen = []

    def stopping(step):
        seen.append(step.label)
        if step.label == "finish":
            step.run(step.tasks[0])
            raise KeyboardInterrupt
        return steps.run_local(step)

    with pytest.raises(KeyboardInterrupt):
        prepare(config, stopping)
    assert seen == ["read", "finish"]
    assert not artifacts.exists(config.out)
    read = tmp_path / "out.work" / "read" / "00001" / "manifest.json"
    before = read.read_bytes()

    def watching(step):
        done = steps.run_local(step)
        assert read.read_bytes() == before
        return done

    made = prepare(config, watching)
    assert not (tmp_path / "out.work").exists()
    whole = prepare(dataclasses.replace(config, out=str(tmp_path / "whole")))
    assert made.digest == whole.digest
    assert made.verify()

    def never(step):
        raise AssertionError(step.label)

    assert prepare(config, never).digest == made.digest
    with pytest.raises(ArtifactMismatch, match="max_length"):
        prepare(dataclasses.replace(config, max_length=4))
    assert prepare(dataclasses.replace(config, max_length=4, fresh=True)).summary["annotations"] == len(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "--max-length"),
        ({"validation": 0.6, "test": 0.5}, "nothing to train on"),
        ({"max_component": float("nan")}, "--max-component"),
        ({"margin": -1.0}, "--margin"),
        ({"buckets": 0}, "--buckets"),
        ({"input": ()}, "--input"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, message):
    config = dataclasses.replace(RankingsConfig(input=("x",), out=str(tmp_path / "out")), **options)
    with pytest.raises(CorpusError, match=message):
        prepare(config)


def test_the_job(tmp_path, monkeypatch, capsys):
    config = config_of(tmp_path, comparisons(100))
    arguments = [
        "rankings",
        "--input",
        *config.input,
        "--out",
        config.out,
        "--max-quarantined",
        "0.2",
        "--kind",
        "dominance",
    ]
    monkeypatch.setattr(sys, "argv", [str(JOB), *arguments])
    runpy.run_path(str(JOB), run_name="__main__")
    assert "annotations: 100" in capsys.readouterr().out
    assert {one["kind"] for one in rows_of(artifacts.open_artifact(config.out, schema.RANKED_LISTS))} == {"dominance"}


@pytest.mark.parametrize("seed", range(8))
def test_of_random_rankings_every_pair_is_counted_once(tmp_path, seed):
    """Rankings of all lengths with ties, contradictions and single images, under every combination of rules."""
    generator = np.random.default_rng(seed)
    records, pairs = [], 0
    for _ in range(60):
        images = [f"i{n}" for n in generator.permutation(9)[: int(generator.integers(1, 7))]]
        cut = int(generator.integers(len(images)))
        records.append({"caption": f"c{generator.integers(8)}", "items": [*images[:cut], images[cut:]]})
        pairs += max(1, len(images) * (len(images) - 1) // 2)  # a list of one counts once
    kind = ("full", "topk", "dominance")[seed % 3]
    options = {
        "cycles": ("break", "collapse")[seed % 2],
        "ties": ("table", "group")[seed // 2 % 2],
        "buckets": 1 + seed,
    }
    made = prepare(jsonl(tmp_path, records, kind=kind, max_length=int(generator.integers(2, 9)), **options))
    report = made.read_json("report.json")
    assert report["annotations"] == pairs
    assert report["kept"] + report["tied"] + report["dropped"] + report["quarantined"] == pairs
    assert sum(report["dropped_by_reason"].values()) == report["dropped"]
    # The sources of a kept pair stand in every list that has its edge; count each edge of a caption once.
    edges = {
        (one["caption"], one["items"][edge["winner"]]["image_uid"], one["items"][edge["loser"]]["image_uid"]): len(
            edge["source_ids"]
        )
        for one in rows_of(made)
        for edge in one["edges"]
    }
    assert sum(edges.values()) == report["kept"]
    assert sum(report["lists_by_length"].values()) == report["lists"] == sum(report["lists_by_split"].values())


def test_scores_of_many_files_meet(tmp_path):
    """One caption's scores lie in three files; they are ranked together and carry their scores."""
    for part in range(3):
        line = {"caption": "c", "image": f"i{part}", "score": part, "model": f"m{part}"}
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(line))
    made = prepare(RankingsConfig(input=(str(tmp_path / "*.jsonl"),), out=str(tmp_path / "out"), buckets=2))
    (one,) = rows_of(made)
    assert [(item["image_uid"], item["score"], item["model"]) for item in one["items"]] == [
        ("i2", 2.0, "m2"),
        ("i1", 1.0, "m1"),
        ("i0", 0.0, "m0"),
    ]
    assert made.summary["annotations"] == 3
