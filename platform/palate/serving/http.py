"""The HTTP application of one replica: OpenAI's routes and Palate's own, keys, limits, errors."""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any, Protocol

import torch
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from palate.serving import engine, logs, page
from palate.serving.answering import Answering, NotFinite, chat_log_probs, envelope, text_log_probs, usage
from palate.serving.engine import BASE, Completion, Event
from palate.serving.errors import ApiError, sent
from palate.serving.metrics import Metrics, RequestMetrics
from palate.serving.schemas import (
    MAX_SEED,
    ChatRequest,
    CompletionRequest,
    FeedbackRequest,
    HistoryRequest,
    SentImage,
    Unsupported,
)
from palate.serving.sent_images import read_image
from palate.serving.served_run import TOKEN_CHARACTERS, Personal, chat_prompt
from palate.serving.service import Hosted, HostedUnified, Served, Service
from palate.serving.settings import Settings
from palate.serving.text import decode
from palate.serving.unified import LEAD, ServedUnified, prompt_embeddings, prompt_ids
from palate.serving.worker import EngineFailed, Overloaded
from palate.users.checks import require_id
from palate.users.database import DatabaseUnavailable
from palate.users.keys import authenticate
from palate.users.records import ExportedPerson, Known, PastText
from palate.users.store import Store

PERSONALIZATION = "x-palate-personalization"
WAIT_SECONDS = 300.0  # longest that ?wait=true blocks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """Who asks: the tenant, and the key whose requests are counted."""

    tenant: str
    key: str


class Limits(Protocol):
    """What of a server's settings the middleware reads."""

    @property
    def require_keys(self) -> bool: ...
    @property
    def max_in_flight(self) -> int: ...
    @property
    def max_body_bytes(self) -> int: ...


class Guarded(Protocol):
    """What stands behind an application: its limits, and the database that holds keys and people."""

    @property
    def settings(self) -> Limits: ...
    @property
    def store(self) -> Store: ...
    def delete_person(self, tenant: str, user_id: str) -> bool: ...


def create_app(service: Service) -> FastAPI:
    """The application over ``service``; the service is started and stopped by whoever made it."""
    return guarded_app("Personalized text in OpenAI's shapes.", routes, service, Metrics(service))


def guarded_app(description: str, router: APIRouter, service: Guarded, metrics: RequestMetrics) -> FastAPI:
    """Routes behind keys, bounds, OpenAI's errors and counts; ``app.state`` holds service and metrics."""
    app = FastAPI(
        title="Palate",
        description=description,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    app.state.service, app.state.metrics, app.state.in_flight = service, metrics, Counter[str]()
    app.include_router(shared)  # first: the text server's last route takes any path below /v1/users
    app.include_router(router)
    app.include_router(page.routes)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(AnyHTTPException, _http_error)
    app.add_exception_handler(DatabaseUnavailable, _database_unavailable)
    app.add_exception_handler(Exception, _unexpected_error)
    app.add_middleware(BoundedBody, most=service.settings.max_body_bytes)
    app.add_middleware(Authenticated, service=service)
    app.add_middleware(Counted, metrics=metrics)
    app.add_middleware(page.Slash)
    return app


shared = APIRouter()  # of every server over a database of people
routes = APIRouter()
_bearer = HTTPBearer(auto_error=False, description="An API key of Palate.")


def _service(request: Request) -> Service:
    return request.app.state.service


async def _caller(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Caller:
    """Who asks, as ``Authenticated`` found out before the body was read."""
    return request.state.caller


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


By = Annotated[Caller, Depends(_caller)]
# What every route may answer beside its own, for the OpenAPI document.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, text in (
        (400, "The request is wrong; the error names the field."),
        (401, "No API key, or an unknown one."),
        (404, "There is no such model, person or route."),
        (413, "The body is too large."),
        (429, "Too many requests of this key are under way."),
        (503, "Too many requests wait, the server has no run, or its database is away: try again."),
    )
}


@shared.delete("/v1/users/{user_id}", responses=ERRORS)
async def delete_user(user_id: str, request: Request, by: By) -> dict[str, Any]:
    """Remove a person: texts, vectors, feedback, rankings, and images that only they ranked."""
    service: Guarded = request.app.state.service
    user = require_user(user_id)
    if not await asyncio.to_thread(service.delete_person, by.tenant, user):
        raise _no_person(user)
    return {"id": user, "object": "user.deleted", "deleted": True}


