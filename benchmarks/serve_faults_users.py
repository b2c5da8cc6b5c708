"""Locust's users for serve_faults.py, which starts them: as many as it says, each at a steady pace, over plain HTTP.

Every request is a line of the file $FAULTS_LOG: what it was, when it began and ended, and how. ``answered`` is a whole
answer, ``retryable`` an error in OpenAI's shape that says when to try again (in a stream: an error event), ``failed``
anything else, an exception of the user's own among it: Locust would go on, and nothing would count the request.
"""

import json
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openai
from locust import HttpUser, constant_pacing, task
from locust.clients import ResponseContextManager

PEOPLE = ("ann", "bob", "eve", None)
TOKENS = 32
RETRYABLE = (429, 503)
KEY, PACE = os.environ["FAULTS_KEY"], float(os.environ["FAULTS_PACE"])
LOG = Path(os.environ["FAULTS_LOG"]).open("a")  # noqa: SIM115 - for as long as the process lives


def chat(stream: bool = False) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Describe thing {random.randrange(100)}."}]
    body = {"model": "palate", "messages": messages, "max_completion_tokens": TOKENS, "stream": stream}
    user = random.choice(PEOPLE)
    return body if user is None else {**body, "user": user}


def judged(status: int, headers: Mapping[str, str], text: str) -> tuple[str, str]:
    """How a request ended, and with what."""
    if 200 <= status < 300:
        return "answered", str(status)
    if status in RETRYABLE and headers.get("Retry-After") and '"error"' in text:
        return "retryable", f"{status} {json.loads(text)['error']['code']}"
    return "failed", f"{status or 'no answer'} {text[:200]}".strip()


def judged_stream(answer: ResponseContextManager) -> tuple[str, str]:
    """The same for server-sent events, read to their end."""
    last = ""
    try:
        for line in answer.iter_lines(decode_unicode=True):
            last = line or last
    except OSError as error:  # as all exceptions of requests are
        return "failed", f"stream cut: {type(error).__name__}"
    if last == "data: [DONE]":
        return "answered", "200"
    event = json.loads(last.removeprefix("data: ") or "{}")
    return ("retryable", f"200, then {event['error']['code']}") if "error" in event else ("failed", "stream cut")


def described(error: Exception) -> str:
    return f"{type(error).__name__} {error}"[:200]


def note(kind: str, began: float, outcome: str, found: str, **more: str) -> None:
    line = {"kind": kind, "began": began, "ended": time.time(), "outcome": outcome, "found": found, **more}
    print(json.dumps(line), file=LOG, flush=True)


class Client(HttpUser):
    """Asks with a key, and notes what came of it."""

    abstract = True
    wait_time = constant_pacing(PACE)

    def on_start(self) -> None:
        self.client.headers["Authorization"] = f"Bearer {KEY}"

    def ask(
        self, kind: str, method: str, path: str, body: Any = None, stream: bool = False, more: Mapping[str, str] = {}
    ) -> None:
        began = time.time()
        with self.client.request(
            method, path, json=body, stream=stream, name=kind, catch_response=True, timeout=60
        ) as answer:
            try:
                if stream and answer.status_code == 200:
                    outcome, found = judged_stream(answer)
                else:
                    outcome, found = judged(answer.status_code, answer.headers, answer.text or str(answer.error))
            except Exception as error:  # half an event, a body that is not JSON
                outcome, found = "failed", described(error)
            note(kind, began, outcome, found, **more)
            if outcome == "answered":
                answer.success()
            else:
                answer.failure(found)


class Reader(Client):
    """Answers, streamed and whole, and a look at people and models."""

    @task(4)
    def whole(self) -> None:
        self.ask("chat", "POST", "/v1/chat/completions", chat())

    @task(4)
    def streamed(self) -> None:
        self.ask("stream", "POST", "/v1/chat/completions", chat(stream=True), stream=True)

    @task(1)
    def person(self) -> None:
        self.ask("person", "GET", f"/v1/users/{random.choice(PEOPLE[:-1])}")

    @task(1)
    def models(self) -> None:
        self.ask("models", "GET", "/v1/models")


class Writer(Client):
    """Every text is another one, every history another person's, and what was answered must stay."""

    fixed_count = 1
    wait_time = constant_pacing(2)
    number = 0

    @task
    def history(self) -> None:
        person, text = f"put-{self.number}", f"Text number {self.number} is grand, grand, grand."
        Writer.number += 1
        body = {"texts": [{"input": f"Describe thing {n}.", "output": f"{text} {n}"} for n in range(3)]}
        self.ask("history", "PUT", f"/v1/users/{person}", body, more={"person": person, "text": text})

    @task
    def feedback(self) -> None:
        text = f"Edit number {self.number} is grand, grand, grand."
        Writer.number += 1
        body = {"user": "says", "prompt": "Describe a thing.", "answer": "A thing.", "edited": text}
        self.ask("feedback", "POST", "/v1/feedback", body, more={"text": text})


class Caller(Client):
    """OpenAI's client as it comes, which tries again twice: what its caller sees."""

    fixed_count = 2

    def on_start(self) -> None:
        self.openai = openai.OpenAI(base_url=f"{self.host}/v1", api_key=KEY, timeout=60)

    @task
    def whole(self) -> None:
        began = time.time()
        try:
            answer = self.openai.chat.completions.with_raw_response.create(**chat())
            outcome = "answered" if answer.parse().choices else "failed"
            found = f"200, tried {answer.retries_taken + 1} times" if answer.retries_taken else "200"
        except Exception as error:
            outcome, found = "failed", described(error)
        note("openai", began, outcome, found)
