"""The page at ``/`` of a served application: three files of the package, sent as they are.

They hold nothing of anybody, so they need no key; what the page asks of the API does. The page finds out for itself
what is served at its address, so that text and images have the same one.
"""

from importlib import resources

from fastapi import APIRouter, Response
from fastapi.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
HEADERS = {
    # Images that were drawn are data in the page. No form is sent by the browser itself: a key must not get into a URL.
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # the page of another version would ask what this server does not know
}

routes = APIRouter(include_in_schema=False)


@routes.get("/")
async def index() -> Response:
    """The page itself."""
    return _file("index.html")


@routes.get("/page.css")
async def style() -> Response:
    """How it looks."""
    return _file("page.css")


@routes.get("/page.js")
async def script() -> Response:
    """What it does."""
    return _file("page.js")


def _file(name: str) -> Response:
    content = resources.files("palate.serving").joinpath("page", name).read_bytes()
    return Response(content, media_type=FILES[name], headers=HEADERS)


class Slash:
    """Leads from ``/images`` to ``/images/`` where an application has this prefix: the page's links are relative."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prefix = scope.get("root_path", "")
        if scope["type"] == "http" and prefix and scope["path"] == prefix:
            await RedirectResponse(f"{prefix}/")(scope, receive, send)
            return
        await self._app(scope, receive, send)
