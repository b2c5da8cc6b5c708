"""What the trainer draws: a ranked list with its latents, noise and timesteps, all from one seed.

A list's draws come from the stream's seed for it and the epoch, so they do not depend on the batch, the rank or the
micro-batch. Shared over the list, by default: timestep and noise (spec a.5), as in Diffusion-DPO's pairs, where the
difference of two errors is then that of the images alone. The prompt is dropped for the whole list.
"""

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from palate.artifacts import Artifact
from palate.config import require, require_at_least, require_shares
from palate.corpora.schema import LISTS
from palate.lpo.denoising import Conditioning, NoiseSchedule, draw_timesteps
from palate.lpo.encoding import Encoded, Latents, Text
from palate.training.stream import CorruptSample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DrawConfig:
    """What is random about a list, and what its images share."""

    share_timestep: bool = True
    """One timestep for all images of a list."""
    share_noise: bool = True
    """One noise for all images of a list."""
    prompt_dropout: float = 0.1
    """Share of lists that are trained without their prompt, which keeps guidance working."""
    source_dropout: float = 0.05
    """Editing: share of lists without source image; as many without instruction, and as many without both."""
    user_dropout: float = 0.1
    """Personal: share of lists that are trained as nobody's."""
    fixed_draws: int = 0
    """So many draws of noise, timestep and dropout for each list, whose reference errors are computed once, before the
    training; 0: new draws in every epoch."""

    def __post_init__(self) -> None:
        require_shares(self, "prompt_dropout", "user_dropout")
        require(self, lambda share: 0 <= share <= 1 / 3, "a share from 0 to 1/3 (there are three)", "source_dropout")
        require_at_least(self, 0, "fixed_draws")


@dataclass(frozen=True)
class Order:
    """What is known about a list of m images: ``tie_groups`` in ascending order of places, ``edges`` with their votes,
    ``top_k`` where only the first choices are known; ``partial`` where the edges are all that is known."""

    tie_groups: tuple[int, ...]
    edges: tuple[tuple[int, int, float], ...] = ()
    top_k: int | None = None
    partial: bool = False


@dataclass(frozen=True)
class ListSample:
    """A drawn list of m images. ``index_M``: timesteps; ``uniform``: for what a loss draws itself; ``reference_M``: the
    reference's errors, where they were computed before."""

    order: Order
    latents_MCHW: Tensor
    noise_MCHW: Tensor
    index_M: Tensor
    given: Conditioning  # m rows
    weight: float
    uniform: float
    reference_M: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index_M)


@dataclass(frozen=True)
class Users:
    """People with an embedding of their own, by place in the table; others are nobody."""

    places: Mapping[str, int]

    def place(self, user_id: str | None) -> int | None:
        return None if user_id is None else self.places.get(user_id)


