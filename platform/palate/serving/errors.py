"""Errors in OpenAI's shape, whole and in streams. Imports little: Ray Serve's proxy sends them, too."""

import json
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

LONGEST = 2_000  # characters of a message, a tenth of them for a name: errors repeat what was sent


class ApiError(HTTPException):
    """An error in OpenAI's shape. A kind of FastAPI's own, which passes those through while it reads a body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        message = _short(message, LONGEST)
        super().__init__(status, message, headers)
        self.status, self.message, self.code = status, message, code
        self.param = None if param is None else _short(param, LONGEST // 10)

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def _short(said: str, most: int) -> str:
    return said if len(said) <= most else f"{said[: most - 1]}…"


def sent(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
