"""VLMEvalKit's TSV files: written by pandas as they are published, read back, and what is wrong with some."""

import base64
import csv
import io
from pathlib import Path
from typing import Any

import pandas
import pytest
from PIL import Image

from palate.corpora import questions
from palate.corpora.questions import Choice
from palate.corpora.streams import CorpusError


def picture(colour: str, side: int = 8, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, form)
    return buffer.getvalue()


def encoded(colour: str) -> str:
    return base64.b64encode(picture(colour)).decode()


def row(index: Any = 0, **cells: Any) -> dict[str, Any]:
    base = {"index": index, "image": encoded("red"), "question": "Which colour?", "hint": None}
    options = {"A": "red", "B": "blue", "C": "green", "D": None}
    return {**base, **options, "answer": "A", "category": "colour", "l2-category": "local", "split": "dev", **cells}


def published(path: Path, rows: list[dict[str, Any]]) -> str:
    """As VLMEvalKit dumps its files: every cell quoted."""
    pandas.DataFrame(rows).to_csv(path, sep="\t", index=False, quoting=csv.QUOTE_ALL)
    return str(path)


def test_a_published_file_is_read(tmp_path: Path) -> None:
    path = published(
        tmp_path / "MMBench.tsv",
        [
            row(7, hint='Look\nat the "left"\tside', D="none of these", answer="D"),
            row(8, image=encoded("blue"), answer="b "),
            row(9, A="N/A", B="None", C=None, answer="B"),
        ],
    )
    first, second, third = questions.read_tsv(path)
    expected_options = ("red", "blue", "green", "none of these")
    hint = 'Look\nat the "left"\tside'
    assert first == Choice(
        "7", picture("red"), "Which colour?", hint, expected_options, 3, "colour", "dev", "local"
    )  # fmt: skip
    assert (second.image, second.options, second.answer) == (picture("blue"), ("red", "blue", "green"), 1)
    assert (third.options, third.answer, third.hint) == (("N/A", "None"), 1, "")


@pytest.mark.parametrize("form", ["EPS", "PPM"])
def test_images_that_are_no_photographs_are_refused(tmp_path: Path, form: str) -> None:
    """EPS is a program, which Pillow would hand to Ghostscript."""
    image = base64.b64encode(picture("red", form=form)).decode()
    with pytest.raises(CorpusError, match=r"row 1 \(index 0\), column 'image': not an image"):
        questions.read_tsv(published(tmp_path / "x.tsv", [row(image=image)]))


def test_an_image_cell_may_be_the_index_of_another_row(tmp_path: Path) -> None:
    # Circular questions: the options go round, the image is that of the first; a reference may come before its image.
    path = published(
        tmp_path / "q.tsv", [row(1, image="3"), row(2, image="3"), row(3), row(1_000_003, image="3", answer="B")]
    )
    choices = questions.read_tsv(path)
    assert [choice.id for choice in choices] == ["1", "2", "3", "1000003"]
    assert all(choice.image is choices[2].image for choice in choices)


@pytest.mark.parametrize(("image", "found"), [("99", "no row has this index"), ("1", "has no image of its own")])
def test_a_reference_to_no_image(tmp_path: Path, image: str, found: str) -> None:
    path = published(tmp_path / "q.tsv", [row(0), row(1, image="0"), row(2, image=image)])
    with pytest.raises(CorpusError, match=rf"q.tsv, row 3 \(index 2\), column 'image': .*'{image}', but .*{found}"):
        questions.read_tsv(path)


def test_yes_and_no_are_two_options(tmp_path: Path) -> None:
    answers = ["Yes", "No", "no"]
    rows = [
        {"index": n, "image": encoded("red"), "question": "Is it red?", "answer": a, "category": "adversarial"}
        for n, a in enumerate(answers)
    ]
    choices = questions.read_tsv(published(tmp_path / "POPE.tsv", rows))
    assert [(choice.options, choice.answer) for choice in choices] == [(("Yes", "No"), n) for n in (0, 1, 1)]
    assert choices[0].category == "adversarial"


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"answer": "D"}, "column 'answer': found 'D', expected one of A, B, C"),
        ({"answer": "AB"}, "column 'answer': found 'AB', expected one of A, B, C"),
        ({"answer": None}, "column 'answer': found nothing .*withheld"),
        ({"answer": "red", "A": None, "B": None, "C": None}, "column 'answer': found 'red', expected one of Yes, No"),
        ({"B": None, "C": None}, "column 'B': a question needs two options, found only A"),
        ({"question": " "}, "column 'question': it is empty"),
        ({"image": None}, "column 'image': it is empty, and there is no image_path"),
        ({"image": "ä" * 100}, "column 'image': expected base64"),
        ({"image": "A" * 101}, "column 'image': expected base64"),
        ({"image": base64.b64encode(b"no image" * 20).decode()}, "column 'image': not an image"),
        ({"image": f"['{encoded('red')}', '{encoded('blue')}']"}, "column 'image': found a list of images"),
    ],
)
def test_rows_that_cannot_be_asked(tmp_path: Path, cells: dict[str, Any], message: str) -> None:
    path = published(tmp_path / "q.tsv", [row(4), row(5, **cells), row(6)])
    with pytest.raises(CorpusError, match=rf"q\.tsv, row 2 \(index 5\), {message}"):
        questions.read_tsv(path)
    skipped: list[str] = []
    assert [choice.id for choice in questions.read_tsv(path, skipped=skipped)] == ["4", "6"]
    assert len(skipped) == 1
    assert "row 2 (index 5)" in skipped[0]