@dataclass(frozen=True)
class Drawing:
    """How a record becomes a sample.

    Attributes:
        encoded: latents and texts of the records.
        scaling: ``(shift, factor)``: what the network sees is ``(latent - shift) * factor``.
        editing: images are edits of a source image, by an instruction.
        sized: the network is told sizes and crops (SDXL).
        zero_prompt: a dropped prompt is zeros, as the pipeline's guidance has it (SDXL), and no empty text.
        users: people with an embedding; None where the network knows none.
    """

    encoded: Encoded
    schedule: NoiseSchedule
    config: DrawConfig
    scaling: tuple[float, float]
    editing: bool = False
    sized: bool = False
    zero_prompt: bool = False
    users: Users | None = None

    def sample(self, row: Mapping[str, Any], seed: int) -> ListSample:
        """Draw from one record of ``LISTS``.

        Raises:
            KeyError: an image or a text of it was not encoded.
        """
        generator = torch.Generator().manual_seed(seed % 2**63)
        found = [self.encoded.latents(item["image_uid"]) for item in row["items"]]
        source = self.encoded.latents(row["source_image"]) if self.editing else None
        config, count = self.config, len(found)
        # Drawn whatever the options are, so that they change nothing but what they say.
        uniform, prompt, image, person = torch.rand(4, generator=generator).tolist()
        index_M = draw_timesteps(self.schedule, count, generator)
        noise_MCHW = torch.randn(count, *found[0].mean.shape, generator=generator)
        spread_MCHW = torch.randn(count, *found[0].mean.shape, generator=generator)
        if config.share_timestep:
            index_M = index_M[:1].expand(count)
        if config.share_noise:
            noise_MCHW = noise_MCHW[:1].expand(count, *noise_MCHW.shape[1:])
        means = torch.stack([one.mean for one in found])
        deviations = torch.stack([one.deviation for one in found])
        shift, factor = self.scaling
        latents_MCHW = (means + deviations * spread_MCHW - shift) * factor
        without_text, without_source = prompt < config.prompt_dropout, False
        if self.editing:
            # Text alone, both, image alone, equally often (arXiv 2211.09800, 3.2.1).
            share = config.source_dropout
            without_text, without_source = image < 2 * share, share <= image < 3 * share
        text = self.encoded.text("" if without_text else row["instruction"] if self.editing else row["caption"])
        if without_text and self.zero_prompt:
            text = Text(torch.zeros_like(text.text), None if text.pooled is None else torch.zeros_like(text.pooled))
        given = Conditioning(
            text_NLD=text.text.expand(count, *text.text.shape),
            pooled_NP=None if text.pooled is None else text.pooled.expand(count, -1),
            time_ids_N6=self._time_ids(found) if self.sized else None,
            source_NCHW=None if source is None else _source(source, without_source, count),
            **self._person(row["user_id"], person < config.user_dropout, count),
        )
        return ListSample(order_of(row), latents_MCHW, noise_MCHW, index_M, given, float(row["weight"]), uniform)

    def _time_ids(self, found: Sequence[Latents]) -> Tensor:
        """SDXL's (arXiv 2307.01952, 2.2): original height and width, crop top and left, target height and width."""
        side = self.encoded.resolution
        return torch.tensor([[*one.original, *one.crop, side, side] for one in found], dtype=torch.float32)

    def _person(self, user_id: str | None, dropped: bool, count: int) -> dict[str, Tensor]:
        if self.users is None:
            return {}
        place = self.users.place(user_id)
        known = place is not None and not dropped
        return {
            "user_NJ": torch.full((count, 1), float(place or 0)),  # the place; the trainer looks the embedding up
            "user_scale_N": torch.full((count,), float(known)),
        }


class ListSource:
    """Records of ``LISTS`` as a source of the exact stream; ``digest`` says which they are."""

    def __init__(self, name: str, table: pa.Table, digest: str, drawing: Drawing, left_out: int = 0) -> None:
        self.left_out = left_out  # lists, for want of an image
        self.name, self._table, self._drawing = name, table, drawing
        self._ids = table["list_id"].to_pylist()
        self.fingerprint = hashlib.sha256("\n".join([digest, *self._ids]).encode()).hexdigest()[:16]
        self._reference: Mapping[tuple[int, int], Sequence[float]] | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def id(self, index: int) -> str:
        return str(self._ids[index])

    def row(self, index: int) -> dict[str, Any]:
        """The record."""
        return dict(self._table.slice(index, 1).to_pylist()[0])

    @property
    def fixed_draws(self) -> int:
        """How many draws of each list there are; 0: any number."""
        return self._drawing.config.fixed_draws

    def with_reference(self, errors: Mapping[tuple[int, int], Sequence[float]]) -> "ListSource":
        """The same lists with the reference's errors of each image, by index and draw."""
        found = copy.copy(self)
        found._reference = errors
        return found

    def load(self, index: int, seed: int) -> ListSample:
        """Draw from a list, by the seed alone.

        Raises:
            CorruptSample: an image or a text of it was not encoded.
        """
        if self.fixed_draws:
            return self.draw(index, seed % self.fixed_draws)
        return self._sample(index, seed)

    def draw(self, index: int, draw: int) -> ListSample:
        """One of the ``fixed_draws`` of a list, with the reference's errors where they are known."""
        name = f"{self.id(index)} {draw}".encode()
        sample = self._sample(index, int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()))
        if self._reference is None:
            return sample
        return replace(sample, reference_M=torch.tensor(self._reference[index, draw]))

    def _sample(self, index: int, seed: int) -> ListSample:
        try:
            return self._drawing.sample(self.row(index), seed)
        except KeyError as error:
            raise CorruptSample(str(error.args[0])) from None


