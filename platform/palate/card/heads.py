"""Training of what all people share: the head, and the prior of user vectors (CARD, arXiv 2601.06352, section 2.5).

Head and vectors are trained together, to the maximum of the likelihood of people's own texts under the personal
distribution, with Gaussian priors on both (and, if asked, Bradley-Terry on implicit rewards against the cluster
model's and other people's texts). Vectors have mean 1: the head's columns carry the scale. At that maximum a trained
vector *is* the MAP fit with the head frozen, so the exact fit (``palate.card.fitting``) that gives everyone's final
vector, a new person's too, means the same as in training. How strong the priors are is chosen by the likelihood of
texts that a first training did not see.

What made the difference with few people (benchmarks/card_head.py, docs/results/card.md): features keep their natural
spectrum, or lean on it further; whitened, nothing personal is learned. The output embedding is whitened all the same,
so that the correction can tell apart tokens that the language model keeps close; here that made no difference.

Symbols: as in ``palate.card.preferences``; e width of the output embedding.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from palate.artifacts import Artifact
from palate.card import pairs
from palate.card.correction import FeatureMap, Head
from palate.card.preferences import Positions, Prior, log_ratios
from palate.config import identity as identity_fields
from palate.training import loop
from palate.training.parallel import World
from palate.training.stream import ListSource, Stream

HEAD, HEAD_FILE = "head.json", "head.safetensors"


@dataclass(frozen=True)
class PreferConfig:
    """How head and prior are learned; the defaults come from texts kept out of histories and from development users'
    questions. What was ablated since: docs/results/card.md."""

    width: int = 64
    """Width of a user vector (J)."""
    output: Literal["tied", "free"] = "tied"
    """tied: the correction of a token goes through the base model's output embedding; free: a learned row a token."""
    reward: Literal["normalized", "additive"] = "normalized"
    """normalized: log-ratio of the personal and the cluster distribution; additive: mean correction of the written
    tokens, trained by Bradley-Terry alone (the most literal reading of the paper)."""
    head_precision: tuple[float, ...] = (60.0, 200.0)
    """Precisions of the prior on the head's weights to choose from."""
    vector_deviation: tuple[float, ...] = (0.5, 0.7, 1.0)
    """Standard deviations of the prior on vectors to choose from."""
    head_epochs: int = 30
    """Passes over people's own texts."""
    head_batch: int = 64
    """Own texts in a global batch."""
    head_learning_rate: float = 3e-3
    """Adam's peak rate for the head."""
    vector_learning_rate: float = 0.1
    """Adam's peak rate for the vectors."""
    cluster_weight: float = 0.0
    """Of Bradley-Terry against the cluster model's texts, beside the likelihood."""
    other_weight: float = 0.0
    """Of Bradley-Terry against other people's texts."""
    feature_power: float = 0.75
    """Spectrum of the features: 0 whitens them, 0.5 keeps their own, more leans on what varies most."""
    embedding_power: float = 0.0
    """The same for the output embedding."""
    decoding_beta: float = 1.0
    """Strength of the correction that the run recommends."""


@dataclass(frozen=True)
class Strength:
    """One choice of the priors."""

    head_precision: float
    vector_deviation: float


@dataclass(frozen=True)
class OwnText:
    """A training sample: one own text and its negatives, as text numbers of the positions."""

    person: int
    text: int
    cluster_texts: tuple[int, ...] = ()
    other_texts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Whitened:
    """Output embeddings of all tokens, centred and reshaped: ``(E - mean_e) @ matrix_ee``, rows of unit length on
    average, so that learning rates and precisions mean the same for every base model."""

    embeddings_Ve: Tensor
    mean_e: Tensor
    matrix_ee: Tensor


