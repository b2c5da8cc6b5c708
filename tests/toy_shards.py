"""Small image-text shards of each format with their index, written from the index's contract alone."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from palate import artifacts
from palate.corpora.captions import IMAGE_TEXT_INDEX, INDEX, SHARDS


def jpeg(number, size=12, mode="RGB"):
    """An image that is another for each ``number``."""
    pixels = np.random.default_rng(number).integers(0, 255, (size, size, len(mode)), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels, mode).save(content, "JPEG")
    return content.getvalue()


def samples(first, count, **options):
    """Keys, images and captions, the last without a caption."""
    found = [(f"{n:06d}", jpeg(n, **options), f"caption {n}") for n in range(first, first + count)]
    return [*found[:-1], (*found[-1][:2], None)]


def write_tar(path, items, records=True):
    with tarfile.open(path, "w") as tar:
        for key, image, text in items:
            members = {f"{key}.jpg": image, f"{key}.json": json.dumps({"key": key}).encode() if records else None}
            members[f"{key}.txt"] = None if text is None else text.encode()
            for name, content in members.items():
                if content is not None:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    rows: dict[str, dict] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.rpartition(".")
            what = {"jpg": "image", "txt": "text", "json": "json"}[suffix]
            rows.setdefault(key, {})[what] = (member.offset_data, member.size)
    lengths = {key: len(text or "") for key, _, text in items}
    return [index_row(key, length=lengths[key], **places) for key, places in rows.items()]


def write_parquet(path, items, nested=False, group=3):
    images = [{"bytes": image, "path": key} if nested else image for key, image, _ in items]
    table = pa.table({"key": [i[0] for i in items], "jpg": images, "caption": [i[2] for i in items]})
    pq.write_table(table, path, row_group_size=group)
    return [index_row(key, row=row, length=len(text or "")) for row, (key, _, text) in enumerate(items)]


def write_llava(path, items, root):
    """JSON lines, with the images as files under ``root``."""
    rows, content = [], b""
    for key, image, text in items:
        (Path(root) / f"{key}.jpg").write_bytes(image)
        record = {"id": key, "image": f"{key}.jpg", "conversations": [{"from": "human", "value": text or ""}]}
        line = json.dumps(record).encode()
        rows.append(index_row(key, json=(len(content), len(line)), length=len(text or "")))
        content += line + b"\n"
    Path(path).write_bytes(content)
    return rows


def index_row(key, image=(-1, -1), text=(-1, -1), json=(-1, -1), row=-1, length=0):
    places = {"image": image, "text": text, "json": json}
    columns = {
        f"{name}_{what}": place[i] for name, place in places.items() for i, what in enumerate(("offset", "size"))
    }
    return {"key": key, **columns, "row": row, "length": length}


def write_index(url, shards, columns=("jpg", "caption")):
    """``shards``: for each its local path, its format, its index rows and, where they differ, its URL and root."""

    def produce(writer):
        rows = []
        (writer.folder / "index").mkdir()
        for number, (path, form, found, *more) in enumerate(shards):
            content = Path(path).read_bytes()
            target, root = (*more, "", "")[:2]
            digest = hashlib.sha256(content).hexdigest()
            values = (number, target or str(path), form, len(found), len(content), digest, root)
            rows.append(dict(zip(SHARDS.names, values, strict=True)))
            batch = pa.RecordBatch.from_pylist(found, INDEX)
            with pa.ipc.new_file(str(writer.folder / f"index/{number:05d}.arrow"), INDEX) as sink:
                sink.write_batch(batch)
        pq.write_table(pa.Table.from_pylist(rows, SHARDS), writer.folder / "shards.parquet")
        writer.write_json("columns.json", dict(zip(("image", "caption"), columns, strict=True)))

    config = {"shards": [str(shard[0]) for shard in shards]}
    return artifacts.ensure(url, produce, kind=IMAGE_TEXT_INDEX, config=config)


def mixed(folder, counts=(5, 4, 6), **options):
    """A tar, a Parquet and a LLaVA shard in ``folder`` and their index; returns the index and the samples."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True)
    items, first = [], 0
    for count in counts:
        items.append(samples(first, count, **options))
        first += count
    shards = [
        (folder / "0.tar", "tar", write_tar(folder / "0.tar", items[0])),
        (folder / "1.parquet", "parquet", write_parquet(folder / "1.parquet", items[1])),
        (
            folder / "2.json",
            "llava",
            write_llava(folder / "2.json", items[2], folder / "images"),
            "",
            f"{folder}/images",
        ),
    ]
    return write_index(folder / "index", shards), [item for some in items for item in some]


def remote(folder, url, formats=("tar", "parquet", "tar"), count=6):
    """Shards in a bucket with their index on the local disk; returns the index and the samples."""
    filesystem, bucket = artifacts.locate(url)
    made, items = [], []
    for number, form in enumerate(formats):
        some = samples(number * count, count)
        path = folder / f"{number}.{form}"
        rows = {"tar": write_tar, "parquet": write_parquet}[form](path, some)
        filesystem.put_file(str(path), f"{bucket}/{path.name}")
        made.append((path, form, rows, f"{url}/{path.name}"))
        items += some
    return write_index(folder / "index", made), items