def list_source(lists: Artifact, split: str, drawing: Drawing, only_users: frozenset[str] | None = None) -> ListSource:
    """The ranked lists of a split, of some people only if wanted; without those that name an image that is not there.

    Raises:
        ValueError: the split has no list, or many have no images.
    """
    table = read_lists(lists, split, only_users)
    if not table.num_rows:
        raise ValueError(f"{lists.url} has no list in split {split!r}: look at its report.json, or prepare more data")
    found = _with_images(table, drawing, f"lists of {lists.url} in split {split!r}")
    left_out = table.num_rows - found.num_rows
    return ListSource(f"lists-{split}", found, f"{lists.digest} {split}", drawing, left_out)


def image_source(corpus: Artifact, split: str, drawing: Drawing) -> ListSource:
    """The captioned images of a split, or its edits, each a list of one: what a base model is trained on.

    Raises:
        ValueError: the corpus has no such images.
    """
    folder, columns = ("edits", _EDITS) if drawing.editing else ("scenes", _SCENES)
    paths = corpus.paths(f"{folder}/", ".parquet")
    if not paths:
        raise ValueError(f"{corpus.url} has no {folder}/: its lists come without images to train a base model on")
    found = pa.concat_tables([pq.read_table(corpus.local(path)) for path in paths])
    found = found.filter(pc.equal(found["split"], split))
    nothing = {"edges": [], "kind": "full", "weight": 1.0}
    rows = [
        {
            "list_id": f"{place}",
            "split": split,
            "items": [{"image_uid": one[columns["image"]], "tie_group": 0}],
            "source_image": one.get(columns["source"]),
            "instruction": one.get("instruction"),
            "caption": one["caption"],
            **nothing,
        }
        for place, one in enumerate(found.to_pylist())
    ]
    table = pa.Table.from_pylist(rows, schema=LISTS)
    return ListSource(f"{folder}-{split}", table, f"{corpus.digest} {folder} {split}", drawing)


def _with_images(table: pa.Table, drawing: Drawing, what: str) -> pa.Table:
    """The records whose images were all encoded; says how many others there are.

    Raises:
        ValueError: these are more than a tenth.
    """
    uids = [item["image_uid"] for item in pc.list_flatten(table["items"]).to_pylist()]
    rows = pc.list_parent_indices(table["items"]).to_pylist()
    if drawing.editing:
        uids += table["source_image"].to_pylist()
        rows += range(table.num_rows)
    unknown = {row: uid for row, uid in zip(rows, uids, strict=True) if uid not in drawing.encoded}
    complete, missing = np.ones(table.num_rows, dtype=bool), len(unknown)
    complete[list(unknown)] = False
    if missing:
        shown = ", ".join(sorted({str(uid) for uid in unknown.values()})[:3])
        found = f"{missing} of {table.num_rows} {what} name images that are not in its images/, such as {shown}"
        if missing > _MOST_WITHOUT_IMAGES * table.num_rows:
            raise ValueError(f"{found}: prepare them with --image-root, or from files that hold the images")
        log.warning("%s; they are left out", found)
    return table.filter(pa.array(complete))


_MOST_WITHOUT_IMAGES = 0.1
_SCENES = {"image": "image_uid", "source": ""}
_EDITS = {"image": "target_uid", "source": "source_uid"}


def read_lists(lists: Artifact, split: str | None, only_users: frozenset[str] | None = None) -> pa.Table:
    """The records of a split, or of all, of some people only if wanted, in the order of the files."""
    tables = [pq.read_table(lists.local(path)) for path in lists.paths("lists/", ".parquet")]
    table = pa.concat_tables(tables)
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    if only_users is not None:
        table = table.filter(pc.is_in(table["user_id"], pa.array(sorted(only_users), pa.string())))
    return table


def order_of(row: Mapping[str, Any]) -> Order:
    """What a record says about the order of its images."""
    return Order(
        tie_groups=tuple(item["tie_group"] for item in row["items"]),
        edges=tuple((edge["winner"], edge["loser"], edge["votes"]) for edge in row["edges"]),
        top_k=row["top_k"] if row["kind"] == "topk" else None,
        partial=row["kind"] == "dominance",
    )


def _source(source: Latents, dropped: bool, count: int) -> Tensor:
    """The posterior's mode, unscaled and without noise, as InstructPix2Pix takes it; zeros where it is dropped."""
    latents = torch.zeros_like(source.mean) if dropped else source.mean
    return latents.expand(count, *latents.shape)
