import io
import json
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from palate.corpora import pictures, rankings
from palate.corpora.rankings import FORMATS, POINT, TIE, WIN
from palate.corpora.streams import CorpusError

SHORT = {WIN: ">", TIE: "=", POINT: "."}


def png(color=(255, 0, 0), size=(4, 3)):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return str(path)


def read(path, name=None, **options):
    name = name or rankings.detect(str(path))
    tables = [
        found.annotations for unit in rankings.units([str(path)], **options) for found in FORMATS[name].read(unit)
    ]
    table = pa.concat_tables(tables)
    assert table.schema == rankings.ANNOTATIONS
    return table.to_pylist()


def brief(rows):
    """["a>b", "c=d", or the reason]."""
    return [row["reason"] or f"{row['winner']}{SHORT[row['label']]}{row['loser'] or ''}" for row in rows]


def pick(first="a", second="b", labels=(1.0, 0.0), **other):
    return {
        "caption": "a cat",
        "user_id": 7,
        "created_at": datetime(2023, 1, 2, tzinfo=UTC),
        "image_0_uid": first,
        "image_1_uid": second,
        "label_0": labels[0],
        "label_1": labels[1],
        "has_label": True,
        "are_different": True,
        "model_0": "xl",
        "model_1": "sd",
        "ranking_id": 11,
        **other,
    }


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_pickapic_takes_wins_draws_and_leaves_out_what_is_no_comparison(tmp_path, suffix):
    rows = [
        pick(),
        pick("c", "d", (0.0, 1.0)),
        pick("e", "f", (0.5, 0.5)),
        pick(has_label=False),
        pick(are_different=False),
        pick(labels=(0.7, 0.2)),
        pick(caption=" "),
        pick(second="a"),
        pick(first=None),
    ]
    if suffix == ".jsonl":
        rows = [{**row, "created_at": row["created_at"].isoformat()} for row in rows]
    found = read(write(tmp_path / f"x{suffix}", rows))
    assert brief(found) == [
        "a>b",
        "d>c",
        "e=f",
        "no label",
        "the images are not different",
        "labels that are no win or draw",
        "an empty caption",
        "an image against itself",
        "no image uid",
    ]
    first, second = found[:2]
    assert (first["winner_model"], first["loser_model"]) == ("xl", "sd")
    assert (second["winner_model"], second["loser_model"]) == ("sd", "xl")
    assert (first["user_id"], first["source_id"], first["caption"]) == ("7", "11", "a cat")
    assert first["time"] == datetime(2023, 1, 2, tzinfo=UTC).timestamp() * 1e6
    assert [row["row"] for row in found] == list(range(9))


def test_pickapic_images_come_along_with_their_sides(tmp_path):
    red, blue = png((255, 0, 0)), png((0, 0, 255))
    path = write(tmp_path / "x.parquet", [pick(jpg_0=red, jpg_1=blue), pick(labels=(0.0, 1.0), jpg_0=red, jpg_1=blue)])
    (found,) = FORMATS["pickapic"].read(rankings.units([path])[0])
    assert found.winner_bytes.to_pylist() == [red, blue]
    assert found.loser_bytes.to_pylist() == [blue, red]
    (without,) = FORMATS["pickapic"].read(rankings.units([path], images=False)[0])
    assert without.winner_bytes is None


def test_a_large_file_is_cut_into_units_and_records_keep_their_numbers(tmp_path, monkeypatch):
    table = pa.Table.from_pylist([pick(f"a{n}", f"b{n}") for n in range(100)])
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=10)
    whole = read(tmp_path / "x.parquet")
    monkeypatch.setattr(rankings, "UNIT_ROWS", 25)
    units = rankings.units([str(tmp_path / "x.parquet")])
    assert [unit.groups for unit in units] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9,)]
    assert read(tmp_path / "x.parquet") == whole


def test_best_of_four_is_three_pairs_of_one_source(tmp_path):
    row = {"ranking_id": 5, "user_id": 1, "prompt": "p", "best_image_uid": "c", "created_at": "2023-01-01T00:00:00"}
    images = {f"image_{n}_uid": uid for n, uid in enumerate("abcd", 1)}
    rows = [{**row, **images}, {**row, **images, "best_image_uid": "z"}, {**row, **images, "best_image_uid": None}]
    found = read(write(tmp_path / "x.parquet", rows))
    assert brief(found) == ["c>a", "c>b", "c>d", "the best image is none of the images", "no label"]
    assert [row["source_id"] for row in found[:3]] == ["5"] * 3
    assert FORMATS["pickapic-rankings"].kind == "topk"


