import json

import pytest

from palate.corpora import streams
from palate.corpora.streams import CorpusError

ROWS = [{"id": "1", "input": "a"}, {"id": "2", "input": "ü"}]


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"task": "LaMP_4", "golds": rows}])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_both_shapes_are_read(tmp_path, wrap, mark):
    path = tmp_path / "rows.json"
    path.write_bytes(mark + b" \n" * (not mark) + json.dumps(wrap(ROWS)).encode())
    assert list(streams.json_records(str(path))) == ROWS


def test_a_file_is_read_by_url(s3_url):
    from palate import artifacts

    filesystem, bucket = artifacts.locate(s3_url)
    filesystem.pipe_file(f"{bucket}/rows.json", json.dumps(ROWS).encode())
    assert list(streams.json_records(f"{s3_url}/rows.json")) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "an empty file"),
        ("hello", "found 'h', expected a JSON list"),
        (json.dumps(ROWS)[:-5], "cut off or broken"),
        ('[{"id": 1}, {"id": }]', "no valid JSON|broken JSON"),
        ('{"data": []}', "without the list 'golds'"),
        (json.dumps({"task": "LaMP_4", "golds": ROWS})[:-9], "cut off or broken"),
    ],
)
def test_what_is_no_record_file_is_named(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(CorpusError, match=message) as error:
        list(streams.json_records(str(path)))
    assert str(path) in str(error.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"nothing\.json: there is no such file"):
        list(streams.json_records(str(tmp_path / "nothing.json")))


def test_the_task_of_a_wrapped_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"task": "LaMP_6", "golds": ROWS}))
    assert streams.wrapper_task(str(path)) == "LaMP_6"
    path.write_text(json.dumps({"golds": ROWS}))
    assert streams.wrapper_task(str(path)) is None


def test_broken_lines_come_as_errors_and_blank_ones_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n\xff\xfe\n[2]\n')
    first, broken, undecodable, last = streams.json_lines(str(path))
    assert (first, last) == ({"a": 1}, [2])
    assert isinstance(broken, ValueError)
    assert isinstance(undecodable, ValueError)
