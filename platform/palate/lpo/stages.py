"""LPO from ranked lists to a tuned generator: encode -> tune -> write what plain diffusers loads.

    RUN/encoded     latents and text embeddings, once
    RUN/people      with --personal examples: people's vectors
    RUN/reference   with --fixed-draws: the reference's errors, once
    RUN/training    checkpoints and logs (TensorBoard, JSON lines)
    RUN/tuned       lora/, pipeline/ or person/, a model card, signals on held-out lists, and a grid of images

Started again, the pipeline skips what is finished and goes on where it was.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from peft import get_peft_model_state_dict
from PIL import Image
from torch import nn

from palate import artifacts, progress
from palate.artifacts import Artifact, ArtifactMismatch, Writer, join
from palate.config import identity, scale, to_dict
from palate.corpora.pictures import decode_image, read_images
from palate.corpora.preparation import Runner, run_local
from palate.corpora.schema import RANKED_LISTS
from palate.lpo import personal, sampling
from palate.lpo.denoising import noise_schedule
from palate.lpo.encoding import EncodeConfig, Encoded, encode, square
from palate.lpo.networks import TRAINED, WeightsConfig, lora_digest, tuned
from palate.lpo.reference import precomputed
from palate.lpo.samples import DrawConfig, Drawing, Users, image_source, list_source, read_lists
from palate.lpo.sampling import SampleConfig
from palate.lpo.taste import TASTE, save_tastes, taste_vectors
from palate.lpo.training import Denoiser, ObjectiveConfig, TuneConfig, measure, tune
from palate.models.diffusion import LoadedDiffusion, load_diffusion
from palate.models.image_features import PIXELS, image_features
from palate.training.checkpoints import Store
from palate.training.loop import TrainingSummary
from palate.training.parallel import World

log = logging.getLogger(__name__)

TUNED, PEOPLE = "lpo-tuned", "lpo-people"


@dataclass(frozen=True)
class PersonalConfig:
    """One model for many people: an embedding each, read by decoupled cross-attention."""

    personal: Literal["none", "learned", "examples"] = "none"
    """learned: an embedding for each person of the training lists, beside a frozen base model; examples: a vector
    computed from each person's example lists, so that people whom the training does not see have one too."""
    width: int = 32
    """Of a learned embedding."""
    examples_split: Literal["examples", "validation", "train"] = "examples"
    """Where the examples come from. Of other lists than the training's, a vector says what it will say of strangers."""
    features: str = PIXELS
    """What examples are compared by: "pixels", simple statistics, or a CLIP or DINO model by folder or hub id."""