class HeadModel(nn.Module):
    """The head's parameters, with a vector a person while it is trained."""

    def __init__(self, features: int, embeddings: Whitened, people: int, config: PreferConfig, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embeddings = embeddings
        self.tied = config.output == "tied"
        tokens, width_e = embeddings.embeddings_Ve.shape
        self.project = nn.Parameter(torch.randn(features, config.width, generator=generator) / features**0.5)
        self.bias = nn.Parameter(torch.zeros(config.width))
        # Zero, so that nothing is corrected at the start; the vectors are not, or no gradient would ever reach it.
        self.output = nn.Parameter(torch.zeros(width_e if self.tied else tokens, config.width))
        self.vectors = nn.Parameter(1 + 0.1 * torch.randn(people, config.width, generator=generator))

    def delta(self, positions: Positions, vectors_NJ: Tensor) -> Tensor:
        """The correction of every candidate, shape (N, k)."""
        gates_NJ = (positions.features_Nd @ self.project + self.bias) * vectors_NJ
        tokens, place_Nk = positions.candidates_Nk.unique(return_inverse=True)
        rows = self.embeddings.embeddings_Ve[tokens] @ self.output if self.tied else self.output[tokens]
        return torch.einsum("nkj,nj->nk", rows[place_Nk], gates_NJ)

    @torch.no_grad()
    def head(self, features: FeatureMap, top_k: int) -> Head:
        """The head as decoding and fitting use it."""
        output_VJ = self.embeddings.embeddings_Ve @ self.output if self.tied else self.output
        return Head(features, self.project.detach().clone(), output_VJ.clone(), top_k, self.bias.detach().clone())


def whiten_embeddings(embeddings_Ve: Tensor, power: float) -> Whitened:
    """Reshape the spectrum of the output embedding over the vocabulary."""
    mean_e, matrix_ee = reshape_spectrum(embeddings_Ve.float(), power)
    reshaped_Ve = (embeddings_Ve.float() - mean_e) @ matrix_ee
    unit = reshaped_Ve.norm(dim=1).mean()
    return Whitened(reshaped_Ve / unit, mean_e, matrix_ee / unit)


def reshape_spectrum(rows_Nd: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Mean (d,) and matrix (d, d) after which principal directions of variance w have variance w^(2·power).

    0 whitens, 0.5 keeps the spectrum. Mean square over all numbers becomes 1. Directions without variance stay zero.
    """
    mean_d = rows_Nd.double().mean(0)
    centred = rows_Nd.double() - mean_d
    values, vectors = torch.linalg.eigh(centred.t() @ centred / max(len(centred), 1))
    floor = values.max().clamp(min=1e-30) * 1e-6
    scales = torch.where(values > floor, values.clamp(min=1e-30).pow(power - 0.5), 0.0)
    scales = scales / ((scales.square() * values).mean().sqrt() + 1e-30)
    return mean_d.float(), (vectors * scales).float()


def final_features(
    statistics: FeatureMap, positions: Positions, learned_N: Tensor, power: float
) -> tuple[FeatureMap, Positions]:
    """Reshape the spectrum of standardized features, fitted on the positions of ``learned_N`` (a mask).

    Returns the feature map that gives these features from hidden states, and all positions with them.
    """
    mean_d, matrix_dd = reshape_spectrum(positions.features_Nd[learned_N], power)
    # The mean of the averaged layers is taken out of every layer, in its own scale.
    mean_Ld = statistics.mean_Ld + mean_d / statistics.scale_Ld
    features_Nd = (positions.features_Nd - mean_d) @ matrix_dd
    return replace(statistics, mean_Ld=mean_Ld, whitening_dd=matrix_dd), replace(positions, features_Nd=features_Nd)


def choose_strength(
    samples: Sequence[OwnText],
    positions: Positions,
    embeddings: Whitened,
    people: int,
    config: PreferConfig,
    folder: str,
    *,
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
) -> tuple[Strength, list[dict[str, float]]]:
    """The priors under which texts that training did not see are likeliest: every fourth of each person's is kept out.

    Returns the choice, and the gain in nats per token over the cluster model for each one tried (mean over people, each
    with their own trained vector, and with everybody's mean vector).
    """
    choices = [Strength(p, d) for p in config.head_precision for d in config.vector_deviation]
    if len(choices) == 1:
        return choices[0], []
    seen: dict[int, int] = {}
    kept: list[OwnText] = []
    learned: list[OwnText] = []
    for sample in samples:
        count = seen[sample.person] = seen.get(sample.person, 0) + 1
        (kept if count % 4 == 0 else learned).append(sample)
    if not kept:
        return choices[len(choices) // 2], []
    tried = []
    for number, choice in enumerate(choices):
        label = f"priors {number + 1}/{len(choices)}"
        place = f"{folder}/choice-{number}"
        model = train_head(
            learned, positions, embeddings, people, config, choice, place, seed=seed, identity=identity, label=label
        )
        own, mean = held_out_gain(model, kept, positions)
        tried.append({**vars(choice), "own": own, "mean": mean})
    best = max(range(len(choices)), key=lambda number: tried[number]["own"])
    return choices[best], tried


@torch.no_grad()
def held_out_gain(model: HeadModel, samples: Sequence[OwnText], positions: Positions) -> tuple[float, float]:
    """Gain over the cluster model in nats per token, with own and with the mean vector; mean over people."""
    spans = _Spans(positions)
    gains: dict[int, list[float]] = {}
    mean_J = model.vectors.mean(0)
    for sample in samples:
        rows_N, _ = spans.rows([sample.text])
        chosen = positions.select(rows_N)
        sums = [
            float(log_ratios(model.delta(chosen, vector_J), chosen.log_probs_Nk, chosen.target_N).sum())
            for vector_J in (model.vectors[sample.person], mean_J)
        ]
        total = gains.setdefault(sample.person, [0.0, 0.0, 0.0])
        gains[sample.person] = [total[0] + sums[0], total[1] + sums[1], total[2] + len(rows_N)]
    people = len(gains)
    return sum(g[0] / g[2] for g in gains.values()) / people, sum(g[1] / g[2] for g in gains.values()) / people


def prior(config: PreferConfig, strength: Strength) -> Prior:
    """The prior of user vectors: mean 1, equal precisions (the head's columns carry the scale)."""
    return Prior(torch.ones(config.width), torch.full((config.width,), strength.vector_deviation**-2))


def save_head(model: HeadModel, features: FeatureMap, top_k: int, prior: Prior, folder: Path) -> None:
    """Write head and prior as safetensors and JSON. A tied head is stored without the base model's embedding."""
    tensors = {
        "mean_Ld": features.mean_Ld,
        "scale_Ld": features.scale_Ld,
        "whitening_dd": features.whitening_dd,
        "project_dJ": model.project.detach(),
        "bias_J": model.bias.detach(),
        "prior_mean_J": prior.mean_J,
        "prior_precision_J": prior.precision_J,
    }
    if model.tied:
        mixed_eJ = model.embeddings.matrix_ee @ model.output.detach()
        tensors |= {"mixed_eJ": mixed_eJ, "offset_J": model.embeddings.mean_e @ mixed_eJ}
    else:
        tensors["output_VJ"] = model.output.detach()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / HEAD_FILE)
    (folder / HEAD).write_text(json.dumps({"layers": features.layers, "top_k": top_k}) + "\n")


def load_head(artifact: Artifact, embeddings_Ve: Tensor) -> tuple[Head, Prior]:
    """What ``save_head`` wrote; ``embeddings_Ve`` is the base model's output embedding.

    Raises:
        ValueError: the embedding has another width than the one that the head was trained with.
    """
    described = artifact.read_json(HEAD)
    with safe_open(artifact.local(HEAD_FILE), framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    features = FeatureMap(tuple(described["layers"]), *(tensors[n] for n in ("mean_Ld", "scale_Ld", "whitening_dd")))
    if "output_VJ" in tensors:
        output_VJ, found = tensors["output_VJ"], embeddings_Ve.shape[0]
        expected = output_VJ.shape[0]
    else:
        expected, found = tensors["mixed_eJ"].shape[0], embeddings_Ve.shape[1]
    if found != expected:
        raise ValueError(
            f"{artifact.url} was trained with a base model whose output embedding has {expected} "
            f"{'tokens' if 'output_VJ' in tensors else 'columns'}, this one has {found}: check --model"
        )
    if "mixed_eJ" in tensors:
        output_VJ = embeddings_Ve.float().cpu() @ tensors["mixed_eJ"] - tensors["offset_J"]
    head = Head(features, tensors["project_dJ"], output_VJ, described["top_k"], tensors["bias_J"])
    return head, Prior(tensors["prior_mean_J"], tensors["prior_precision_J"])


def own_texts(texts: Sequence[pairs.Text], people: Mapping[str, int]) -> list[OwnText]:
    """Training samples from contrast texts, in their order: own texts of ``people`` (row of each), with negatives."""
    negatives: dict[tuple[str, str], dict[str, list[int]]] = {}
    for number, text in enumerate(texts):
        kinds = negatives.setdefault((text.user_id, text.item_id), {pairs.OWN: [], pairs.CLUSTER: [], pairs.OTHER: []})
        kinds[text.kind].append(number)
    return [
        OwnText(people[user], kinds[pairs.OWN][0], tuple(kinds[pairs.CLUSTER]), tuple(kinds[pairs.OTHER]))
        for (user, _), kinds in negatives.items()
        if user in people
    ]


def train_head(
    samples: Sequence[OwnText],
    positions: Positions,
    embeddings: Whitened,
    people: int,
    config: PreferConfig,
    strength: Strength,
    folder: str,
    *,
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
    label: str = "head",
) -> HeadModel:
    """Train head and vectors together on the texts of ``samples``.

    Args:
        positions: of all texts that the samples name, whitened.
        folder: for checkpoints and logs.

    Raises:
        ValueError: there is no own text.
    """
    if not samples:
        raise ValueError(
            "no text is left to learn vectors from: the histories are too short for --contrast-share, or it is 0"
        )
    model = HeadModel(positions.features_Nd.shape[1], embeddings, people, config, seed)
    spans = _Spans(positions)
    tokens = sum(spans.length(sample.text) for sample in samples)
    names = ("project", "bias", "output")
    groups = [
        loop.Group("head", [(name, getattr(model, name)) for name in names], config.head_learning_rate),
        loop.Group("vectors", [("vectors", model.vectors)], config.vector_learning_rate),
    ]
    settings = loop.LoopConfig(
        steps=max(1, -(-len(samples) // config.head_batch) * config.head_epochs),
        seed=seed,
        warmup_ratio=0.1,
        betas=(0.9, 0.99),
        micro_batch=config.head_batch,
        checkpoint_every=500,
        label=label,
    )
    stream = Stream(
        [ListSource("own texts", samples, [str(sample.text) for sample in samples])],
        min(config.head_batch, len(samples)),
        seed=seed,
    )

    def weigh(sample: OwnText) -> dict[str, float]:
        tokens = float(spans.length(sample.text))
        return {
            "head": tokens,
            "vectors": tokens,
            "cluster pairs": float(len(sample.cluster_texts)),
            "other pairs": float(len(sample.other_texts)),
        }

    def loss(model: nn.Module, batch: list[OwnText], totals: Mapping[str, float]) -> loop.LossOutput:
        assert isinstance(model, HeadModel)
        output = _loss(model, batch, positions, spans, config, totals)
        # The priors, spread over the tokens of an epoch; a micro-batch adds its share.
        share = sum(spans.length(sample.text) for sample in batch) / totals["head"] / tokens
        weights = strength.head_precision * sum(getattr(model, name).square().sum() for name in names)
        vectors = (model.vectors - 1).square().sum() / strength.vector_deviation**2
        return replace(output, loss=output.loss + 0.5 * share * (weights + vectors))

    # All that decides the result and is no setting of the loop, lest another head's checkpoint be gone on from.
    described = {"prefer": identity_fields(config), "strength": vars(strength), **(identity or {})}
    loop.train(model, groups, stream, weigh, loss, settings, folder, World(), identity=described)
    return model.requires_grad_(False)


class _Spans:
    """Where the positions of each text lie."""

    def __init__(self, positions: Positions) -> None:
        numbers = torch.arange(positions.texts + 1)
        self.bounds = torch.searchsorted(positions.text_N.contiguous(), numbers).tolist()

    def length(self, text: int) -> int:
        return self.bounds[text + 1] - self.bounds[text]

    def rows(self, texts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The positions of ``texts``, and the place of each position's text in that list; both (N,)."""
        rows = [torch.arange(self.bounds[text], self.bounds[text + 1]) for text in texts]
        places = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor([len(r) for r in rows]))
        return torch.cat(rows), places


def _loss(
    model: HeadModel,
    batch: Sequence[OwnText],
    positions: Positions,
    spans: _Spans,
    config: PreferConfig,
    totals: Mapping[str, float],
) -> loop.LossOutput:
    """Negative log-likelihood a token of own texts, plus Bradley-Terry a pair on implicit rewards."""
    additive = config.reward == "additive"
    weights = {"cluster pairs": config.cluster_weight, "other pairs": config.other_weight}
    texts = [sample.text for sample in batch]
    person = [sample.person for sample in batch]
    compared: list[tuple[int, str]] = []  # place of the own text in the batch, and the kind of the pair
    for place, sample in enumerate(batch):
        for kind, others in (("cluster pairs", sample.cluster_texts), ("other pairs", sample.other_texts)):
            if weights[kind]:
                texts += others
                person += [sample.person] * len(others)
                compared += [(place, kind)] * len(others)
    rows_N, place_N = spans.rows(texts)
    chosen = positions.select(rows_N)
    vectors_NJ = model.vectors[torch.tensor(person)[place_N]]
    delta_Nk = model.delta(chosen, vectors_NJ)
    if additive:
        reward_N = delta_Nk.gather(1, chosen.target_N.clamp(min=0)[:, None]).squeeze(1) * (chosen.target_N >= 0)
        lengths_S = torch.tensor([spans.length(text) for text in texts])
        reward_S = torch.zeros(len(texts)).index_add(0, place_N, reward_N) / lengths_S
    else:
        reward_N = log_ratios(delta_Nk, chosen.log_probs_Nk, chosen.target_N)
        reward_S = torch.zeros(len(texts)).index_add(0, place_N, reward_N)
    gain = reward_S[: len(batch)].sum()
    loss = torch.zeros(()) if additive else -gain / totals["head"]
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {
        "gain_nats_per_token": (gain.detach(), float(sum(spans.length(sample.text) for sample in batch)))
    }
    if compared:
        own = torch.tensor([place for place, _ in compared])
        margin_P = reward_S[own] - reward_S[len(batch) :]
        for kind in weights:
            of_kind = torch.tensor([name == kind for _, name in compared])
            if of_kind.any():
                loss = loss - weights[kind] * F.logsigmoid(margin_P[of_kind]).sum() / totals[kind]
                won = (margin_P[of_kind] > 0).float().sum()
                metrics[f"{kind[:-1]} accuracy"] = (won, float(of_kind.sum()))
    return loop.LossOutput(loss, metrics)
