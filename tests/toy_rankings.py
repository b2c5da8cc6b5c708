"""Small sets of comparisons with everything in them that a real one has."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from palate.lpo.preparation import RankingsConfig


def png(color):
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(stream, "PNG")
    return stream.getvalue()


def comparisons(count=600, captions=60, seed=0, images=False):
    """Random rows of Pick-a-Pic, every kind of bad one among them."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        caption = int(generator.integers(captions)) // (1 + int(generator.integers(3)))
        first, second = generator.choice(6, 2, replace=False).tolist()
        label = [1.0, 0.0, 0.5][int(generator.integers(3))]
        row = {
            "caption": f"caption {caption}",
            "user_id": int(generator.integers(4)),
            "image_0_uid": f"{caption}-{first}",
            "image_1_uid": f"{caption}-{second}",
            "label_0": label,
            "label_1": 1 - label,
            "has_label": bool(generator.random() > 0.05),
            "are_different": bool(generator.random() > 0.05),
            "model_0": f"model {first}",
            "model_1": f"model {second}",
            "ranking_id": number,
        }
        if number % 40 < 2:
            row |= {"has_label": True, "are_different": True}
            row |= {"caption": ""} if number % 40 == 0 else {"image_1_uid": row["image_0_uid"]}
        if images:
            row["jpg_0"], row["jpg_1"] = png((40 * first, caption, 0)), png((40 * second, caption, 0))
        rows.append(row)
    return rows


def config_of(folder, rows, out="out", parts=1, **options):
    folder.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows)
    for part in range(parts):
        start, stop = len(rows) * part // parts, len(rows) * (part + 1) // parts
        pq.write_table(table.slice(start, stop - start), folder / f"part-{part}.parquet", row_group_size=50)
    options = {"max_quarantined": 0.2, "max_component": 1.0, "buckets": 2, **options}
    return RankingsConfig(input=(str(folder / "part-*.parquet"),), out=str(folder / out), **options)
