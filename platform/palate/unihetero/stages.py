"""Pretraining from image-text shards to a model that transformers loads.

    RUN/training     checkpoints and logs (TensorBoard, JSON lines)
    RUN/model        what AutoModel and AutoProcessor load, with a model card

Stages follow one another by ``--start RUN``: projector -> joint -> pixels, or instruction tuning (joint, on
conversations). Started again, a run goes on where it was; a finished one does nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import AutoProcessor

from palate import artifacts, progress
from palate.artifacts import Artifact, Writer, join
from palate.config import identity, require_at_least, require_shares, scale
from palate.corpora.captions import IMAGE_TEXT_INDEX
from palate.models.causal_lm import load_causal_lm
from palate.models.vision import load_vision
from palate.models.weights import sampled_hash
from palate.training.checkpoints import Store
from palate.training.loop import TrainingSummary
from palate.training.parallel import World
from palate.training.shards import Cache, ShardSource
from palate.training.stream import Packing, Stream
from palate.unihetero.arms import ARMS, ArmName, configured
from palate.unihetero.latents import LatentMaker
from palate.unihetero.model import SemanticLoss, UniHeteroConfig, UniHeteroModel
from palate.unihetero.objectives import ObjectiveConfig
from palate.unihetero.phrasing import add_image_tokens, with_tokens
from palate.unihetero.processing import UniHeteroProcessor
from palate.unihetero.sources import Decode, token_lengths
from palate.unihetero.training import LOSSES, PretrainConfig, pretrain

KIND = "unihetero-model"


@dataclass(frozen=True)
class TrainConfig:
    """Pretrain, warm up or tune a unified model on image-text shards."""

    corpus: tuple[str, ...]
    """Indexes of shards (jobs/prepare.py captions); several are a mixture."""
    out: str = scale()
    """Folder or URL of the run."""
    language: str = "smollm2"
    """A causal language model: a hub id, a folder, or a built-in name."""
    vision: str = "facebook/dinov2-base"
    """A vision encoder: a hub id or a folder."""
    start: str | None = None
    """Go on from the model of this run, instead of --language and --vision."""
    vae: str | None = None
    """An AutoencoderKL whose latents are told, for the arms pixel and decoder: a hub id or a folder."""
    arm: ArmName = "embedding"
    """What is learned beside text: embedding is UniHetero; understanding is text alone."""
    semantic_loss: SemanticLoss = "cosine"
    """How predictions of embeddings are judged."""
    branch_from: int | None = None
    """After which layer the isolated arm branches off; by default the middle."""
    image_tokens: int | None = None
    """Visual tokens of an image; by default the encoder's patches."""
    merge: Literal["mean", "concatenate"] = "mean"
    """How patches become fewer tokens."""
    text_first: float = 0.25
    """Share of captioned samples that are written text first, to draw; none in the stage projector, to which they would
    say nothing."""
    longest: int = 2048
    """Tokens of a sample; longer ones are cut."""
    pack: int | None = None
    """Tokens of a pack of several samples; None: each sample is a row of its own."""
    weights: tuple[float, ...] = ()
    """Shares of the corpora in a mixture; by default their sizes."""
    window: int = 1 << 18
    """Samples that are shuffled, and packed, together."""
    seed: int = 0
    """Of all that is drawn."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: PretrainConfig = field(default_factory=PretrainConfig)
    cache: str = scale("")
    """Folder on a local disk for fetched and unpacked shards; by default in Palate's cache."""
    cache_gb: float = scale(20.0)
    """Its size."""
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

    def __post_init__(self) -> None:
        require_at_least(self, 1, "longest", "window", "workers")
        require_shares(self, "text_first")
        if self.weights and len(self.weights) != len(self.corpus):
            raise ValueError(f"--weights has {len(self.weights)} shares for {len(self.corpus)} corpora")
        if self.arm == "shuffled":
            raise ValueError("--arm shuffled is a control of the experiment (sweep), whose source draws other images")
        if (self.arm in ("pixel", "decoder")) != (self.vae is not None):
            raise ValueError(f"--vae goes with the arms pixel and decoder, and they need it; the arm is {self.arm}")
        if self.arm == "curriculum" and self.train.stage == "projector":
            raise ValueError("--stage projector learns from text, which --arm curriculum leaves out at first")
        of_the_start = ("language", "vision", "image_tokens", "merge")
        if self.start and (others := [name for name in of_the_start if getattr(self, name) != _default(name)]):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            raise ValueError(f"--start brings a model with all its parts: leave out {flags}")


