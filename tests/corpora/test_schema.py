import pyarrow as pa
import pyarrow.parquet as pq

from palate import artifacts
from palate.corpora import schema


def test_normalized_ignores_case_width_and_white_space():
    assert schema.normalized("  Ｈello\n  WORLD ") == "hello world"
    assert schema.normalized("straße") == schema.normalized("STRASSE")


def test_user_split_is_fixed_and_near_the_share():
    ids = [f"user-{number}" for number in range(2000)]
    first = [schema.user_split(user, 0.3) for user in ids]
    assert first == [schema.user_split(user, 0.3) for user in reversed(ids)][::-1]
    assert abs(first.count("test") / len(ids) - 0.3) < 0.04  # four standard errors


def test_items_come_back_sorted_by_user_and_time(tmp_path):
    rows = [
        {"user_id": user, "item_id": f"{user}{order}", "order": order, "source": "s", "input": "i", "output": "o"}
        for user, order in [("b", 1), ("a", 1), ("b", 0), ("a", 0)]
    ]

    def produce(writer: artifacts.Writer) -> None:
        (writer.folder / "items").mkdir()
        filled = [{**row, "date": None} for row in rows]
        pq.write_table(pa.Table.from_pylist(filled, schema=schema.ITEMS), writer.folder / "items" / "part-0.parquet")

    corpus = artifacts.ensure(tmp_path / "corpus", produce, kind=schema.TEXT_CORPUS, config={"seed": 0})
    assert [item.item_id for item in schema.read_items(corpus)] == ["a0", "a1", "b0", "b1"]
