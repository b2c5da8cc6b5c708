"""Latents and text embeddings of ranked lists, computed once: Parquet by image uid and by caption.

The posterior's mean and deviation are kept, so that training still samples. Images are resized with their shorter side
to the resolution and cropped at the centre; what SDXL wants to know of that is kept beside the latents.

    OUT/index               shapes, type and counts; written when all shards are there
    OUT/images-NNNNN        latents.parquet, a shard for each file of images
    OUT/captions-NNNNN      texts.parquet, a shard for some thousand captions

On retry: a shard is an artifact of its own, so a killed encoding goes on after the shards that are finished.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from palate import artifacts
from palate import config as configs
from palate.artifacts import Artifact, Writer
from palate.config import scale
from palate.corpora.pictures import decode_image, read_image
from palate.corpora.preparation import Runner, Step, run_local
from palate.models.diffusion import LoadedDiffusion, encode_images, encode_text, load_diffusion

ENCODED, SHARD = "encoded-images", "encoded-shard"
CAPTIONS = 4096  # of a shard
ROW_GROUP = 8  # images read from disk together; training reads at random

LATENTS = pa.schema(
    [
        pa.field("image_uid", pa.string(), nullable=False),
        pa.field("mean", pa.binary(), nullable=False),
        pa.field("deviation", pa.binary(), nullable=False),
        pa.field("original", pa.list_(pa.int32(), 2), nullable=False),  # height, width
        pa.field("crop", pa.list_(pa.int32(), 2), nullable=False),  # top, left, after resizing
    ]
)
TEXTS = pa.schema(
    [
        pa.field("caption", pa.string(), nullable=False),
        pa.field("text", pa.binary(), nullable=False),
        pa.field("pooled", pa.binary()),
    ]
)


@dataclass(frozen=True)
class EncodeConfig:
    """How images and captions are encoded."""

    resolution: int = 512
    """Pixels of a side; must suit the base model."""
    latent_dtype: Literal["float16", "float32"] = "float16"
    """Of what is stored."""
    encode_batch: int = scale(8)
    """Images, or captions, that go through the encoders at once."""
    max_disk_gb: float = scale(100.0)
    """Refuse to begin when the result would take more."""
    encode_device: str | None = scale(None)
    """Where the encoders run; None: where the training does."""

    def __post_init__(self) -> None:
        # 8 is the least that any VAE and diffusers' pipelines take; a model that wants more says so when it encodes.
        configs.require(self, lambda side: side >= 8 and side % 8 == 0, "a multiple of 8", "resolution")
        configs.require_at_least(self, 1, "encode_batch")


class Picture(NamedTuple):
    """An image as the encoder takes it: pixels (3, R, R) in [-1, 1], and where they come from (height, width)."""

    pixels: Tensor
    original: tuple[int, int]
    crop: tuple[int, int]


def read_picture(content: bytes, resolution: int) -> Picture:
    """Decode and crop.

    Raises:
        ValueError: the bytes are no image that can be decoded whole.
    """
    return crop_picture(decode_image(content), resolution)


def crop_picture(image: Image.Image, resolution: int) -> Picture:
    """An RGB image as the encoder takes it, ``square``."""
    cropped, crop = square(image, resolution)
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 127.5 - 1
    return Picture(pixels, (image.height, image.width), crop)


def square(image: Image.Image, resolution: int) -> tuple[Image.Image, tuple[int, int]]:
    """Resize the shorter side to ``resolution`` (bilinear) and crop at the centre; and the crop's top and left."""
    width, height = image.size
    factor = resolution / min(width, height)
    # Rounding must not make a side shorter than the crop.
    size = max(resolution, round(width * factor)), max(resolution, round(height * factor))
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    box = (left, top, left + resolution, top + resolution)
    return image.resize(size, Image.Resampling.BILINEAR).crop(box), (top, left)


def encode(
    lists: Artifact,
    model: str | LoadedDiffusion,
    out: str,
    config: EncodeConfig,
    runner: Runner = run_local,
    *,
    fresh: bool = False,
) -> "Encoded":
    """The latents and text embeddings of ``lists`` at ``out``, made by ``model`` unless they are there.

    Args:
        model: by name, so that each process of the runner loads it; or as it is at hand, for a runner in this process.

    Raises:
        CorpusError: an image cannot be decoded (naming it).
        ValueError: the result would not fit on the disk.
        ArtifactMismatch: something else is there.
    """
    if fresh:
        for folder in artifacts.folders(out):
            artifacts.discard(folder)
    # Where others encode, this process only asks what the model is: it needs no accelerator.
    device = config.encode_device if runner is run_local or torch.cuda.is_available() else "cpu"
    loaded = _loaded(model, device) if isinstance(model, str) else model
    identity = {"model": loaded.name, "weights": loaded.weights, **configs.identity(config)}
    index = artifacts.join(out, "index")
    if artifacts.finished(index, kind=ENCODED, config=identity, inputs={"lists": lists}) is None:
        encoding = _Encoding(lists, model, out, config, identity)
        shards = lists.paths("images/", ".parquet")
        captions = _captions(lists)
        shapes, summary = encoding.plan(shards, captions, loaded)
        parts = [captions[start : start + CAPTIONS] for start in range(0, len(captions), CAPTIONS)]
        runner(Step("encode images", encoding.images, list(enumerate(shards))))
        runner(Step("encode captions", encoding.captions, list(enumerate(parts))))

        def produce(writer: Writer) -> None:
            writer.write_json("shapes.json", {"dtype": config.latent_dtype, "resolution": config.resolution, **shapes})
            writer.summary.update(summary)

        artifacts.ensure(index, produce, kind=ENCODED, config=identity, inputs={"lists": lists})
    _loaded.cache_clear()  # the training needs the memory
    return Encoded(out)


