"""The contrast stage: for texts that no adapter learned from, what else could answer the same input, and the features.

Work is cut into shards of people, each an artifact of its own: a run that is killed goes on with the shard it was at,
and ranks share the shards.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.torch import save_file

from palate.artifacts import Artifact, Writer
from palate.card import features, pairs
from palate.card.adapters import RowMask
from palate.card.correction import FeatureMap
from palate.card.preferences import Positions
from palate.corpora.schema import Item
from palate.models.causal_lm import LoadedModel, answer_ids

POSITIONS = "positions.safetensors"
TEXTS = "texts.parquet"
FEATURE_MAP = "feature_map.safetensors"


@dataclass(frozen=True)
class ContrastConfig:
    """Which texts are contrasted, and with what."""

    contrast_share: float = 0.5
    """Share of every history that is kept from the adapters and used for vectors."""
    contrast_items: int = 64
    """Most texts a person, the latest ones."""
    cluster_texts: int = 0
    """Answers sampled from the cluster model for each input; needed where --cluster-weight is above 0."""
    other_texts: int = 0
    """Texts of other people of the cluster for each input, matched by topic; needed where --other-weight is above 0.
    By default neither is made: the likelihood contrasts own texts with all that the cluster model could have written,
    and neither kind of pairs improved on that (docs/results/card.md)."""
    temperature: float = 1.0
    """Of the cluster model's answers."""
    top_p: float = 0.95
    """Of the cluster model's answers."""
    layers: tuple[int, ...] = ()
    """Hidden states that make the features (0 is the embedding); by default four spread over the upper half."""
    top_k: int = 50
    """Candidates at each position that a vector can move."""
    people_per_shard: int = 32
    """People whose texts are written together."""

    def chosen_layers(self, count: int) -> tuple[int, ...]:
        """``layers``, or the default for a model of ``count`` blocks."""
        return self.layers or tuple(sorted({max(1, round(count * share)) for share in (0.6, 0.75, 0.9, 1.0)}))


class Sampler(Protocol):
    """Draws one answer a prompt from the adapter of each; ``palate.serving.answers.sample_answers`` does it."""

    def __call__(
        self,
        loaded: LoadedModel,
        rows: RowMask,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[int],
        *,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
        max_new_tokens: int,
    ) -> list[str]: ...


@dataclass(frozen=True)
class Contrasted:
    """An item with everything that answers its input: ``texts[0]`` is the person's own."""

    item: Item
    prompt_ids: Sequence[int]
    cluster: int
    texts: tuple[pairs.Text, ...]


def contrasts(
    items: Sequence[Item],
    prompts: Sequence[Sequence[int]],
    clusters: Mapping[str, int],
    sampled: Sequence[Sequence[str]],
    others: Mapping[str, Sequence[Item]],
) -> tuple[list[Contrasted], int]:
    """Put the texts of each item together; near-copies of the own text are dropped, and counted over all items."""
    found, dropped = [], 0
    for item, prompt, answers in zip(items, prompts, sampled, strict=True):
        kept, copies = pairs.drop_near_copies(item.output, answers)
        dropped += copies
        texts = [pairs.Text(item.user_id, item.item_id, pairs.OWN, item.user_id, item.output)]
        texts += [pairs.Text(item.user_id, item.item_id, pairs.CLUSTER, "", text) for text in kept]
        texts += [
            pairs.Text(item.user_id, item.item_id, pairs.OTHER, other.user_id, other.output)
            for other in others.get(item.item_id, ())
        ]
        found.append(Contrasted(item, prompt, clusters[item.user_id], tuple(texts)))
    return found, dropped


def branches(contrasted: Sequence[Contrasted], loaded: LoadedModel, max_answer_tokens: int) -> list[features.Branches]:
    """Token ids of the texts, as ``features.extract`` takes them."""
    return [
        features.Branches(
            one.prompt_ids,
            tuple(answer_ids(loaded, text.text)[:max_answer_tokens] for text in one.texts),
            one.cluster,
        )
        for one in contrasted
    ]


def write(writer: Writer, texts: Sequence[pairs.Text], positions: Positions) -> None:
    """Write texts and their positions; text number n of ``positions`` is row n."""
    rows = [vars(text) for text in texts]
    pq.write_table(pa.Table.from_pylist(rows, schema=pairs.TEXTS), writer.folder / TEXTS)
    features.save_positions(positions, writer.folder / POSITIONS)


def read(shards: Sequence[Artifact]) -> tuple[list[pairs.Text], Positions]:
    """The texts of all shards in order, and their positions, numbered alike.

    Raises:
        ArtifactCorrupt: a shard has other bytes than were written.
    """
    texts: list[pairs.Text] = []
    parts = []
    for shard in shards:
        shard.verify()
        positions = features.load_positions(shard.local(POSITIONS))
        parts.append(features.renumbered(positions, len(texts)))
        texts += [pairs.Text(**row) for row in pq.read_table(shard.local(TEXTS), schema=pairs.TEXTS).to_pylist()]
    return texts, features.concatenate(parts)


def save_feature_map(feature_map: FeatureMap, folder: Path) -> None:
    """Write as safetensors; the layers go into the file's metadata."""
    tensors = {name: getattr(feature_map, name).contiguous() for name in ("mean_Ld", "scale_Ld", "whitening_dd")}
    save_file(tensors, folder / FEATURE_MAP, metadata={"layers": json.dumps(feature_map.layers)})


def load_feature_map(file: Path) -> FeatureMap:
    """What ``save_feature_map`` wrote."""
    with safe_open(file, framework="pt") as stored:
        layers = tuple(json.loads(stored.metadata()["layers"]))
        return FeatureMap(layers, *(stored.get_tensor(name) for name in ("mean_Ld", "scale_Ld", "whitening_dd")))