@shared.get("/v1/users/{user_id}/export", responses=ERRORS)
async def export_user(user_id: str, request: Request, by: By) -> dict[str, Any]:
    """All that is kept about a person, as the text server's ``/import`` takes it; images by their digests."""
    service: Guarded = request.app.state.service
    user = require_user(user_id)
    exported = await asyncio.to_thread(service.store.export, by.tenant, user)
    if exported is None:
        raise _no_person(user)
    return exported


@shared.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format, of this replica."""
    return Response(request.app.state.metrics.render(), media_type="text/plain; version=0.0.4")


@routes.post("/v1/chat/completions", responses=ERRORS)
async def chat_completions(body: ChatRequest, request: Request, by: By) -> Response:
    """An answer in the person's manner; ``user`` names the person."""
    service = _service(request)
    with refusing():
        body.require_supported()
        turns, images = body.turns(), body.images()  # refuses parts that are neither
    hosted = _hosted(service, body.model)
    _require_short(hosted, body)
    if isinstance(hosted, HostedUnified):
        return await _answer_about_images(request, by, hosted, body, turns, images)
    if images:
        raise ApiError(
            400,
            f"{body.model!r} reads text only: leave images out, or ask a model that reads them"
            + (f" ({', '.join(sorted(service.unified))})" if service.unified else ""),
            param=f"{images[0].where}.type",
            code="unsupported_parameter",
        )
    served = await _served(service, by, hosted, body)
    try:
        prompt = await asyncio.to_thread(chat_prompt, hosted.run, turns, served.history)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error
    top = body.top_logprobs or 0
    asked = _requests(service, hosted, body, _personal(hosted, served, body, [prompt]), body.most_tokens, top)
    shape = _Chat(envelope("chat.completion", body.model), hosted, body.logprobs)
    return await _answer(request, by, hosted, asked, shape, body, len(prompt), {PERSONALIZATION: served.state})


@routes.post("/v1/completions", responses=ERRORS)
async def completions(body: CompletionRequest, request: Request, by: By) -> Response:
    """The plain continuation of a prompt, without a chat template."""
    service = _service(request)
    with refusing():
        body.require_supported()
    hosted = _hosted(service, body.model)
    _require_short(hosted, body)
    headers: dict[str, str] = {}
    tokenizer = hosted.run.loaded.plain_tokenizer
    if isinstance(hosted, HostedUnified):
        _require_impersonal(hosted, body)
        ids = await asyncio.to_thread(lambda: [tokenizer(prompt).input_ids for prompt in body.prompts])
        prompts = [engine.Request(prompt, barred=hosted.run.barred) for prompt in ids]
    else:
        served = await _served(service, by, hosted, body)
        headers[PERSONALIZATION] = served.state
        ids = await asyncio.to_thread(lambda: [tokenizer(prompt).input_ids for prompt in body.prompts])
        prompts = _personal(hosted, served, body, ids)
    asked = _requests(service, hosted, body, prompts, body.max_tokens, body.logprobs or 0)
    shape = _Text(envelope("text_completion", body.model), hosted, body.logprobs is not None)
    return await _answer(request, by, hosted, asked, shape, body, sum(map(len, ids)), headers)


@routes.get("/v1/models", responses=ERRORS)
async def models(request: Request, by: By) -> dict[str, Any]:
    """The runs that are served, the live one first under the alias."""
    service = _service(request)
    return {"object": "list", "data": [_model(service, name) for name in service.names]}


@routes.get("/v1/models/{model}", responses=ERRORS)
async def model(model: str, request: Request, by: By) -> dict[str, Any]:
    """One of the runs that are served."""
    service = _service(request)
    _hosted(service, model)
    return _model(service, model)


@routes.put("/v1/users/{user_id}", responses={**ERRORS, 202: {"description": "Stored; the vector is being fitted."}})
async def put_user(user_id: str, body: HistoryRequest, request: Request, by: By, wait: bool = False) -> Response:
    """Replace a person's texts, oldest first; their vector follows. ``?wait=true`` answers when it is fitted."""
    service = _service(request)
    user = require_user(user_id)
    texts = [PastText(text.input, text.output, text.date) for text in body.texts]
    write = partial(service.store.put_history, by.tenant, user, texts)
    return await _follow(request, by, lambda: write()[0], wait)