def test_rows_that_share_a_broken_image_are_skipped_with_it(tmp_path: Path) -> None:
    path = published(tmp_path / "q.tsv", [row(4, image="A" * 100), row(5, image="4"), row(6)])
    skipped: list[str] = []
    assert [choice.id for choice in questions.read_tsv(path, skipped=skipped)] == ["6"]
    assert ["row 1" in skipped[0], "row 2" in skipped[1]] == [True, True]


def test_files_that_are_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"index 4\), column 'index': the index is there already"):
        questions.read_tsv(published(tmp_path / "twice.tsv", [row(4), row(4)]))
    (tmp_path / "other.tsv").write_text("index\tquestion\tA\n1\twhy\tx\n")
    with pytest.raises(CorpusError, match=r"header lacks the columns \['answer', 'image'\]; it has \['index'"):
        questions.read_tsv(str(tmp_path / "other.tsv"))
    (tmp_path / "short.tsv").write_text("index\timage\tquestion\tanswer\n1\tx\twhy\n")
    with pytest.raises(CorpusError, match=r"row 1 \(line 2\): 3 cells, expected 4"):
        questions.read_tsv(str(tmp_path / "short.tsv"))
    (tmp_path / "open.tsv").write_text('index\timage\tquestion\tanswer\n1\tx\t"why\tA\n')
    with pytest.raises(CorpusError, match="not a UTF-8 TSV file"):
        questions.read_tsv(str(tmp_path / "open.tsv"))
    (tmp_path / "latin.tsv").write_bytes(b"index\timage\tquestion\tanswer\n1\tx\t\xe9\tA\n")
    with pytest.raises(CorpusError, match="not a UTF-8 TSV file"):
        questions.read_tsv(str(tmp_path / "latin.tsv"))
    with pytest.raises(CorpusError, match="no such file"):
        questions.read_tsv(str(tmp_path / "gone.tsv"))
    (tmp_path / "empty.tsv").write_text("")
    with pytest.raises(CorpusError, match="header lacks"):
        questions.read_tsv(str(tmp_path / "empty.tsv"))


def test_images_may_be_files_beside_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(picture("red", form="JPEG"))
    rows = [row(1, image_path="1.jpg"), row(2, image_path=str(folder / "1.jpg"))]
    for cells in rows:
        del cells["image"]
    path = published(tmp_path / "local.tsv", rows)
    assert {choice.image for choice in questions.read_tsv(path, images=str(folder))} == {
        (folder / "1.jpg").read_bytes()
    }
    with pytest.raises(CorpusError, match=r"row 1 .*column 'image_path': .* has no '1.jpg'"):
        questions.read_tsv(path)
    for outside in ("../1.jpg", "/etc/passwd"):
        with pytest.raises(CorpusError, match="leads out of"):
            questions.read_tsv(published(tmp_path / "out.tsv", [row(1, image=None, image_path=outside)]))


def written() -> list[Choice]:
    red, blue = picture("red"), picture("blue", side=400, form="BMP")  # 480 KB: far over the csv module's limit
    return [
        Choice("a", red, "What?\nWhere?", "", ("circle", "square"), 1, "shape", "test"),
        Choice("b", red, 'Say "so"\r\nor\tso', "left half", ("0", "1", "2", "3", "4"), 4, "count", "test", "global"),
        Choice("c", blue, "Est-ce un carré ?", "", ("Yes", "No"), 0),
    ]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = str(tmp_path / "made" / "scenes.tsv")
    questions.write_tsv(path, written())
    assert questions.read_tsv(path) == written()
    table = pandas.read_csv(path, sep="\t")
    assert table["image"].tolist()[1] == "a"  # stored once
    assert table["answer"].tolist() == ["B", "E", "A"]
    assert table["question"].tolist() == [choice.question for choice in written()]


def test_urls_are_written_and_read() -> None:
    questions.write_tsv("memory://scenes/q.tsv", written())
    assert questions.read_tsv("memory://scenes/q.tsv") == written()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "a"}, "'a': an id is unique"),
        ({"id": "x" * 65}, "1 to 64 characters"),
        ({"options": ("one",), "answer": 0}, "expected 2 to 26 options"),
        ({"options": ("one", " ")}, "expected 2 to 26 options with text"),
        ({"answer": 2}, "'b': answer 2 is none of its 2 options"),
        ({"image": b"x" * 48}, "image of 48 bytes is shorter"),
    ],
)
def test_what_the_format_cannot_hold(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {
        "id": "b",
        "image": picture("red"),
        "question": "?",
        "hint": "",
        "options": ("x", "y"),
        "answer": 0,
    }
    with pytest.raises(CorpusError, match=message):
        questions.write_tsv(str(tmp_path / "q.tsv"), [written()[0], Choice(**{**fields, **change})])