def _default(name: str) -> object:
    return next(one.default for one in fields(TrainConfig) if one.name == name)


@dataclass(frozen=True)
class Parts:
    """What a run begins with."""

    model: UniHeteroModel
    processor: UniHeteroProcessor
    latents: LatentMaker | None


def start_over(config: TrainConfig) -> None:
    """Discard the run's stages, if ``fresh``."""
    if config.fresh:
        artifacts.discard(join(config.out, "model"))
        Store(join(config.out, "training"), {}, 1, World()).discard()


def pipeline(config: TrainConfig, world: World) -> Artifact:
    """Train and write the model, unless it is there; every rank calls it.

    Raises:
        ArtifactMismatch: the run folder holds another run.
        TrainingStopped: a guard ended the training, with the ids of the samples.
    """
    indexes = {
        f"corpus{number}": artifacts.open_artifact(u, IMAGE_TEXT_INDEX) for number, u in enumerate(config.corpus)
    }
    out = join(config.out, "model")
    parts = load_parts(config, str(world.device))
    described = {**identity(config), "base_weights": sampled_hash(parts.model.named_parameters())}
    if found := artifacts.finished(out, kind=KIND, config=described, inputs=indexes):
        return found
    stream = stream_of(config, list(indexes.values()), parts.processor)
    with progress.stage("pretrain"):
        summary = pretrain(
            parts.model,
            ARMS[config.arm],
            stream,
            config.objective,
            config.train,
            join(config.out, "training"),
            world,
            seed=config.seed,
            identity={"unihetero": described, "corpora": [index.digest for index in indexes.values()]},
            latents=parts.latents if LOSSES[config.train.stage] != "text" else None,
            row=config.pack,
        )
    # Sharded weights are gathered by all ranks, and written by the first.
    weights = full_weights(parts.model)
    if world.main:
        produce = partial(_write, config=config, parts=parts, weights=weights, summary=summary)
        artifacts.ensure(out, produce, kind=KIND, config=described, inputs=indexes)
    world.barrier()
    return artifacts.open_artifact(out, KIND)