@dataclass(frozen=True)
class LpoConfig:
    """Tune an image generator on ranked lists."""

    lists: str
    """Prepared lists (jobs/prepare.py rankings): a folder or URL."""
    out: str = scale()
    """Folder or URL of the run."""
    model: str = "shapes"
    """Base model: a hub id or a folder of a diffusers pipeline."""
    train_on: Literal["lists", "images"] = "lists"
    """images: the captioned images, or edits, that `jobs/prepare.py shapes` puts beside the lists, to train a base
    model (with --objective denoising and --weights full)."""
    seed: int = 0
    """Of everything that is drawn."""
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    draw: DrawConfig = field(default_factory=DrawConfig)
    learn: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    personal: PersonalConfig = field(default_factory=PersonalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    grid: int = 6
    """Captions of held-out lists in the grid of images; 0: none."""
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


def start_over(config: LpoConfig) -> None:
    """Discard the run's stages, if ``fresh``."""
    if config.fresh:
        artifacts.discard(join(config.out, "tuned"))
        stages = [artifacts.folders(join(config.out, name)) for name in ("encoded", "reference")]
        for folder in (*chain.from_iterable(stages), join(config.out, "people")):
            artifacts.discard(folder)
        Store(join(config.out, "training"), {}, 1, World()).discard()


def encode_lists(
    config: LpoConfig, device: str, runner: Runner = run_local, loaded: LoadedDiffusion | None = None
) -> Encoded:
    """The first stage, unless it is finished.

    Args:
        device: where the encoders run if the settings do not say.
        loaded: the model, for a runner in this process; used where it is on that device.
    """
    lists = artifacts.open_artifact(config.lists, RANKED_LISTS)
    settings = replace(config.encode, encode_device=config.encode.encode_device or device)
    at_hand = loaded if loaded is not None and str(loaded.device) == settings.encode_device else None
    return encode(lists, at_hand or config.model, join(config.out, "encoded"), settings, runner)


def people_of_examples(config: LpoConfig, lists: Artifact, device: str) -> Artifact:
    """Everybody's vector from their example lists, unless they are there."""
    chosen = {"split": config.personal.examples_split, "features": config.personal.features}

    def produce(writer: Writer) -> None:
        features = image_features(config.personal.features, device)
        tastes = taste_vectors(lists, config.personal.examples_split, features)
        save_tastes(tastes, writer.folder)
        writer.summary.update(people=len(tastes.ids), width=tastes.vectors_UD.shape[1])
        trained = set(read_lists(lists, "train")["user_id"].to_pylist()) - {None}
        nobody = sorted(trained - set(tastes.ids))
        print(f"{len(tastes.ids)} people have examples, {len(trained) - len(nobody)} of the {len(trained)} in training")
        if nobody:
            log.warning("without examples, their training lists are nobody's: %s", ", ".join(nobody[:5]))

    return artifacts.ensure(join(config.out, "people"), produce, kind=PEOPLE, config=chosen, inputs={"lists": lists})


def pipeline(config: LpoConfig, world: World) -> Artifact:
    """Every stage that is not finished; every rank calls it. Returns the tuned artifact.

    Raises:
        ArtifactMismatch: the run folder holds another run.
        TrainingStopped: a guard ended the training.
        ValueError: settings, model and lists do not go together.
    """
    _check(config)
    lists = artifacts.open_artifact(config.lists, RANKED_LISTS)
    out = join(config.out, "tuned")
    loaded = load_diffusion(config.model, device=str(world.device))
    described = {**identity(config), **_identity(config, loaded)}
    again = _differs_in_pictures(out, described)
    if not again and (found := artifacts.finished(out, kind=TUNED, config=described, inputs={"lists": lists})):
        return found
    if world.main:
        with progress.stage("encode"):
            encode_lists(config, str(world.device), loaded=loaded)
        if config.personal.personal == "examples":
            with progress.stage("people"):
                people_of_examples(config, lists, str(world.device))
    world.barrier()
    encoded = Encoded(join(config.out, "encoded"))
    run = _Run(config, lists, encoded, loaded, world)
    with progress.stage("tune"):
        summary = run.tune()
    if world.main:
        with progress.stage("write"):
            produce = partial(run.write, summary=summary)
            artifacts.ensure(out, produce, kind=TUNED, config=described, inputs={"lists": lists}, fresh=again)
    world.barrier()
    return artifacts.open_artifact(out, TUNED)


def _check(config: LpoConfig) -> None:
    if config.train_on == "images" and config.learn.objective != "denoising":
        raise ValueError("--train-on images has nothing that is ranked: it goes with --objective denoising")
    if config.personal.personal != "none" and config.weights != WeightsConfig():
        raise ValueError(
            f"--personal {config.personal.personal} trains the branch that reads people's vectors, and nothing else: "
            "leave out --weights, --rank, --alpha, --targets, --start-lora, --reference-lora, --gradient-checkpointing"
        )


def _identity(config: LpoConfig, loaded: LoadedDiffusion) -> dict[str, Any]:
    """What decides a run beside its settings: the weights behind names, and whose gradients the safeguard weighs."""
    found: dict[str, Any] = {"base_weights": loaded.weights}
    for name in ("start_lora", "reference_lora"):
        if path := getattr(config.weights, name):
            found[f"{name}_weights"] = lora_digest(path)
    if config.learn.safeguard_mu is not None:
        found["safeguard_by"] = "parameters" if config.tune.caching == "one-pass" else "predictions"
    return found


def _differs_in_pictures(out: str, described: Mapping[str, Any]) -> bool:
    """Whether what is finished differs in its grid alone, which needs no training to be made again."""
    if not artifacts.exists(out):
        return False
    before = artifacts.open_artifact(out, TUNED).config
    pictures = {name: described[name] for name in ("sample", "grid")}
    return dict(before) != dict(described) and {**before, **pictures} == described


def check_base(loaded: LoadedDiffusion, run: Artifact) -> None:
    """Refuse a base model other than the one that a run tuned.

    Raises:
        ArtifactMismatch: naming both.
    """
    if loaded.weights != base_weights(run):
        raise ArtifactMismatch(
            f"the base model {loaded.name} has the weights {loaded.weights}, but {run.url} was tuned from weights "
            f"{base_weights(run)}: give the base that it was tuned from, or tune this one"
        )


def base_weights(run: Artifact) -> str:
    """Which weights a run tuned.

    Raises:
        ArtifactMismatch: it does not say.
    """
    if "base_weights" not in run.config:
        raise ArtifactMismatch(
            f"{run.url} does not say which weights it was tuned from: it is of an older version; tune anew"
        )
    return str(run.config["base_weights"])


@dataclass
class _Run:
    config: LpoConfig
    lists: Artifact
    encoded: Encoded
    loaded: LoadedDiffusion
    world: World

    def __post_init__(self) -> None:
        self.schedule = noise_schedule(self.loaded.scheduler)
        self.people = self._people()

    def _people(self) -> personal.People | None:
        """Those who are learned, or who have examples."""
        chosen = self.config.personal
        if chosen.personal == "none":
            return None
        if chosen.personal == "examples":
            made = artifacts.open_artifact(join(self.config.out, "people"), PEOPLE)
            return personal.load_people(made.local_folder())
        found = set(read_lists(self.lists, "train")["user_id"].to_pylist()) - {None}
        if not found:
            raise ValueError(
                f"{self.config.lists} names no person: prepare the lists with --group-by caption-user, or leave "
                "--personal out"
            )
        return personal.new_people(sorted(found), chosen.width, self.config.seed)

    def drawing(self, config: DrawConfig) -> Drawing:
        users = Users(self.people.places) if self.people else None
        return drawing_of(self.loaded, self.encoded, config, users)

    def tune(self) -> TrainingSummary:
        """Train, and leave the tuned weights in the loaded pipeline."""
        config = self.config
        network = self.loaded.denoiser
        if self.people is not None:
            people = self.people.to(self.world.device)
            personal.add_branch(network, people.embeddings_UJ.shape[1], config.seed)
            parameters = personal.branch_parameters(network)
            if people.embeddings_UJ.requires_grad:
                parameters = [("people.embeddings_UJ", people.embeddings_UJ), *parameters]
            network.add_module("people", people)  # a parameter of the model like the others, while it trains
            denoiser = Denoiser(
                network,
                self.loaded.family,
                self.schedule,
                partial(_itself, network),
                partial(people.given, network),
            )
        else:
            keep = not config.draw.fixed_draws
            parameters, reference = tuned(self.loaded, config.weights, config.seed, keep_reference=keep)
            denoiser = Denoiser(network, self.loaded.family, self.schedule, reference)
        network.train()
        described = {name: value for name, value in identity(config).items() if name not in ("sample", "grid")}
        described |= _identity(config, self.loaded)
        self.denoiser = denoiser
        source_of = image_source if config.train_on == "images" else list_source
        source = source_of(self.lists, "train", self.drawing(config.draw))
        self.left_out = source.left_out
        if config.draw.fixed_draws and config.learn.objective not in ("sft", "denoising"):
            kept = ("model", "weights", "draw", "personal", "seed", "encode")
            what = {name: described[name] for name in kept} | _identity(config, self.loaded)
            what["precision"] = config.tune.precision
            source = precomputed(denoiser, source, config.tune, join(config.out, "reference"), self.world, what)
        summary = tune(
            denoiser,
            parameters,
            source,
            config.learn,
            config.tune,
            join(config.out, "training"),
            self.world,
            seed=config.seed,
            identity={"lpo": described, "lists": self.lists.digest},
        )
        network.eval()
        if config.draw.fixed_draws and config.weights.weights == "full" and self.people is None:
            base = load_diffusion(config.model, device=str(self.world.device)).denoiser
            self.denoiser = replace(denoiser, reference=lambda: nullcontext(base))
        return summary

    def write(self, writer: Writer, summary: TrainingSummary) -> None:
        """The tuned weights, how they do on held-out lists, a grid and a model card."""
        report: dict[str, float] = {}
        examples = self.config.personal.examples_split if self.config.personal.personal == "examples" else None
        whole = DrawConfig(prompt_dropout=0, source_dropout=0, user_dropout=0)
        for split in ("validation", "test"):
            # Lists that people's vectors are made of say nothing of what is held out.
            if split != examples and read_lists(self.lists, split).num_rows:
                measured = measure(
                    self.denoiser,
                    list_source(self.lists, split, self.drawing(whole)),
                    self.config.learn,
                    self.config.tune,
                )
                report |= {f"{split}/{name}": value for name, value in measured.items()}
        pipeline = self.loaded.pipeline
        network = self.loaded.denoiser
        if self.people is not None:
            del network.people
            personal.save_branch(network, self.people, writer.folder / "person")
            if self.config.personal.personal == "examples":  # what a later person is measured by
                made = artifacts.open_artifact(join(self.config.out, "people"), PEOPLE)
                shutil.copy(made.local(TASTE), writer.folder / "person" / TASTE)
        elif self.config.weights.weights == "lora":
            part = self.loaded.denoiser_name
            state = get_peft_model_state_dict(network, adapter_name=TRAINED)
            shape = network.peft_config[TRAINED].to_dict()  # type: ignore[union-attr, index]
            keywords = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": shape}
            pipeline.save_lora_weights(writer.folder / "lora", **keywords)
        else:
            pipeline.save_pretrained(writer.folder / "pipeline")
        if self.config.grid:
            self._grid().save(writer.folder / "grid.png")
        card = model_card(self.config, self.lists, report)
        report |= {"seconds": summary.seconds, "unreadable_lists": float(summary.corrupt)}
        report["lists_without_images"] = float(self.left_out)
        writer.write_json("report.json", report)
        (writer.folder / "README.md").write_text(card)
        writer.summary.update(report)

    def _grid(self) -> Any:
        """The same seeds before and after, or of some people: captions of held-out lists, or edits of their sources."""
        people, side = self.people, self.encoded.resolution
        tables = [read_lists(self.lists, split) for split in ("test", "validation", "train")]
        rows = next((table for table in tables if table.num_rows), tables[0]).to_pylist()
        editing = self.loaded.family == "ip2p"
        found = {row["instruction" if editing else "caption"]: row for row in rows}  # one list of each text
        captions = sorted(found)[: self.config.grid]
        given: dict[str, list[Image.Image]] = {}
        if editing:
            contents = read_images(self.lists, {found[caption]["source_image"] for caption in captions})
            sources = [decode_image(contents[found[caption]["source_image"]]) for caption in captions]
            given = {"source": [square(source, side)[0] for source in sources]}
        make = partial(
            sampling.generate,
            self.loaded.pipeline,
            captions,
            list(range(len(captions))),
            self.config.sample,
            size=(side, side),
            sources=given.get("source"),
        )
        network: Any = self.loaded.denoiser
        if people is not None:
            columns = dict(given)
            for place, user in [(0, "nobody"), *list(enumerate(people.ids))[:3]]:
                scale = torch.full((1,), 0.0 if user == "nobody" else 1.0)
                personal.set_people(network, scale.to(self.world.device))
                columns[user] = make(
                    embeddings=people.embeddings_UJ[place].detach().expand(len(captions), -1), label=f"images: {user}"
                )
            return sampling.grid(captions, columns)
        pipeline, name = self.loaded.pipeline, self.loaded.denoiser_name
        with self.denoiser.reference() as reference:
            setattr(pipeline, name, reference)
            before = make(label="images before")
        setattr(pipeline, name, network)
        return sampling.grid(captions, given | {"before": before, "after": make(label="images after")})


def model_card(config: LpoConfig, lists: Artifact, report: Mapping[str, float]) -> str:
    """What was tuned, on what and how it did on held-out lists, in the form that model hubs show."""
    kind = (
        "person" if config.personal.personal != "none" else "lora" if config.weights.weights == "lora" else "pipeline"
    )
    use = {
        "lora": "pipeline.load_lora_weights(FOLDER + '/lora')",
        "pipeline": "pipeline = DiffusionPipeline.from_pretrained(FOLDER + '/pipeline')",
        "person": (
            "pipeline.load_ip_adapter(FOLDER + '/person', '', 'ip_adapter.safetensors', image_encoder_folder=None)\n"
            "# a person's row of users.safetensors, twice (guidance is of the text alone): ip_adapter_image_embeds"
        ),
    }[kind]
    picture = "![The same seeds side by side](grid.png)\n\n" if config.grid else ""
    rows = "".join(f"| {name} | {value:.4f} |\n" for name, value in sorted(report.items()))
    chosen = to_dict(config.learn) | {
        "learning_rate": config.tune.learning_rate,
        "resolution": config.encode.resolution,
        "seed": config.seed,
    }
    if config.personal.personal == "none":
        chosen |= to_dict(config.weights)
    learned = "".join(f"| {name} | {value} |\n" for name, value in chosen.items())
    return (
        f"---\nbase_model: {config.model}\nlibrary_name: diffusers\ntags: [preference-tuning, diffusion-lpo]\n---\n\n"
        f"# {config.model}, tuned on ranked lists\n\n"
        f"Tuned by Palate: {config.learn.objective} over {config.tune.steps} steps of {config.tune.batch} lists "
        f"(Diffusion-LPO, arXiv 2510.01540). The lists have the digest `{lists.digest[:16]}`. Whose taste this is, "
        "those lists say; weights can keep traces of what they were tuned on, and the licences of these images and of "
        "the base model hold for what is made of them.\n\n"
        f"```python\n{use}\n```\n\n{picture}"
        f"| setting | value |\n|---|---|\n{learned}\n"
        f"| on held-out lists | value |\n|---|--:|\n{rows}"
    )


def drawing_of(loaded: LoadedDiffusion, encoded: Encoded, config: DrawConfig, users: Users | None = None) -> Drawing:
    """How records become samples for this model."""
    vae: Any = loaded.vae.config
    return Drawing(
        encoded,
        noise_schedule(loaded.scheduler),
        config,
        scaling=(float(vae.get("shift_factor") or 0.0), float(vae.get("scaling_factor") or 1.0)),
        editing=loaded.family == "ip2p",
        sized=loaded.family == "sdxl",
        zero_prompt=bool(loaded.pipeline.config.get("force_zeros_for_empty_prompt")),
        users=users,
    )


@contextmanager
def _itself(network: nn.Module) -> Iterator[nn.Module]:
    """A reference that is the network, told of nobody."""
    yield network
