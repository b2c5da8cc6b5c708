"""What stands behind the HTTP routes for images of one replica: the models in memory, and where they come from.

Models are named in the settings and in a registry, a JSON file that is read again whenever it changes, so that a run
is added, replaced or taken away without a restart. LoRAs of one base share its weights.
"""

import importlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from palate import artifacts
from palate.artifacts import Artifact, ArtifactMismatch
from palate.lpo.networks import load_lora
from palate.lpo.personal import load_branch
from palate.lpo.sampling import SampleConfig
from palate.lpo.stages import TUNED, check_base
from palate.models.diffusion import LoadedDiffusion, load_diffusion
from palate.serving.images import ImageModel, ImageWorker, Model, Review
from palate.serving.unified import load_images
from palate.users.checks import require_id
from palate.users.images import RankedImages
from palate.users.records import Ranking
from palate.users.store import Store, open_store

GRACE_SECONDS = 10.0  # how long a model that was taken away is kept for requests that have just asked for it
LOOK_SECONDS = 0.5  # how often the registry is looked at
RETRY_SECONDS = 10.0  # until a model that could not be loaded is tried again

log = logging.getLogger(__name__)


class ModelSource(BaseModel):
    """Where a model comes from, and how it draws where a request does not say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = None
    """A hub id or folder of a diffusers pipeline, or a built-in; by default what ``run`` was tuned from."""
    run: str | None = None
    """Folder or URL of a run of jobs/lpo.py, or of jobs/unihetero.py with a pixel decoder; without, the base as it
    is."""
    vae: str | None = None
    """Of a run of jobs/unihetero.py: the AutoencoderKL whose latents it was trained on, a hub id or a folder."""
    tenants: tuple[str, ...] | None = None
    """Who may use it, and see its people; by default everybody. A run with people needs it."""
    steps: int = Field(30, ge=1)
    guidance: float | None = Field(None, ge=0)
    """By default 7.5, and 1, which is none, for a run of jobs/unihetero.py."""
    image_guidance: float = Field(1.5, ge=1)

    @model_validator(mode="after")
    def _of_something(self) -> "ModelSource":
        if self.base is None and self.run is None:
            raise ValueError("a model needs 'base', 'run', or both")
        if self.vae is not None and (self.base is not None or self.run is None):
            raise ValueError("'vae' goes with the 'run' of a unified model, and without a 'base'")
        return self

    def sampling(self, steps: int | None, guidance: float | None, image_guidance: float | None) -> SampleConfig:
        """How to draw for a request that says this or nothing."""
        usual = self.guidance if self.guidance is not None else 7.5 if self.vae is None else 1.0
        return SampleConfig(
            sampler_steps=self.steps if steps is None else steps,
            guidance=usual if guidance is None else guidance,
            image_guidance=self.image_guidance if image_guidance is None else image_guidance,
        )


Sources = TypeAdapter(dict[str, ModelSource])


class ImageSettings(BaseModel):
    """How a replica serves images. The defaults are for a laptop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: dict[str, ModelSource] = Field(default_factory=dict)
    """Models by the names that clients use."""
    registry: str | None = None
    """A JSON file of further models, of the form of ``models``; read again when it changes."""
    default_model: str | None = None
    """What requests get that name no model."""
    safety: str | None = None
    """``package.module:function``, called on each image (PIL) before it is returned; None lets it through, a text is
    the reason why it is refused."""
    database: str = "sqlite:///palate.db"
    """URL of the user store that holds keys and rankings: a SQLite file, or PostgreSQL."""
    feedback: str | None = None
    """Folder or URL for the images that people rank; without it no ranking is taken."""
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int | None = Field(None, ge=1)
    """Threads of torch; all cores by default."""
    require_keys: bool = True
    """Whether every request needs an API key; without, everybody is the tenant "default"."""
    max_batch: int = Field(4, ge=1)
    """Images of equal shape that are drawn together."""
    max_waiting: int = Field(64, ge=0)
    """Images that may wait beside those; more are refused with 503."""
    max_in_flight: int = Field(16, ge=1)
    """Requests that one key may have under way in this replica, whose n images count each; more are refused with 429
    before their body is read."""
    max_images: int = Field(4, ge=1)
    """Largest ``n``."""
    max_steps: int = Field(100, ge=1)
    max_pixels: int = Field(1024 * 1024, ge=64 * 64)
    """Of an image that is drawn."""
    max_upload_pixels: int = Field(16_000_000, ge=1, le=Image.MAX_IMAGE_PIXELS or 2**31)
    """Of an image that is sent to be edited."""
    max_body_bytes: int = Field(20_000_000, ge=1000)

    @model_validator(mode="after")
    def _can_be_met(self) -> "ImageSettings":
        if self.max_images > min(self.max_batch + self.max_waiting, self.max_in_flight):
            raise ValueError("max_images is more than max_in_flight, or than max_batch and max_waiting together")
        return self


