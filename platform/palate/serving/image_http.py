"""The HTTP application for images of one replica: OpenAI's routes, behind the middleware of the text server."""

import asyncio
import base64
import io
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image, ImageOps
from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from palate.serving.answering import NotFinite
from palate.serving.errors import ApiError, sent
from palate.serving.http import (
    ERRORS,
    PERSONALIZATION,
    By,
    Caller,
    ClientGone,
    EventStream,
    guarded_app,
    impersonal,
    require_user,
    take_places,
    translated,
    unless_gone,
)
from palate.serving.image_schemas import (
    EditRequest,
    FormError,
    GenerationRequest,
    RankingRequest,
    fitted_size,
    one_image,
    read_form,
    read_upload,
)
from palate.serving.image_service import HostedImages, ImageService
from palate.serving.images import Drawing, Drawn, Event, ImageRequest, Progress, Refused, ReviewFailed
from palate.serving.metrics import SECONDS, RequestMetrics
from palate.serving.schemas import MAX_SEED
from palate.serving.sent_images import read_encoded
from palate.serving.unified import UnifiedImages
from palate.serving.worker import EngineFailed, Overloaded
from palate.users.images import png_of
from palate.users.records import Ranking
from palate.users.store import OtherRanking

Body = GenerationRequest | EditRequest


def create_image_app(service: ImageService) -> FastAPI:
    """The application over ``service``; the service is started and stopped by whoever made it."""
    return guarded_app("Images in OpenAI's shapes.", routes, service, ImageMetrics(service))


class ImageMetrics(RequestMetrics):
    """Counts images and how long they took; the load is read from the service when asked."""

    def __init__(self, service: ImageService) -> None:
        super().__init__()
        self._images = Counter("palate_images", "Images returned", registry=self._registry)
        self._refused = Counter("palate_images_refused", "Refused by the safety hook", registry=self._registry)
        self._whole = Histogram(
            "palate_image_seconds", "From a request to all its images", buckets=SECONDS, registry=self._registry
        )
        self._registry.register(_Load(service))

    def answered(self, started: float, images: int) -> None:
        """A complete answer; ``started`` is ``time.perf_counter()`` at its request."""
        self._whole.observe(time.perf_counter() - started)
        self._images.inc(images)

    def refused(self) -> None:
        self._refused.inc()


class _Load:
    """What the replica is drawing at the moment."""

    def __init__(self, service: ImageService) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        load = self._service.worker.load
        for name in ("running", "waiting"):
            yield GaugeMetricFamily(f"palate_images_{name}", f"Images that are {name}", value=getattr(load, name))


routes = APIRouter()

EDIT_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        **EditRequest.model_json_schema()["properties"],
                    },
                    "required": ["image", "prompt"],
                }
            }
        },
    }
}


def _service(request: Request) -> ImageService:
    return request.app.state.service


@routes.post("/v1/images/generations", responses=ERRORS)
async def generations(body: GenerationRequest, request: Request, by: By) -> Response:
    """Images for a prompt; ``user`` names the person whose taste they follow, where the model knows them."""
    hosted = _hosted(_service(request), body.model, by)
    if hosted.model.editing:
        raise ApiError(
            400, f"{hosted.name!r} edits images: send one to /v1/images/edits, or ask another model", param="model"
        )
    size = _size(request, hosted, body.wanted or hosted.model.size)
    return await _answer(request, by, _Asked("image_generation", hosted, body, size))


@routes.post("/v1/images/edits", responses=ERRORS, openapi_extra=EDIT_FORM)
async def edits(request: Request, by: By) -> Response:
    """What an instruction makes of an image (multipart; the file ``image``)."""
    service = _service(request)
    with _refusing_forms():
        form = request.headers.get("content-type", ""), await request.body()
        fields, files = await asyncio.to_thread(read_form, *form)
        content = one_image(fields, files)
        body = EditRequest.of_form(fields)
        hosted = _hosted(service, body.model, by)
        if isinstance(hosted.model, UnifiedImages) or not hosted.model.editing:
            raise ApiError(
                400, f"{hosted.name!r} does not edit images: ask a model that does (InstructPix2Pix)", param="model"
            )
        source = await asyncio.to_thread(read_upload, content, service.settings.max_upload_pixels)
    fitted = fitted_size(source.size, hosted.model.multiple, service.settings.max_pixels)
    size = _size(request, hosted, body.wanted or fitted)
    source = await asyncio.to_thread(ImageOps.fit, source, size)
    return await _answer(request, by, _Asked("image_edit", hosted, body, size, source))


