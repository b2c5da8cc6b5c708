"""What clients are told when an answer breaks off, as those of a replica do that dies: an error in OpenAI's shape that
says to try again.

Requests pass through a process of Ray Serve's own, its proxy, which outlives replicas. Left alone, it answers what was
under way on a replica that died with a bare 500, breaks its streams off, and refuses what is too much in plain text.
Serve puts these middlewares before its proxies where Ray was started with

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=palate.serving.proxy:middlewares

in its environment, on every node that has a proxy. Nothing is sent again from here: only the client knows whether what
it asked for may be done twice. Imports no torch, as Serve gives its proxies seconds to start.
"""

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from palate.serving.errors import ApiError, sent

RETRY = "1"  # seconds; another replica answers at once, if there is one


def middlewares() -> list[Middleware]:
    """What Serve calls when a proxy starts."""
    return [Middleware(Retryable)]


class Retryable:
    """Gives Serve's own failures the API's form: nothing answered at all, a stream that broke off, a plain 503."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = started = streams = ended = False
        retry = RETRY

        async def watched(message: Message) -> None:
            nonlocal refused, started, streams, ended, retry
            if message["type"] == "http.response.start":
                refused = _is_serves_refusal(scope, message)
                streams = _content_type(message) == "text/event-stream"
                retry = _headers(message).get("retry-after", RETRY)
            if refused:  # answered below
                return
            started = True
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, watched)
        # Serve's own Retry-After only with its own refusal.
        headers = {"Retry-After": retry if refused else RETRY}
        if name := Headers(scope=scope).get("x-request-id"):
            headers["X-Request-Id"] = name
        # A generator that ends early does the same while its replica lives: from here they look alike.
        text = "the answer broke off; its replica may have ended: try again"
        lost = ApiError(503, text, code="replica_lost", headers=headers)
        if refused:
            error = ApiError(503, "too many requests wait, or no replica is there yet: try again", code="overloaded")
            error.headers = headers
            await error.response()(scope, receive, send)
        elif not started:
            await lost.response()(scope, receive, send)
        elif streams and not ended:  # too late for a status
            await send({"type": "http.response.body", "body": sent(lost.body()).encode(), "more_body": False})


def _is_serves_refusal(scope: Scope, start: Message) -> bool:
    """Whether Serve itself refuses with a 503: in plain text, as no application of Palate's does. Its own routes, for
    probes, are under ``/-/``."""
    plain = _content_type(start) == "text/plain"
    return start["status"] == 503 and plain and not scope["path"].startswith("/-/")


def _content_type(start: Message) -> str:
    return _headers(start).get("content-type", "").partition(";")[0]


def _headers(start: Message) -> Headers:
    return Headers(raw=start.get("headers", []))
