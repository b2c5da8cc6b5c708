import base64
import dataclasses
import errno
import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from palate import artifacts
from palate.corpora import captions, image_text
from palate.corpora.captions import CaptionsConfig, prepare
from palate.corpora.duplicates import perceptual_hash
from palate.corpora.preparation import run_local
from palate.corpora.streams import CorpusError
from toy_captions import (
    encoded,
    jpeg,
    mixed,
    picture,
    sample,
    tar_bytes,
    write_llava,
    write_parquet,
    write_tar,
)

TALK = [{"from": "human", "value": "<image>\nWas?"}, {"from": "gpt", "value": "Übung"}]
COLUMNS = image_text.Columns("jpg", "caption")


def run(folder: Path, pattern: str = "in/*", **settings):
    return prepare(CaptionsConfig(input=(str(folder / pattern),), out=str(folder / "out"), **settings))


def index_of(made, shard: int = 0) -> list[dict]:
    with pa.memory_map(str(made.local(f"index/{shard:05d}.arrow"))) as source:
        reader = pa.ipc.open_file(source)
        assert reader.num_record_batches == 1
        assert reader.schema == captions.INDEX
        return reader.read_all().to_pylist()


def keys(made) -> list[str]:
    return [row["key"] for shard in range(shards_of(made)[-1]["shard"] + 1) for row in index_of(made, shard)]


def shards_of(made) -> list[dict]:
    table = pq.read_table(made.local("shards.parquet"))
    assert table.schema.equals(captions.SHARDS)
    return table.to_pylist()


def dropped(made) -> dict[str, str]:
    tables = [pq.read_table(made.local(path)) for path in made.paths("dropped/")]
    return {row["key"]: row["reason"] for table in tables for row in table.to_pylist()}


def reasons(made) -> dict[str, int]:
    return {one["reason"]: one["dropped"] for one in made.read_json("data_card.json")["reasons"]}


def part(path: str | Path, row: dict, name: str) -> bytes | None:
    if row[f"{name}_size"] < 0:
        return None
    return Path(path).read_bytes()[row[f"{name}_offset"] :][: row[f"{name}_size"]]


# Formats


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_indexed_by_byte_ranges(tmp_path, form):
    long = "folder/" + "k" * (150 if form != tarfile.USTAR_FORMAT else 60)
    written = [
        sample("000", jpeg(0), "ein Bär", {"similarity": 0.3}),
        sample(long, jpeg(1), "two", suffix="JPEG"),
        sample("a.b/000", encoded(picture(2), "PNG"), "three", suffix="png"),
        sample("x", encoded(picture(3), "WEBP"), None, {"conversations": TALK}, "webp"),
    ]
    path = write_tar(tmp_path / "in" / "0.tar", written, form)
    made = run(tmp_path)
    rows = index_of(made)
    assert [row["key"] for row in rows] == ["000", long, "a.b/000", "x"]
    assert [row["length"] for row in rows] == [7, 3, 5, 12 + 5]
    for row, members in zip(rows, written, strict=True):
        contents = {Path(name).suffix.lower(): content for name, content in members.items()}
        assert part(path, row, "text") == contents.get(".txt")
        assert part(path, row, "json") == contents.get(".json")
        assert part(path, row, "image") in contents.values()
        assert Image.open(io.BytesIO(part(path, row, "image"))).size == (48, 40)
        assert row["row"] == -1
    (shard,) = shards_of(made)
    assert (shard["url"], shard["format"], shard["samples"], shard["root"]) == (str(path), "tar", 4, "")
    assert (shard["bytes"], shard["sha256"]) == (path.stat().st_size, artifacts.file_entry(path, "x").sha256)
    assert made.read_json("columns.json") == {}


def test_names_are_split_as_webdataset_does():
    split = image_text.split_name
    assert split("a/b.c/key.seg.PNG") == ("a/b.c/key", "seg.png")
    assert split("key.jpg") == ("key", "jpg")
    assert [split(name) for name in ("a/._key.jpg", "README", "__meta__.json__", "a/.jpg", "key.")] == [None] * 5


def test_members_with_longer_suffixes_are_taken_where_they_are_the_only_ones(tmp_path):
    members = [
        {"a.photo.jpg": jpeg(0), "a.en.txt": b"one", "a.seg.npy": b"x"},
        {"b.thumb.jpg": jpeg(9), "b.jpg": jpeg(1), "b.alt.txt": b"no", "b.txt": b"yes"},
        {"c.left.jpg": jpeg(2), "c.right.jpg": jpeg(3), "c.txt": b"which"},
        {"d.jpg": jpeg(4), "d.JPG": jpeg(5), "d.txt": b"twice"},
    ]
    path = write_tar(tmp_path / "in" / "0.tar", members)
    made = run(tmp_path, max_quarantined=0.5)
    first, second = index_of(made)
    assert (part(path, first, "image"), part(path, first, "text")) == (members[0]["a.photo.jpg"], b"one")
    assert (part(path, second, "image"), part(path, second, "text")) == (members[1]["b.jpg"], b"yes")
    assert dropped(made) == {"c": image_text.MEMBERS, "d": image_text.MEMBERS}


@pytest.mark.parametrize("style", ["bytes", "struct"])
def test_parquet_is_indexed_by_rows(tmp_path, style):
    images = [jpeg(seed) for seed in range(9)]
    cells = images if style == "bytes" else [{"bytes": image, "path": "x.jpg"} for image in images]
    columns = {"SAMPLE_ID": list(range(100, 109)), "image": cells, "TEXT": [f"text {n}" for n in range(9)]}
    columns["TEXT"][3] = None
    write_parquet(tmp_path / "in" / "0.parquet", columns)
    made = run(tmp_path, max_quarantined=0.2)
    rows = index_of(made)
    assert [row["row"] for row in rows] == [0, 1, 2, 4, 5, 6, 7, 8]
    assert [row["key"] for row in rows] == [str(100 + row["row"]) for row in rows]
    assert {row[name] for row in rows for name in captions.INDEX.names[1:7]} == {-1}
    assert made.read_json("columns.json") == {"image": "image", "caption": "TEXT"}
    assert dropped(made) == {"103": image_text.NO_CAPTION}


