"""A thread that draws images on request: requests of equal shape go through a pipeline together, others in turn.

Each image has a generator of its own, so its noise does not depend on what is drawn with it; what is left is the
rounding of batched matrix products. Batches are taken in order of arrival: the oldest waiting request, and those of
its shape behind it. The queue is bounded: what would wait behind too many is refused at once. A request whose client
is gone leaves the queue, and a batch that nobody waits for any more ends before its next step.
"""

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import nn

from palate.lpo.personal import People, set_people
from palate.lpo.sampling import SampleConfig, generate
from palate.models.diffusion import LoadedDiffusion
from palate.serving.answering import NotFinite
from palate.serving.unified import UnifiedImages
from palate.serving.worker import EngineFailed, Load, Overloaded

Result = TypeVar("Result")
Review = Callable[[Image.Image], object]
OnStep = Callable[[int, int], None]  # steps done, and of how many

log = logging.getLogger(__name__)


class Refused(Exception):
    """The safety hook refused an image; the message is its reason."""


class ReviewFailed(Exception):
    """The safety hook failed, so that nobody knows whether the image may be shown."""


class _Abandoned(Exception):
    """Nobody waits for a batch any more."""


@dataclass(frozen=True, eq=False)
class ImageModel:
    """A generator in memory.

    Attributes:
        adapter: name of the LoRA in the denoiser that draws; None: the denoiser without any.
        people: whose embeddings the denoiser's branch takes; None: it has no branch.
    """

    loaded: LoadedDiffusion
    adapter: str | None = None
    people: People | None = None

    @property
    def editing(self) -> bool:
        """Whether it changes an image rather than making one."""
        return self.loaded.family == "ip2p"

    @property
    def base(self) -> str:
        """The pipeline that draws, by name."""
        return self.loaded.name

    @property
    def personal(self) -> bool:
        """Whether it knows people."""
        return self.people is not None

    @property
    def multiple(self) -> int:
        """What the sides of its images are multiples of."""
        pipeline: Any = self.loaded.pipeline
        patch = 2 if self.loaded.denoiser_name == "transformer" else 1
        return math.lcm(8, pipeline.vae_scale_factor * patch)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the images that it was made for."""
        pipeline: Any = self.loaded.pipeline
        side = getattr(pipeline, "default_sample_size", None) or pipeline.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return width * pipeline.vae_scale_factor, height * pipeline.vae_scale_factor

    def knows(self, user: str | None) -> bool:
        """Whether images for this person are other than those for anybody."""
        return self.people is not None and user in self.people.places


Model = ImageModel | UnifiedImages


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """One image: ``size`` is (width, height), and ``source`` the image to be edited, of that size."""

    model: Model
    prompt: str
    seed: int
    size: tuple[int, int]
    config: SampleConfig
    user: str | None = None
    source: Image.Image | None = None

    @property
    def shape(self) -> Hashable:
        """Requests of equal shape can be drawn together."""
        return self.model, self.size, self.config


@dataclass(frozen=True)
class Progress:
    """``step`` of ``of`` denoising steps are done; of a unified model, which draws one after another, images."""

    step: int
    of: int


@dataclass(frozen=True, eq=False)
class Drawn:
    """The image, which the safety hook has let through."""

    image: Image.Image


Event = Progress | Drawn


@dataclass(eq=False)
class _Place:
    """An image under way and where its events go."""

    request: ImageRequest
    deliver: Callable[[Event | Exception], None]
    closed: bool = False


def draw(requests: Sequence[ImageRequest], on_step: OnStep) -> list[Image.Image | NotFinite]:
    """Images for requests of equal shape, in one call of their pipeline, or by a unified model in turn.

    Raises:
        ValueError: the pipeline cannot draw them.
    """
    first = requests[0]
    model, size = first.model, first.size
    if isinstance(model, UnifiedImages):
        return _draw_in_turn(model, requests, on_step)
    watched = _Watched(model.loaded.pipeline, on_step)
    _use_adapter(model.loaded.denoiser, model.adapter)
    images = generate(
        watched,
        [request.prompt for request in requests],
        [request.seed for request in requests],
        replace(first.config, batch=len(requests)),
        size=(size[1], size[0]),
        sources=[request.source for request in requests if request.source is not None] if model.editing else None,
        embeddings=_embeddings(model, requests),
    )
    broken = [NotFinite("the model gave NaN or infinite values for this image")] * len(images)
    return [image if fine else error for image, fine, error in zip(images, watched.finite, broken, strict=True)]


def _draw_in_turn(
    model: UnifiedImages, requests: Sequence[ImageRequest], on_step: OnStep
) -> list[Image.Image | NotFinite]:
    """Images by a unified model, whose heads draw for a whole batch by one seed."""
    drawn = []
    for done, request in enumerate(requests, 1):
        drawn.append(model.draw(request.prompt, request.seed, request.config.sampler_steps, request.config.guidance))
        on_step(done, len(requests))
    return drawn


def _embeddings(model: ImageModel, requests: Sequence[ImageRequest]) -> torch.Tensor | None:
    """The people's embeddings, (N, J), with the denoiser told of each image whether it is for anybody it knows."""
    if model.people is None:
        return None
    known = [model.knows(request.user) for request in requests]
    sides = requests[0].config.sides(model.editing)
    set_people(model.loaded.denoiser, torch.tensor(known, device=model.loaded.device).float().repeat(sides))
    embeddings_NJ = model.people.embeddings_UJ.new_zeros(len(requests), model.people.embeddings_UJ.shape[1])
    for place, request in enumerate(requests):
        if known[place]:
            embeddings_NJ[place] = model.people.embeddings_UJ[model.people.places[str(request.user)]].detach()
    return embeddings_NJ