@dataclass(frozen=True)
class _Encoding:
    lists: Artifact
    model: str | LoadedDiffusion
    out: str
    config: EncodeConfig
    identity: Mapping[str, Any]

    def plan(
        self, shards: Sequence[str], captions: Sequence[str], loaded: LoadedDiffusion
    ) -> tuple[dict[str, list[int]], dict[str, Any]]:
        """The shapes of what is stored, and its extent, which is printed and must fit on the disk."""
        config = self.config
        images = sum(pq.read_metadata(self.lists.local(path)).num_rows for path in shards)
        shapes = _shapes(loaded, config)
        sizes = {name: np.dtype(config.latent_dtype).itemsize * int(np.prod(shape)) for name, shape in shapes.items()}
        needed = 2 * images * sizes.pop("latents") + len(captions) * sum(sizes.values())
        print(f"encoding {images} images and {len(captions)} captions: {needed / 2**30:.2f} GiB", flush=True)
        allowed = config.max_disk_gb * 2**30
        filesystem, root = artifacts.locate(self.out)
        if artifacts.is_local(filesystem):
            filesystem.makedirs(root, exist_ok=True)
            allowed = min(allowed, shutil.disk_usage(root).free)
        if needed > allowed:
            raise ValueError(
                f"the encodings would take {needed / 2**30:.1f} GiB, and {allowed / 2**30:.1f} GiB are allowed "
                "(--max-disk-gb) and free: lower --resolution, or use fewer lists"
            )
        return shapes, {"images": images, "captions": len(captions), "bytes": needed}

    def encoders(self) -> LoadedDiffusion:
        return _loaded(self.model, self.config.encode_device) if isinstance(self.model, str) else self.model

    def images(self, task: tuple[int, str]) -> dict[str, Any]:
        """Encode one file of images into a shard."""
        number, path = task
        loaded, config = self.encoders(), self.config

        def rows() -> Iterator[list[dict[str, Any]]]:
            with pq.ParquetFile(self.lists.local(path)) as file:
                for batch in file.iter_batches(config.encode_batch):
                    found = batch.to_pylist()
                    pictures = [crop_picture(read_image(row), config.resolution) for row in found]
                    means, deviations = encode_images(loaded, torch.stack([picture.pixels for picture in pictures]))
                    yield [
                        {
                            "image_uid": row["image_uid"],
                            "mean": _bytes(mean, config.latent_dtype),
                            "deviation": _bytes(deviation, config.latent_dtype),
                            "original": picture.original,
                            "crop": picture.crop,
                        }
                        for row, picture, mean, deviation in zip(found, pictures, means, deviations, strict=True)
                    ]

        return self._shard(f"images-{number:05d}", "latents.parquet", LATENTS, rows(), {"of": path})

    def captions(self, task: tuple[int, Sequence[str]]) -> dict[str, Any]:
        """Encode some captions into a shard."""
        number, captions = task
        loaded, config = self.encoders(), self.config

        def rows() -> Iterator[list[dict[str, Any]]]:
            for start in range(0, len(captions), config.encode_batch):
                some = list(captions[start : start + config.encode_batch])
                found = encode_text(loaded, some)
                texts, pooled = found["prompt_embeds"], found.get("pooled_prompt_embeds")
                yield [
                    {
                        "caption": caption,
                        "text": _bytes(texts[index], config.latent_dtype),
                        "pooled": None if pooled is None else _bytes(pooled[index], config.latent_dtype),
                    }
                    for index, caption in enumerate(some)
                ]

        return self._shard(f"captions-{number:05d}", "texts.parquet", TEXTS, rows(), {"captions": len(captions)})

    def _shard(
        self, name: str, file: str, schema: pa.Schema, batches: Iterator[list[dict[str, Any]]], what: dict[str, Any]
    ) -> dict[str, Any]:
        def produce(writer: Writer) -> None:
            count = 0
            # Random bits do not compress.
            with pq.ParquetWriter(writer.folder / file, schema, compression="none") as parquet:
                for rows in batches:
                    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=ROW_GROUP)
                    count += len(rows)
            writer.summary["rows"] = count

        config = {**self.identity, **what}
        inputs = {"lists": self.lists}
        made = artifacts.ensure(artifacts.join(self.out, name), produce, kind=SHARD, config=config, inputs=inputs)
        return made.summary