@routes.post("/v1/feedback", responses={**ERRORS, 202: {"description": "Stored; the vector is being fitted."}})
async def feedback(body: FeedbackRequest, request: Request, by: By, wait: bool = False) -> Response:
    """What a person made of an answer; it becomes the latest of their texts."""
    service = _service(request)
    user = require_user(body.user, "user")
    add = partial(service.store.add_feedback, by.tenant, user, body.prompt, body.answer, body.edited)
    return await _follow(request, by, add, wait)


@routes.get("/v1/users", responses=ERRORS)
async def users(request: Request, by: By, after: str = "", limit: int = 100) -> dict[str, Any]:
    """Ids of the tenant's people, sorted, from behind ``after`` on."""
    service = _service(request)
    if not 1 <= limit <= 1000:
        raise ApiError(400, f"'limit' must lie in 1..1000, found {limit}", param="limit")
    if after:
        require_user(after, "after")
    found = await asyncio.to_thread(service.store.people, by.tenant, after, limit)
    return {"object": "list", "data": found, "has_more": len(found) == limit}


@routes.get("/v1/users/{user_id}", responses=ERRORS)
async def get_user(user_id: str, request: Request, by: By) -> dict[str, Any]:
    """A person's cluster, number of texts, and the words that their vector promotes and demotes."""
    service = _service(request)
    person = await _known(service, by, user_id)
    found = await _described(service, by, person)
    hosted = service.hosted.get(service.live or "")
    if hosted is not None and found["status"] == "personal":
        fitted = await asyncio.to_thread(service.store.fitted, by.tenant, person.user_id, hosted.run.version)
        if fitted is not None:
            vector_J = torch.from_numpy(fitted.vector_J.copy())
            said = await asyncio.to_thread(hosted.run.promoted_and_demoted, vector_J)
            found["vector"] = None if said is None else asdict(said)
    return found


@routes.post("/v1/users/{user_id}/import", responses=ERRORS)
async def import_user(user_id: str, body: ExportedPerson, request: Request, by: By) -> Response:
    """Put an exported person in the place of what is kept under this id."""
    service = _service(request)
    user = require_user(user_id)
    content = body.model_copy(update={"user_id": user})
    return await _follow(request, by, partial(service.store.restore, by.tenant, content), False)


@routes.api_route("/v1/users/{rest:path}", methods=["GET", "PUT", "POST", "DELETE", "PATCH"], include_in_schema=False)
async def no_such_user(rest: str, by: By) -> Response:
    """What no other route takes: an id with a path in it, or a method that is none."""
    require_user(rest)
    raise ApiError(405, "this method is not for people")


@routes.head("/healthz", include_in_schema=False)  # some balancers ask so
@routes.get("/healthz", responses={503: ERRORS[503]})
async def health(request: Request) -> Response:
    """200 while the replica can answer."""
    service = _service(request)
    state = "ok" if service.healthy and service.ready else "failed" if not service.healthy else "no run is live"
    content = {
        "status": state,
        "runs": len(service.all_hosted),
        "failed": len(service.failed),  # whose names are in the log
        "switching": service.live != service.wanted,  # the registry wants another run live than the one that answers
    }
    return JSONResponse(content, 200 if state == "ok" else 503)


@dataclass(frozen=True)
class _Chat:
    """Chat completions, whole and in chunks; ``lead`` begins an answer and is not its own."""

    head: dict[str, Any]
    hosted: Hosted | HostedUnified
    log_probs: bool
    lead: str = ""

    def whole(self, index: int, events: Sequence[Event], completion: Completion) -> dict[str, Any]:
        found = chat_log_probs(self.hosted.run.loaded.tokenizer, events) if self.log_probs else None
        message = {"role": "assistant", "content": completion.text.removeprefix(self.lead), "refusal": None}
        return {"index": index, "message": message, "logprobs": found, "finish_reason": completion.finish_reason}

    @property
    def chunk_head(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk"}

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def length(self, event: Event) -> int:
        return len(event.text)  # its log-probabilities need no offset, the lead does

    def chunk(self, index: int, event: Event, offset: int) -> dict[str, Any]:
        found = chat_log_probs(self.hosted.run.loaded.tokenizer, [event]) if self.log_probs else None
        reason = event.completion.finish_reason if event.completion else None
        text = event.text if offset else event.text.removeprefix(self.lead)
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}