@dataclass(frozen=True, eq=False)
class HostedImages:
    """A model in memory by its name; ``version`` is the digest of its run, if it is of one."""

    name: str
    source: ModelSource
    model: Model
    version: str | None

    def visible_to(self, tenant: str) -> bool:
        return self.source.tenants is None or tenant in self.source.tenants


class ImageService:
    """One replica. ``ready`` says whether it has a model; ``healthy`` whether it should go on.

    Raises:
        ValueError: the database cannot be used, or the safety hook is none.
    """

    def __init__(self, settings: ImageSettings, *, store: Store | None = None) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        review = load_hook(settings.safety) if settings.safety else None
        self.store = store or open_store(settings.database)
        self.ranked = RankedImages(settings.feedback) if settings.feedback else None
        self.worker = ImageWorker(max_batch=settings.max_batch, max_waiting=settings.max_waiting, review=review)
        self.hosted: dict[str, HostedImages] = {}
        self.failed: dict[str, float] = {}  # models that could not be loaded, and when to try again
        self.registry_error: str | None = None
        self._added: dict[str, ModelSource] = {}
        self._registered: dict[str, ModelSource] = {}  # as last read without an error
        self._bases: WeakValueDictionary[str, LoadedDiffusion] = WeakValueDictionary()
        self._adapters = count()
        self._leaving: list[tuple[HostedImages, float]] = []  # taken away or replaced, and since when
        self._tending = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="palate-models", daemon=True)

    def start(self) -> "ImageService":
        """Load what settings and registry name, then keep tending in the background."""
        self.tend()
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the threads; what is still drawn fails with ``EngineFailed``."""
        self._stopping.set()
        self.worker.stop()  # first, lest a model waits to be put into a network that draws
        if self._thread.is_alive():
            self._thread.join()
        self.store.close()

    @property
    def ready(self) -> bool:
        return bool(self.hosted)

    @property
    def healthy(self) -> bool:
        """False once the device has failed: the replica must be replaced."""
        return self.worker.failure is None

    def find(self, name: str, tenant: str) -> HostedImages | None:
        """The model that a request names, if there is one for this tenant."""
        hosted = self.hosted.get(name)
        return hosted if hosted is not None and hosted.visible_to(tenant) else None

    def visible(self, tenant: str) -> list[HostedImages]:
        """The tenant's models by name."""
        return [hosted for _, hosted in sorted(self.hosted.items()) if hosted.visible_to(tenant)]

    def add(self, name: str, source: ModelSource) -> HostedImages:
        """Load a model now and serve it by ``name``, in the place of what has that name, until this replica ends.

        Raises:
            ValueError: it cannot be loaded.
            ArtifactError: its run is not finished, or damaged.
        """
        with self._tending:
            self._host(name, source)
            self._added[name] = source
            return self.hosted[name]

    def rank(self, tenant: str, ranking: Ranking, files: Mapping[str, bytes]) -> Ranking:
        """Store a ranking and the files of its images, by digest.

        Raises:
            ValueError: as ``Store.add_ranking``; or this server keeps no images.
        """
        if self.ranked is None:
            raise ValueError("this server takes no rankings: its setting 'feedback' names no folder")
        keep = partial(self.ranked.keep, tenant, files)
        self.store.announce_images(tenant, list(files))
        keep()  # the long part, while others may write; images that were removed meanwhile are put back below
        return self.store.add_ranking(tenant, ranking, keep)

    def delete_person(self, tenant: str, user_id: str) -> bool:
        """Delete all that is kept of a person, and images that only they ranked; False if there is nobody.

        Files that cannot be removed now are tried again in the background.
        """
        found = self.store.delete(tenant, user_id)
        self._try_to_remove_images()
        return found

    def remove_images(self) -> None:
        """Remove the images whose rankings were deleted, here or by a text server."""
        while self.ranked is not None and self.store.remove_images(self.ranked.remove):
            pass

    def tend(self) -> None:
        """Load what is named and not there yet, let go of what is no longer named."""
        with self._tending:
            wanted = {**self.settings.models, **self._read_registry(), **self._added}
            for name, source in wanted.items():
                if time.monotonic() < self.failed.get(name, 0.0):
                    continue
                try:
                    self._host(name, source)
                except Exception as error:  # of any library: one that cannot be loaded must not stop the others
                    log.error("%s cannot be served, and is tried again in %.0f s: %s", name, RETRY_SECONDS, error)
                    self.failed[name] = time.monotonic() + RETRY_SECONDS
            for name in [name for name in self.hosted if name not in wanted]:
                self._leave(self.hosted.pop(name))
            for name in [name for name in self.failed if name not in wanted]:
                del self.failed[name]
            self._let_go()

    def _read_registry(self) -> Mapping[str, ModelSource]:
        """What the registry names; where it cannot be read, what it named before."""
        if self.settings.registry is None:
            return {}
        try:
            self._registered = Sources.validate_json(Path(self.settings.registry).read_bytes())
            self.registry_error = None
        except (OSError, ValidationError) as error:
            if self.registry_error != str(error):
                log.error("the registry %s cannot be read, and what it named stays: %s", self.settings.registry, error)
            self.registry_error = str(error)
        return self._registered

    def _host(self, name: str, source: ModelSource) -> None:
        before = self.hosted.get(name)
        if before is not None and before.source == source:
            return
        require_id(name, "the name of a model")
        start = time.perf_counter()
        if source.run is not None and source.vae is not None:
            unified = load_images(source.run, source.vae, device=self.settings.device, dtype=self._dtype)
            self._put(HostedImages(name, source, unified, unified.served.version), start)
            return
        run = artifacts.open_artifact(artifacts.join(source.run, "tuned"), TUNED) if source.run else None
        if run and run.paths("person/") and source.tenants is None and self.settings.require_keys:
            raise ValueError(f"{source.run} knows people: say whose they are with 'tenants'")
        self._put(HostedImages(name, source, self._load(source, run), run.digest[:16] if run else None), start)

    def _put(self, made: HostedImages, start: float) -> None:
        """Serve a model that has been loaded since ``start``, in the place of what has its name."""
        self.failed.pop(made.name, None)
        before = self.hosted.get(made.name)
        self.hosted[made.name] = made
        if before is not None:
            self._leave(before)
        log.info("%s loaded in %.1f s", made.name, time.perf_counter() - start)

    def _load(self, source: ModelSource, run: Artifact | None) -> ImageModel:
        """The model: LoRAs share their base, what changes a network otherwise has one of its own."""
        if run is None:
            return ImageModel(self._base(str(source.base)))
        base = source.base or run.config["model"]
        if run.paths("lora/"):
            loaded, adapter = self._base(base), f"run-{next(self._adapters)}"
            check_base(loaded, run)
            self.worker.run(partial(_attach, loaded, run, adapter)).result()
            return ImageModel(loaded, adapter)
        if run.paths("pipeline/"):
            return ImageModel(self._fresh(str(run.local_folder("pipeline"))))
        if run.paths("person/"):
            loaded = self._fresh(base)
            check_base(loaded, run)
            people = load_branch(loaded.denoiser, run.local_folder("person")).to(loaded.device)
            loaded.denoiser.eval()
            return ImageModel(loaded, people=people)
        raise ArtifactMismatch(f"{run.url} has neither lora/, pipeline/ nor person/: is it a run of jobs/lpo.py?")

    def _base(self, name: str) -> LoadedDiffusion:
        """A base by name, shared by all that are drawn with its weights."""
        loaded = self._bases.get(name)
        if loaded is None:
            loaded = self._bases[name] = self._fresh(name)
        return loaded

    def _fresh(self, name: str) -> LoadedDiffusion:
        return load_diffusion(name, device=self.settings.device, dtype=self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.settings.precision == "bf16" else torch.float32

    def _leave(self, hosted: HostedImages) -> None:
        self._leaving.append((hosted, time.monotonic()))

    def _let_go(self) -> None:
        """Free models that were taken away, once nothing is drawn with them and nothing can be about to be."""
        staying = []
        for hosted, since in self._leaving:
            if self.worker.uses(hosted.model) or time.monotonic() - since < GRACE_SECONDS:
                staying.append((hosted, since))
            elif isinstance(hosted.model, ImageModel) and hosted.model.adapter is not None:
                network: Any = hosted.model.loaded.denoiser
                self.worker.run(partial(network.delete_adapters, hosted.model.adapter))
        self._leaving = staying

    def _repeat(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            try:
                self.tend()
            except Exception as error:
                log.exception("looking after the models failed, and is tried again: %s", error)
            self._try_to_remove_images()

    def _try_to_remove_images(self) -> None:
        try:
            self.remove_images()
        except Exception as error:  # the database or the images may be away for a while
            log.exception("removing images of deleted rankings failed, and is tried again: %s", error)


def _attach(loaded: LoadedDiffusion, run: Artifact, adapter: str) -> None:
    """Put a run's LoRA into the base, which is drawn without it until it is asked for by name."""
    load_lora(loaded, str(run.local_folder("lora")), adapter)
    loaded.denoiser.eval()  # dropout too


def load_hook(path: str) -> Review:
    """The function at ``package.module:function``.

    Raises:
        ValueError: there is none.
    """
    module, _, name = path.partition(":")
    try:
        found: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise ValueError(f"safety {path!r} cannot be imported: {error}. Give package.module:function") from error
    if not callable(found):
        raise ValueError(f"safety {path!r}: {module} has no function {name!r}. Give package.module:function")
    return found
