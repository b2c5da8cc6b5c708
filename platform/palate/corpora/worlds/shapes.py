"""A synthetic world of coloured shapes, with captions, edits, and annotators whose taste is known.

A caption states shape, colour, size and background ("a small red circle on grey"); position, exact size, hue,
saturation and brightness are free. Annotators rank images by a Plackett-Luce model: Gumbel noise on utilities that are
linear in five attributes measured from pixels (``measure``), so that images drawn by a model are judged by the same
truth. Groups of annotators differ in taste, and each annotator from the group. Everything is a function of the seed.

The artifact holds ranked lists (``corpora/schema.py``), and beside them

    scenes/*.parquet   images with captions, to train a model from nothing (``SCENES``)
    edits/*.parquet    source, instruction, target, to train an editor from nothing (``EDITS``); only with --edits
    targets.parquet    with --edits: for each list the image that changes what was asked and nothing else
    users.parquet      every annotator's group, weights, and whether training must not see them

Symbols: N images, F attributes, U annotators, H x W pixels.
"""

import colorsys
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from palate import artifacts
from palate.artifacts import Artifact
from palate.config import scale
from palate.corpora.schema import IMAGES, LISTS, RANKED_LISTS
from palate.corpora.streams import CorpusError

Array = NDArray[np.float64]
Split = Literal["train", "validation", "test"]
# Lists are for training, for testing, or examples of an annotator's taste, whose captions are those of validation.
_CAPTIONS_OF: dict[str, Split] = {"train": "train", "examples": "validation", "test": "test"}

SIDE = 16  # pixels of an image
SHAPES = ("circle", "square", "triangle", "cross")
HUES = {"red": 0.0, "yellow": 55.0, "green": 120.0, "cyan": 180.0, "blue": 235.0, "purple": 290.0}  # degrees
RADII = {"small": (2.4, 3.4), "large": (3.8, 5.2)}  # of the circle of about the same area, in pixels
LIGHT = {"black": 0.06, "grey": 0.5, "white": 0.94}  # backgrounds
SATURATION, VALUE, HUE_JITTER, LIGHT_JITTER = (0.5, 1.0), (0.6, 1.0), 8.0, 0.04

SHARES = {"train": 0.65, "validation": 0.1, "test": 0.25}  # of the captions
_SCENE_SPLITS = (*("train",) * 8, "validation", "test")  # of captioned scenes, in turn
PER_FILE = 4096  # images
EDIT_SPREAD = 0.06  # mean absolute difference from the target that weighs as much as one spread of an attribute
IGNORED = 0.15  # of the proposed edits leave what they should change

# What annotators look at, each with its mean and its typical deviation among images of one caption.
FEATURES = ("size", "brightness", "saturation", "centredness", "contrast")
MEANS = np.array([0.20, 0.49, 0.52, 0.61, 0.38])
SPREADS = np.array([0.036, 0.080, 0.114, 0.148, 0.063])
# Directions of taste: everybody likes shapes in the centre somewhat, and the groups disagree on the rest.
GROUPS = {
    "bold": (1.0, 0.0, 0.0, 0.5, 0.5),
    "delicate": (-1.0, 0.5, 0.0, 0.5, 0.0),
    "vivid": (0.0, 0.5, 1.0, 0.5, 0.0),
    "muted": (0.0, -0.5, -1.0, 0.5, 0.0),
}

