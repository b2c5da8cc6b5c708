"""CARD from a corpus to personal vectors: style -> cluster -> adapt -> contrast -> prefer.

Every stage reads artifacts and writes one; started again, the pipeline skips what is finished and goes on where it was.

    RUN/style       where each person stands, and the fitted embedding
    RUN/clusters    centroids, everyone's cluster, and the curve that K was chosen by
    RUN/adapters    one PEFT folder a cluster
    RUN/contrast    statistics, then shards of texts with their features
    RUN/head        what all people share, the prior, and everyone's vector
    RUN/training    checkpoints and logs (TensorBoard) of the two trainings
"""

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from palate import artifacts, progress
from palate.artifacts import Artifact, Writer, join
from palate.card import adaptation, adapters, contrast, features, heads, pairs, prompts, styles
from palate.card.adaptation import AdaptConfig
from palate.card.contrast import ContrastConfig
from palate.card.correction import FeatureMap
from palate.card.fitting import fit_vectors
from palate.card.heads import PreferConfig
from palate.card.preferences import ABSENT, Positions
from palate.config import identity, scale
from palate.corpora import schema
from palate.corpora.schema import Item
from palate.models.causal_lm import LoadedModel, answer_ids, load_causal_lm
from palate.training.checkpoints import Store
from palate.training.parallel import World

STYLE, CLUSTERS, ADAPTERS, HEAD = "card-style", "card-clusters", "card-adapters", "card-head"
STATISTICS, SHARD = "card-statistics", "card-contrast"
EMBEDDINGS = pa.schema([pa.field("user_id", pa.string(), False), pa.field("embedding", pa.list_(pa.float32()), False)])
VECTORS = pa.schema(
    [
        pa.field("user_id", pa.string(), False),
        pa.field("cluster", pa.int32(), False),
        pa.field("vector", pa.list_(pa.float32()), False),
    ]
)
ASSIGNMENT = pa.schema([pa.field("user_id", pa.string(), False), pa.field("cluster", pa.int32(), False)])

CONTEXTS = "contexts.safetensors"  # of the head: where it is shown what a vector promotes
CONTEXT_POSITIONS = 512
STATISTICS_TEXTS = 256  # how many texts tell the scale of the hidden states


@dataclass(frozen=True)
class StyleConfig:
    """How people's manner is embedded."""

    encoder: str = "stylometric"
    """stylometric (character n-grams and surface habits), or a hub id or folder of a sentence encoder."""


@dataclass(frozen=True)
class ClusterConfig:
    """How people are grouped."""

    clusters: int | Literal["auto"] = 4
    """Number of clusters and adapters; auto chooses it by silhouette and stability."""
    max_clusters: int = 16
    """Largest number that auto considers."""


@dataclass(frozen=True)
class PromptConfig:
    """How a request becomes tokens, in training, decoding and serving alike."""

    history_k: int = 0
    """Items of the person's history that are retrieved (BM25) into the prompt."""
    max_prompt_tokens: int = 256
    """Longest prompt, the chat template included."""
    max_answer_tokens: int = 128
    """Longest answer that is learned from or generated."""