def test_imagereward_json_has_ranks_that_skip_and_repeat(tmp_path):
    rows = [{"id": "r1", "prompt": "p", "generations": ["a", "b", "c", "d"], "ranking": [5, 1, 3, 3]}]
    found = read(write(tmp_path / "test.json", rows))
    assert sorted(brief(found)) == ["b>a", "b>c", "b>d", "c=d", "c>a", "d>a"]
    assert {row["source_id"] for row in found} == {"r1"}


def points(path, margin=0.0, size=8):
    """The pairs of a file of points, with the reasons."""
    name = rankings.detect(path)
    tables = [found.annotations for unit in rankings.units([path]) for found in FORMATS[name].read(unit)]
    table = pa.concat_tables(tables)
    usable = table.filter(pa.compute.is_null(table["reason"]))
    return rankings.pair_points(usable, margin, size).to_pylist()


def test_imagereward_rows_are_compared_within_their_prompt_id(tmp_path):
    base = {"prompt": "p", "overall_rating": 4.0, "classification": "x"}
    rows = [
        {**base, "image_path": "a", "prompt_id": "1", "rank": 2},
        {**base, "image_path": "b", "prompt_id": "1", "rank": 1, "overall_rating": 6.0},
        {**base, "image_path": "c", "prompt_id": "2", "rank": 1},
        {**base, "image_path": "d", "prompt_id": "1", "rank": 2},
    ]
    found = points(write(tmp_path / "x.parquet", rows))
    assert sorted(brief(found)) == ["a list of one", "a=d", "b>a", "b>d"]
    assert [row["winner_score"] for row in found if row["loser"] == "a"] == [6.0]


def test_imagereward_images_lie_in_the_rows(tmp_path):
    rows = [
        {
            "prompt": "p",
            "prompt_id": "1",
            "rank": n,
            "overall_rating": 1.0,
            "image": {"bytes": png(), "path": f"{n}.png"},
        }
        for n in (1, 2)
    ]
    (found,) = FORMATS["imagereward"].read(rankings.units([write(tmp_path / "x.parquet", rows)])[0])
    assert found.annotations["winner"].to_pylist() == ["1.png", "2.png"]
    assert found.winner_bytes.to_pylist() == [png(), png()]


def test_hpdv2_has_pairs_and_the_ranks_of_every_annotator(tmp_path):
    train = write(tmp_path / "train.json", [{"human_preference": [0, 1], "prompt": "p", "file_path": ["a", "b"]}])
    assert brief(read(train)) == ["b>a"]
    annotators = [{"rank": [1, 2, 3], "user_hash": "u"}, {"rank": [2, 1, 2], "user_hash": "v"}]
    test = [{"prompt": "p", "image_path": ["a", "b", "c"], "rank": [1.5, 1.5, 2.5], "raw_annotations": annotators}]
    found = read(write(tmp_path / "test.json", test))
    assert [(row["user_id"], text) for row, text in zip(found, brief(found), strict=True)] == [
        ("u", "a>b"), ("u", "a>c"), ("u", "b>c"), ("v", "b>a"), ("v", "a=c"), ("v", "b>c"),
    ]  # fmt: skip
    assert len({(row["row"], row["place"]) for row in found}) == 6


def test_hpdv3_votes_weigh_by_their_difference(tmp_path):
    base = {"prompt": "p", "path1": "a", "path2": "b", "model1": "x", "model2": "y", "confidence": 0.9}
    rows = [base, {**base, "choice_dist": [12, 5]}, {**base, "choice_dist": [3, 3]}]
    found = read(write(tmp_path / "x.json", rows))
    assert brief(found) == ["a>b", "a>b", "a=b"]
    assert [row["votes"] for row in found] == [1.0, 7.0, 1.0]
    assert (found[0]["winner_model"], found[0]["loser_model"]) == ("x", "y")