def _use_adapter(denoiser: nn.Module, adapter: str | None) -> None:
    """Draw with one LoRA of the denoiser's, or with none."""
    network: Any = denoiser
    if not getattr(network, "peft_config", None):
        return
    if adapter is None:
        network.disable_adapters()
    else:
        network.enable_adapters()
        network.set_adapters([adapter])


class _Watched:
    """A pipeline that tells of its steps, and whether the latents of each image are finite at the end."""

    def __init__(self, pipeline: Any, on_step: OnStep) -> None:
        self.pipeline, self.on_step = pipeline, on_step
        self.finite: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def __call__(self, **given: Any) -> Any:
        return self.pipeline(**given, callback_on_step_end=self._after)

    def _after(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        of = len(pipeline.scheduler.timesteps)
        if step == of - 1:
            self.finite = tensors["latents"].isfinite().flatten(1).all(1).tolist()
        self.on_step(step + 1, of)
        return {}


class ImageWorker:
    """Draws until ``stop``.

    Args:
        max_batch: images that are drawn together.
        max_waiting: images that may wait beside those.
        review: the safety hook, called on each image by this thread alone; None lets it through, a text is the
            reason why it is refused, and anything else, or an exception, withholds it too.
        draw: what draws a batch.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_waiting: int,
        review: Review | None = None,
        draw: Callable[[Sequence[ImageRequest], OnStep], Sequence[Image.Image | Exception]] = draw,
    ) -> None:
        if max_batch < 1 or max_waiting < 0:
            raise ValueError(f"max_batch must be at least 1 and max_waiting 0, found {max_batch} and {max_waiting}")
        self.max_batch, self.most = max_batch, max_batch + max_waiting
        self.failure: BaseException | None = None
        self._review, self._draw_all = review, draw
        self._wake = threading.Condition()
        self._waiting: deque[_Place] = deque()
        self._running: list[_Place] = []
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._active = 0  # places that have not been left
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="palate-images", daemon=True)
        self._thread.start()

    @property
    def load(self) -> Load:
        with self._wake:
            return Load(sum(not place.closed for place in self._running), len(self._waiting), len(self._jobs))

    def uses(self, model: Model) -> bool:
        """Whether an image of the model's is being drawn or waits."""
        with self._wake:
            return any(place.request.model is model for place in (*self._running, *self._waiting))

    def run(self, work: Callable[[], Result]) -> "Future[Result]":
        """Call ``work`` on the thread before the next batch: what changes a network that draws."""
        future: Future[Result] = Future()
        with self._wake:
            if self._stopping:
                future.set_exception(EngineFailed("the engine has stopped"))
            else:
                self._jobs.append((work, future))
                self._wake.notify()
        return future

    def stop(self) -> None:
        """End the thread at the next step; what still runs or waits fails with ``EngineFailed``."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def enter(self, places: Sequence[_Place]) -> None:
        """Queue images, all of them or none.

        Raises:
            Overloaded: too many wait.
            EngineFailed: nothing is drawn any more.
        """
        with self._wake:
            if self._stopping:
                raise EngineFailed("the engine has stopped") from self.failure
            if self._active + len(places) > self.most:
                raise Overloaded(
                    f"{self._active} images are drawn or wait, and {self.most} may: {len(places)} more do not fit"
                )
            self._active += len(places)
            self._waiting.extend(places)
            self._wake.notify()

    def leave(self, places: Sequence[_Place]) -> None:
        """Nobody waits for these any more, or they are done."""
        with self._wake:
            for place in places:
                if not place.closed:
                    place.closed = True
                    self._active -= 1
                    with suppress(ValueError):
                        self._waiting.remove(place)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            log.exception("the engine failed")
            self.failure = error
        self._end()

    def _turn(self) -> bool:
        """Wait for a job or a batch, and do it; False when it is time to stop."""
        with self._wake:
            self._running = []
            self._wake.wait_for(lambda: self._stopping or self._jobs or self._waiting)
            if self._stopping:
                return False
            job = self._jobs.popleft() if self._jobs else None
            if job is None:
                self._running = self._next_batch()
        if job is not None:
            _do(*job)
        else:
            self._draw(self._running)
        return True

    def _next_batch(self) -> list[_Place]:
        """The oldest that waits and those of its shape, taken from the queue."""
        shape = self._waiting[0].request.shape
        batch = [place for place in self._waiting if place.request.shape == shape][: self.max_batch]
        taken = set(map(id, batch))
        self._waiting = deque(place for place in self._waiting if id(place) not in taken)
        return batch

    def _draw(self, batch: Sequence[_Place]) -> None:
        """Draw a batch; where it fails, each of its images alone, so that none fails for another's sake."""

        def on_step(step: int, of: int) -> None:
            if self._stopping or all(place.closed for place in batch):
                raise _Abandoned
            for place in batch:
                place.deliver(Progress(step, of))

        try:
            images = self._draw_all([place.request for place in batch], on_step)
        except _Abandoned:
            images = [EngineFailed("the server is stopping")] * len(batch)
        except torch.AcceleratorError as error:  # the device is unusable from here on
            log.exception("the device failed")
            self.failure, self._stopping = error, True
            images = [EngineFailed(f"the device failed: {error}")] * len(batch)
        except Exception as error:
            if len(batch) > 1:
                for place in batch:
                    if not place.closed:
                        self._draw([place])
                return
            if not isinstance(error, ValueError):
                log.exception("an image could not be drawn")
                error = EngineFailed(f"the image could not be drawn: {type(error).__name__}")
            images = [error]
        for place, image in zip(batch, images, strict=True):
            if not place.closed:
                place.deliver(self._reviewed(image) if isinstance(image, Image.Image) else image)

    def _reviewed(self, image: Image.Image) -> Drawn | Exception:
        if self._review is None:
            return Drawn(image)
        try:
            reason = self._review(image.copy())
        except Exception:
            log.exception("the safety hook failed, and the image is withheld")
            return ReviewFailed("the safety hook failed, so the image is withheld; the server's log says why")
        if reason is None:
            return Drawn(image)
        if isinstance(reason, str):
            return Refused(reason)
        log.error("the safety hook gave %r, and the image is withheld: expected a reason or None", reason)
        return ReviewFailed("the safety hook gave neither a reason nor None, so the image is withheld")

    def _end(self) -> None:
        """Fail what is left."""
        with self._wake:
            self._stopping = True
            waiting, self._waiting = list(self._waiting), deque()
            jobs, self._jobs = list(self._jobs), deque()
        for place in (*self._running, *waiting):
            place.deliver(EngineFailed("the server is stopping"))
        for _, future in jobs:
            future.set_exception(EngineFailed("the engine has stopped"))


class Drawing:
    """The images of one request as they come. Whoever makes one must close it, which stops what is not done.

    Raises:
        Overloaded, EngineFailed: as ``ImageWorker.enter``.
    """

    def __init__(self, worker: ImageWorker, requests: Sequence[ImageRequest]) -> None:
        loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._left = len(requests)
        self._worker = worker

        def place(index: int, request: ImageRequest) -> _Place:
            def deliver(event: Event | Exception) -> None:
                with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    loop.call_soon_threadsafe(self._arrived.put_nowait, (index, event))

            return _Place(request, deliver)

        self._places = [place(index, request) for index, request in enumerate(requests)]
        worker.enter(self._places)

    async def next(self) -> tuple[int, Event] | None:
        """The next event of any of the images, with its place in the request; None when all are drawn.

        Raises:
            Refused, ReviewFailed: the safety hook's word on an image.
            NotFinite: the model gave NaN or infinite values.
            EngineFailed: an image could not be drawn, or the server is stopping.
            ValueError: the pipeline cannot draw this.
        """
        if not self._left:
            return None
        index, event = await self._arrived.get()
        if isinstance(event, Exception):
            raise event
        self._left -= isinstance(event, Drawn)
        return index, event

    async def close(self) -> None:
        self._worker.leave(self._places)


def _do(work: Callable[[], Result], future: "Future[Result]") -> None:
    try:
        result = work()
    except Exception as error:  # the work's own trouble, not the worker's
        future.set_exception(error)
    else:
        future.set_result(result)
