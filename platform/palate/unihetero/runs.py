"""One run of the experiment: an arm, a seed, and what it knows after so many samples.

    RUN/training       checkpoints and logs of the train loop
    RUN/points         what was measured at each stop, as soon as it was
    RUN/result.json    all points, what was measured at the end, the data's fingerprint, the cost

All arms see the same samples in the same order; the fingerprint of all batches proves it.
"""

import hashlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerBase, ViTModel

from palate import artifacts
from palate.artifacts import Artifact
from palate.config import identity, require_at_least
from palate.corpora import vqa
from palate.corpora.worlds import scenes
from palate.models.small_lm import small_llama, word_tokenizer
from palate.training import logging as run_logs
from palate.training.parallel import World
from palate.training.stream import Stream
from palate.unihetero.arms import ARMS, Arm, configured
from palate.unihetero.averages import WIDTH_10
from palate.unihetero.model import SemanticLoss, UniHeteroConfig, UniHeteroModel
from palate.unihetero.objectives import ObjectiveConfig, Weights, total
from palate.unihetero.parts import MERGE, TOKENS, WORDS, EncodedSplit
from palate.unihetero.phrasing import Phrasing, add_image_tokens, text_first, with_tokens
from palate.unihetero.probes import probe
from palate.unihetero.samples import Batch, Sample, Segment, collate
from palate.unihetero.scoring import Asked, choose, correct, free_run, text_loss, without_image
from palate.unihetero.training import PretrainConfig, pretrain

KIND = "unihetero-run"
_FREE_RUN = 256  # test images on which free running is measured
_PROBED = (3000, 1000)  # images that probes are fitted on, and tested on