def test_scores_are_ordered_with_a_margin_within_caption_and_rater(tmp_path):
    rows = [
        {"caption": "p", "image": name, "score": score} for name, score in zip("abc", (0.1, 0.9, 0.85), strict=True)
    ]
    rows += [{"caption": "p", "image": "z", "score": 5, "user_id": "u"}, {"caption": "p", "image": "y", "score": "?"}]
    path = write(tmp_path / "x.jsonl", rows)
    assert brief(read(path)) == ["a.", "b.", "c.", "z.", "no value"]
    assert sorted(brief(points(path))) == ["a list of one", "b>a", "b>c", "c>a"]
    assert sorted(brief(points(path, margin=0.1))) == ["a list of one", "b=c", "b>a", "c>a"]


def test_many_points_are_dealt_into_sets_that_span_the_range(tmp_path):
    """Eleven scores in sets of at most four: every image is compared, and each set has high and low ones."""
    path = write(tmp_path / "x.jsonl", [{"caption": "p", "image": f"i{n:02}", "score": n} for n in range(11)])
    found = points(path, size=4)
    sets = {}
    for row in found:
        sets.setdefault(row["source_id"], set()).update([row["winner_score"], row["loser_score"]])
    assert sorted(sorted(one) for one in sets.values()) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]


@pytest.mark.parametrize("words", [("up", "down"), (True, False), (1, 0), ("exclusive_win", "exclusive_lose")])
def test_thumbs_put_what_was_liked_over_what_was_not(tmp_path, words):
    rows = [{"caption": "p", "image": name, "label": words[name > "b"]} for name in "abc"]
    rows.append({"caption": "p", "image": "d", "label": "sideways"})
    path = write(tmp_path / "x.jsonl", rows)
    assert brief(read(path)) == ["a.", "b.", "c.", "a label that is neither up nor down"]
    assert sorted(brief(points(path))) == ["a=b", "a>c", "b>c"]


def test_diffusion_ktos_csv(tmp_path):
    (tmp_path / "x.csv").write_text("file_path,caption,label\na.png,p,exclusive_win\nb.png,p,exclusive_lose\n")
    assert brief(points(str(tmp_path / "x.csv"))) == ["a.png>b.png"]


def test_fields_of_csv_are_texts_whatever_the_first_rows_look_like(tmp_path):
    lines = ["file_path\tcaption\tlabel", *(f"{n}\t00{n % 2}\t{n % 3 % 2}" for n in range(100_000)), "x\t\t1"]
    (tmp_path / "x.tsv").write_text("\n".join(lines))
    found = read(tmp_path / "x.tsv")
    assert [row["caption"] for row in found[:2]] == ["000", "001"]
    assert brief(found[-2:]) == ["99999.", "an empty caption"]
    (tmp_path / "x.tsv").write_text("file_path\tcaption\tlabel\na\tb\n")
    with pytest.raises(CorpusError, match=r"x\.tsv: no table that can be read"):
        read(tmp_path / "x.tsv", "thumbs")