@routes.post(
    "/v1/feedback",
    status_code=201,
    responses={
        **ERRORS,
        409: {"description": "The id is another ranking's."},
        501: {"description": "This server takes no rankings."},
    },
)
async def feedback(body: RankingRequest, request: Request, by: By) -> dict[str, Any]:
    """Images in the order in which a person likes them: what the next model is tuned on."""
    service = _service(request)
    if service.ranked is None:
        raise ApiError(
            501,
            "this server takes no rankings: set 'feedback' to a folder or URL for their images",
            code="not_configured",
        )
    user = require_user(body.user, "user")
    name = require_user(body.id, "id") if body.id is not None else f"ranking-{uuid4().hex}"
    if body.model is not None:
        _hosted(service, body.model, by)
    try:
        files = await asyncio.to_thread(_ranked_files, service, body)
        ranking = Ranking(user, name, body.prompt, tuple(files), body.model)
        await asyncio.to_thread(service.rank, by.tenant, ranking, files)
    except OtherRanking as error:
        raise ApiError(409, str(error), param="id", code="id_in_use") from error
    except ValueError as error:  # what the body's checks let through, such as a person with too many
        raise ApiError(400, str(error)) from error
    return {"object": "feedback.ranking", "id": name, "images": len(files)}


@routes.get("/v1/models", responses=ERRORS)
async def models(request: Request, by: By) -> dict[str, Any]:
    """The models that the key's tenant may use."""
    return {"object": "list", "data": [_model(hosted) for hosted in _service(request).visible(by.tenant)]}


@routes.get("/v1/models/{model}", responses=ERRORS)
async def model(model: str, request: Request, by: By) -> dict[str, Any]:
    """One of them."""
    return _model(_hosted(_service(request), model, by))


@routes.head("/healthz", include_in_schema=False)
@routes.get("/healthz", responses={503: ERRORS[503]})
async def health(request: Request) -> Response:
    """200 while the replica can draw."""
    service = _service(request)
    state = "ok" if service.healthy and service.ready else "failed" if not service.healthy else "no model is loaded"
    content = {
        "status": state,
        "models": len(service.hosted),
        "failed": len(service.failed),  # whose names are some tenant's, and in the log
        "registry": "unreadable" if service.registry_error else "ok",
    }
    return JSONResponse(content, 200 if state == "ok" else 503)


@dataclass(frozen=True)
class _Asked:
    """A request that has been checked, and how its answer looks; ``kind`` begins the types of its events."""

    kind: str
    hosted: HostedImages
    body: Body
    size: tuple[int, int]
    source: Image.Image | None = None

    def requests(self, seed: int) -> list[ImageRequest]:
        """One for each of n images, with seeds of their own; torch takes 64 bits without a sign."""
        body = self.body
        image_guidance = body.image_guidance if isinstance(body, EditRequest) else None
        config = self.hosted.source.sampling(body.steps, body.guidance, image_guidance)
        return [
            ImageRequest(self.hosted.model, body.prompt, number, self.size, config, body.user, self.source)
            for number in ((seed + place) % (MAX_SEED + 1) for place in range(body.n))
        ]

    @property
    def described(self) -> dict[str, Any]:
        """What an answer says of all its images."""
        size = f"{self.size[0]}x{self.size[1]}"
        return {"background": "opaque", "output_format": "png", "size": size}

    def event(self, index: int, event: Progress | dict[str, Any]) -> str:
        """A server-sent event of the image at ``index``."""
        head = {"index": index, "created_at": int(time.time())}
        if isinstance(event, Progress):
            return sent({"type": f"{self.kind}.progress", **head, "step": event.step, "of": event.of})
        return sent({"type": f"{self.kind}.completed", **head, **self.described, "quality": "auto", **event})


async def _answer(request: Request, by: Caller, asked: _Asked) -> Response:
    """Draw, and answer whole, or as a stream once the first step is done."""
    body, settings = asked.body, _service(request).settings
    if body.user is not None and isinstance(asked.hosted.model, UnifiedImages):
        raise impersonal(asked.hosted.name, "user")
    if body.user is not None and not asked.hosted.model.knows(body.user):  # a run's people may have ids of any form
        require_user(body.user, "user")
    if body.n > settings.max_images:
        raise ApiError(400, f"n = {body.n}: this server makes at most {settings.max_images} at a time", param="n")
    requests = asked.requests(body.seed if body.seed is not None else secrets.randbelow(MAX_SEED))
    if (steps := requests[0].config.sampler_steps) > settings.max_steps:
        raise ApiError(400, f"{steps} steps: this server takes at most {settings.max_steps}", param="steps")
    release = take_places(request.app, by, body.n - 1)
    try:
        drawing = Drawing(_service(request).worker, requests)
    except (Overloaded, EngineFailed) as error:
        release()
        raise translated(error) from error

    async def close() -> None:
        release()
        await drawing.close()

    headers = {PERSONALIZATION: "personal" if asked.hosted.model.knows(body.user) else "population"}
    try:
        first = await unless_gone(request, drawing.next())
        if body.stream:
            events = _events(request, drawing, first, asked, requests)
            return EventStream(events, close, headers=headers, media_type="text/event-stream")
        images = await unless_gone(request, _gather(drawing, first, body.n))
        data = [await _sent_image(*pair) for pair in zip(images, requests, strict=True)]
    except BaseException as error:
        await close()
        if isinstance(error, Exception):
            raise _error(request, error) from error
        raise
    await close()
    request.app.state.metrics.answered(request.state.started, body.n)
    return JSONResponse({"created": int(time.time()), "data": data, **asked.described}, headers=headers)


