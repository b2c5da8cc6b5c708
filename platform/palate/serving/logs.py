"""Logs of a server as JSON lines: one for each request, none with what was asked, answered or by whom.

A line of a request has its id, which the answer carries as ``X-Request-Id`` and which is the client's own where it sent
a proper one; the route as it is written in the code, never the path, because paths name people; and the tenant.
"""

import json
import logging
import re
import sys
import uuid
from typing import Any

ACCESS = "palate.access"
FIELDS = ("request_id", "method", "route", "status", "seconds", "tenant", "ended")
_PROPER = re.compile(rb"[A-Za-z0-9._-]{1,64}")

log = logging.getLogger(ACCESS)


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def write_json_lines() -> None:
    """Let all that palate logs in this process go to stderr as JSON lines, from INFO; done twice, it is done once."""
    palate = logging.getLogger("palate")
    if not any(isinstance(handler.formatter, JsonLines) for handler in palate.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        palate.addHandler(handler)
        palate.setLevel(logging.INFO)
        palate.propagate = False


def request_id(given: bytes | None) -> str:
    """The client's id of a request if it is of at most 64 letters, digits, dots and dashes; else a new one."""
    return given.decode() if given is not None and _PROPER.fullmatch(given) else uuid.uuid4().hex


def answered(
    *, request_id: str, method: str, route: str, status: int, seconds: float, tenant: str | None, ended: str
) -> None:
    """The line of a request. ``ended``: whole, cut (the client went, or an answer broke off) or failed."""
    level = logging.ERROR if ended == "failed" else logging.INFO
    found = {"request_id": request_id, "method": method, "route": route, "status": status}
    found |= {"seconds": round(seconds, 4), "tenant": tenant, "ended": ended}
    log.log(level, "%s %s %d", method, route, status, extra=found)