def load_parts(config: TrainConfig, device: str) -> Parts:
    """The model, its processor and the autoencoder, on ``device``.

    Raises:
        ValueError: one of them cannot be loaded, or they do not fit together.
    """
    arm = ARMS[config.arm]
    if config.start is not None:
        folder = artifacts.open_artifact(join(config.start, "model"), KIND).local_folder()
        before = UniHeteroModel.from_pretrained(folder, use_safetensors=True)
        processor = AutoProcessor.from_pretrained(folder)
        language, vision, settings = before.language, before.vision, before.config
    else:
        loaded = load_causal_lm(config.language)
        language, tokenizer = loaded.model, loaded.tokenizer
        encoder = load_vision(config.vision)
        vision, image_processor = encoder.model, encoder.image_processor
        add_image_tokens(tokenizer)
        if len(tokenizer) > language.config.vocab_size:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)  # of the new tokens' embeddings
                language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        size = int(np.array(image_processor(images=[Image.new("RGB", (64, 64))])["pixel_values"]).shape[-1])
        tokens = config.image_tokens or (size // vision.config.patch_size) ** 2
        processor = UniHeteroProcessor(image_processor, tokenizer, image_tokens=tokens)
        # Of what the module gives, which in some models (Gemma) is more than its weight says.
        with torch.no_grad():
            texts = language.get_input_embeddings()(torch.arange(min(len(tokenizer), 4096), device=language.device))
        scale_of_text = float(texts.float().square().mean().sqrt())
        settings = UniHeteroConfig(
            text_config=language.config,
            vision_config=vision.config,
            image_size=size,
            image_tokens=tokens,
            merge=config.merge,
            embed_scale=scale_of_text,
        )
    latents = None
    if config.vae is not None:
        latents = LatentMaker(
            AutoencoderKL.from_pretrained(artifacts.model_source(config.vae), use_safetensors=True).to(device),
            processor,
            settings.image_tokens,
        )
        settings.latent_width = latents.width
    branch = config.branch_from or settings.text_config.num_hidden_layers // 2
    settings = configured(with_tokens(settings, processor.tokenizer), arm, config.semantic_loss, branch)
    model = UniHeteroModel.from_parts(language, vision, settings, config.seed)
    if config.start is not None:
        _take_over(model, before)
    return Parts(model.to(device), processor, latents)


def stream_of(config: TrainConfig, indexes: list[Artifact], processor: UniHeteroProcessor) -> Stream:
    """The global batches over the corpora."""
    folder = config.cache or str(artifacts.cache_folder() / "shards")
    cache = Cache(folder, int(config.cache_gb * 1e9))
    share = 0.0 if config.train.stage == "projector" else config.text_first
    decode = Decode(processor, share, config.longest)
    sources = [ShardSource(index, decode, cache, name=f"corpus{n}") for n, index in enumerate(indexes)]
    packing = None
    if config.pack is not None:
        count = token_lengths(processor.image_tokens)
        lengths = {source.name: source.lengths(count) for source in sources}
        packing = Packing(config.pack, lengths, f"characters/{processor.image_tokens}")
    weights = dict(zip([source.name for source in sources], config.weights, strict=True)) if config.weights else None
    return Stream(sources, config.train.batch, seed=config.seed, window=config.window, weights=weights, packing=packing)


def full_weights(model: UniHeteroModel) -> dict[str, torch.Tensor]:
    """All weights on the CPU, tied ones as one tensor; every rank calls it."""
    found, seen = {}, {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            seen[id(value)] = whole.detach().cpu()
        found[name] = seen[id(value)]
    return found


def _take_over(model: UniHeteroModel, before: UniHeteroModel) -> None:
    """All weights of an earlier stage that the new model has places for; new heads keep what was drawn."""
    mine = model.state_dict()
    theirs = before.state_dict()
    fitting = {key: value for key, value in theirs.items() if key in mine and mine[key].shape == value.shape}
    if "projector.up.weight" not in fitting:
        raise ValueError("--start is a model with another projector: --image-tokens and --merge are those of its run")
    model.load_state_dict(fitting, strict=False)
    if model.target_projector is not None and before.target_projector is None:
        model.target_projector.load_state_dict(model.projector.state_dict())


def _write(
    writer: Writer, config: TrainConfig, parts: Parts, weights: Mapping[str, torch.Tensor], summary: TrainingSummary
) -> None:
    parts.model.save_pretrained(writer.folder, state_dict=dict(weights))
    parts.processor.save_pretrained(writer.folder)
    report: dict[str, Any] = {"steps": summary.steps, "loss": summary.loss, "corrupt": summary.corrupt}
    writer.write_json("report.json", report)
    (writer.folder / "README.md").write_text(_card(config, summary))
    writer.summary.update(report)


def _card(config: TrainConfig, summary: TrainingSummary) -> str:
    loss = "none" if summary.loss is None else f"{summary.loss:.4f}"
    began = f"Language model `{config.language}`, vision encoder `{config.vision}` (frozen)"
    if config.start is not None:
        began = f"From the run `{config.start}`"
    return (
        "---\nlibrary_name: transformers\ntags: [unihetero, vision-language]\n---\n\n"
        f"# A unified vision-language model (arm `{config.arm}`)\n\n"
        f"{began}, stage `{config.train.stage}`, {summary.steps} updates of {config.train.batch}; last loss {loss}.\n\n"
        "```python\nimport palate.unihetero.processing  # registers the classes\n"
        "from transformers import AutoModel, AutoProcessor\n\n"
        'model, processor = AutoModel.from_pretrained("."), AutoProcessor.from_pretrained(".")\n```\n'
    )