async def _gather(drawing: Drawing, first: tuple[int, Event] | None, count: int) -> list[Image.Image]:
    """The images, in order."""
    found: dict[int, Image.Image] = {}
    item = first
    while item is not None:
        if isinstance(item[1], Drawn):
            found[item[0]] = item[1].image
        item = await drawing.next()
    return [found[place] for place in range(count)]


async def _events(
    request: Request,
    drawing: Drawing,
    first: tuple[int, Event] | None,
    asked: _Asked,
    requests: list[ImageRequest],
) -> AsyncIterator[str]:
    """Server-sent events: steps of each image, then the image."""
    item = first
    try:
        while item is not None:
            index, event = item
            if isinstance(event, Progress):
                yield asked.event(index, event)
            else:
                yield asked.event(index, await _sent_image(event.image, requests[index]))
            item = await drawing.next()
    except Exception as error:  # too late for a status
        known = _error(request, error)
        if not isinstance(known, ApiError):
            raise
        yield sent(known.body())
        return
    request.app.state.metrics.answered(request.state.started, len(requests))
    yield "data: [DONE]\n\n"


async def _sent_image(image: Image.Image, request: ImageRequest) -> dict[str, Any]:
    """An image as answers hold it, with the seed that makes it again."""
    return {"b64_json": await asyncio.to_thread(_png, image), "seed": request.seed}


def _png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _error(request: Request, error: Exception) -> Exception:
    """The API's error for what may go wrong with a request; anything else as it is."""
    match error:
        case Refused():
            request.app.state.metrics.refused()
            return ApiError(400, f"the image was refused: {error}", code="content_policy_violation")
        case ReviewFailed():
            return ApiError(500, str(error), code="safety_failed")
        case Overloaded() | EngineFailed() | NotFinite() | ClientGone() | ValueError():
            return translated(error)
    return error


def _ranked_files(service: ImageService, body: RankingRequest) -> dict[str, bytes]:
    """PNG files of a ranking's images by digest, best first; one image at a time is in memory unpacked.

    Raises:
        ApiError: naming an image that is none, too large, or there twice.
    """
    settings = service.settings
    files: dict[str, bytes] = {}
    for place, sent_image in enumerate(body.images):
        where = f"images.{place}.b64_json"
        try:
            image = read_encoded(sent_image.b64_json, settings.max_body_bytes, settings.max_pixels)
        except ValueError as error:
            raise ApiError(400, f"{where}: {error}", param=where, code="invalid_image") from error
        digest, file = png_of(image)
        if digest in files:
            first = list(files).index(digest)
            raise ApiError(
                400,
                f"images.{place} shows the same as images.{first}: each image has one place in a ranking",
                param=f"images.{place}",
                code="invalid_image",
            )
        files[digest] = file
    return files


def _hosted(service: ImageService, name: str | None, by: Caller) -> HostedImages:
    if not service.hosted:
        raise ApiError(503, "no model is loaded yet", headers={"Retry-After": "5"})
    known = ", ".join(hosted.name for hosted in service.visible(by.tenant))
    wanted = name or service.settings.default_model
    if wanted is None:
        raise ApiError(400, f"'model' is missing; there are: {known}", param="model")
    hosted = service.find(wanted, by.tenant)
    if hosted is None:
        raise ApiError(
            404, f"there is no model {wanted[:200]!r} here; there are: {known}", param="model", code="model_not_found"
        )
    return hosted


def _size(request: Request, hosted: HostedImages, size: tuple[int, int]) -> tuple[int, int]:
    """``size`` if the model and this server can draw it."""
    width, height = size
    most = _service(request).settings.max_pixels
    if isinstance(hosted.model, UnifiedImages):
        only = hosted.model.size
        if size != only:
            message = f"{width}x{height}: {hosted.name!r} draws images of {only[0]}x{only[1]} only"
            raise ApiError(400, message, param="size")
        multiple = 1
    else:
        multiple = hosted.model.multiple
    if width % multiple or height % multiple:
        raise ApiError(
            400, f"{width}x{height}: sides must be multiples of {multiple} for {hosted.name!r}", param="size"
        )
    if width * height > most:
        raise ApiError(400, f"{width}x{height}: this server makes images of at most {most} pixels", param="size")
    return size


def _model(hosted: HostedImages) -> dict[str, Any]:
    model = hosted.model
    return {
        "id": hosted.name,
        "object": "model",
        "created": 0,
        "owned_by": "palate",
        "base": model.base,
        "run": hosted.version,
        "task": "edit" if model.editing else "generate",
        "size": f"{model.size[0]}x{model.size[1]}",
        "personal": model.personal,
    }


@contextmanager
def _refusing_forms() -> Iterator[None]:
    """Answer a form that is wrong as a JSON body that is wrong."""
    try:
        yield
    except FormError as error:
        raise ApiError(400, str(error), param=error.param) from error
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    except ClientDisconnect as error:
        raise translated(ClientGone()) from error