@dataclass(frozen=True)
class _Text:
    """Plain completions, whole and in chunks."""

    head: dict[str, Any]
    hosted: Hosted | HostedUnified
    log_probs: bool

    def whole(self, index: int, events: Sequence[Event], completion: Completion) -> dict[str, Any]:
        found = text_log_probs(self.hosted.run.loaded.tokenizer, events) if self.log_probs else None
        return {"index": index, "text": completion.text, "logprobs": found, "finish_reason": completion.finish_reason}

    @property
    def chunk_head(self) -> dict[str, Any]:
        return self.head

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def length(self, event: Event) -> int:
        return len(decode(self.hosted.run.loaded.tokenizer, [event.token_id])) if self.log_probs else 0

    def chunk(self, index: int, event: Event, offset: int) -> dict[str, Any]:
        found = text_log_probs(self.hosted.run.loaded.tokenizer, [event], offset) if self.log_probs else None
        reason = event.completion.finish_reason if event.completion else None
        return {"index": index, "text": event.text, "logprobs": found, "finish_reason": reason}


@contextmanager
def refusing() -> Iterator[None]:
    """Answer what is not supported with a 400 that names it."""
    try:
        yield
    except Unsupported as error:
        raise ApiError(400, str(error), param=error.param, code="unsupported_parameter") from error