def test_columns_can_be_named(tmp_path):
    write_parquet(tmp_path / "in" / "0.parquet", {"picture": [jpeg(0)], "words": ["one"], "text": ["two"]})
    made = run(tmp_path, image_column="picture", caption_column="words")
    assert made.read_json("columns.json") == {"image": "picture", "caption": "words"}
    assert index_of(made)[0]["key"] == "000000000"


def test_rows_that_were_not_fetched_are_no_broken_ones(tmp_path):
    """img2dataset's Parquet keeps the rows whose download failed."""
    columns = {
        "jpg": [jpeg(0), None, None],
        "caption": ["one", "two", "three"],
        "status": ["success", "failed_to_download", "failed_to_resize"],
    }
    write_parquet(tmp_path / "in" / "0.parquet", columns)
    made = run(tmp_path, max_quarantined=0)
    assert reasons(made) == {"status is not success": 2}
    assert made.local("quarantine.jsonl").read_text() == ""


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_llava_records_are_indexed_by_byte_ranges(tmp_path, monkeypatch, lines, mark):
    monkeypatch.setattr(image_text, "_BLOCK", 64)  # so that records lie across blocks
    (tmp_path / "root" / "coco").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "root" / "coco" / f"{number}.jpg").write_bytes(jpeg(number))
    records = [
        {"id": "é0", "image": "coco/0.jpg", "conversations": TALK, "nested": [{"a": "]},{"}, 1.5, '\\"']},
        {"id": 1, "image": "coco/1.jpg", "conversations": TALK},
        {"id": "text", "conversations": TALK},
        {"id": "gone", "image": "coco/7.jpg", "conversations": TALK},
        {"id": "out", "image": "../outside/2.jpg", "conversations": TALK},
        {"id": "still", "image": "coco/2.jpg", "conversations": []},
        ["no object"],
        {"image": "coco/2.jpg", "conversations": TALK},
    ]
    path = write_llava(tmp_path / "in" / ("x.jsonl" if lines else "x.json"), records, lines)
    path.write_bytes(mark + path.read_bytes())
    made = run(tmp_path, images=str(tmp_path / "root"), max_quarantined=0.9)
    rows = index_of(made)
    assert [json.loads(part(path, row, "json")) for row in rows] == [records[0], records[1], records[7]]
    assert [row["key"] for row in rows] == ["é0", "1", "7"]
    assert {row["length"] for row in rows} == {17}
    assert {row["image_size"] for row in rows} == {-1}
    assert dropped(made) == {
        "text": image_text.NOT_ONE_IMAGE,
        "gone": image_text.NO_IMAGE,
        "out": image_text.RECORD,
        "still": image_text.NO_CAPTION,
        "6": image_text.RECORD,
    }
    assert shards_of(made)[0]["root"] == str(tmp_path / "root")


SAID = {
    "good": {"conversations": TALK, "questions": [{"kind": "colour", "text": "Which?", "answer": "red"}]},
    "user": {"conversations": [{"from": "user", "value": "Was?"}]},
    "none": {"conversations": None, "questions": None},
    "empty": {"conversations": [], "questions": []},
    "text": {"conversations": "Was?"},
    "dict": {"conversations": {"from": "human", "value": "Was?"}},
    "turns": {"conversations": [["human", "Was?"]]},
    "role": {"conversations": [{"role": "user", "content": "Was?"}]},
    "value": {"conversations": [*TALK, {"from": "human", "value": None}]},
    "gpt": {"conversations": TALK[1:]},
    "system": {"conversations": [{"from": "system", "value": "Be brief."}, *TALK]},
    "surrogate": {"conversations": [{"from": "human", "value": "\ud800"}]},
    "asked": {"conversations": TALK, "questions": ["Which?"]},
    "open": {"conversations": TALK, "questions": [{"text": "Which?"}]},
    "many": {"conversations": TALK, "questions": [{"text": "Which?", "answer": ["red", "blue"]}]},
    "one": {"conversations": TALK, "questions": {"text": "Which?", "answer": "red"}},
}
UNSAID = ["none", "empty"]
KEPT = ["good", "user"]


@pytest.mark.parametrize("form", ["llava", "tar", "captioned"])
def test_records_that_training_could_not_take_are_left_out(tmp_path, form):
    if form == "llava":
        (tmp_path / "root").mkdir()
        for number, key in enumerate(SAID):
            (tmp_path / "root" / f"{key}.jpg").write_bytes(jpeg(number))
        write_llava(
            tmp_path / "in" / "x.json",
            json.loads(json.dumps([{"id": k, "image": f"{k}.jpg", **v} for k, v in SAID.items()])),
        )
    else:
        text = "caption" if form == "captioned" else None
        write_tar(
            tmp_path / "in" / "0.tar", [sample(key, jpeg(n), text, one) for n, (key, one) in enumerate(SAID.items())]
        )
    made = run(tmp_path, images=str(tmp_path / "root"), max_quarantined=1)
    unsaid = dict.fromkeys(UNSAID, image_text.NO_CAPTION) if form != "captioned" else {}
    assert keys(made) == [*KEPT, *(UNSAID if form == "captioned" else [])]
    wrong = [key for key in SAID if key not in (*KEPT, *UNSAID)]
    assert dropped(made) == {**unsaid, **dict.fromkeys(wrong, image_text.FORM)}
    found = {
        one["key"]: one["found"] for one in map(json.loads, made.local("quarantine.jsonl").read_text().splitlines())
    }
    assert found["gpt"] == "conversations: the first turn is from 'gpt', expected human or user"
    assert found["open"] == "questions[0]: found {'text': 'Which?'}, expected {text, answer} of text"
    with pytest.raises(CorpusError, match=image_text.FORM):
        run(tmp_path, images=str(tmp_path / "root"), fresh=True)


@pytest.mark.slow  # imports the model
def test_conversations_are_those_that_training_takes():
    from palate.unihetero import phrasing

    assert image_text.HUMAN == phrasing.HUMAN


