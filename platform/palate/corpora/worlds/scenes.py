"""A synthetic world of scenes with several coloured shapes, with captions, and questions whose answers are known.

A scene holds one to four shapes, each in a place of its own: a1 and b1 above, a2 and b2 below. A caption names all of
them; a question asks for one fact:

    shape     "what is the red one"           where just one object is red
    colour    "which colour is the circle"    where there is just one circle
    place     "where is the red circle"       where there is just one
    at        "what is at b2"                 a shape, or nothing
    count     "how many are there", "how many circles are there"

The artifact is as ``corpora/vqa.py`` says; the facts of an image are its ``Described``. Everything is a function of
the seed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palate import artifacts
from palate.artifacts import Artifact
from palate.config import scale
from palate.corpora import vqa
from palate.corpora.streams import CorpusError
from palate.corpora.vqa import Question
from palate.corpora.worlds import shapes
from palate.corpora.worlds.shapes import HUES, SHAPES, Array, encode_png

SIDE = 32  # pixels of an image
MOST = 4  # objects of a scene
GRID = 2  # places of a side
PLACES = tuple(f"{column}{row}" for row in "12" for column in "ab")
COUNTS = ("zero", "one", "two", "three", "four")
RADII = (4.6, 6.4)  # of the circle of about the same area, in pixels
JITTER = 1.5  # pixels that a shape may be off its place's centre, at most
PLURALS = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES}
KINDS = ("shape", "colour", "place", "at", "count")
NOTHING = "nothing"
OPTIONS: dict[str, tuple[str, ...]] = {  # every answer that a question of a kind may have
    "shape": SHAPES,
    "colour": tuple(HUES),
    "place": PLACES,
    "at": (*SHAPES, NOTHING),
    "count": COUNTS,
}


@dataclass(frozen=True)
class Object:
    """One shape. Lengths in pixels, hue in degrees, the others in [0, 1]."""

    shape: str
    colour: str
    place: str
    x: float
    y: float
    radius: float
    hue: float
    saturation: float
    value: float


@dataclass(frozen=True)
class Described:
    """One scene: what is in it, in the order of the places, and the background's light."""

    objects: tuple[Object, ...]
    light: float

    @property
    def caption(self) -> str:
        return " and ".join(f"a {one.colour} {one.shape} at {one.place}" for one in self.objects)

    @property
    def facts(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def described(facts: Sequence[Mapping[str, Any]]) -> list[Described]:
    """The scenes of these ``facts``; none where the images are others than of scenes."""
    return [
        Described(tuple(Object(**thing) for thing in one["objects"]), one["light"]) for one in facts if "objects" in one
    ]


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Synthetic scenes of several coloured shapes, with captions and questions."""

    out: str = scale()  # folder or URL of the corpus
    encoder: int = 20_000  # scenes to train a vision encoder without labels
    train: int = 30_000  # scenes with captions and questions
    validation: int = 500
    test: int = 1_000
    objects: int = MOST  # of a scene, at most
    questions: int = 4  # of each training scene; others get one of each kind that has one
    per_shard: int = 2_000
    seed: int = 0  # everything is a function of it
    fresh: bool = scale(False)  # discard what is at --out, finished or not

    def __post_init__(self) -> None:
        for name in ("per_shard", "train", "test", "questions"):
            if getattr(self, name) < 1:
                raise CorpusError(f"--{name.replace('_', '-')} is at least 1, got {getattr(self, name)}")
        if not 1 <= self.objects <= MOST:
            raise CorpusError(f"--objects is 1 to {MOST}, for a scene has as many places; got {self.objects}")


def prepare(config: ScenesConfig) -> Artifact:
    """The corpus at ``config.out``."""

    def produce(writer: artifacts.Writer) -> None:
        counts: dict[str, int] = {}
        for number, split in enumerate(vqa.SPLITS):
            random = np.random.default_rng(np.random.SeedSequence([config.seed, number]))
            counts[split], tested = getattr(config, split), []
            for shard, start in enumerate(range(0, counts[split], config.per_shard)):
                drawn = [draw(random, config.objects) for _ in range(min(config.per_shard, counts[split] - start))]
                wanted = config.questions if split == "train" else None
                asked = [tuple(ask(scene, random, wanted)) for scene in drawn]
                found = [
                    vqa.Example(encode_png(picture), scene.caption, questions, scene.facts)
                    for scene, picture, questions in zip(drawn, paint(drawn), asked, strict=True)
                ]
                vqa.write_shard(writer, split, shard, start, found)
                tested += found if split == "test" else []
        vqa.write_meta(writer, vqa.Meta(SIDE, OPTIONS, tuple(vocabulary())), tested)
        writer.write_json("report.json", counts)
        writer.summary.update(counts)

    return artifacts.ensure(config.out, produce, kind=vqa.KIND, config=config, fresh=config.fresh)


def vocabulary() -> list[str]:
    """Every word of captions, questions and answers."""
    words = {"a", "and", "at", "what", "is", "the", "one", "which", "colour", "where", "how", "many", "are", "there"}
    words |= {*SHAPES, *PLURALS.values(), *HUES, *PLACES, *COUNTS, NOTHING}
    return sorted(words)


def draw(random: np.random.Generator, most: int = MOST) -> Described:
    """A scene of 1 to ``most`` objects; shapes, colours, places and all else independent and uniform."""
    count = int(random.integers(1, most + 1))
    places = sorted(random.choice(len(PLACES), size=count, replace=False))
    step = SIDE / GRID
    objects = []
    for place in places:
        row, column = divmod(int(place), GRID)
        shape, colour = str(random.choice(SHAPES)), str(random.choice(tuple(HUES)))
        radius = random.uniform(*RADII)
        left, right, top, bottom = shapes.extent(shape, radius)
        x = (column + 0.5) * step + random.uniform(-JITTER, JITTER)
        # A triangle reaches further up than down: its box is in the middle of the place, not its centre.
        y = (row + 0.5) * step + random.uniform(-JITTER, JITTER) + (top - bottom) / 2
        objects.append(
            Object(
                shape=shape,
                colour=colour,
                place=PLACES[place],
                x=float(np.clip(x, left, SIDE - right)),
                y=float(np.clip(y, top, SIDE - bottom)),
                radius=radius,
                hue=HUES[colour] + random.uniform(-shapes.HUE_JITTER, shapes.HUE_JITTER),
                saturation=random.uniform(*shapes.SATURATION),
                value=random.uniform(*shapes.VALUE),
            )
        )
    return Described(tuple(objects), light=random.uniform(0.0, 0.35))


def paint(scenes: Sequence[Described]) -> Array:
    """Images (N, 3, SIDE, SIDE) in [0, 1], antialiased by the distance of pixel centres from the outlines."""
    images = np.empty((len(scenes), 3, SIDE, SIDE))
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    for image, scene in zip(images, scenes, strict=True):
        image[:] = scene.light
        for one in scene.objects:
            covered = np.clip(0.5 - shapes.distance(one.shape, columns - one.x, rows - one.y, one.radius), 0, 1)
            colour = shapes.rgb(one.hue, one.saturation, one.value)
            image += covered * (colour[:, None, None] - image)
    return images


def ask(scene: Described, random: np.random.Generator, count: int | None = None) -> list[Question]:
    """One question of every kind that the scene allows, in the order of ``KINDS``; or ``count`` of random kinds."""
    possible = _possible(scene)
    kinds = [kind for kind in KINDS if possible[kind]]
    chosen = kinds if count is None else [str(kind) for kind in random.choice(kinds, size=count)]
    drawn = []
    for kind in chosen:
        options = possible[kind]
        if kind == "at":  # as often something as nothing
            filled = {one.place for one in scene.objects}
            something = random.uniform() < 0.5
            options = [q for q in options if (q.text.removeprefix("what is at ") in filled) == something] or options
        drawn.append(options[int(random.integers(len(options)))])
    return drawn


def _possible(scene: Described) -> dict[str, list[Question]]:
    objects = scene.objects
    colours = [one.colour for one in objects]
    forms = [one.shape for one in objects]
    both = [(one.colour, one.shape) for one in objects]
    at = {one.place: one.shape for one in objects}
    named = [Question("count", "how many are there", COUNTS[len(objects)])]
    named += [Question("count", f"how many {PLURALS[shape]} are there", COUNTS[forms.count(shape)]) for shape in SHAPES]
    return {
        "shape": [
            Question("shape", f"what is the {one.colour} one", one.shape)
            for one in objects
            if colours.count(one.colour) == 1
        ],
        "colour": [
            Question("colour", f"which colour is the {one.shape}", one.colour)
            for one in objects
            if forms.count(one.shape) == 1
        ],
        "place": [
            Question("place", f"where is the {one.colour} {one.shape}", one.place)
            for one in objects
            if both.count((one.colour, one.shape)) == 1
        ],
        "at": [Question("at", f"what is at {place}", at.get(place, NOTHING)) for place in PLACES],
        "count": named,
    }
