"""What stands before Ray Serve's proxy, around applications that fail as Serve's does when a replica dies."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from palate.serving.proxy import middlewares
from toy_serving import listening

OK = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
CHUNK = b'data: {"id": "1", "object": "chat.completion.chunk", "choices": [], "created": 0, "model": "palate"}\n\n'
END = b"data: [DONE]\n\n"


def start(status: int, kind: bytes) -> dict:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


def body(content: bytes, more: bool = False) -> dict:
    return {"type": "http.response.body", "body": content, "more_body": more}


def says(*messages: dict) -> ASGIApp:
    """What Serve's proxy sends, behind the middlewares."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(dict(message))

    wrapped: ASGIApp = app
    for one in middlewares():
        wrapped = one.cls(wrapped, *one.args, **one.kwargs)
    return wrapped


def get(*messages: dict, path: str = "/v1/models") -> httpx.Response:
    with listening(says(*messages)) as url:
        return httpx.get(url + path, headers={"x-request-id": "abc"})


def test_a_request_that_nobody_answers_is_to_be_sent_again():
    answer = get()
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["x-request-id"] == "abc"
    assert answer.json()["error"] == {
        "message": "the answer broke off; its replica may have ended: try again",
        "type": "server_error",
        "param": None,
        "code": "replica_lost",
    }


@pytest.mark.parametrize("messages", [(OK, body(CHUNK, more=True)), (OK,)], ids=["after a chunk", "before the first"])
def test_a_stream_that_breaks_off_says_so_and_the_openai_client_raises(messages):
    with listening(says(*messages)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        stream = client.chat.completions.create(model="palate", messages=[], stream=True)
        with pytest.raises(openai.APIError, match="try again") as raised:
            list(stream)
    assert raised.value.code == "replica_lost"


def test_whole_answers_pass_as_they_are():
    answer = get(OK, body(CHUNK, more=True), body(END, more=True), body(b""))
    assert (answer.status_code, answer.content) == (200, CHUNK + END)
    for status, kind, content in ((500, b"application/json", b"{}"), (503, b"application/json", b"{}")):
        answer = get(start(status, kind), body(content))
        assert (answer.status_code, answer.content, answer.headers.get("retry-after")) == (status, content, None)


def test_a_whole_answer_that_breaks_off_is_not_completed():
    """No form is left to say it in: the connection ends, which clients see."""
    with pytest.raises(httpx.RemoteProtocolError):
        get(start(200, b"application/json"), body(b'{"id"', more=True))


def test_serves_own_refusal_gets_the_shape_of_the_api_and_its_probes_do_not():
    refusal = (start(503, b"text/plain; charset=utf-8"), body(b"Request dropped due to backpressure"))
    answer = get(*refusal)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert answer.headers["retry-after"] == "1"
    assert get(*refusal, path="/-/healthz").text == "Request dropped due to backpressure"
    refusal[0]["headers"].append((b"retry-after", b"7"))
    assert get(*refusal).headers["retry-after"] == "7"


def test_it_starts_quickly():
    """Serve waits seconds for a proxy, and torch alone may take them."""
    code = "import sys, palate.serving.proxy; print('torch' in sys.modules, 'ray' in sys.modules)"
    platform = Path(__file__).resolve().parents[2] / "platform"
    environment = {**os.environ, "PYTHONPATH": str(platform)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
