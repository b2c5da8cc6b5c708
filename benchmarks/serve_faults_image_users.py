"""Locust's users for serve_faults.py --server images; what they note, and how, is in serve_faults_users.py."""

import base64
import io
import random
import time
from typing import Any

import openai
from locust import constant_pacing, task
from PIL import Image
from serve_faults_users import KEY, Client, described, note

COLOURS = ("red", "green", "blue", "yellow")


def scene() -> dict[str, Any]:
    return {"model": "shapes", "prompt": f"a small {random.choice(COLOURS)} circle on grey"}


def picture() -> str:
    """An image that nobody has sent before, as answers hold it."""
    stream = io.BytesIO()
    Image.frombytes("RGB", (32, 32), random.randbytes(3 * 32 * 32)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


class Reader(Client):
    """Images, streamed with their steps and whole, and a look at the models."""

    @task(4)
    def whole(self) -> None:
        self.ask("image", "POST", "/v1/images/generations", scene())

    @task(4)
    def streamed(self) -> None:
        self.ask("image stream", "POST", "/v1/images/generations", {**scene(), "stream": True}, stream=True)

    @task(1)
    def models(self) -> None:
        self.ask("models", "GET", "/v1/models")


class Ranker(Client):
    """Every ranking is another one, of images of its own, and what was answered must stay."""

    fixed_count = 1
    wait_time = constant_pacing(1)
    number = 0

    @task
    def ranking(self) -> None:
        text = f"Scene number {self.number}"
        Ranker.number += 1
        images = [{"b64_json": picture()} for _ in range(3)]
        body = {"user": "ranks", "prompt": text, "images": images}
        self.ask("ranking", "POST", "/v1/feedback", body, more={"text": text})


class Caller(Client):
    """OpenAI's client as it comes, which tries again twice: what its caller sees."""

    fixed_count = 2

    def on_start(self) -> None:
        self.openai = openai.OpenAI(base_url=f"{self.host}/v1", api_key=KEY, timeout=60)

    @task
    def whole(self) -> None:
        began = time.time()
        try:
            answer = self.openai.images.with_raw_response.generate(**scene())
            outcome = "answered" if answer.parse().data else "failed"
            found = f"200, tried {answer.retries_taken + 1} times" if answer.retries_taken else "200"
        except Exception as error:
            outcome, found = "failed", described(error)
        note("openai", began, outcome, found)