@dataclass(frozen=True)
class RunConfig:
    """What all runs of an experiment have in common."""

    samples: int = 16_384
    """That each run sees."""
    stops: tuple[int, ...] = (2_048, 4_096, 8_192, 16_384)
    """Samples after which a run is measured; the last of all runs is the last of these up to ``samples``."""
    width: int = 96
    """Of the language model."""
    layers: int = 4
    """Of the language model."""
    branch_from: int = 2
    """Where the isolated branch leaves it."""
    semantic_loss: SemanticLoss = "cosine"
    """How predictions of embeddings are judged."""
    text_first: float = 0.25
    """Share of the samples that are written text first, to draw."""
    batch: int = 32
    """Samples an update."""
    learning_rate: float = 1e-3
    """Constant after the warm-up; what is measured is an average of the weights."""
    warmup: int = 50
    """Steps over which the rate rises, whatever a run's length: so a longer run goes on from a shorter one."""
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(ramp=40, momentum=0.99))
    monitor_every: int = 100
    """Steps between looks at targets and gradients."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch", "samples", "width", "layers", "warmup", "monitor_every")
        if odd := [size for size in (self.samples, *self.stops) if size % self.batch]:
            raise ValueError(f"samples and stops are whole batches of {self.batch}, found {odd}")
        if len({self.samples, *(stop for stop in self.stops if stop < self.samples)}) < 3:
            raise ValueError(
                f"--stops: a slope needs two sizes below {self.samples} samples at least, got {self.stops}"
            )


class Examples:
    """A split of the corpus as samples; a ``Source`` of the stream."""

    def __init__(
        self,
        split: EncodedSplit,
        segments: Sequence[tuple[Segment, ...]],
        phrasing: Phrasing,
        features: str,
        share: float,
        digest: str,
        shuffled: bool = False,
    ) -> None:
        self.name, self.split, self.segments, self.phrasing = "examples", split, segments, phrasing
        self.features = split.features_NPs if features == "trained" else split.random_NPs
        self.share, self.shuffled = share, shuffled
        self.fingerprint = digest[:16]

    def __len__(self) -> int:
        return len(self.split.examples.keys)

    def id(self, index: int) -> str:
        return self.split.examples.keys[index]

    def load(self, index: int, seed: int) -> Sample:
        given: dict[str, Any] = {
            "encoded": True,
            "latents": self.split.latents_NPc[index][None].float(),
            "seed": seed % (1 << 40),
        }
        if self.shuffled:  # another image's, whichever it is
            other = (index + 1 + random.Random(seed).randrange(len(self) - 1)) % len(self)
            given["targets"] = self.features[other][None].float()
        image = self.features[index][None].float()
        if text_first(seed, self.share):
            return self.phrasing.to_draw(self.id(index), self.split.examples.captions[index], image, **given)
        return self.phrasing.described(self.id(index), image, self.segments[index], **given)


@dataclass(frozen=True)
class Experiment:
    """The data and the settings of all runs."""

    config: RunConfig
    corpus: Artifact
    parts: Artifact
    train: EncodedSplit
    test: EncodedSplit
    _segments: dict[int, list[tuple[Segment, ...]]] = field(default_factory=dict, repr=False)

    @cached_property
    def meta(self) -> vqa.Meta:
        return vqa.read_meta(self.corpus)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = word_tokenizer([*WORDS, *self.meta.words])
        add_image_tokens(tokenizer)
        return tokenizer

    @cached_property
    def phrasing(self) -> Phrasing:
        return Phrasing(self.tokenizer, TOKENS)

    def segments(self, split: EncodedSplit) -> list[tuple[Segment, ...]]:
        """The caption's, and the questions', of every image: made once a process, for they take minutes."""
        if id(split) not in self._segments:
            self._segments[id(split)] = [
                (self.phrasing.caption(caption), *(self.phrasing.question(q.text, q.answer) for q in questions))
                for caption, questions in zip(split.examples.captions, split.examples.questions, strict=True)
            ]
        return self._segments[id(split)]

    def model(self, arm: Arm, features: str, seed: int) -> UniHeteroModel:
        """A new model; of equal seeds, arms have equal language models and projectors."""
        config = self.config
        vision = ViTModel.from_pretrained(
            self.parts.local_folder("vision" if features == "trained" else "random"),
            add_pooling_layer=False,
            use_safetensors=True,
        )
        language = small_llama(len(self.tokenizer), config.width, config.layers, seed=seed)
        scale = float(language.get_input_embeddings().weight.detach().float().square().mean().sqrt())
        settings = UniHeteroConfig(
            text_config=language.config,
            vision_config=vision.config,
            image_tokens=TOKENS,
            merge=MERGE,
            embed_scale=scale,
            latent_width=self.train.latents_NPc.shape[-1],
            head_width=config.width,
        )
        settings = configured(with_tokens(settings, self.tokenizer), arm, config.semantic_loss, config.branch_from)
        return UniHeteroModel.from_parts(language, vision, settings, seed)


def run(
    experiment: Experiment,
    name: str,
    seed: int,
    objective: ObjectiveConfig,
    out: str,
    samples: int,
    brief: bool = False,
) -> Artifact:
    """A run of the arm ``name`` ("embedding", or "random:embedding" for it on the random encoder), unless it is
    done."""
    features, _, arm_name = name.rpartition(":")
    features = features or "trained"
    arm = ARMS[arm_name]  # type: ignore[index]
    settings = identity(experiment.config) | {
        "arm": name,
        "seed": seed,
        "samples": samples,
        "objective": identity(objective),
    }
    inputs = {"corpus": experiment.corpus, "parts": experiment.parts}

    def produce(writer: artifacts.Writer) -> None:
        _Run(experiment, arm, features, seed, objective, out, samples, settings, brief).write(writer)

    return artifacts.ensure(artifacts.join(out, "done"), produce, kind=KIND, config=settings, inputs=inputs)


@dataclass
class _Run:
    experiment: Experiment
    arm: Arm
    features: str
    seed: int
    objective: ObjectiveConfig
    out: str
    samples: int
    settings: dict[str, Any]
    brief: bool = False
    """Only train: what is logged is all that is wanted."""

    def __post_init__(self) -> None:
        self.world = World.current()
        self.model = self.experiment.model(self.arm, self.features, self.seed).to(self.world.device)
        self.source = self._source(self.experiment.train)
        test = self.experiment.test
        self.tested = self._source(test)
        self.asked = [
            [
                Asked(one.text, options := self.experiment.meta.options[one.kind], options.index(one.answer), one.kind)
                for one in questions
            ]
            for questions in test.examples.questions
        ]

    def _source(self, split: EncodedSplit) -> Examples:
        experiment = self.experiment
        return Examples(
            split,
            experiment.segments(split),
            experiment.phrasing,
            self.features,
            experiment.config.text_first,
            experiment.corpus.digest,
            self.arm.shuffled,
        )

    def write(self, writer: artifacts.Writer) -> None:
        config = self.experiment.config
        stream = Stream([self.source], config.batch, seed=self.seed)
        steps = self.samples // config.batch
        wanted = () if self.brief else (*config.stops, config.samples, self.samples)
        stops = {stop // config.batch: stop for stop in wanted if stop <= self.samples}
        ends = {config.samples // config.batch, steps}
        settings = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]
        folder = artifacts.join(self.out, "training")
        filesystem, points = artifacts.locate(artifacts.join(self.out, "points"))
        filesystem.makedirs(points, exist_ok=True)

        def observe(step: int) -> None:
            file = f"{points}/{stops[step]:09d}.json"
            if not filesystem.exists(file) or json.loads(filesystem.cat_file(file))["of"] != settings:
                found = {"samples": stops[step], "of": settings, **self.measured()}
                if step in ends:
                    found["final"] = self.measured_at_the_end()
                if not artifacts.is_local(filesystem):
                    filesystem.pipe_file(file, json.dumps(found).encode())
                    return
                whole = Path(file).with_suffix(".part")  # a kill leaves no half of a point
                whole.write_text(json.dumps(found))
                whole.replace(file)

        started = time.perf_counter()
        pretrain(
            self.model,
            self.arm,
            stream,
            self.objective,
            PretrainConfig(
                steps=steps,
                batch=config.batch,
                learning_rate=config.learning_rate,
                schedule="constant",
                warmup_ratio=config.warmup / steps,
                average=WIDTH_10,
                spike_sigmas=None,
                monitor_every=config.monitor_every,
                micro_batch=config.batch,
                checkpoint_every=max(1, steps // 4),
            ),
            folder,
            self.world,
            seed=self.seed,
            identity=self.settings,
            stops=sorted(stops),
            observe=observe,
        )
        rows = run_logs.read(folder)
        result = {
            **self.settings,
            "points": [
                json.loads(filesystem.cat_file(f))
                for f in sorted(filesystem.ls(points, detail=False))
                if f.endswith(".json")
            ],
            "fingerprints": {str(stop): _chain(rows[:step]) for step, stop in stops.items()},
            "flops_per_sample": self.flops(),
            "seconds": time.perf_counter() - started,
            "log": _thinned(rows),
        }
        writer.write_json("result.json", result)
        writer.summary.update(seconds=result["seconds"])
        if result["points"]:
            writer.summary.update(accuracy=result["points"][-1]["accuracy"]["all"])

    @torch.inference_mode()
    def measured(self) -> dict[str, Any]:
        """Accuracy by kind of question, and losses, on the test images."""
        phrasing = self.experiment.phrasing
        images = [self.tested.features[index][None].float() for index in range(len(self.tested))]
        scores = choose(self.model, phrasing, images, self.asked, encoded=True, batch=64)
        right: dict[str, list[bool]] = {}
        for questions, hits in zip(self.asked, correct(scores, self.asked), strict=True):
            for one, hit in zip(questions, hits, strict=True):
                right.setdefault(one.kind, []).append(hit)
        kinds = {kind: float(np.mean(hits)) for kind, hits in right.items()}
        described = [
            phrasing.described(self.tested.id(i), images[i], self.tested.segments[i], encoded=True)
            for i in range(min(500, len(images)))
        ]
        return {
            # Kinds weigh equally, however many scenes allow them.
            "accuracy": {"all": float(np.mean(list(kinds.values()))), **kinds},
            "text_loss": text_loss(self.model, described, 64),
            "text_only_loss": text_loss(self.model, without_image(described), 64),
        }

    @torch.inference_mode()
    def measured_at_the_end(self) -> dict[str, Any]:
        """Free running, and what probes read from the projector's output and the states at several depths."""
        found: dict[str, Any] = {"probes": self._probes()}
        config = self.model.config
        if config.semantic != "none" and config.shift and config.branch_from is None:
            count = min(_FREE_RUN, len(self.tested))
            captions = self.experiment.test.examples.captions[:count]
            fitted = self.source.features[: 4 * _FREE_RUN].float()
            given = self.tested.features[:count].float()
            made = free_run(self.model, self.experiment.phrasing, given, captions, fitted)
            found["free_run"] = {name: getattr(made, name) for name in made.__dataclass_fields__}
        return found

    def _probes(self) -> dict[str, dict[str, float]]:
        fitted, tested = _PROBED
        train = scenes.described(self.experiment.train.examples.facts[:fitted])
        test = scenes.described(self.experiment.test.examples.facts[:tested])
        if not train:
            return {}
        given = self._depths(self.source.features[:fitted]), self._depths(self.tested.features[:tested])
        return {name: probe(given[0][name].numpy(), train, given[1][name].numpy(), test) for name in given[0]}

    def _depths(self, features_IPs: Tensor) -> dict[str, Tensor]:
        """States at the visual tokens after the projector and after each layer, (I, P, d)."""
        prefix = torch.tensor([self.experiment.phrasing.image()], device=self.model.device)
        found: dict[str, list[Tensor]] = {}
        for part_IPs in features_IPs.float().to(self.model.device).split(256):
            ids = prefix.expand(len(part_IPs), -1)
            output = self.model.decode(self.model.embed(ids, part_IPs), output_hidden_states=True)
            for number, states in enumerate(output.hidden_states):
                name = "input" if number == 0 else f"layer {number}"
                found.setdefault(name, []).append(states[:, 1 : 1 + part_IPs.shape[1]].cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def flops(self) -> float:
        """Of one training sample, forward and backward, counted by torch on a batch."""
        samples = [self.source.load(index, index) for index in range(32)]
        batch: Batch = collate([[sample] for sample in samples]).to(self.model.device)
        totals = {"text": 1.0, "visual": 1.0}
        with FlopCounterMode(display=False) as counter:
            loss, _ = total(self.model(**batch.arguments()), Weights(1, 1, 1), totals)
            loss.backward()
        self.model.zero_grad(set_to_none=True)
        return counter.get_total_flops() / len(samples)


def calibrated(experiment: Experiment, name: str, target: float, seed: int, out: str, samples: int) -> ObjectiveConfig:
    """The weight at which the arm's loss has a gradient in the language model of ``target`` times the text's.

    From a short run at weight 1 with a seed that no other run has: the median of the logged ratios of its last two
    thirds. A loss that gives the language model no gradient keeps its weight.

    Raises:
        ValueError: the run was too short to look at a gradient.
    """
    arm = ARMS[name]  # type: ignore[index]
    wanted = {"semantic": arm.semantic != "none", "pixel": arm.pixels == "inside"}
    often = max(1, min(20, samples // experiment.config.batch // 6))
    short = replace(experiment, config=replace(experiment.config, monitor_every=often))
    level = replace(experiment.config.objective, semantic_weight=1.0, pixel_weight=1.0, ramp=0)
    found = run(short, name, seed, level, out, samples, brief=True).read_json("result.json")
    ratios: dict[str, list[float]] = {}
    for row in found["log"][len(found["log"]) // 3 :]:
        for key, value in row["metrics"].items():
            if key.startswith("ratio/") and key.endswith("/all"):
                ratios.setdefault(key.split("/")[1], []).append(value)
    if any(needed and loss not in ratios for loss, needed in wanted.items()):
        raise ValueError(f"{out}: {samples} samples are too few to calibrate {name}: raise --calibration-samples")
    weights = {loss: target / float(np.median(values)) for loss, values in ratios.items()}
    return replace(
        experiment.config.objective,
        semantic_weight=weights.get("semantic", 1.0),
        pixel_weight=weights.get("pixel", 1.0),
    )


def _chain(rows: Sequence[dict[str, Any]]) -> str:
    """The fingerprint of all batches of these steps."""
    return hashlib.sha256("".join(row["fingerprint"] for row in rows).encode()).hexdigest()[:16]


def _thinned(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a look at gradients, and every fiftieth."""
    return [
        {"step": row["step"], "loss": row["loss"], "metrics": row["metrics"]}
        for number, row in enumerate(rows)
        if number % 50 == 0 or any(name.startswith("ratio/") for name in row["metrics"])
    ]