SCENES = pa.schema(
    [
        pa.field("image_uid", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # of the image; every caption occurs in each
    ]
)
EDITS = pa.schema(
    [
        pa.field("source_uid", pa.string(), nullable=False),
        pa.field("instruction", pa.string(), nullable=False),
        pa.field("target_uid", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),  # of the target
        pa.field("split", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Asked:
    """What a caption states."""

    shape: str
    colour: str
    size: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on {self.background}"


ASKED = tuple(Asked(*values) for values in product(SHAPES, HUES, RADII, LIGHT))
BY_CAPTION = {asked.caption: asked for asked in ASKED}


@dataclass(frozen=True)
class Scene:
    """One image: what its caption states, and the rest. Lengths in pixels, hue in degrees, the others in [0, 1]."""

    asked: Asked
    x: float
    y: float
    radius: float
    hue: float
    saturation: float
    value: float
    light: float


@dataclass(frozen=True)
class Annotator:
    """A simulated person. ``weights`` are the utility's, one for each of ``FEATURES`` in units of its spread."""

    user_id: str
    group: str
    held_out: bool
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """Synthetic scenes of coloured shapes, ranked by simulated annotators."""

    out: str = scale()  # folder or URL of the corpus
    scenes: int = 8000  # captioned images, or pairs of images with --edits, to train a model from nothing
    pool: int = 48  # images of each caption that annotators rank
    lists: int = 3000  # ranked lists for training
    examples: int = 16  # lists an annotator that show their taste
    tests: int = 8  # test lists an annotator
    lengths: tuple[int, ...] = (8,)  # images of a list, drawn uniformly from these
    groups: tuple[str, ...] = tuple(GROUPS)  # tastes that there are
    users: int = 40  # annotators
    held_out: float = 0.25  # share of them that no training list comes from
    variation: float = 0.25  # how far an annotator's taste is from the group's, which has length 1
    sharpness: float = 2.5  # how decided annotators are: the utility's deviation; that of the noise is 1.28
    edits: bool = False  # rank edits of a scene rather than scenes
    seed: int = 0  # everything is a function of it
    fresh: bool = scale(False)  # discard what is at --out, finished or not


def prepare(config: ShapesConfig) -> Artifact:
    """The corpus at ``config.out``.

    Raises:
        CorpusError: a field is out of range; the message names it.
    """
    _check(config)

    def produce(writer: artifacts.Writer) -> None:
        world = _World(config)
        rows = world.edited() if config.edits else world.ranked()
        users = [asdict(annotator) for annotator in world.annotators]
        files = {
            "lists/part-00000.parquet": pa.Table.from_pylist(rows, schema=LISTS),
            "users.parquet": pa.Table.from_pylist(users),
            **{f"{name}/part-00000.parquet": table for name, table in world.pretraining().items()},
        }
        if config.edits:
            files["targets.parquet"] = pa.Table.from_pylist(world.targets)
        images = list(world.images.items())
        for start in range(0, len(images), PER_FILE):
            files[f"images/part-{start // PER_FILE:05d}.parquet"] = _image_table(images[start : start + PER_FILE])
        for path, table in files.items():
            (writer.folder / path).parent.mkdir(exist_ok=True)
            pq.write_table(table, writer.folder / path, compression="zstd")
        (writer.folder / "quarantine.jsonl").touch()
        counts = {"users": len(users), "lists": len(rows), "images": len(world.images), "quarantined": 0}
        report = {**counts, "scenes": config.scenes, "captions": len(ASKED)}
        writer.write_json("report.json", report)
        writer.summary.update(report)

    return artifacts.ensure(config.out, produce, kind=RANKED_LISTS, config=config, fresh=config.fresh)


def read_annotators(corpus: Artifact) -> list[Annotator]:
    """The truth about every annotator of a corpus, sorted by id."""
    rows = pq.read_table(corpus.local("users.parquet")).to_pylist()
    return sorted((Annotator(**{**row, "weights": tuple(row["weights"])}) for row in rows), key=lambda a: a.user_id)


def vocabulary() -> list[str]:
    """Every word of captions and instructions."""
    options = (*SHAPES, *HUES, *RADII, *LIGHT)
    return sorted({"a", "on", "make", "the", "background", *options})


def caption_splits(seed: int) -> dict[str, Split]:
    """The split of every caption."""
    order = np.random.default_rng(seed).permutation(len(ASKED))
    edges = np.cumsum(list(SHARES.values())) * len(ASKED)
    names: tuple[Split, ...] = ("train", "validation", "test")
    return {ASKED[which].caption: names[int(np.searchsorted(edges, place + 0.5))] for place, which in enumerate(order)}


# Scenes


def draw_scene(asked: Asked, random: np.random.Generator) -> Scene:
    """A scene of what is asked; the rest uniform, the shape wholly inside the image."""
    radius = random.uniform(*RADII[asked.size])
    left, right, top, bottom = extent(asked.shape, radius)
    return Scene(
        asked=asked,
        x=random.uniform(left, SIDE - right),
        y=random.uniform(top, SIDE - bottom),
        radius=radius,
        hue=HUES[asked.colour] + random.uniform(-HUE_JITTER, HUE_JITTER),
        saturation=random.uniform(*SATURATION),
        value=random.uniform(*VALUE),
        light=LIGHT[asked.background] + random.uniform(-LIGHT_JITTER, LIGHT_JITTER),
    )


def paint(scenes: Sequence[Scene]) -> Array:
    """Images (N, 3, SIDE, SIDE) in [0, 1], antialiased by the distance of pixel centres from the outline."""
    images = np.empty((len(scenes), 3, SIDE, SIDE))
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    for image, scene in zip(images, scenes, strict=True):
        covered = np.clip(0.5 - distance(scene.asked.shape, columns - scene.x, rows - scene.y, scene.radius), 0, 1)
        colour = rgb(scene.hue, scene.saturation, scene.value)
        image[:] = scene.light + covered * (colour[:, None, None] - scene.light)
    return images


def rgb(hue: float, saturation: float, value: float) -> Array:
    """Red, green and blue (3,) in [0, 1] of a hue in degrees, saturation and value in [0, 1]."""
    return np.array(colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value))


def instruct(scene: Scene, random: np.random.Generator) -> tuple[str, Scene]:
    """An instruction that changes one thing of the scene, such as "make the circle red", and the scene so changed."""
    asked = scene.asked
    what = str(random.choice(("shape", "colour", "size", "background")))
    options: dict[str, Sequence[str]] = {
        "shape": SHAPES,
        "colour": tuple(HUES),
        "size": tuple(RADII),
        "background": tuple(LIGHT),
    }
    new = str(random.choice([value for value in options[what] if value != getattr(asked, what)]))
    fresh = draw_scene(changed := replace(asked, **{what: new}), random)
    kept: dict[str, float] = {"x": scene.x, "y": scene.y, "saturation": scene.saturation, "value": scene.value}
    kept["radius"] = fresh.radius if what == "size" else scene.radius
    kept["hue"] = scene.hue - HUES[asked.colour] + HUES[changed.colour]
    kept["light"] = scene.light - LIGHT[asked.background] + LIGHT[changed.background]
    words = f"make the background {new}" if what == "background" else f"make the {asked.shape} {new}"
    if what == "shape":
        words = f"make the {asked.shape} a {new}"
    return words, _inside(Scene(changed, **kept))


def propose_edit(source: Scene, target: Scene, random: np.random.Generator) -> Scene:
    """What an editor might answer: near the target or far from it, or the instruction ignored."""
    base = source if random.uniform() < IGNORED else target
    strength = random.uniform(0, 1)
    moved = draw_scene(base.asked, random)
    names = ("x", "y", "radius", "saturation", "value")
    mixed = {name: getattr(base, name) + strength * (getattr(moved, name) - getattr(base, name)) for name in names}
    return _inside(replace(base, **mixed))


def encode_png(image_3HW: Array) -> bytes:
    """An image in [0, 1] as PNG."""
    pixels = np.round(np.clip(image_3HW, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def decode_png(content: bytes) -> Array:
    """The image (3, H, W) in [0, 1]."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64).transpose(2, 0, 1) / 255


# Taste


def measure(images_N3HW: Array) -> Array:
    """``FEATURES`` of images in [0, 1], whoever drew them, (N, F) and finite whatever the image shows.

    The background is the median colour of the border; a pixel belongs to the shape as its colour is away from that.
    Size is the share of the shape's pixels, brightness their mean luma (Rec. 601), saturation their mean range over
    the channels, centredness 1 - the distance of their centroid from the centre in half sides, contrast the root
    mean square distance of their mean colour from the background. Where there is no shape, the last four are 0.
    """
    images = np.clip(np.asarray(images_N3HW, dtype=np.float64), 0, 1)
    height, width = images.shape[2:]
    border = np.ones((height, width), dtype=bool)
    border[1:-1, 1:-1] = False
    background_N3 = np.median(images[:, :, border], axis=2)
    away_NHW = np.sqrt(((images - background_N3[:, :, None, None]) ** 2).mean(axis=1))
    shape_NHW = np.clip((away_NHW - 0.08) / 0.12, 0, 1)
    mass_N = np.maximum(shape_NHW.sum(axis=(1, 2)), 1)

    def over_shape(values_NHW: Array) -> Array:
        return (shape_NHW * values_NHW).sum(axis=(1, 2)) / mass_N

    rows, columns = (np.mgrid[0:height, 0:width] + 0.5) / np.array([height, width])[:, None, None] * 2 - 1
    share_N = over_shape(np.ones((1, height, width)))  # 1, and less where hardly anything is there
    colour_N3 = np.stack([over_shape(images[:, channel]) for channel in range(3)], axis=1)
    contrast_N3 = colour_N3 - share_N[:, None] * background_N3
    return np.stack(
        [
            shape_NHW.mean(axis=(1, 2)),
            colour_N3 @ np.array([0.299, 0.587, 0.114]),
            over_shape(images.max(axis=1) - images.min(axis=1)),
            share_N * np.maximum(0, 1 - np.hypot(over_shape(rows[None]), over_shape(columns[None]))),
            np.sqrt((contrast_N3**2).mean(axis=1)),
        ],
        axis=1,
    )


def utilities(features_NF: Array, weights_UF: Array) -> Array:
    """How much each annotator, or group, likes each image, (N, U): linear in the standardized attributes."""
    return (features_NF - MEANS) / SPREADS @ np.asarray(weights_UF, dtype=np.float64).T


def edit_utilities(images_N3HW: Array, targets_N3HW: Array, weights_UF: Array) -> Array:
    """The same for edits, (N, U): half the taste, less the distance from what was asked for, as sharp as the taste."""
    weights_UF = np.asarray(weights_UF, dtype=np.float64)
    distance_N = np.abs(images_N3HW - targets_N3HW).mean(axis=(1, 2, 3)) / EDIT_SPREAD
    sharpness_U = np.linalg.norm(weights_UF, axis=1)
    return utilities(measure(images_N3HW), weights_UF) / 2 - distance_N[:, None] * sharpness_U


def group_weights(groups: Sequence[str], sharpness: float) -> Array:
    """The weights (U, F) of each group's mean taste; ``utilities`` with them deviates by ``sharpness``."""
    directions = np.array([GROUPS[group] for group in groups])
    return sharpness * directions / np.linalg.norm(directions, axis=1, keepdims=True)


def rank(utilities_M: Array, random: np.random.Generator) -> list[int]:
    """Positions best first, drawn from the Plackett-Luce model of these utilities (Gumbel-max, Yellott 1977)."""
    return [int(place) for place in np.argsort(-(utilities_M + random.gumbel(size=len(utilities_M))))]


def draw_annotators(config: ShapesConfig, random: np.random.Generator) -> list[Annotator]:
    """Annotators, the groups in turn, the held-out ones spread over them."""
    count = round(config.held_out * config.users)
    held_out = {config.users - 1 - place for place in range(count)}
    centres_GF = group_weights(config.groups, 1.0)
    annotators = []
    for number in range(config.users):
        which = number % len(config.groups)
        taste_F = centres_GF[which] + config.variation * random.standard_normal(len(FEATURES))
        weights = config.sharpness * taste_F / np.linalg.norm(taste_F)
        annotators.append(
            Annotator(f"annotator-{number:04d}", config.groups[which], number in held_out, tuple(map(float, weights)))
        )
    return annotators


class _World:
    """The tables of one corpus. Images collect in ``images`` by uid, as scenes."""

    def __init__(self, config: ShapesConfig) -> None:
        self.config = config
        streams = np.random.SeedSequence(config.seed).spawn(4)
        users, self._ranking, self._drawing, self._pretraining = (np.random.default_rng(stream) for stream in streams)
        self.annotators = draw_annotators(config, users)
        self.images: dict[str, Scene] = {}
        self.targets: list[dict[str, str]] = []
        splits = caption_splits(config.seed)
        self._asked = {split: [asked for asked in ASKED if splits[asked.caption] == split] for split in SHARES}

    def ranked(self) -> list[dict[str, Any]]:
        """Lists of scenes of one caption."""
        pools = {}
        for asked in ASKED:
            scenes = [draw_scene(asked, self._drawing) for _ in range(self.config.pool)]
            pools[asked] = [self._add("scene", scene) for scene in scenes], measure(_as_saved(paint(scenes)))
        rows: list[dict[str, Any]] = []
        for annotator, split in self._assignments():
            random = self._ranking
            captions = self._asked[_CAPTIONS_OF[split]]
            asked = captions[random.integers(len(captions))]
            uids, features_NF = pools[asked]
            shown = random.choice(len(uids), size=self._length(), replace=False)
            liked = utilities(features_NF[shown], np.array([annotator.weights]))[:, 0]
            best_first = [uids[shown[place]] for place in rank(liked, random)]
            rows.append(self._row(len(rows), annotator, split, asked, best_first))
        return rows

    def edited(self) -> list[dict[str, Any]]:
        """Lists of edits of one scene by one instruction."""
        rows: list[dict[str, Any]] = []
        for annotator, split in self._assignments():
            source, instruction, target = self._edit(split)
            proposals = [propose_edit(source, target, self._ranking) for _ in range(self._length())]
            pictures, exact = _as_saved(paint(proposals)), _as_saved(paint([target]))
            liked = edit_utilities(pictures, exact, np.array([annotator.weights]))[:, 0]
            uids = [self._add("edit", proposal) for proposal in proposals]
            best_first = [uids[place] for place in rank(liked, self._ranking)]
            row = self._row(len(rows), annotator, split, target.asked, best_first)
            rows.append(row | {"source_image": self._add("source", source), "instruction": instruction})
            self.targets.append({"list_id": row["list_id"], "target_uid": self._add("target", target)})
        return rows

    def pretraining(self) -> dict[str, pa.Table]:
        """Captioned scenes, or edits, that no annotator sees."""
        random, rows = self._pretraining, []
        for number in range(self.config.scenes):
            split = _SCENE_SPLITS[number % len(_SCENE_SPLITS)]
            scene = draw_scene(ASKED[random.integers(len(ASKED))], random)
            if not self.config.edits:
                rows.append({"image_uid": self._add("plain", scene), "caption": scene.asked.caption, "split": split})
                continue
            instruction, target = instruct(scene, random)
            uids = {"source_uid": self._add("plain", scene), "target_uid": self._add("plain", target)}
            rows.append({**uids, "instruction": instruction, "caption": target.asked.caption, "split": split})
        if self.config.edits:
            return {"edits": pa.Table.from_pylist(rows, schema=EDITS)}
        return {"scenes": pa.Table.from_pylist(rows, schema=SCENES)}

    def _assignments(self) -> Iterator[tuple[Annotator, str]]:
        """Who ranks for which split, a list each."""
        held_in = [annotator for annotator in self.annotators if not annotator.held_out]
        for number in range(self.config.lists):
            yield held_in[number % len(held_in)], "train"
        for annotator in self.annotators:
            for _ in range(self.config.examples):
                yield annotator, "examples"
            for _ in range(self.config.tests):
                yield annotator, "test"

    def _length(self) -> int:
        return int(self._ranking.choice(self.config.lengths))

    def _edit(self, split: str) -> tuple[Scene, str, Scene]:
        """A scene, an instruction and the scene so changed, whose caption is of the split."""
        wanted = set(self._asked[_CAPTIONS_OF[split]])
        while True:
            source = draw_scene(ASKED[self._ranking.integers(len(ASKED))], self._ranking)
            instruction, target = instruct(source, self._ranking)
            if target.asked in wanted:
                return source, instruction, target

    def _add(self, kind: str, scene: Scene) -> str:
        uid = f"{kind}-{len(self.images):06d}"
        self.images[uid] = scene
        return uid

    def _row(self, number: int, annotator: Annotator, split: str, asked: Asked, uids: list[str]) -> dict[str, Any]:
        list_id = f"shapes-{number:06d}"
        edges = [
            {"winner": place, "loser": place + 1, "votes": 1.0, "source_ids": [list_id]}
            for place in range(len(uids) - 1)
        ]
        items = [{"image_uid": uid, "model": None, "score": None, "tie_group": place} for place, uid in enumerate(uids)]
        return {
            "list_id": list_id,
            "caption": asked.caption,
            "user_id": annotator.user_id,
            "split": split,
            "items": items,
            "edges": edges,
            "kind": "full",
            "top_k": None,
            "source_image": None,
            "instruction": None,
            "weight": 1.0,
        }


def _image_table(images: Sequence[tuple[str, Scene]]) -> pa.Table:
    pictures = paint([scene for _, scene in images])
    rows = [
        {"image_uid": uid, "bytes": encode_png(picture), "path": None, "width": SIDE, "height": SIDE}
        for (uid, _), picture in zip(images, pictures, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=IMAGES)


def _as_saved(images: Array) -> Array:
    """As 8-bit files hold them, so that annotators rank what readers see."""
    return np.round(images * 255) / 255


def _inside(scene: Scene) -> Scene:
    """The scene, moved so that the shape lies wholly inside the image."""
    left, right, top, bottom = extent(scene.asked.shape, scene.radius)
    x, y = (float(np.clip(scene.x, left, SIDE - right)), float(np.clip(scene.y, top, SIDE - bottom)))
    return replace(scene, x=x, y=y)


# Outlines. Sizes are such that shapes of one radius cover about the same area.
_HALF_SIDE, _HEIGHT, _ARM, _ARM_WIDTH = 0.89, 0.78, 1.25, 0.42


def distance(shape: str, x: Array, y: Array, radius: float) -> Array:
    """Signed distance (or a bound of it, outside of corners) of points from the outline, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - _HALF_SIDE * radius
    if shape == "triangle":  # equilateral, pointing up
        return np.maximum(y, np.sqrt(0.75) * np.abs(x) - y / 2) - _HEIGHT * radius
    across = np.maximum(np.abs(x) - _ARM * radius, np.abs(y) - _ARM_WIDTH * radius)
    down = np.maximum(np.abs(y) - _ARM * radius, np.abs(x) - _ARM_WIDTH * radius)
    return np.minimum(across, down)


def extent(shape: str, radius: float) -> tuple[float, float, float, float]:
    """How far the shape reaches to the left, right, top and bottom of its centre."""
    if shape == "triangle":
        inner = _HEIGHT * radius
        return np.sqrt(3) * inner, np.sqrt(3) * inner, 2 * inner, inner
    reach = radius * {"circle": 1.0, "square": _HALF_SIDE, "cross": _ARM}[shape]
    return reach, reach, reach, reach


def _check(config: ShapesConfig) -> None:
    unknown = [group for group in config.groups if group not in GROUPS]
    problems = {
        f"--groups {' '.join(config.groups)}: there are {', '.join(GROUPS)}": unknown or not config.groups,
        f"--lengths {config.lengths}: a list has at least 2 images": not config.lengths or min(config.lengths) < 2,
        f"--pool {config.pool}: lists of {max(config.lengths, default=0)} need as many images of a caption": (
            not config.edits and config.pool < max(config.lengths, default=0)
        ),
        f"--users {config.users} --held-out {config.held_out}: nobody is left to train on": (
            round(config.held_out * config.users) >= config.users
        ),
        f"--held-out {config.held_out}: a share between 0 and 1": not 0 <= config.held_out < 1,
        f"--scenes {config.scenes} --lists {config.lists}: not negative": min(config.scenes, config.lists) < 0,
        f"--sharpness {config.sharpness} --variation {config.variation}: not negative": (
            min(config.sharpness, config.variation) < 0
        ),
    }
    for problem, found in problems.items():
        if found:
            raise CorpusError(problem)