def test_folders_of_ranked_images(tmp_path):
    for name in ("red cat/1_x.png", "red cat/2_y.png", "red cat/2_z.jpg", "n7/1.png", "n7/2.png", "lone/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    (tmp_path / "n7" / "caption.txt").write_text("seven\n")
    found = read(tmp_path)
    assert [(row["caption"], text) for row, text in zip(found, brief(found), strict=True)] == [
        ("lone", "a list of one"),
        ("seven", "n7/1.png>n7/2.png"),
        ("red cat", "red cat/1_x.png>red cat/2_y.png"),
        ("red cat", "red cat/1_x.png>red cat/2_z.jpg"),
        ("red cat", "red cat/2_y.png=red cat/2_z.jpg"),
    ]


def test_folders_of_winners_and_losers(tmp_path):
    for name in ("1_x/w/a.png", "1_x/l/a.png", "1_x/w/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    (tmp_path / "1_x" / "w" / "a.caption").write_text("a boat")
    found = read(tmp_path)
    assert brief(found) == ["1_x/w/a.png>1_x/l/a.png", "a list of one"]
    assert found[0]["caption"] == "a boat"


def test_plain_jsonl(tmp_path):
    rows = [
        {"caption": "p", "items": ["a", "b", "c"], "user_id": "u", "ties": [["b", "c"]], "id": "one"},
        {"caption": "p", "items": [{"path": "a", "model": "m", "score": 2}, ["b", {"image_uid": "c"}]], "votes": 2},
        {"caption": "p", "items": ["a"]},
        {"caption": "p", "items": []},
        {"caption": "p", "items": ["a", "b", "a"]},
        {"caption": "p", "items": ["a", "b", "c"], "ties": [["a", "c"]]},
        {"caption": "p", "items": "ab"},
        {"caption": "", "items": ["a", "b"]},
        "{",
        [1],
        {"caption": "p", "items": ["a", "b"], "votes": -1},
        {"caption": "p", "items": ["x", "y"], "source_image": "s", "instruction": "make it red"},
    ]
    found = read(write(tmp_path / "own.jsonl", rows), "jsonl")
    assert brief(found) == [
        "a>b", "a>c", "b=c", "a>b", "a>c", "b=c", "a list of one", "no images", "an image twice in a ranking",
        "a tie of items that are no neighbours of the list", "items is no list", "an empty caption",
        "the line is no JSON", "the record is no object", "votes that are no positive number", "x>y",
    ]  # fmt: skip
    assert [row["source_id"] for row in found[:6]] == ["one"] * 3 + ["own.jsonl:1"] * 3
    assert (found[3]["votes"], found[3]["winner_model"], found[3]["winner_score"]) == (2.0, "m", 2.0)
    assert (found[-1]["source_image"], found[-1]["instruction"]) == ("s", "make it red")


def test_a_ranking_becomes_all_its_pairs_whatever_the_ranks():
    """Against the definition, on random ranks with ties."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        count = int(generator.integers(2, 9))
        ranks = generator.integers(0, 4, count).tolist()
        columns = rankings._Columns()
        columns.add_ranking(0, rankings.Ranking("p", [f"i{n}" for n in range(count)], ranks))
        table = columns.table(rankings.Unit("f", 0)).to_pylist()
        expected = {
            (f"i{a}", f"i{b}", WIN if ranks[a] < ranks[b] else TIE)
            for a in range(count)
            for b in range(count)
            if ranks[a] < ranks[b] or (ranks[a] == ranks[b] and a < b)
        }
        assert {(row["winner"], row["loser"], row["label"]) for row in table} == expected
        assert len(table) == count * (count - 1) // 2


def test_what_is_of_no_known_format_is_refused_with_what_was_found(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": "t", "number": 3}])
    with pytest.raises(CorpusError, match=r"\['number', 'text'\].*--format"):
        rankings.detect(path)
    with pytest.raises(CorpusError, match="found no record"):
        rankings.detect(write(tmp_path / "empty.jsonl", []))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(CorpusError, match="no Parquet file"):
        rankings.detect(str(tmp_path / "broken.parquet"))


def test_inputs_are_files_patterns_and_folders(tmp_path):
    for name in ("b.parquet", "a.parquet", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "pictures").mkdir()
    files = [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    assert rankings.expand([str(tmp_path / "*.parquet")]) == files
    assert rankings.expand([str(tmp_path)]) == files
    assert rankings.expand([files[1], files[0], files[1]]) == files[::-1]
    assert rankings.expand([str(tmp_path / "pictures")]) == [str(tmp_path / "pictures")]
    for absent in ("no.parquet", "*.json"):
        with pytest.raises(CorpusError, match="no such file"):
            rankings.expand([str(tmp_path / absent)])


def test_times_are_in_utc_whatever_the_machines_zone():
    expected = datetime(2023, 1, 2, 3, tzinfo=UTC).timestamp() * 1e6
    assert rankings._time("2023-01-02T03:00:00") == rankings._time("2023-01-02T05:00:00+02:00") == expected
    assert rankings._time(None) == rankings._time("yesterday") == 0


def test_images_are_decoded_whole():
    assert pictures.image_size(png(size=(7, 5))) == (7, 5)
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, "JPEG")
    for broken in (b"", b"no image", stream.getvalue()[:-400], png()[:45]):
        with pytest.raises(ValueError, match="not an image"):
            pictures.image_size(broken)


def test_a_uid_cannot_lead_out_of_the_folder_of_images(tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "root").mkdir()
    gallery = pictures.Gallery(str(tmp_path / "root"), "embed")
    assert gallery._look("../secret", None, 0) == pictures.UNKNOWN
    assert gallery._look("x/../../secret.png", None, 0) == pictures.UNKNOWN