@dataclass(frozen=True)
class CardConfig:
    """Train CARD on a text corpus."""

    corpus: str
    """Prepared corpus (jobs/prepare.py): a folder or URL."""
    out: str = scale()
    """Folder or URL of the run."""
    model: str = "smollm2"
    """Base model: a hub id, a folder, a GGUF file, smollm2 or tiny."""
    learn_from: Literal["everyone", "development"] = "everyone"
    """Whose histories train style, adapters and head: everyone's, or the development users' only; then test users
    are met as new people, by their nearest cluster and the exact fit."""
    seed: int = 0
    """Of everything that is drawn."""
    style: StyleConfig = field(default_factory=StyleConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    prefer: PreferConfig = field(default_factory=PreferConfig)
    launcher: Literal["local", "torchrun", "ray"] = scale("local")
    """local: this process; torchrun: the ranks that torchrun started; ray: workers of a Ray cluster."""
    workers: int = scale(1)
    """Ranks, under Ray."""
    cpus_per_worker: float | None = scale(None)
    """CPUs that each of Ray's workers gets, and threads that it computes with. None: one, or none beside a GPU."""
    gpu: bool | None = scale(None)
    """Whether each of Ray's workers gets a GPU. None: if the cluster has as many at the start; so say it where machines
    are started only when they are asked for."""
    fresh: bool = scale(False)
    """Discard what the run folder holds and begin anew."""


@dataclass(frozen=True)
class People:
    """The histories of a corpus, oldest item first, and who among the people is learned from."""

    task: schema.Task
    histories: Mapping[str, tuple[Item, ...]]
    learned_from: frozenset[str]

    def for_adapters(self, share: float) -> list[Item]:
        """The items that adapters learn from: those of a history that are not kept for the contrast."""
        return [
            item
            for user in sorted(self.learned_from)
            for place, item in enumerate(self.histories[user])
            if not pairs.held_out(place, share)
        ]

    def for_vectors(self, user: str, share: float, most: int) -> list[Item]:
        """The items that a person's vector is fitted to: what no adapter learned from, the latest ``most``."""
        history = self.histories[user]
        if user in self.learned_from:
            history = tuple(item for place, item in enumerate(history) if pairs.held_out(place, share))
        return list(history[-most:])


def read_people(corpus: Artifact, learn_from: str = "everyone") -> People:
    """The histories of a prepared corpus.

    Raises:
        ValueError: nobody in it has a history, or nobody to learn from.
    """
    histories: dict[str, list[Item]] = {}
    for item in schema.read_items(corpus):
        histories.setdefault(item.user_id, []).append(item)
    chosen = {user for user in histories if learn_from == "everyone" or schema.user_split(user) == "development"}
    if not chosen:
        raise ValueError(
            f"{corpus.url} has {len(histories)} people with a history, and none to learn from: "
            "prepare a corpus with history items, or pass --learn-from everyone"
        )
    return People(
        schema.read_task(corpus), {user: tuple(items) for user, items in histories.items()}, frozenset(chosen)
    )


def start_over(config: CardConfig) -> None:
    """Discard the run where ``--fresh`` asks for it; settings that cannot work are refused before anything is gone.

    Done once a command, before any rank starts, lest ranks that are started again after a fault lose what was done.
    """
    if not config.fresh:
        return
    check_settings(config)
    check_histories(config, read_people(artifacts.open_artifact(config.corpus, schema.TEXT_CORPUS), config.learn_from))
    for name in ("style", "clusters", "adapters", "head"):
        artifacts.discard(join(config.out, name))
    for shard in artifacts.folders(join(config.out, "contrast")):
        artifacts.discard(shard)
    # The checkpoints of its trainings would be gone on from otherwise.
    for training in (join(config.out, "training/adapters"), *artifacts.folders(join(config.out, "training/head"))):
        Store(training, {}, keep=1, world=World()).discard()


def pipeline(config: CardConfig, world: World, *, sampler: contrast.Sampler) -> None:
    """Run all stages, or what is left of them; every rank of ``world`` calls it."""
    check_settings(config)
    corpus = artifacts.open_artifact(config.corpus, schema.TEXT_CORPUS)
    people = read_people(corpus, config.learn_from)
    check_histories(config, people)
    style = on_main(world, lambda: style_stage(config, corpus, people))
    clusters = on_main(world, lambda: cluster_stage(config, style, people))
    loaded = load_causal_lm(config.model, device=str(world.device))
    if config.contrast.top_k > loaded.fingerprint["vocab_size"]:
        raise ValueError(
            f"--top-k {config.contrast.top_k}: {loaded.name} knows {loaded.fingerprint['vocab_size']} tokens only"
        )
    with announced(world, "adapt"):
        trained, rows = adapt_stage(config, corpus, clusters, people, loaded, world)
    with announced(world, "contrast"):
        statistics, shards = contrast_stage(config, corpus, clusters, trained, people, loaded, rows, world, sampler)
    with announced(world, "prefer"):
        on_main(world, lambda: prefer_stage(config, trained, statistics, shards, people, clusters, loaded))


def check_settings(config: CardConfig) -> None:
    """Refuse settings that would fail, or learn nothing, only when hours of work are done.

    Raises:
        ValueError: naming the flag.
    """
    if artifacts.locate(config.out)[1] == artifacts.locate(config.corpus)[1]:
        raise ValueError(f"--out {config.out} is the corpus itself: choose another folder for the run")
    for least, part, names in (
        (1, config.cluster, () if config.cluster.clusters == "auto" else ("clusters",)),
        (1, config.prompt, ("max_answer_tokens",)),
        (0, config.prompt, ("history_k",)),
        (1, config.adapt, ("rank", "epochs", "batch")),
        (1, config.contrast, ("contrast_items", "top_k", "people_per_shard")),
        (0, config.contrast, ("cluster_texts", "other_texts")),
        (1, config.prefer, ("width", "head_epochs", "head_batch")),
    ):
        for name in names:
            if getattr(part, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(part, name)}")
    if config.adapt.max_steps is not None and config.adapt.max_steps < 1:
        raise ValueError(f"--max-steps must be at least 1, got {config.adapt.max_steps}: leave it out for no limit")
    if not 0 < config.contrast.contrast_share <= 1:  # NaN, too
        raise ValueError(f"--contrast-share must be above 0 and at most 1, got {config.contrast.contrast_share}")
    prefer = config.prefer
    for part, names in ((config.adapt, ("learning_rate",)), (prefer, ("head_learning_rate", "vector_learning_rate"))):
        for name in names:
            if not 0 < getattr(part, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be a number above 0, got {getattr(part, name)}")
    if not 0 < config.contrast.top_p <= 1 or not 0 <= config.contrast.temperature < math.inf:
        raise ValueError(
            f"--top-p must be above 0 and at most 1, --temperature a number not below 0, got "
            f"{config.contrast.top_p} and {config.contrast.temperature}"
        )
    for name in ("head_precision", "vector_deviation"):
        if not getattr(prefer, name) or not all(0 < value < math.inf for value in getattr(prefer, name)):
            raise ValueError(f"--{name.replace('_', '-')} needs numbers above 0, got {list(getattr(prefer, name))}")
    for kind in ("cluster", "other"):
        weight, texts = getattr(prefer, f"{kind}_weight"), getattr(config.contrast, f"{kind}_texts")
        if not 0 <= weight < math.inf:
            raise ValueError(f"--{kind}-weight must be a number not below 0, got {weight}")
        if weight and not texts:
            raise ValueError(f"--{kind}-weight {weight:g} weighs pairs that are not made: set --{kind}-texts above 0")
    if prefer.reward == "additive" and not (prefer.cluster_weight or prefer.other_weight):
        raise ValueError("--reward additive learns from pairs alone: set --cluster-weight or --other-weight above 0")


def check_histories(config: CardConfig, people: People) -> None:
    """Refuse histories too short to be divided between adapters and vectors, before anything is trained.

    Raises:
        ValueError: no text would be left for the vectors.
    """
    share = config.contrast.contrast_share
    if not any(people.for_vectors(user, share, 1) for user in people.learned_from):
        longest = max(len(people.histories[user]) for user in people.learned_from)
        raise ValueError(
            f"no text is left to learn vectors from: the longest history that is learned from has {longest} items, and "
            f"--contrast-share {share} keeps none of them from the adapters. Raise it, or prepare longer histories"
        )


def style_stage(config: CardConfig, corpus: Artifact, people: People) -> Artifact:
    """Embed everyone's texts; the embedding is fitted on those who are learned from."""

    def produce(writer: Writer) -> None:
        users = sorted(people.histories)
        texts = [[item.output for item in people.histories[user]] for user in users]
        if config.style.encoder == "stylometric":
            learned = [[i.output for i in people.histories[user]] for user in sorted(people.learned_from)]
            style_map = styles.fit_style_map(learned, styles.StyleConfig(seed=config.seed))
            styles.save_style_map(style_map, writer.folder)
            embeddings = style_map(texts)
        else:
            from palate.models.encoders import load_encoder

            embeddings = load_encoder(config.style.encoder).embed_histories(texts)
        table = {"user_id": users, "embedding": list(embeddings)}
        pq.write_table(pa.table(table, schema=EMBEDDINGS), writer.folder / "embeddings.parquet")
        writer.summary.update(people=len(users), learned_from=len(people.learned_from), width=embeddings.shape[1])

    with progress.stage("style"):
        settings = {**identity(config.style), "learn_from": config.learn_from, "seed": config.seed}
        return artifacts.ensure(
            join(config.out, "style"), produce, kind=STYLE, config=settings, inputs={"corpus": corpus}
        )


def cluster_stage(config: CardConfig, style: Artifact, people: People) -> Artifact:
    """Group people by style: K-means on those who are learned from, the nearest centroid for the others."""

    def produce(writer: Writer) -> None:
        embeddings = read_embeddings(style)
        learned = {user: embeddings[user] for user in people.learned_from}
        count = None if config.cluster.clusters == "auto" else config.cluster.clusters
        found = styles.cluster(learned, count, config.seed, config.cluster.max_clusters)
        users = sorted(embeddings)
        assigned = styles.nearest(found.centroids_KE, np.stack([embeddings[user] for user in users]))
        sizes = np.bincount(assigned, minlength=len(found.centroids_KE)).tolist()
        table = {"user_id": users, "cluster": assigned.astype(np.int32)}
        pq.write_table(pa.table(table, schema=ASSIGNMENT), writer.folder / "assignment.parquet")
        styles.save_clustering(found, writer.folder)
        if count is not None and len(sizes) < count:
            print(f"only {len(sizes)} clusters: there are no {count} people of different style", flush=True)
        writer.summary.update(clusters=len(sizes), sizes=sizes)
        print(f"{len(sizes)} clusters of {sizes} people", flush=True)

    with progress.stage("cluster"):
        settings = {**identity(config.cluster), "seed": config.seed}
        return artifacts.ensure(
            join(config.out, "clusters"), produce, kind=CLUSTERS, config=settings, inputs={"style": style}
        )


def adapt_stage(
    config: CardConfig, corpus: Artifact, clusters: Artifact, people: People, loaded: LoadedModel, world: World
) -> tuple[Artifact, adapters.RowMask]:
    """Train the clusters' adapters on all ranks; the model comes back with them packed in, frozen."""
    target = join(config.out, "adapters")
    count = int(clusters.summary["clusters"])
    settings = {
        **identity(config.adapt),
        **identity(config.prompt),
        "contrast_share": config.contrast.contrast_share,
        "learn_from": config.learn_from,
        "seed": config.seed,
        "base_model": loaded.fingerprint,
    }
    imported = [Path(folder) for folder in config.adapt.adapters_from]
    if imported:
        settings["imported"] = [artifacts.file_entry(weights_of(folder), "weights").sha256 for folder in imported]
        if len(imported) != count:
            raise ValueError(
                f"--adapters-from names {len(imported)} adapters, but there are {count} clusters: name one a cluster"
            )
    inputs = {"corpus": corpus, "clusters": clusters}
    finished = artifacts.finished(target, kind=ADAPTERS, config=settings, inputs=inputs)
    if finished is not None:
        return finished.verify(), adapters.load_adapters(loaded.model, adapter_folders(finished))
    if imported:
        rows = adapters.load_adapters(loaded.model, imported)

        def copy(writer: Writer) -> None:
            for cluster, folder in enumerate(imported):
                target = writer.folder / adaptation.group_name(cluster)
                target.mkdir()
                for name in ("adapter_config.json", "adapter_model.safetensors"):
                    shutil.copy(folder / name, target / name)
            writer.write_json("base.json", {"model": config.model, "fingerprint": loaded.fingerprint})

        made = on_main(world, lambda: artifacts.ensure(target, copy, kind=ADAPTERS, config=settings, inputs=inputs))
        return made, rows
    assignment = read_assignment(clusters)
    items = people.for_adapters(config.contrast.contrast_share)
    samples = [
        adaptation.Sample(prompt, answer[: config.prompt.max_answer_tokens], assignment[item.user_id])
        for item, prompt, answer in zip(
            items,
            item_prompts(config, people, items, loaded),
            [answer_ids(loaded, item.output) for item in items],
            strict=True,
        )
    ]
    rows, summary = adaptation.train_adapters(
        loaded,
        count,
        samples,
        [f"{item.user_id}/{item.item_id}" for item in items],
        config.adapt,
        join(config.out, "training", "adapters"),
        world,
        seed=config.seed,
        identity={"corpus": corpus.digest, "clusters": clusters.digest, **settings},
    )

    def produce(writer: Writer) -> None:
        for cluster in range(count):
            folder = writer.folder / adaptation.group_name(cluster)
            adapters.export_adapter(loaded.model, cluster, adaptation.lora(config.adapt), folder, config.model)
        writer.write_json("base.json", {"model": config.model, "fingerprint": loaded.fingerprint})
        writer.summary.update(texts=len(samples), steps=summary.steps, loss=summary.loss, updates=summary.updates)

    made = on_main(world, lambda: artifacts.ensure(target, produce, kind=ADAPTERS, config=settings, inputs=inputs))
    return made, rows


def weights_of(folder: Path) -> Path:
    """The weights of a PEFT folder.

    Raises:
        ValueError: it has none as safetensors.
    """
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ValueError(f"--adapters-from {folder}: there is no adapter_model.safetensors; a PEFT folder has one")
    return weights


def contrast_stage(
    config: CardConfig,
    corpus: Artifact,
    clusters: Artifact,
    trained: Artifact,
    people: People,
    loaded: LoadedModel,
    rows: adapters.RowMask,
    world: World,
    sampler: contrast.Sampler,
) -> tuple[Artifact, list[Artifact]]:
    """Contrast everyone's kept items; the ranks share the shards. Returns the statistics of the features and these."""
    assignment = read_assignment(clusters)
    settings = {**identity(config.contrast), **identity(config.prompt), "seed": config.seed}
    inputs = {"corpus": corpus, "clusters": clusters, "adapters": trained}
    users = sorted(people.histories)
    kept = {u: people.for_vectors(u, config.contrast.contrast_share, config.contrast.contrast_items) for u in users}
    statistics = on_main(
        world, lambda: _statistics_stage(config, settings, inputs, people, kept, assignment, loaded, rows)
    )
    feature_map = read_feature_map(statistics)
    size = config.contrast.people_per_shard
    shards = [users[start : start + size] for start in range(0, len(users), size)]
    written = [item for user in sorted(people.learned_from) for item in people.histories[user]]
    bank = cache(lambda: pairs.Bank(written, assignment))  # made where a shard is left to do

    def url(number: int) -> str:
        return join(config.out, "contrast", f"shard-{number:05d}-of-{len(shards):05d}")

    for number in range(world.rank, len(shards), world.size):
        items = [item for user in shards[number] for item in kept[user]]

        def produce(writer: Writer, items: list[Item] = items) -> None:
            made, dropped = _contrast(config, people, items, bank(), assignment, loaded, rows, sampler)
            branches = contrast.branches(made, loaded, config.prompt.max_answer_tokens)
            positions = features.extract(loaded, rows, feature_map, branches, config.contrast.top_k)
            texts = [text for one in made for text in one.texts]
            contrast.write(writer, texts, positions)
            kinds = [text.kind for text in texts]
            writer.summary.update(
                {kind: kinds.count(kind) for kind in (pairs.OWN, pairs.CLUSTER, pairs.OTHER)}, near_copies=dropped
            )

        artifacts.ensure(url(number), produce, kind=SHARD, config=settings, inputs={**inputs, "statistics": statistics})
    world.barrier()
    return statistics, [artifacts.open_artifact(url(number), SHARD) for number in range(len(shards))]


def prefer_stage(
    config: CardConfig,
    trained: Artifact,
    statistics: Artifact,
    shards: Sequence[Artifact],
    people: People,
    clusters: Artifact,
    loaded: LoadedModel,
) -> Artifact:
    """Learn head and prior from those who are learned from; fit everyone's vector exactly."""
    inputs = {"adapters": trained, "statistics": statistics}
    inputs |= {f"shard-{number:05d}": shard for number, shard in enumerate(shards)}
    settings = {**identity(config.prefer), "seed": config.seed, "base_model": loaded.fingerprint}

    def produce(writer: Writer) -> None:
        texts, standardized = contrast.read(shards)
        learned = {user: row for row, user in enumerate(sorted({t.user_id for t in texts} & people.learned_from))}
        samples = heads.own_texts(texts, learned)
        is_learned_S = torch.tensor([text.user_id in learned and text.kind == pairs.OWN for text in texts])
        feature_map, positions = heads.final_features(
            read_feature_map(statistics), standardized, is_learned_S[standardized.text_N], config.prefer.feature_power
        )
        embeddings = heads.whiten_embeddings(output_embeddings(loaded), config.prefer.embedding_power)
        arguments = (positions, embeddings, len(learned), config.prefer)
        folder = join(config.out, "training", "head")
        options: dict[str, Any] = {"seed": config.seed, "identity": {name: a.digest for name, a in inputs.items()}}
        strength, tried = heads.choose_strength(samples, *arguments, folder, **options)
        model = heads.train_head(samples, *arguments, strength, join(folder, "final"), **options)
        prior = heads.prior(config.prefer, strength)
        heads.save_head(model, feature_map, config.contrast.top_k, prior, writer.folder)
        by_person = own_positions(texts, positions)
        nobody = positions.select(torch.zeros(0, dtype=torch.long))
        users = sorted(people.histories)
        head = model.head(feature_map, config.contrast.top_k)
        fits = fit_vectors([by_person.get(user, nobody) for user in users], head, prior)
        write_vectors(writer.folder, users, read_assignment(clusters), [fit.vector_J for fit in fits])
        writer.write_json("task.json", asdict(people.task))
        features.save_positions(_contexts(positions, is_learned_S, config.seed), writer.folder / CONTEXTS)
        writer.write_json("choice.json", {"chosen": vars(strength), "tried": tried})
        largest = max(fit.gradient_norm for fit in fits)
        writer.summary.update(people=len(users), texts=len(samples), **vars(strength), largest_gradient_norm=largest)

    return artifacts.ensure(join(config.out, "head"), produce, kind=HEAD, config=settings, inputs=inputs)


def _contexts(positions: Positions, is_learned_S: torch.Tensor, seed: int) -> Positions:
    """Some places in texts of those who are learned from, in random order, without what was written there."""
    rows = is_learned_S[positions.text_N].nonzero().squeeze(1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:CONTEXT_POSITIONS]
    drawn = positions.select(rows[order])
    nothing = torch.full_like(drawn.target_N, ABSENT)
    return replace(
        drawn,
        target_N=nothing,
        target_log_prob_N=torch.zeros_like(drawn.target_log_prob_N),
        text_N=torch.zeros_like(nothing),
    )


def own_positions(texts: Sequence[pairs.Text], positions: Positions) -> dict[str, Positions]:
    """The positions of each person's own texts."""
    rows: dict[str, list[int]] = {}
    for row, number in enumerate(positions.text_N.tolist()):
        if texts[number].kind == pairs.OWN:
            rows.setdefault(texts[number].user_id, []).append(row)
    return {user: positions.select(torch.tensor(found)) for user, found in rows.items()}


def output_embeddings(loaded: LoadedModel) -> torch.Tensor:
    """The base model's output embedding (V, e), on the CPU in float32."""
    return loaded.model.get_output_embeddings().weight.detach().float().cpu()


def write_vectors(
    folder: Path, users: Sequence[str], clusters: Mapping[str, int], vectors: Sequence[torch.Tensor]
) -> None:
    """Write everyone's cluster and vector."""
    table = {
        "user_id": list(users),
        "cluster": np.array([clusters[user] for user in users], np.int32),
        "vector": [vector.numpy() for vector in vectors],
    }
    pq.write_table(pa.table(table, schema=VECTORS), folder / "vectors.parquet")


def read_vectors(head: Artifact) -> dict[str, torch.Tensor]:
    """Everyone's vector (J,)."""
    rows = pq.read_table(head.local("vectors.parquet"), schema=VECTORS).to_pylist()
    return {row["user_id"]: torch.tensor(row["vector"], dtype=torch.float32) for row in rows}


def item_prompts(config: CardConfig, people: People, items: Sequence[Item], loaded: LoadedModel) -> list[list[int]]:
    """The prompt of each history item, with what the person wrote before it where ``--history-k`` asks for that."""
    k = config.prompt.history_k
    needed = {item.user_id for item in items} if k else set()
    retrievers = {user: prompts.Retriever(people.task, people.histories[user]) for user in needed}
    return [
        prompts.prompt_ids(
            loaded,
            people.task,
            item.input,
            retrievers[item.user_id].for_item(item, k) if k else [],
            config.prompt.max_prompt_tokens,
        )
        for item in items
    ]


def read_embeddings(style: Artifact) -> dict[str, np.ndarray]:
    """Everyone's style embedding, shape (E,)."""
    rows = pq.read_table(style.local("embeddings.parquet"), schema=EMBEDDINGS).to_pylist()
    return {row["user_id"]: np.array(row["embedding"], np.float32) for row in rows}


def read_assignment(clusters: Artifact) -> dict[str, int]:
    """Everyone's cluster."""
    rows = pq.read_table(clusters.local("assignment.parquet"), schema=ASSIGNMENT).to_pylist()
    return {row["user_id"]: row["cluster"] for row in rows}


def adapter_folders(trained: Artifact) -> list[Path]:
    """The PEFT folders of the clusters, in order."""
    root = trained.local_folder()
    count = len({Path(path).parts[0] for path in trained.paths("cluster-")})
    return [root / adaptation.group_name(cluster) for cluster in range(count)]


def read_feature_map(statistics: Artifact) -> FeatureMap:
    """The feature map of the contrast stage: standardized, not yet whitened."""
    return contrast.load_feature_map(statistics.local(contrast.FEATURE_MAP))


def announced(world: World, name: str) -> AbstractContextManager[None]:
    """Let rank 0 announce a stage that all ranks take part in."""
    return progress.stage(name) if world.main else nullcontext()


def on_main(world: World, work: Callable[[], Artifact]) -> Artifact:
    """Let rank 0 do ``work`` while the others wait, and give its artifact to all."""
    done = work() if world.main else None
    url = world.broadcast(done.url if done else None)
    return done or artifacts.open_artifact(url)


def _statistics_stage(
    config: CardConfig,
    settings: dict[str, Any],
    inputs: Mapping[str, Artifact],
    people: People,
    kept: Mapping[str, Sequence[Item]],
    assignment: Mapping[str, int],
    loaded: LoadedModel,
    rows: adapters.RowMask,
) -> Artifact:
    """The scale of each layer's hidden states, on some of the texts of those who are learned from."""

    def produce(writer: Writer) -> None:
        items = sorted((item for user in people.learned_from for item in kept[user]), key=_lot)[:STATISTICS_TEXTS]
        made, _ = contrast.contrasts(
            items, item_prompts(config, people, items, loaded), assignment, [[] for _ in items], {}
        )
        branches = contrast.branches(made, loaded, config.prompt.max_answer_tokens)
        layers = config.contrast.chosen_layers(loaded.fingerprint["layers"])
        contrast.save_feature_map(features.fit_standardization(loaded, rows, layers, branches), writer.folder)
        writer.summary.update(texts=len(items), layers=layers)

    url = join(config.out, "contrast", "statistics")
    return artifacts.ensure(url, produce, kind=STATISTICS, config=settings, inputs=inputs)


def _contrast(
    config: CardConfig,
    people: People,
    items: Sequence[Item],
    bank: pairs.Bank,
    assignment: Mapping[str, int],
    loaded: LoadedModel,
    rows: adapters.RowMask,
    sampler: contrast.Sampler,
) -> tuple[list[contrast.Contrasted], int]:
    count = config.contrast.cluster_texts
    item_prompt = item_prompts(config, people, items, loaded)
    sampled = sampler(
        loaded,
        rows,
        [prompt for prompt in item_prompt for _ in range(count)],
        [assignment[item.user_id] for item in items for _ in range(count)],
        temperature=config.contrast.temperature,
        top_p=config.contrast.top_p,
        seeds=[_draw(config.seed, item, number) for item in items for number in range(count)],
        max_new_tokens=config.prompt.max_answer_tokens,
    )
    grouped = (
        [sampled[start : start + count] for start in range(0, len(sampled), count)] if count else [[]] * len(items)
    )
    others = bank.matched(items, config.contrast.other_texts)
    return contrast.contrasts(items, item_prompt, assignment, grouped, others)


def _lot(item: Item) -> str:
    """A fixed place in a random order of items."""
    return hashlib.sha256(f"{item.user_id}/{item.item_id}".encode()).hexdigest()


def _draw(seed: int, item: Item, number: int) -> int:
    """The seed of an item's n-th sampled answer, whatever shard or rank draws it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number} {item.user_id}/{item.item_id}".encode()).digest()[:6], "big")