def _require_short(hosted: Hosted | HostedUnified, body: ChatRequest | CompletionRequest) -> None:
    """Refuse what cannot fit whatever its tokens are, before it is made into tokens."""
    most = hosted.worker.engine.max_length * TOKEN_CHARACTERS
    if body.characters > most:
        raise ApiError(
            400,
            f"the prompt has {body.characters} characters, and only {hosted.worker.engine.max_length} tokens fit",
            param="messages" if isinstance(body, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )


def _hosted(service: Service, name: str) -> Hosted | HostedUnified:
    if not service.all_hosted:
        raise ApiError(503, "no run is served yet", headers={"Retry-After": "5"})
    hosted = service.find(name)
    if hosted is None:
        known = ", ".join(service.names)
        raise ApiError(
            404, f"there is no model {name[:200]!r} here; there are: {known}", param="model", code="model_not_found"
        )
    return hosted


def _user(value: str | None) -> str | None:
    return None if value is None else require_user(value, "user")


def require_user(value: str, param: str = "user_id") -> str:
    """``value`` if it can be the id of a person.

    Raises:
        ApiError: naming ``param``.
    """
    try:
        return require_id(value, param)
    except ValueError as error:
        raise ApiError(400, str(error), param=param) from error


def _no_person(user_id: str) -> ApiError:
    return ApiError(404, f"there is no person {user_id!r}", param="user_id", code="user_not_found")


async def _known(service: Service, by: Caller, user_id: str) -> Known:
    user = require_user(user_id)
    known = await asyncio.to_thread(service.store.known, by.tenant, user)
    if known is None:
        raise _no_person(user)
    return known


async def _answer_about_images(
    request: Request,
    by: Caller,
    hosted: HostedUnified,
    body: ChatRequest,
    turns: Sequence[tuple[str, str]],
    images: Sequence[SentImage],
) -> Response:
    """An answer of a unified model, to a conversation with any number of images."""
    service, run = _service(request), hosted.run
    _require_impersonal(hosted, body)
    if len(images) > service.settings.max_images:
        message = f"{len(images)} images: this server reads at most {service.settings.max_images} in a request"
        raise ApiError(400, message, param=f"{images[service.settings.max_images].where}.type")
    try:
        ids = await asyncio.to_thread(prompt_ids, run, turns, len(images))
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error
    prompt = engine.Request(ids, barred=run.barred)
    asked = _requests(service, hosted, body, [prompt], body.most_tokens, body.top_logprobs or 0)
    if images:
        read = partial(_read_images, service.settings, run, ids, images)
        embeddings_Td = await _read_beside(request, by, hosted, body.n, read)
        asked = [replace(one, embeddings_Td=embeddings_Td) for one in asked]
    shape = _Chat(envelope("chat.completion", body.model), hosted, body.logprobs, LEAD)
    return await _answer(request, by, hosted, asked, shape, body, len(ids), {})


async def _read_beside(
    request: Request, by: Caller, hosted: HostedUnified, answers: int, read: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """What ``read`` gives, on the model's reading thread; for nobody whose answers would not fit or who is gone."""
    release = take_places(request.app, by, answers - 1)  # images in memory take a place, as answers do
    try:
        hosted.worker.require_room(answers)
        try:
            reading = asyncio.get_running_loop().run_in_executor(hosted.reader, read)
        except RuntimeError as error:
            raise EngineFailed("the server is stopping") from error
        found: torch.Tensor = await unless_gone(request, reading)
        return found
    except (Overloaded, EngineFailed, ClientGone) as error:
        raise translated(error) from error
    finally:
        release()


def _read_images(
    settings: Settings, run: ServedUnified, ids: Sequence[int], images: Sequence[SentImage]
) -> torch.Tensor:
    """What the language model reads of a prompt with these images.

    Raises:
        ApiError: naming an image that is none, too large, or not inside the request.
    """
    read = []
    for image in images:
        try:
            read.append(read_image(image.url, settings.max_image_bytes, settings.max_image_pixels))
        except ValueError as error:
            raise ApiError(400, str(error), param=f"{image.where}.image_url.url", code="invalid_image") from error
    return prompt_embeddings(run, ids, read)


def _require_impersonal(hosted: HostedUnified, body: ChatRequest | CompletionRequest) -> None:
    """Refuse what asks for a person's manner."""
    if body.user is not None:
        raise impersonal(hosted.name, "user")
    if body.personalization.beta:
        raise impersonal(hosted.name, "personalization.beta")


def impersonal(name: str, param: str) -> ApiError:
    """The error for a model that knows no people."""
    message = f"personalization of {name!r} is not available: leave {param!r} out"
    return ApiError(400, message, param=param, code="unsupported_parameter")


async def _served(service: Service, by: Caller, hosted: Hosted, body: ChatRequest | CompletionRequest) -> Served:
    """Whom a request is answered for: nobody, where it asks for the base model."""
    user = _user(body.user)
    if body.personalization.base:
        return Served(Personal(BASE, hosted.run.population.vector_J), "base")
    return await asyncio.to_thread(service.serve, hosted, by.tenant, user)


def _personal(
    hosted: Hosted, served: Served, body: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[int]]
) -> list[engine.Request]:
    """Prompts to be continued in a person's manner."""
    adapter = served.personal.cluster if hosted.run.rows.count else BASE
    wanted = body.personalization
    beta = 0.0 if wanted.base else hosted.run.beta if wanted.beta is None else wanted.beta
    return [engine.Request(ids, adapter=adapter, vector_J=served.personal.vector_J, beta=beta) for ids in prompts]


def _requests(
    service: Service,
    hosted: Hosted | HostedUnified,
    body: ChatRequest | CompletionRequest,
    prompts: Sequence[engine.Request],
    most_tokens: int | None,
    top_log_probs: int,
) -> list[engine.Request]:
    """The engine's requests: n answers for each prompt, as the body wants them.

    Raises:
        ApiError: more answers or tokens than this server gives.
    """
    settings, room = service.settings, hosted.worker.engine.max_length
    if body.n * len(prompts) > settings.max_answers:
        found = f"{body.n} answers to each of {len(prompts)} prompts" if len(prompts) > 1 else f"n = {body.n}"
        raise ApiError(400, f"{found}: this server gives at most {settings.max_answers} at a time", param="n")
    if most_tokens is not None and most_tokens > settings.max_new_tokens:
        message = f"{most_tokens} tokens are asked for: this server gives at most {settings.max_new_tokens}"
        raise ApiError(400, message, param=body.length_field)
    seed = body.seed if body.seed is not None else secrets.randbelow(MAX_SEED)
    made = []
    for number, prompt in enumerate(prompts):
        length = len(prompt.prompt_ids)
        left = room - length
        if left < 1 or (most_tokens or 1) > left:
            raise ApiError(
                400,
                f"the prompt has {length} tokens and up to {most_tokens or 1} are asked for: together they may be "
                f"{room}. Shorten the prompt" + (" or ask for fewer" if most_tokens else ""),
                param="messages" if isinstance(body, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        for answer in range(body.n):
            made.append(
                replace(
                    prompt,
                    max_new_tokens=most_tokens or min(left, settings.max_new_tokens),
                    temperature=body.temperature,
                    top_p=body.top_p,
                    # Seeds of their own, so that n answers differ; torch takes 64 bits without a sign.
                    seed=(seed + number * body.n + answer) % (MAX_SEED + 1),
                    stop=body.stops,
                    top_log_probs=top_log_probs,
                )
            )
    return made


async def _answer(
    request: Request,
    by: Caller,
    hosted: Hosted | HostedUnified,
    asked: Sequence[engine.Request],
    shape: _Chat | _Text,
    body: ChatRequest | CompletionRequest,
    prompt_tokens: int,
    headers: dict[str, str],
) -> Response:
    """Start the requests, and answer whole or as a stream once the first token is there."""
    metrics = request.app.state.metrics
    release = take_places(request.app, by, len(asked) - 1)
    started = request.state.started
    try:
        answering = Answering(hosted.worker, asked)
    except Overloaded as error:
        release()
        raise translated(error) from error

    async def close() -> None:
        release()
        await answering.close()

    try:
        first = await unless_gone(request, answering.next())
        metrics.first_token(time.perf_counter() - started)
        if body.stream:
            events = _chunks(
                answering, first, shape, body, prompt_tokens, len(asked), partial(metrics.answered, started)
            )
            return EventStream(events, close, headers=headers, media_type="text/event-stream")
        found = await unless_gone(request, _gather(answering, first, len(asked)))
    except BaseException as error:
        await close()
        if isinstance(error, Overloaded | EngineFailed | NotFinite | ClientGone | ValueError):
            raise translated(error) from error
        raise
    await close()
    metrics.answered(started, sum(len(events) for events in found))
    endings = [events[-1].completion for events in found]
    choices = [shape.whole(i, events, end) for i, (events, end) in enumerate(zip(found, endings, strict=True)) if end]
    content = {**shape.head, "choices": choices, "usage": usage(prompt_tokens, [end for end in endings if end])}
    return JSONResponse(content, headers=headers)


def take_places(app: FastAPI, by: Caller, count: int) -> Callable[[], None]:
    """Count as many of a key's places as taken; the function that ends that.

    Each request has one for as long as it lasts (``Authenticated``): who makes n answers or images takes n - 1 more.

    Raises:
        ApiError: the key has as many under way as it may.
    """
    in_flight: Counter[str] = app.state.in_flight
    most = app.state.service.settings.max_in_flight
    if (wanted := in_flight[by.key] + count) > most:
        raise ApiError(
            429,
            f"{wanted} requests and answers of this key would be under way, and at most {most} may be: wait for one to "
            "end",
            code="rate_limit_exceeded",
            headers={"Retry-After": "1"},
        )
    in_flight[by.key] += count

    def release() -> None:
        in_flight[by.key] -= count
        if not in_flight[by.key]:
            del in_flight[by.key]

    return release


async def _gather(answering: Answering, first: tuple[int, Event] | None, count: int) -> list[list[Event]]:
    """The events of each answer."""
    found: list[list[Event]] = [[] for _ in range(count)]
    item = first
    while item is not None:
        found[item[0]].append(item[1])
        item = await answering.next()
    return found


async def _chunks(
    answering: Answering,
    first: tuple[int, Event] | None,
    shape: _Chat | _Text,
    body: ChatRequest | CompletionRequest,
    prompt_tokens: int,
    count: int,
    done: Callable[[int], None],
) -> AsyncIterator[str]:
    """Server-sent events."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    head = shape.chunk_head | ({"usage": None} if with_usage else {})
    completions: list[Completion] = []
    offsets = [0] * count
    item, tokens = first, 0
    try:
        for index in range(count):
            if (opening := shape.opening(index)) is not None:
                yield sent({**head, "choices": [opening]})
        while item is not None:
            index, event = item
            tokens += 1
            if event.text or event.completion is not None or shape.log_probs:
                yield sent({**head, "choices": [shape.chunk(index, event, offsets[index])]})
            offsets[index] += shape.length(event)
            if event.completion is not None:
                completions.append(event.completion)
            item = await answering.next()
    except (EngineFailed, Overloaded, NotFinite) as error:  # too late for a status
        yield sent(translated(error).body())
        return
    if with_usage:
        yield sent({**head, "choices": [], "usage": usage(prompt_tokens, completions)})
    done(tokens)
    yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """A stream that closes what feeds it however it ends, also before its first chunk."""

    def __init__(self, content: AsyncIterator[str], close: Callable[[], Any], **keywords: Any) -> None:
        super().__init__(content, **keywords)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.shield(self._close())


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(request: Request, work: Any) -> Any:
    """What ``work`` gives, or ``ClientGone`` as soon as the client hangs up."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await gone


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def translated(error: Exception) -> ApiError:
    """The API's error for an engine's or the database's."""
    match error:
        case Overloaded():
            return ApiError(503, str(error), code="overloaded", headers={"Retry-After": "2"})
        case NotFinite():
            return ApiError(500, str(error), code="not_finite")
        case EngineFailed():
            return ApiError(503, f"{error}: try again", code="engine_failed", headers={"Retry-After": "2"})
        case DatabaseUnavailable():  # its own message may say where the database is
            text = "the database of people cannot work just now: try again"
            return ApiError(503, text, code="database_unavailable", headers={"Retry-After": "2"})
        case ClientGone():
            return ApiError(499, "the client has closed the connection")
    return ApiError(400, str(error))


async def _follow(request: Request, by: Caller, write: Callable[[], Known], wait: bool) -> Response:
    """Write a person, and say where their fit can be followed (202), or that it is done (200)."""
    service = _service(request)
    try:
        try:
            person = await asyncio.to_thread(write)
        except ValueError as error:  # what the body's checks let through, such as a history that is full
            raise ApiError(400, str(error)) from error
        service.cache.forget(by.tenant, person.user_id)
        service.fit_soon()
        location = f"/v1/users/{person.user_id}"
        deadline, pause = time.monotonic() + WAIT_SECONDS, 0.05
        while True:
            described = {**await _described(service, by, person), "status_url": location}
            if described["status"] != "pending":
                service.cache.forget(by.tenant, person.user_id)
                return JSONResponse(described, 200)
            if not wait or time.monotonic() > deadline:
                return JSONResponse(described, 202, headers={"Location": location})
            await unless_gone(request, asyncio.sleep(pause))
            pause = min(1.0, 1.3 * pause)
    except ClientGone as error:
        raise translated(error) from error


async def _described(service: Service, by: Caller, person: Known) -> dict[str, Any]:
    """A person and how far their fit is.

    Raises:
        ApiError: they have been deleted meanwhile.
    """
    version, fitted_version = await asyncio.to_thread(service.fitted_version, by.tenant, person.user_id)
    if version is None:
        raise _no_person(person.user_id)
    described: dict[str, Any] = {
        "id": person.user_id,
        "object": "user",
        "status": "pending",
        "texts": person.count,
        "version": person.version,
        "model": service.live,
        "created": int(person.created.timestamp()),
        "updated": int(person.updated.timestamp()),
    }
    hosted = service.hosted.get(service.live or "")
    if hosted is None or fitted_version is None or fitted_version < person.version:
        return described
    fitted = await asyncio.to_thread(service.store.fitted, by.tenant, person.user_id, hosted.run.version)
    if fitted is not None:
        described |= {"status": "personal" if fitted.texts else "population", "cluster": fitted.cluster}
    return described


def _model(service: Service, name: str) -> dict[str, Any]:
    hosted = _hosted(service, name)
    head = {"id": name, "object": "model", "created": 0, "owned_by": "palate"}
    if isinstance(hosted, HostedUnified):
        return {**head, "live": False, "run": hosted.run.version, "image_tokens": hosted.run.processor.image_tokens}
    return {
        **head,
        "live": hosted.name == service.live,
        "run": hosted.name,
        "base": hosted.run.loaded.name,
        "clusters": hosted.run.rows.count,
        "beta": hosted.run.beta,
    }


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _validation_error(request: Request, error: Exception) -> Response:
    """The first thing that is wrong with a request, by the name of its field."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    first, value = found[0], found[0].get("input")
    if first["type"] == "string_type" and isinstance(value, list):  # text or a list of texts: why the list is none
        first = next((one for one in found if one["loc"][:2] == first["loc"][:2] and one is not first), first)
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(part for part in place if not part.startswith(("function-", "constrained-", "list["))) or None
    message = str(first["msg"])
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is no valid JSON").response()
    if first["loc"] == ("body",):
        message = "a JSON object is expected as the body, with the header 'Content-Type: application/json'"
    elif first["type"] == "too_long" and isinstance(first["input"], str):
        message = f"expected at most {first['ctx']['max_length']} characters, found {len(first['input'])}"
    return ApiError(400, f"{param}: {message}" if param else message, param=param).response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AnyHTTPException)
    message, headers = str(error.detail), dict(error.headers or {})
    if error.status_code == 404:
        message = f"there is no route {request.url.path[:200]!r}: /openapi.json names all"
    elif error.status_code == 405:
        message = f"this route takes {headers.get('Allow', 'another method')}, not {request.method}"
    elif error.status_code == 400:  # FastAPI's, of a body that breaks its reader
        message = "the body cannot be read: expected JSON in UTF-8, not compressed and not deeply nested"
    return ApiError(error.status_code, message, headers=headers).response()


async def _database_unavailable(request: Request, error: Exception) -> Response:
    return _away(error, request.state.request_id)


def _away(error: Exception, request_id: str) -> Response:
    assert isinstance(error, DatabaseUnavailable)
    log.warning("the database is away", exc_info=error, extra={"request_id": request_id})
    return translated(error).response()


async def _unexpected_error(request: Request, error: Exception) -> Response:
    name = request.state.request_id
    log.error("unexpected error", exc_info=error, extra={"request_id": name})
    return ApiError(
        500, f"the server failed; its log says why (request {name})", headers={"X-Request-Id": name}
    ).response()


class BoundedBody:
    """Refuses bodies of more than ``most`` bytes, before they are in memory."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = ApiError(413, f"the body has more than {self._most} bytes: send less", code="body_too_large")
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if not stated.isdigit() or int(stated) > self._most:
            await too_large.response()(scope, receive, send)
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self._most:
                    raise too_large
            return message

        await self._app(scope, bounded, send)


class Authenticated:
    """Finds out who asks for anything under /v1, and that the key has a place for it, before the body is read."""

    def __init__(self, app: ASGIApp, service: Guarded) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Behind a prefix, as Ray Serve gives to one of several applications, paths begin with it.
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")).startswith("/v1/"):
            try:
                caller = await self._caller(dict(scope["headers"]).get(b"authorization", b"").decode("latin-1"))
                scope.setdefault("state", {})["caller"] = caller  # also of what is refused, for the log
                release = take_places(scope["app"], caller, 1)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            except DatabaseUnavailable as error:
                await _away(error, scope["state"]["request_id"])(scope, receive, send)
                return
            try:
                await self._app(scope, receive, send)
            finally:
                release()
            return
        await self._app(scope, receive, send)

    async def _caller(self, header: str) -> Caller:
        if not self._service.settings.require_keys:
            return Caller("default", "")
        scheme, _, given = header.partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise _unauthorized("no API key is given: send it as 'Authorization: Bearer KEY'")
        key = await asyncio.to_thread(authenticate, self._service.store, given.strip())
        if key is None:
            raise _unauthorized("this API key is not known, or was revoked")
        return Caller(key.tenant, key.id)


class Counted:
    """Notes when each request came and gives it an id, counts answers by route and status, and logs a line of each."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started, status, ended = time.perf_counter(), 0, "cut"
        name = logs.request_id(dict(scope["headers"]).get(b"x-request-id"))
        state = scope.setdefault("state", {})
        state["started"], state["request_id"] = started, name

        def count(found: int) -> None:
            nonlocal status
            status = found
            self._metrics.request(getattr(scope.get("route"), "path", "unknown"), found)

        async def received() -> Message:
            try:
                return await receive()
            except Exception as error:  # Ray Serve raises where other servers say so, if its task was ended meanwhile
                log.debug("the client has gone: %r", error)
                return {"type": "http.disconnect"}

        async def counted(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", name.encode())]}
                count(message["status"])
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                ended = "whole"
            await send(message)

        try:
            await self._app(scope, received, counted)
        except Exception:  # answered with 500 further out
            ended = "failed"
            count(500)
            raise
        finally:
            caller = state.get("caller")
            logs.answered(
                request_id=name,
                method=scope["method"],
                route=getattr(scope.get("route"), "path", "unknown"),
                status=status,
                seconds=time.perf_counter() - started,
                tenant=caller.tenant if isinstance(caller, Caller) else None,
                ended=ended,
            )


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[FastAPI]:
    """The application over a service that is started here and stopped at the end: for tests and other servers."""
    await asyncio.to_thread(service.start)
    try:
        yield create_app(service)
    finally:
        await asyncio.to_thread(service.stop)
