"""Logs of a server: a line of JSON for each request, which names nobody."""

import asyncio
import json
import logging
import sys

import pytest
from starlette.requests import Request

from palate.serving import logs
from palate.serving.http import Caller, Counted
from palate.serving.metrics import RequestMetrics


@pytest.fixture
def lines(caplog):
    """The lines that a server writes, parsed."""
    caplog.set_level(logging.INFO, logger="palate")
    return lambda: [json.loads(logs.JsonLines().format(record)) for record in caplog.records]


def answer(app, headers=(), path="/v1/users/ann"):
    """The messages that ``app``, counted and logged, sends for one request."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"a secret text", "more_body": False}

    scope = {"type": "http", "method": "PUT", "path": path, "headers": list(headers), "query_string": b"key=secret"}
    asyncio.run(Counted(app, RequestMetrics())(scope, receive, send))
    return sent


async def whole(scope, receive, send):
    scope["route"] = type("Route", (), {"path": "/v1/users/{user_id}"})()
    Request(scope).state.caller = Caller("acme", "key-1")
    await send({"type": "http.response.start", "status": 202, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b"{}"})


async def cut(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"data: ", "more_body": True})


async def failing(scope, receive, send):
    raise RuntimeError("broken")


def test_a_request_is_one_line_without_path_key_or_text(lines):
    sent = answer(whole, [(b"authorization", b"Bearer secret"), (b"x-request-id", b"abc-1.2")])
    assert (b"x-request-id", b"abc-1.2") in sent[0]["headers"]
    assert (b"a", b"b") in sent[0]["headers"]
    (line,) = lines()
    assert line.pop("seconds") >= 0
    assert line.pop("time")
    assert line == {
        "level": "INFO",
        "logger": "palate.access",
        "message": "PUT /v1/users/{user_id} 202",
        "request_id": "abc-1.2",
        "method": "PUT",
        "route": "/v1/users/{user_id}",
        "status": 202,
        "tenant": "acme",
        "ended": "whole",
    }


@pytest.mark.parametrize("given", [b"", b"a b", b"x" * 65, b'"\n{', "ä".encode()])
def test_an_improper_id_is_replaced(lines, given):
    sent = answer(whole, [(b"x-request-id", given)])
    (line,) = lines()
    assert len(line["request_id"]) == 32
    assert (b"x-request-id", line["request_id"].encode()) in sent[0]["headers"]


def test_an_answer_that_broke_off_and_a_failure_are_told_apart(lines):
    answer(cut)
    with pytest.raises(RuntimeError, match="broken"):
        answer(failing)
    broken, failed = lines()
    assert (broken["ended"], broken["status"], broken["tenant"], broken["route"]) == ("cut", 200, None, "unknown")
    assert (failed["ended"], failed["status"], failed["level"]) == ("failed", 500, "ERROR")


def test_a_client_that_goes_is_no_failure_where_the_server_raises_instead_of_saying_so(lines):
    """As Ray Serve does for a stream that its client cancelled."""

    async def until_the_client_has_gone(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass

    async def gone():
        raise RuntimeError("this task was cancelled")

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    metrics = RequestMetrics()
    asyncio.run(Counted(until_the_client_has_gone, metrics)(scope, gone, send))
    (line,) = lines()
    assert (line["ended"], line["status"], line["level"]) == ("cut", 200, "INFO")
    assert b'status="500"' not in metrics.render()


def test_errors_are_in_their_line():
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("palate.x", logging.ERROR, "f", 1, "it %s", ("failed",), sys.exc_info())
    line = json.loads(logs.JsonLines().format(record))
    assert line["message"] == "it failed"
    assert line["error"].endswith("ValueError: why")


def test_lines_are_written_once_however_often_they_are_asked_for(monkeypatch, capsys):
    palate = logging.getLogger("palate")
    monkeypatch.setattr(palate, "handlers", [])
    monkeypatch.setattr(palate, "propagate", palate.propagate)
    monkeypatch.setattr(palate, "level", palate.level)
    logs.write_json_lines()
    logs.write_json_lines()
    logging.getLogger("palate.serving.x").info("ready")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "ready"