@pytest.mark.parametrize("rewrite", [False, True])
def test_columns_of_parquet_count_where_they_become_records(tmp_path, rewrite):
    columns = {
        "key": ["a", "b", "c"],
        "jpg": [jpeg(n) for n in range(3)],
        "questions": ["the", "captions", "here"],
        "conversations": [TALK, TALK[1:], None],
    }
    write_parquet(tmp_path / "in" / "0.parquet", columns)
    made = run(tmp_path, rewrite=rewrite, caption_column="questions", max_quarantined=0.5)
    assert made.summary["kept"] == 3 - rewrite
    assert dropped(made) == ({"b": image_text.FORM} if rewrite else {})


def test_a_json_list_that_is_cut_off_keeps_what_is_whole(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    path = write_llava(
        tmp_path / "in" / "x.json", [{"id": n, "image": "0.jpg", "conversations": TALK} for n in range(5)]
    )
    path.write_bytes(path.read_bytes()[:-60])
    made = run(tmp_path, images=str(tmp_path), max_quarantined=1)
    assert made.summary["seen"] == 4
    assert "cut off or broken at byte" in made.read_json("data_card.json")["inputs"][0]["damage"]


# What is broken


def test_odd_images_are_kept_and_broken_ones_are_not(tmp_path):
    big = encoded(Image.new("1", (2000, 1000)), "PNG")
    samples = [
        sample("pixel", encoded(Image.new("RGB", (1, 1), "red"), "PNG"), "one", suffix="png"),
        sample("cmyk", encoded(picture(1).convert("CMYK")), "two"),
        sample("cut", jpeg(2)[:-300], "three"),
        sample("words", b"<html>404</html>", "four"),
        sample("bomb", big, "five", suffix="png"),
        sample("silent", jpeg(3), None),
        sample("blank", jpeg(4), " \n"),
        sample("latin", jpeg(5), "Bär".encode("latin-1")),
        sample("record", jpeg(6), "six", [1]),
        {"alone.txt": b"seven"},
    ]
    write_tar(tmp_path / "in" / "0.tar", samples)
    made = run(tmp_path, max_pixels=1_000_000, max_quarantined=0.9)
    assert keys(made) == ["pixel", "cmyk"]
    assert dropped(made) == {
        "cut": "an image that cannot be decoded",
        "words": "an image that cannot be decoded",
        "bomb": "an image of too many pixels",
        "silent": "no caption",
        "blank": "no caption",
        "latin": "a caption that is not UTF-8",
        "record": "a record that cannot be read",
        "alone": "no image",
    }
    lines = [json.loads(line) for line in made.local("quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == list(dropped(made))
    assert lines[2] == {
        "input": str(tmp_path / "in" / "0.tar"),
        "record": 4,
        "key": "bomb",
        "reason": "an image of too many pixels",
        "found": "2000 x 1000 pixels, --max-pixels 1000000",
    }


def test_text_that_no_file_can_hold_stops_nothing(tmp_path):
    """Lone surrogates, which JSON can spell: in ids, licences and image names."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "0.jpg").write_bytes(jpeg(0))
    names = ["0.jpg", "\ud800.jpg", "\udcff.jpg", "nul\0.jpg", "0.jpg/in", "n" * 300 + ".jpg"]
    records = [{"id": f"{n}\ud800", "image": name, "conversations": TALK} for n, name in enumerate(names)]
    records[0]["license"] = "cc\udfff"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    write_tar(tmp_path / "in" / "0.tar", [sample("t", jpeg(1), "text", {"license": "\ud800", "\ud800": "\ud800"})])
    made = run(tmp_path, images=str(tmp_path / "root"), max_quarantined=0.9)
    assert keys(made) == ["t", "0?"]
    assert made.read_json("data_card.json")["licences"] == {"?": 1, "cc?": 1}
    wrong = dict.fromkeys(["1?", "2?", "3?"], image_text.RECORD)
    assert dropped(made) == {**wrong, "4?": image_text.NO_IMAGE, "5?": image_text.NO_IMAGE}
    rewritten = CaptionsConfig(
        input=(str(tmp_path / "in" / "*"),),
        images=str(tmp_path / "root"),
        out=str(tmp_path / "new"),
        rewrite=True,
        max_quarantined=0.9,
    )
    assert prepare(rewritten).summary["kept"] == 2


def test_what_memory_or_a_disk_lacks_is_no_damage_of_a_shard(tmp_path, monkeypatch):
    """Else samples would be left out for good that are whole."""
    path = write_parquet(tmp_path / "in" / "0.parquet", {"jpg": [jpeg(n) for n in range(9)], "caption": ["text"] * 9})
    readers = [
        (pq.ParquetFile, "iter_batches", lambda: list(image_text.read_parquet(path, COLUMNS, []))),
        (pq, "read_schema", lambda: image_text.caption_column(str(path), "")),
    ]
    for error in (OSError(errno.EIO, "Input/output error"), pa.ArrowMemoryError("malloc failed")):
        for target, name, read in readers:
            with monkeypatch.context() as patched:
                patched.setattr(target, name, Mock(side_effect=error))
                with pytest.raises(type(error)) as raised:
                    read()
                assert raised.value is error


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_of_a_parquet_file_with_garbage_inside_what_is_whole_is_kept(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(image_text, "PARQUET_ROWS", 3)
    path = tmp_path / "0.parquet"
    table = pa.table({"jpg": [jpeg(n, (99, 99)) for n in range(9)], "caption": [f"text {n}" for n in range(9)]})
    pq.write_table(table, path, row_group_size=3, compression=compression)
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset
    content[start : start + 200] = b"\x7f" * 200
    path.write_bytes(content)
    found: list[image_text.Found] = []
    with pytest.raises(image_text.Damaged, match="no Parquet file that can be read whole"):
        found += image_text.read_parquet(path, COLUMNS, [])
    assert [one.length for one in found] == [6, 6, 6]


def test_too_many_broken_samples_stop_the_job(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", [sample("a", jpeg(0), "one"), sample("b", b"no", "two")])
    with pytest.raises(
        CorpusError, match=r"1 of 2 samples cannot be used, more than --max-quarantined 0\.05: .*decoded"
    ):
        run(tmp_path)


def test_a_shard_of_broken_samples_stops_the_job_early(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "ROWS", 50)
    write_tar(tmp_path / "in" / "0.tar", [sample(str(n), b"no", "text") for n in range(300)])
    with pytest.raises(CorpusError, match=r"most of the first 150 samples cannot be used"):
        run(tmp_path)


def cut_at(content: bytes, wanted: str) -> int:
    """Where the content of a tar's member begins."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return tar.getmember(wanted).offset_data


@pytest.mark.parametrize(
    ("member", "shift", "kept"),
    [
        ("2.jpg", 100, 2),  # inside an image
        ("2.txt", 1, 2),  # inside a caption
        ("2.txt", -300, 2),  # inside the header of a caption
        ("2.jpg", -300, 2),  # inside a header: the samples before are whole
        ("2.jpg", -512, 2),  # between samples
    ],
)
def test_of_a_tar_that_is_cut_off_what_is_whole_is_kept(tmp_path, member, shift, kept):
    content = tar_bytes([sample(str(n), jpeg(n), f"text {n}") for n in range(4)])
    path = tmp_path / "in" / "0.tar"
    path.parent.mkdir()
    path.write_bytes(content[: cut_at(content, member) + shift])
    with pytest.raises(CorpusError, match=r"1 of 1 shards are damaged, .*0\.tar.*Fetch them again"):
        run(tmp_path, max_quarantined=0.4)
    made = run(tmp_path, max_quarantined=1)
    assert keys(made) == ["0", "1"][:kept]
    assert made.summary["damaged_shards"] == 1
    assert image_text.CUT_OFF in reasons(made) or made.summary["seen"] == kept
    assert captions.DAMAGED in made.local("quarantine.jsonl").read_text()


def test_garbage_inside_a_tar_is_no_end_of_it(tmp_path):
    """Python's tarfile takes it for one, silently."""
    content = bytearray(tar_bytes([sample(str(n), jpeg(n), f"text {n}") for n in range(4)]))
    content[cut_at(bytes(content), "2.jpg") - 512 :][:512]
    start = cut_at(bytes(content), "2.jpg") - 512
    content[start : start + 512] = b"\x7f" * 512
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(content)
    made = run(tmp_path, max_quarantined=1)
    assert keys(made) == ["0", "1"]
    assert "no header of a member at byte" in made.read_json("data_card.json")["inputs"][0]["damage"]


def header_at(content: bytes, offset: int, **changed) -> bytes:
    """The content with another size in a header; in base-256, as GNU tar writes what octal digits cannot say."""
    header = bytearray(content[offset : offset + 512])
    header[124:136] = changed["size"].to_bytes(12, "big", signed=True)
    header[124] |= 0x80
    header[156:157] = changed.get("kind", bytes(header[156:157]))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:offset] + bytes(header) + content[offset + 512 :]


@pytest.mark.parametrize(("member", "kept"), [("0.jpg", 0), ("2.jpg", 2)])
@pytest.mark.parametrize("size", [-512, -100, -(1 << 40), 1 << 62])
@pytest.mark.parametrize("kind", [b"0", b"L", b"x"])
def test_a_tar_whose_header_leads_back_or_away_is_damaged(tmp_path, member, kept, size, kind):
    """Not read for ever, nor whole into memory."""
    content = tar_bytes([sample(str(n), jpeg(n), f"text {n}") for n in range(4)])
    path = tmp_path / "0.tar"
    path.write_bytes(header_at(content, cut_at(content, member) - 512, size=size, kind=kind))
    found: list[image_text.Found] = []
    with pytest.raises(image_text.Damaged):
        found += itertools.islice(image_text.read_tar(path), 9)
    assert [one.key for one in found if one.reason is None] == ["0", "1"][:kept]


@pytest.mark.parametrize(
    ("member", "shift", "kept", "cut"),
    [
        ("2.jpg", -512, 2, 0),  # between samples
        ("2.jpg", 100, 2, 1),  # inside an image
        ("2.txt", 1, 2, 1),  # inside a caption
        ("2.txt", -512, 2, 1),  # between the members of one sample
        ("2.txt", 512, 3, 0),
    ],
)
def test_zeros_where_a_download_broke_off_are_no_end_of_a_tar(tmp_path, member, shift, kept, cut):
    content = tar_bytes([sample(str(n), jpeg(n, (200, 200)), f"text {n}") for n in range(8)])
    whole = cut_at(content, member) + shift
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(content[:whole] + bytes(len(content) - whole))
    with pytest.raises(CorpusError, match=r"1 of 1 shards are damaged, .*nothing but zeros from byte"):
        run(tmp_path, max_quarantined=0.4)
    made = run(tmp_path, max_quarantined=1)
    assert keys(made) == ["0", "1", "2"][:kept]
    assert reasons(made).get(image_text.CUT_OFF, 0) == cut


def test_a_tar_behind_a_tar_is_not_left_out_in_silence(tmp_path):
    first, second = (tar_bytes([sample(str(n), jpeg(n), "text") for n in some]) for some in ((0, 1), (2, 3)))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(first + second)
    made = run(tmp_path, max_quarantined=1)
    assert keys(made) == ["0", "1"]
    assert "more behind the block that ends it" in made.read_json("data_card.json")["inputs"][0]["damage"]


@pytest.mark.parametrize("record", [512, 10240, 1 << 16, 1 << 20])
def test_a_tar_may_be_filled_up_to_its_last_record(tmp_path, record):
    content = tar_bytes([sample("a", jpeg(0), "one")]).rstrip(b"\0")
    content += bytes(-len(content) % 512 + 1024)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(content + bytes(-len(content) % record))
    assert run(tmp_path, max_quarantined=0).summary["damaged_shards"] == 0


@pytest.mark.parametrize(("name", "content"), [("b.tar", b"<html>"), ("b.tar", b""), ("b.parquet", b"PAR1no")])
def test_a_shard_that_is_none_is_reported_among_others(tmp_path, name, content):
    write_tar(tmp_path / "in" / "a.tar", [sample("a", jpeg(0), "one")])
    write_parquet(tmp_path / "in" / "c.parquet", {"jpg": [jpeg(1)], "caption": ["two"]})
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(CorpusError, match=rf"1 of 3 shards are damaged, more than --max-quarantined 0\.05: .*{name}"):
        run(tmp_path)
    made = run(tmp_path, max_quarantined=0.4)
    assert [shard["samples"] for shard in shards_of(made)] == [1, 0, 1]
    assert index_of(made, 1) == []


# Filters


def test_filters_take_the_columns_of_published_data_sets(tmp_path):
    size = 8
    laion = {
        "jpg": [jpeg(n) for n in range(size)],
        "TEXT": [f"text {n}" for n in range(size)],
        "similarity": [0.1, 0.3, 0.3, None, 0.3, 0.3, float("nan"), 0.3],
        "punsafe": [0.1, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
        "pwatermark": [0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1],
        "aesthetic": [5.0, 5.0, 5.0, 5.0, 4.0, 5.0, 5.0, 5.0],
        "LANGUAGE": ["en", "en", "en", "en", "en", "de", "en", "en"],
        "LICENSE": ["cc0"] * size,
    }
    write_parquet(tmp_path / "in" / "0.parquet", laion)
    records = [
        {"clip_similarity_vitl14": 0.3, "nsfw": "UNLIKELY", "watermark_score": 0.1, "aesthetic_score": 6, "lang": "en"},
        {"clip_similarity_vitl14": "0.3", "nsfw": "NSFW", "watermark_score": 0.1, "aesthetic_score": 6, "lang": "en"},
    ]
    write_tar(tmp_path / "in" / "1.tar", [sample(f"t{n}", jpeg(20 + n), "text", one) for n, one in enumerate(records)])
    limits = {"min_similarity": 0.2, "max_unsafe": 0.5, "max_watermark": 0.5, "min_aesthetic": 4.5, "language": ("en",)}
    made = run(tmp_path, **limits)
    assert keys(made) == ["000000007", "t0"]
    card = made.read_json("data_card.json")
    assert [(one["reason"], one["dropped"], one["left"]) for one in card["reasons"]] == [
        ("language", 1, 9),
        ("unsafe", 2, 7),
        ("watermark", 1, 6),
        ("similarity", 3, 3),
        ("aesthetic score", 1, 2),
    ]
    assert card["reasons"][3]["columns"] == ["clip_similarity_vitl14", "similarity"]
    assert card["reasons"][3]["settings"] == {"min_similarity": 0.2}
    assert card["licences"] == {"cc0": 1}


def test_sizes_are_those_of_the_decoded_image_and_lengths_are_in_characters(tmp_path):
    samples = [
        sample("good", jpeg(0), "ümlaut"),
        sample("short", jpeg(1), "ümla"),
        sample("long", jpeg(2), "ümlaut und mehr"),
        sample("small", jpeg(3, (39, 60)), "caption", {"width": 500, "height": 500}),
        sample("narrow", jpeg(4, (40, 90)), "caption"),
    ]
    write_tar(tmp_path / "in" / "0.tar", samples)
    made = run(tmp_path, min_caption=5, max_caption=10, min_side=40, max_aspect=2.2)
    assert keys(made) == ["good"]
    assert dropped(made) == {
        "short": "a short caption",
        "long": "a long caption",
        "small": "a small image",
        "narrow": "a narrow image",
    }


def test_a_filter_without_its_column_is_refused_with_those_that_there_are(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", [sample("a", jpeg(0), "one", {"clip": 0.3, "width": 5})])
    with pytest.raises(
        CorpusError, match=r"filter on similarity found no column similarity or .*found the columns clip, w"
    ):
        run(tmp_path, min_similarity=0.2)
    made = run(tmp_path, min_similarity=0.2, column=("similarity=clip",))
    assert keys(made) == ["a"]


def test_a_missing_column_is_noticed_before_the_shard_is_read(tmp_path, monkeypatch):
    write_tar(tmp_path / "in" / "0.tar", [sample(str(n), jpeg(0), "one", {"x": 1}) for n in range(120)])
    with pytest.raises(CorpusError, match=r"in 100 samples; found the columns x"):
        run(tmp_path, language=("en",))


# Duplicates


def test_the_first_of_duplicates_is_kept_across_shards_and_formats(tmp_path):
    """By shard, then by row; samples that other reasons drop are nobody's first."""
    other = jpeg(1, quality=60)
    write_tar(tmp_path / "in" / "0.tar", [sample("a", jpeg(0), "x" * 50), sample("b", jpeg(1), "caption")])
    columns = {"key": ["c", "d", "e"], "jpg": [jpeg(0), other, jpeg(2)], "caption": ["caption"] * 3}
    write_parquet(tmp_path / "in" / "1.parquet", columns)
    write_tar(tmp_path / "in" / "2.tar", [sample("f", jpeg(0), "caption"), sample("g", other, "caption")])
    made = run(tmp_path, max_caption=20)
    assert keys(made) == ["b", "c", "e"]
    rows = [row for n in range(3) for row in pq.read_table(made.local(f"dropped/{n:05d}.parquet")).to_pylist()]
    assert [(row["key"], row["reason"], row["of"]) for row in rows] == [
        ("a", "a long caption", None),
        ("d", "near an earlier image", "0:1"),
        ("f", "equal to an earlier image", "1:0"),
        ("g", "equal to an earlier image", "1:1"),
    ]


@pytest.mark.parametrize("form", ["llava", "tar"])
def test_several_conversations_about_one_image_are_kept(tmp_path, form):
    """As LLaVA has them; only those that are equal are dropped. What shows an evaluation image is, whatever is said."""
    other = [TALK[0], {"from": "gpt", "value": "Etwas anderes"}]
    images = {"0": jpeg(0), "near": jpeg(0, quality=60), "1": jpeg(1), "2": jpeg(2)}
    talks = [("0", TALK), ("0", other), ("0", TALK), ("near", TALK), ("1", TALK), ("1", other), ("2", TALK)]
    (tmp_path / "root").mkdir()
    for name, content in images.items():
        (tmp_path / "root" / f"{name}.jpg").write_bytes(content)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "1.png").write_bytes(encoded(picture(1), "PNG"))
    if form == "llava":
        records = [{"id": n, "image": f"{name}.jpg", "conversations": talk} for n, (name, talk) in enumerate(talks)]
        write_llava(tmp_path / "in" / "x.json", records)
    else:
        samples = [
            sample(str(n), images[name], None, {"id": n, "conversations": talk}) for n, (name, talk) in enumerate(talks)
        ]
        write_tar(tmp_path / "in" / "0.tar", samples)
    write_tar(tmp_path / "in" / "z.tar", [sample("caption", jpeg(0), "caption"), sample("again", jpeg(0), "again")])
    made = run(tmp_path, images=str(tmp_path / "root"), evaluation=(str(tmp_path / "evaluation"),))
    assert keys(made) == ["0", "1", "3", "6", "caption"]
    assert dropped(made) == {
        "2": "equal to an earlier image",
        "4": "near an evaluation image",
        "5": "near an evaluation image",
        "again": "equal to an earlier image",
    }


def test_only_equal_files_are_duplicates_where_near_ones_are_not_asked_for(tmp_path):
    images = [jpeg(0), jpeg(0, quality=60), jpeg(0)]
    write_tar(tmp_path / "in" / "0.tar", [sample(str(n), one, "caption") for n, one in enumerate(images)])
    assert keys(run(tmp_path, duplicate_distance=None)) == ["0", "1"]


def test_plain_images_are_not_all_called_duplicates(tmp_path):
    colours = ["red", "green", "white", "black", "red"]
    images = [encoded(Image.new("RGB", (64, 64), colour), "PNG") for colour in colours]
    write_tar(tmp_path / "in" / "0.tar", [sample(str(n), one, "caption", suffix="png") for n, one in enumerate(images)])
    assert keys(run(tmp_path)) == ["0", "1", "2", "3"]


def expected(folder: Path) -> list[str]:
    """What must be kept of ``mixed``, by comparing every pair."""
    samples = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".parquet":
            samples += [(row["key"], row["jpg"]) for row in pq.read_table(path).to_pylist()]
        else:
            with tarfile.open(path) as tar:
                samples += [
                    (one.name[:-4], tar.extractfile(one).read()) for one in tar.getmembers() if one.name.endswith("jpg")
                ]
    good = []
    for key, content in samples:
        try:
            with Image.open(io.BytesIO(content)) as image:
                good.append((key, perceptual_hash(image.convert("RGB"))))
        except OSError:
            continue
    kept = []
    for row, (key, found) in enumerate(good):
        if all((found ^ earlier).bit_count() > 2 for _, earlier in good[:row]):
            kept.append(key)
    return kept


def test_what_is_kept_depends_on_neither_parts_nor_groups(tmp_path, monkeypatch):
    mixed(tmp_path / "in")
    config = CaptionsConfig(input=(str(tmp_path / "in" / "*"),), out=str(tmp_path / "out"))
    made = prepare(config)
    assert keys(made) == expected(tmp_path / "in")
    assert made.summary["near_duplicates"] > 0
    monkeypatch.setattr(captions, "LEAST_IN_PART", 1)
    cut = dataclasses.replace(config, out=str(tmp_path / "cut"), buckets=3, group_samples=1)
    assert [(one.path, one.sha256) for one in prepare(cut).files] == [(one.path, one.sha256) for one in made.files]


def test_every_sample_is_accounted_for(tmp_path):
    mixed(tmp_path / "in")
    made = run(tmp_path, min_caption=12)
    card = made.read_json("data_card.json")
    assert card["summary"]["kept"] + sum(one["dropped"] for one in card["reasons"]) == card["summary"]["seen"] == 48
    assert card["reasons"][-1]["left"] == card["summary"]["kept"] == len(keys(made))
    assert sorted([*keys(made), *dropped(made)]) == sorted(f"{n:03d}{i:03d}" for n in range(4) for i in range(12))
    assert Counter(dropped(made).values()) == reasons(made)
    for histogram in ("shorter_side", "caption_characters", "image_formats"):
        assert sum(card[histogram].values()) == card["summary"]["kept"]
    for shard, path in zip(card["inputs"], sorted((tmp_path / "in").iterdir()), strict=True):
        assert (shard["url"], shard["sha256"]) == (str(path), artifacts.file_entry(path, "x").sha256)
    text = made.local("DATA_CARD.md").read_text()
    assert "| near an earlier image |" in text
    assert f"{card['summary']['kept']} of 48 samples are kept" in text


# Evaluation images


def write_tsv(path: Path, images: list[bytes]) -> Path:
    rows = [["index", "question", "image"]]
    rows += [[str(n), 'is "this"\ta\nline?', base64.b64encode(image).decode()] for n, image in enumerate(images)]
    rows.append([str(len(images)), "again", "0"])
    import csv

    with path.open("w", newline="") as stream:
        csv.writer(stream, delimiter="\t").writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["folder", "parquet", "tsv"])
def test_evaluation_images_are_kept_out(tmp_path, kind):
    images = [jpeg(1), jpeg(2)]
    place = tmp_path / "evaluation"
    place.mkdir()
    if kind == "folder":
        (place / "deep").mkdir()
        (place / "deep" / "1.jpg").write_bytes(images[0])
        (place / "2.jpg").write_bytes(images[1])
        (place / "readme.txt").write_text("no image")
    elif kind == "parquet":
        write_parquet(place / "x.parquet", {"image": [{"bytes": one, "path": None} for one in images], "q": ["", ""]})
    else:
        write_tsv(place / "x.tsv", images)
    smaller = encoded(picture(2, (256, 200)).resize((100, 90)), quality=60)
    samples = [jpeg(0), jpeg(1), smaller, jpeg(3), smaller]
    write_tar(tmp_path / "in" / "0.tar", [sample(str(n), one, "caption") for n, one in enumerate(samples)])
    made = run(tmp_path, evaluation=(str(place),))
    assert keys(made) == ["0", "3"]
    lines = [json.loads(line) for line in made.local("decontaminated.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["1", "2", "4"]
    assert all(line["evaluation"].startswith(str(place)) for line in lines)
    card = made.read_json("data_card.json")
    assert sum(one["images"] for one in card["evaluation"]) == 2
    assert card["summary"]["decontaminated"] == 3


def test_a_list_of_images_in_a_tsv_is_several(tmp_path):
    images = [base64.b64encode(jpeg(n)).decode() for n in (1, 2)]
    (tmp_path / "x.tsv").write_text(f"index\timage\n0\t{images!r}\n")
    write_tar(tmp_path / "in" / "0.tar", [sample(str(n), jpeg(n), "caption") for n in range(4)])
    assert keys(run(tmp_path, evaluation=(str(tmp_path / "x.tsv"),))) == ["0", "3"]


@pytest.mark.parametrize("listed", [False, True])
def test_images_of_a_tsv_may_be_wrapped_into_lines(tmp_path, listed):
    images = [base64.encodebytes(jpeg(n)).decode() for n in (1, 2)]
    cells = [repr(images)] if listed else images
    rows = [f'{n}\t"{cell}"\n' for n, cell in enumerate(cells)]
    (tmp_path / "x.tsv").write_text("index\timage\n" + "".join(rows))
    write_tar(tmp_path / "in" / "0.tar", [sample(str(n), jpeg(n), "caption") for n in range(4)])
    made = run(tmp_path, evaluation=(str(tmp_path / "x.tsv"),), max_quarantined=0, evaluation_distance=0)
    assert keys(made) == ["0", "3"]
    assert made.read_json("data_card.json")["evaluation"][0]["images"] == 2


def test_many_broken_evaluation_images_stop_the_job(tmp_path):
    images = [base64.b64encode(jpeg(n)[: -300 if n % 2 else None]).decode() for n in range(4)]
    (tmp_path / "x.tsv").write_text("index\timage\n" + "".join(f"{n}\t{one}\n" for n, one in enumerate(images)))
    write_tar(tmp_path / "in" / "0.tar", [sample(str(n), jpeg(n + 2), "caption") for n in range(4)])
    message = r"x\.tsv: 2 of 4 images cannot be decoded, more than --max-quarantined 0\.05: samples that show"
    with pytest.raises(CorpusError, match=message):
        run(tmp_path, evaluation=(str(tmp_path / "x.tsv"),))
    made = run(tmp_path, evaluation=(str(tmp_path / "x.tsv"),), max_quarantined=0.5)
    assert made.read_json("data_card.json")["evaluation"][0]["broken"] == 2


def test_evaluation_images_that_cannot_be_used_are_said(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", [sample("0", jpeg(0), "caption")])
    (tmp_path / "x.tsv").write_text("index\timage_path\n0\tx.jpg\n")
    (tmp_path / "broken.png").write_bytes(b"no")
    with pytest.raises(CorpusError, match=r"found the columns index, image_path; expected VLMEvalKit's column image"):
        run(tmp_path, evaluation=(str(tmp_path / "x.tsv"),))
    with pytest.raises(CorpusError, match=r"broken\.png: none of its 1 images can be decoded"):
        run(tmp_path, evaluation=(str(tmp_path / "broken.png"),))
    with pytest.raises(CorpusError, match=r"--evaluation .*absent: there is no file of"):
        run(tmp_path, evaluation=(str(tmp_path / "absent"),))


# Going on, and again


class Killed(BaseException):
    pass


def test_a_killed_preparation_goes_on_after_the_tasks_that_are_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "LEAST_IN_PART", 1)
    mixed(tmp_path / "in")
    config = CaptionsConfig(input=(str(tmp_path / "in" / "*"),), out=str(tmp_path / "out"), group_samples=1, buckets=2)
    whole = prepare(dataclasses.replace(config, out=str(tmp_path / "whole")))
    ran: list[str] = []

    def until(limit: int):
        def runner(step):
            def run(task):
                count = len(ran)
                if count >= limit:
                    raise Killed
                before = len(list(tmp_path.glob("out.work/*/*/manifest.json")))
                result = step.run(task)
                if len(list(tmp_path.glob("out.work/*/*/manifest.json"))) > before:
                    ran.append(f"{step.label} {task}")
                return result

            return run_local(dataclasses.replace(step, run=run))

        return runner

    for limit in range(3, 100, 3):
        try:
            made = prepare(config, until(limit))
        except Killed:
            continue
        break
    assert len(ran) == len(set(ran)) > 10
    assert [(one.path, one.sha256) for one in made.files] == [(one.path, one.sha256) for one in whole.files]
    assert not (tmp_path / "out.work").exists()


def test_a_finished_index_is_used_again_unless_something_changed(tmp_path):
    mixed(tmp_path / "in", shards=2)
    config = CaptionsConfig(input=(str(tmp_path / "in" / "*"),), out=str(tmp_path / "out"), max_quarantined=0.1)
    made = prepare(config)

    def never(step):
        raise AssertionError(step.label)

    assert prepare(dataclasses.replace(config, buckets=5), never).digest == made.digest
    with pytest.raises(artifacts.ArtifactMismatch, match="min_side"):
        prepare(dataclasses.replace(config, min_side=10))
    write_tar(tmp_path / "in" / "00000.tar", [sample("new", jpeg(70), "caption")])
    with pytest.raises(artifacts.ArtifactMismatch, match=r"inputs\.names and versions"):
        prepare(config)
    assert "new" in keys(prepare(dataclasses.replace(config, fresh=True)))


# New shards


def test_rewritten_shards_hold_the_kept_samples(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "1.jpg").write_bytes(jpeg(90))
    mixed(tmp_path / "in")
    gif = encoded(picture(91), "GIF")
    write_parquet(
        tmp_path / "in" / "7.parquet",
        {"key": ["p"], "jpg": [gif], "caption": ["gif"], "score": [float("nan")], "raw": [b"x"]},
    )
    write_llava(tmp_path / "in" / "9.json", [{"id": "l", "image": "1.jpg", "conversations": TALK}])
    plain = run(tmp_path, images=str(tmp_path / "root"))
    config = CaptionsConfig(
        input=(str(tmp_path / "in" / "*"),),
        images=str(tmp_path / "root"),
        out=str(tmp_path / "new"),
        rewrite=True,
        shard_samples=7,
    )
    made = prepare(config)
    rows = shards_of(made)
    assert [row["samples"] for row in rows[:-1]] == [7] * (len(rows) - 1)
    origins, found = [], []
    for row in rows:
        assert row["format"] == "tar"
        assert artifacts.file_entry(Path(row["url"]), "x").sha256 == row["sha256"]
        origins += pq.read_table(Path(row["url"]).with_name("origin.parquet")).to_pylist()
        with tarfile.open(row["url"]) as tar:
            names = tar.getnames()
        for one in index_of(made, row["shard"]):
            found.append({name: part(row["url"], one, name) for name in ("image", "text", "json")})
            assert f"{one['key']}.jpg" in names or f"{one['key']}.png" in names
    assert [one["source_key"] for one in origins] == keys(plain)
    assert len({one["key"] for one in origins}) == len(found) == plain.summary["kept"]
    source = {row["key"]: row for row in pq.read_table(tmp_path / "in" / "00001.parquet").to_pylist()}
    for origin, sample_ in zip(origins, found, strict=True):
        if origin["url"].endswith("00001.parquet"):
            row = source[origin["source_key"]]
            assert (sample_["image"], sample_["text"]) == (row["jpg"], row["caption"].encode())
            assert json.loads(sample_["json"]) == {"key": row["key"]}
    assert Image.open(io.BytesIO(found[-2]["image"])).format == "PNG"
    assert json.loads(found[-2]["json"]) == {"key": "p", "score": None}
    assert (found[-1]["image"], found[-1]["text"]) == (jpeg(90), None)
    assert json.loads(found[-1]["json"])["conversations"] == TALK
    again = prepare(dataclasses.replace(config, out=str(tmp_path / "again"), group_samples=1))
    assert [row["sha256"] for row in shards_of(again)] == [row["sha256"] for row in rows]
    # The new shards are shards like any other, with nothing more to drop.
    third = CaptionsConfig(input=(str(tmp_path / "new.shards" / "*" / "*.tar"),), out=str(tmp_path / "third"))
    assert prepare(third).summary["kept"] == plain.summary["kept"]


def test_fewer_new_shards_leave_none_of_the_old_ones(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", [sample(str(n), jpeg(n), f"caption {n}") for n in range(6)])
    run(tmp_path, rewrite=True, shard_samples=2)
    assert len(list((tmp_path / "out.shards").glob("*/*.tar"))) == 3
    run(tmp_path, rewrite=True, shard_samples=4, fresh=True)
    assert len(list((tmp_path / "out.shards").glob("*/*.tar"))) == 2


def test_shards_and_index_may_be_in_object_storage(tmp_path, s3_url):
    mixed(tmp_path / "in")
    filesystem, bucket = artifacts.locate(s3_url)
    for path in (tmp_path / "in").iterdir():
        filesystem.put_file(str(path), f"{bucket}/in/{path.name}")
    made = prepare(CaptionsConfig(input=(f"{s3_url}/in/*",), out=f"{s3_url}/out"))
    local = run(tmp_path)
    assert keys(made) == keys(local)
    assert [row["sha256"] for row in shards_of(made)] == [row["sha256"] for row in shards_of(local)]
    assert shards_of(made)[0]["url"] == f"{s3_url}/in/00000.tar"
    assert not filesystem.find(f"{bucket}/out.work")
    renewed = prepare(CaptionsConfig(input=(f"{s3_url}/in/*",), out=f"{s3_url}/new", rewrite=True, shard_samples=11))
    assert shards_of(renewed)[0]["url"] == f"{s3_url}/new.shards/00000/00000.tar"
    assert [row["samples"] for row in shards_of(renewed)] == [11, 9]


# What is refused


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ([], {}, r"--input .*: there is no such file"),
        (["x.tar.gz"], {}, r"decompress it"),
        (["x.zip"], {}, r"found the suffix '.zip', expected one of .tar, .parquet, .json, .jsonl"),
        (["x.json"], {}, r"say under which folder, --images ROOT"),
    ],
)
def test_inputs_that_cannot_be_read_are_refused(tmp_path, files, settings, message):
    (tmp_path / "in").mkdir()
    for name in files:
        (tmp_path / "in" / name).write_bytes(b"x")
    with pytest.raises(CorpusError, match=message):
        run(tmp_path, **settings)


def test_a_folder_is_refused_with_the_pattern_to_give(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(CorpusError, match=r"found a folder, expected files: give a pattern such as '.*in/\*\.tar'"):
        run(tmp_path, "in")


def test_parquet_with_urls_only_is_refused_with_its_columns(tmp_path):
    write_parquet(tmp_path / "in" / "0.parquet", {"URL": ["http://x"], "TEXT": ["one"], "image": ["x.jpg"]})
    with pytest.raises(CorpusError, match=r"found the columns URL \(string\), TEXT .*fetch the images first"):
        run(tmp_path)


def test_parquet_shards_must_have_the_same_columns(tmp_path):
    write_parquet(tmp_path / "in" / "0.parquet", {"jpg": [jpeg(0)], "caption": ["one"]})
    write_parquet(tmp_path / "in" / "1.parquet", {"image": [jpeg(1)], "text": ["two"]})
    with pytest.raises(CorpusError, match=r"1\.parquet: found no column 'caption', but image, text"):
        run(tmp_path)


def test_nothing_left_is_an_error(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", [sample("a", jpeg(0), "one")])
    with pytest.raises(CorpusError, match=r"no sample is left: \{'a small image': 1\}"):
        run(tmp_path, min_side=4000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"duplicate_distance": 13}, "--duplicate-distance is from 0 to 12, got 13"),
        ({"column": ("clip=x",)}, r"--column is FILTER=COLUMN with a filter of status, .*'clip=x'"),
        ({"max_aspect": 0.5}, "--max-aspect is at least 1, got 0.5"),
        ({"min_similarity": float("nan")}, "--min-similarity is a number, got nan"),
        ({"max_quarantined": 2.0}, "--max-quarantined is a share"),
        ({"shard_samples": 0}, "--shard-samples is at least 1"),
        ({"input": ()}, "--input is a path"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CaptionsConfig(**{"input": ("x",), "out": "y", **settings})


def test_memory_of_an_array_of_places_is_mapped(tmp_path):
    """Readers map the index: it must not be compressed."""
    write_tar(tmp_path / "in" / "0.tar", [sample(str(n), jpeg(n), "caption") for n in range(3)])
    made = run(tmp_path)
    before = pa.total_allocated_bytes()
    with pa.memory_map(str(made.local("index/00000.arrow"))) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
        assert np.asarray(batch["image_offset"]).tolist() == sorted(np.asarray(batch["image_offset"]).tolist())
        assert pa.total_allocated_bytes() == before