def _captions(lists: Artifact) -> list[str]:
    """Every caption, or instruction where images are edited, and the empty one that stands for a dropped prompt."""
    found = {""}
    for folder in ("lists/", "scenes/", "edits/"):
        for path in lists.paths(folder, ".parquet"):
            file = lists.local(path)
            names = [name for name in ("caption", "instruction") if name in pq.read_schema(file).names]
            for row in pq.read_table(file, columns=names).to_pylist():
                found.add(row.get("instruction") or row["caption"])
    return sorted(found)


def _shapes(loaded: LoadedDiffusion, config: EncodeConfig) -> dict[str, list[int]]:
    mean, _ = encode_images(loaded, torch.zeros(1, 3, config.resolution, config.resolution))
    found = encode_text(loaded, [""])
    shapes = {"latents": list(mean.shape[1:]), "text": list(found["prompt_embeds"].shape[1:])}
    if (pooled := found.get("pooled_prompt_embeds")) is not None:
        shapes["pooled"] = list(pooled.shape[1:])
    return shapes


@lru_cache(maxsize=1)
def _loaded(model: str, device: str | None) -> LoadedDiffusion:
    """The encoders, loaded once a process."""
    return load_diffusion(model, device=device or "cpu")


def _bytes(tensor: Tensor, dtype: str) -> bytes:
    found = tensor.float().cpu().numpy().astype(dtype)
    if not np.isfinite(found).all():
        raise ValueError(f"the encoder gave values that are not finite in {dtype}: encode with --latent-dtype float32")
    return bytes(found.tobytes())


class Latents(NamedTuple):
    """Posterior of one image: mean and deviation (C, H, W), float32, unscaled; original size and crop (y, x)."""

    mean: Tensor
    deviation: Tensor
    original: tuple[int, int]
    crop: tuple[int, int]


class Text(NamedTuple):
    """One encoded caption: (L, D) and, for some families, (P,); float32."""

    text: Tensor
    pooled: Tensor | None


class Encoded:
    """Random access to what ``encode`` made. Row groups are read when needed; the last ones are kept.

    Args:
        memory: bytes of latents that are kept, and as many of texts.

    Raises:
        ArtifactMissing: the encoding is not finished.
    """

    def __init__(self, url: str, memory: int = 1 << 30) -> None:
        self.url, self.artifact = url, artifacts.open_artifact(artifacts.join(url, "index"), ENCODED)
        settings = self.artifact.read_json("shapes.json")
        self._dtype, self.resolution = np.dtype(settings["dtype"]), int(settings["resolution"])
        self._shapes = {name: tuple(settings[name]) for name in ("latents", "text", "pooled") if name in settings}
        self._places = {name: self._index(name, key) for name, key in (("latents", "image_uid"), ("texts", "caption"))}
        values = {name: int(np.prod(shape)) for name, shape in self._shapes.items()}
        rows = {"latents": 2 * values["latents"], "texts": values["text"] + values.get("pooled", 0)}
        self._group: dict[str, Callable[[str, int], list[dict[str, Any]]]] = {
            name: lru_cache(maxsize=max(1, memory // (ROW_GROUP * count * self._dtype.itemsize)))(self._read_group)
            for name, count in rows.items()
        }
        # Open files, as reading one's footer takes longer than a row group.
        self._file: Callable[[str], pq.ParquetFile] = lru_cache(maxsize=64)(pq.ParquetFile)

    def __contains__(self, image_uid: str) -> bool:
        return image_uid in self._places["latents"]

    def latents(self, image_uid: str) -> Latents:
        """The posterior of an image.

        Raises:
            KeyError: it was not encoded.
        """
        row = self._row("latents", image_uid)
        mean, deviation = (self._tensor(row[name], "latents") for name in ("mean", "deviation"))
        return Latents(mean, deviation, tuple(row["original"]), tuple(row["crop"]))

    def text(self, caption: str) -> Text:
        """An encoded caption.

        Raises:
            KeyError: it was not encoded.
        """
        row = self._row("texts", caption)
        return Text(self._tensor(row["text"], "text"), self._tensor(row["pooled"], "pooled") if row["pooled"] else None)

    def _tensor(self, content: bytes, name: str) -> Tensor:
        array = np.frombuffer(content, dtype=self._dtype).astype(np.float32)
        return torch.from_numpy(array).view(self._shapes[name])

    def _row(self, folder: str, key: str) -> dict[str, Any]:
        place = self._places[folder].get(key)
        if place is None:
            raise KeyError(f"{json.dumps(key)[:80]} is not among the {folder} of {self.url}")
        path, group, row = place
        return self._group[folder](path, group)[row]

    def _read_group(self, path: str, group: int) -> list[dict[str, Any]]:
        return list(self._file(path).read_row_group(group).to_pylist())

    def _index(self, name: str, key: str) -> dict[str, tuple[str, int, int]]:
        places = {}
        for folder in artifacts.folders(self.url):
            shard = artifacts.open_artifact(folder)
            for path in shard.paths(name, ".parquet"):
                local = str(shard.local(path))
                with pq.ParquetFile(local) as file:
                    for group in range(file.num_row_groups):
                        keys = file.read_row_group(group, columns=[key])[key].to_pylist()
                        places.update({found: (local, group, row) for row, found in enumerate(keys)})
        return places
