"""Unified models behind the text endpoints: decoding as ``generation.say`` does, images inside requests, refusals."""

import io
import json
import re
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image

from palate.serving import http as http_module
from palate.serving.engine import Completion, Engine, Event, Request
from palate.serving.http import PERSONALIZATION
from palate.serving.sent_images import read_image
from palate.serving.service import Service
from palate.serving.settings import Settings
from palate.serving.text import decode
from palate.serving.unified import LEAD, ServedUnified, load_unified, prompt_embeddings, prompt_ids
from palate.unihetero.generation import say
from palate.users.keys import create_key
from toy_serving import serving, settings
from toy_unified import data_url, photo, unified_run

QUESTIONS = ("what is it", "where is it", "what is it left", "is it a red circle")
MOST = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unified")


@pytest.fixture(scope="module")
def url(folder: Path) -> str:
    return unified_run(folder / "run")


@pytest.fixture(scope="module")
def served(url: str) -> ServedUnified:
    return load_unified(url)


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def expected(served: ServedUnified, ids: list[int], images: list[Image.Image], most: int = MOST) -> list[int]:
    """What ``generation.say`` says, by a pass over the whole prompt and the cache of transformers."""
    features = served.model.encode(served.processor.pixels(images)) if images else None
    pieces = say(served.model, ids, features, end=served.phrasing.end, most=most)
    return [token for piece in pieces for token in piece.ids]


def asked(served: ServedUnified, count: int) -> tuple[list[Request], list[list[int]]]:
    """Requests about none, one or two images, and what should be said."""
    requests, wanted = [], []
    for number in range(count):
        images = [opened(photo(10 * number + place)) for place in range(number % 3)]
        ids = prompt_ids(served, [("user", QUESTIONS[number % len(QUESTIONS)])], len(images))
        embeddings = prompt_embeddings(served, ids, images) if images else None
        requests.append(Request(ids, max_new_tokens=MOST, embeddings_Td=embeddings, barred=served.barred))
        wanted.append(expected(served, ids, images))
    return requests, wanted


def without_end(served: ServedUnified, token_ids: list[int]) -> list[int]:
    return [token for token in token_ids if token != served.phrasing.end]


@pytest.mark.parametrize(("slots", "prefill_tokens"), [(8, 256), (3, 256), (4, 5), (1, 256)])
def test_the_engine_says_what_say_says_in_any_company(served: ServedUnified, slots: int, prefill_tokens: int) -> None:
    requests, wanted = asked(served, 12)
    assert len({tuple(said) for said in wanted}) > 6  # the image decides
    engine = Engine(served.loaded, slots=slots, max_length=64, prefill_tokens=prefill_tokens)
    for completion, said in zip(engine.generate(requests), wanted, strict=True):
        assert without_end(served, completion.token_ids) == said


def test_streams_that_join_midway_and_leave(served: ServedUnified) -> None:
    requests, wanted = asked(served, 9)
    engine = Engine(served.loaded, slots=4, max_length=64, prefill_tokens=7)
    texts: dict[int, str] = {}
    done: set[int] = set()

    def step() -> None:
        for event in engine.step():
            texts[event.id] = texts.get(event.id, "") + event.text
            if event.completion is not None:
                done.add(event.id)

    ids = []
    for number, request in enumerate(requests):
        ids.append(engine.submit(request, stream=True))
        step()
        if number == 4:
            gone = next(id for id in ids if id not in done)
            assert engine.cancel(gone)
    while not engine.idle:
        step()
    assert done == set(ids) - {gone}
    for id, said in zip(ids, wanted, strict=True):
        if id != gone:
            assert texts[id] == decode(served.loaded.tokenizer, said)


def test_what_is_barred_is_never_said_and_moves_no_one_else(served: ServedUnified) -> None:
    ids = [5, 6, 7]
    plain = Request(ids, max_new_tokens=MOST, top_log_probs=3)
    engine = Engine(served.loaded, slots=3, max_length=64)
    (alone,) = engine.generate([plain])
    first = alone.token_ids[0]
    barred = Request(ids, max_new_tokens=MOST, barred=(first,), temperature=1.5, seed=1)
    beside, without = engine.generate([plain, barred])
    assert beside.token_ids == alone.token_ids
    assert first not in without.token_ids
    vocabulary = served.loaded.model.config.vocab_size
    with pytest.raises(ValueError, match="top_log_probs must lie"):
        engine.submit(Request(ids, max_new_tokens=1, barred=(1, 2), top_log_probs=vocabulary - 1))
    with pytest.raises(ValueError, match=r"needs embeddings of shape \(3, 32\), found \(2, 32\)"):
        engine.submit(Request(ids, max_new_tokens=1, embeddings_Td=torch.zeros(2, 32)))


def test_embeddings_of_tokens_are_the_tokens(served: ServedUnified) -> None:
    ids = [5, 6, 7, 8, 9, 10, 11]
    given = served.model.get_input_embeddings()(torch.tensor(ids)).detach()
    engine = Engine(served.loaded, slots=2, max_length=64, prefill_tokens=3)
    one, other = engine.generate([Request(ids, max_new_tokens=8), Request(ids, max_new_tokens=8, embeddings_Td=given)])
    assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
    # Two rows of one product are not bit for bit alike when several threads share it.
    assert one.log_probs == pytest.approx(other.log_probs, rel=1e-5)


def test_conversations_are_put_as_in_training(served: ServedUnified) -> None:
    said = served.phrasing
    before = said.conversation([("user", "what is it"), ("assistant", "circle")])
    turns = [("user", "what is it"), ("assistant", "circle"), ("user", "where is it")]
    assert prompt_ids(served, turns, 2) == [*said.image(), *said.image(), *before.ids, *said.asked("where is it")]
    assert prompt_ids(served, [("user", "")], 1) == [*said.image(), *said.ids(said.words.caption)]
    for turns, images, message in [
        ([("system", "be brief"), ("user", "x")], 1, "without system messages"),
        ([("user", "x"), ("user", "y")], 1, "in turn"),
        ([("user", "x"), ("assistant", "y")], 1, "in turn"),
        ([("assistant", "y"), ("user", "x")], 1, "in turn"),
        ([("user", " ")], 0, "no text"),
        ([("user", "x"), ("assistant", "y"), ("user", "")], 1, "no text"),
    ]:
        with pytest.raises(ValueError, match=message):
            prompt_ids(served, turns, images)


@pytest.fixture(scope="module")
def server(url: str, run_url: str, folder: Path) -> Iterator[tuple[str, Service]]:
    limits = {"max_images": 2, "max_image_bytes": 20_000, "max_image_pixels": 10_000, "max_body_bytes": 200_000}
    with serving(settings(folder, unified={"scenes": url}, **limits), run_url) as made:
        yield made


@pytest.fixture(scope="module")
def key(server: tuple[str, Service]) -> str:
    return create_key(server[1].store, "acme", "tests")


@pytest.fixture(scope="module")
def client(server: tuple[str, Service], key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def http(server: tuple[str, Service], key: str) -> httpx.Client:
    return httpx.Client(base_url=server[0], headers={"Authorization": f"Bearer {key}"}, timeout=60)


def part(url: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def about(*images: dict[str, Any], question: str = "what is it") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": question}, *images]}]


def ask(client: openai.OpenAI, *images: dict[str, Any], **changes: Any) -> Any:
    given = {"model": "scenes", "messages": about(*images), "temperature": 0, "max_completion_tokens": MOST}
    return client.chat.completions.create(**{**given, **changes})


def test_a_question_about_an_image(client: openai.OpenAI, served: ServedUnified) -> None:
    answers = []
    for seed in range(4):
        image = photo(seed)
        answer = ask(client, part(data_url(image), detail="auto"))
        ids = prompt_ids(served, [("user", "what is it")], 1)
        said = expected(served, ids, [opened(image)])
        assert answer.choices[0].message.content == decode(served.loaded.tokenizer, said)
        assert answer.usage.prompt_tokens == len(ids)
        chunks = ask(client, part(data_url(image)), stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert streamed == answer.choices[0].message.content
        answers.append(streamed)
    assert len(set(answers)) > 1


def test_several_turns_and_images_and_answers(client: openai.OpenAI, served: ServedUnified) -> None:
    images = [photo(5), photo(6, kind="JPEG")]
    messages = [
        {"role": "user", "content": [part(data_url(images[0])), {"type": "text", "text": "what is it"}]},
        {"role": "assistant", "content": "circle"},
        {"role": "user", "content": [{"type": "text", "text": "where is it"}, part(data_url(images[1], "jpeg"))]},
    ]
    answer = ask(client, messages=messages)
    turns = [("user", "what is it"), ("assistant", "circle"), ("user", "where is it")]
    said = expected(served, prompt_ids(served, turns, 2), [opened(image) for image in images])
    assert answer.choices[0].message.content == decode(served.loaded.tokenizer, said)
    drawn = ask(client, part(data_url(images[0])), n=3, temperature=1.5, seed=1, logprobs=True, top_logprobs=5)
    assert len({choice.message.content for choice in drawn.choices}) > 1
    said = [token.token for choice in drawn.choices for token in choice.logprobs.content]
    assert not {"<image>", "<image_start>", "<image_end>"} & set(said)
    cut = answer.choices[0].message.content.split()[-1]
    stopped = ask(client, messages=messages, stop=cut).choices[0]
    assert cut not in stopped.message.content
    text_only = ask(client)
    said = expected(served, prompt_ids(served, [("user", "what is it")], 0), [])
    assert text_only.choices[0].message.content == decode(served.loaded.tokenizer, said)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (photo(0, (1, 1)), "png"),
        (photo(0, kind="JPEG", mode="CMYK"), "jpeg"),
        (photo(0, kind="JPEG", mode="L"), "jpg"),
        (photo(0, kind="WEBP"), "webp"),
        (photo(0, mode="RGBA"), "png"),
        (photo(0, mode="P"), "png"),
        (photo(0, mode="1"), "png"),
        (photo(0, (100, 2)), "PNG"),
    ],
)
def test_images_of_all_kinds(client: openai.OpenAI, image: bytes, kind: str) -> None:
    assert ask(client, part(data_url(image, kind))).choices[0].finish_reason in ("stop", "length")


def huge(side: int) -> bytes:
    """A PNG of a kilobyte that says it is ``side`` pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
        + chunk(b"IEND", b"")
    )


FIRST = "messages.0.content.1.image_url.url"
GOOD = data_url(photo(0))


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"messages": about(part(data_url(photo(0)[:200])))}, FIRST, "no PNG, JPEG, WEBP that can be read"),
        ({"messages": about(part(data_url(photo(0, kind="JPEG")[:300], "jpeg")))}, FIRST, "can be read"),
        ({"messages": about(part(data_url(photo(0, kind="GIF"))))}, FIRST, "can be read"),
        ({"messages": about(part(data_url(photo(0, kind="GIF"), "gif")))}, FIRST, "only data URLs of a PNG"),
        ({"messages": about(part(data_url(huge(9_000))))}, FIRST, "9000x9000 pixels: at most 10000"),
        ({"messages": about(part(data_url(huge(60_000))))}, FIRST, "decompression bomb"),
        ({"messages": about(part(data_url(photo(0, (101, 100), "JPEG"))))}, FIRST, "101x100 pixels: at most 10000"),
        ({"messages": about(part(data_url(photo(0, (102, 2)))))}, FIRST, "over 50 times the other"),
        ({"messages": about(part(data_url(photo(0, (90, 90)))))}, FIRST, "bytes: at most 20000"),
        ({"messages": about(part("data:image/png;base64,%%%"))}, FIRST, "no valid base64"),
        ({"messages": about(part("data:image/png;base64,é"))}, FIRST, "no valid base64"),
        ({"messages": about(part("data:image/png;base64,"))}, FIRST, "can be read"),
        ({"messages": about(part("data:text/plain;base64,aGk="))}, FIRST, "only data URLs"),
        ({"messages": about(part("data:image/png,abc"))}, FIRST, "only data URLs"),
        ({"messages": about(part("http://169.254.169.254/latest"))}, FIRST, "fetches nothing"),
        ({"messages": about(part("https://example.com/a.png"))}, FIRST, "fetches nothing"),
        ({"messages": about(part("file:///etc/passwd"))}, FIRST, "fetches nothing"),
        ({"messages": about(part(GOOD, detail="high"))}, "messages.0.content.1.image_url.detail", "'auto'"),
        ({"messages": about(part(GOOD, size=3))}, "messages.0.content.1.image_url", "'size' of an image"),
        ({"messages": about(part(5))}, FIRST, "an image is sent as"),
        ({"messages": about(part("\ud800"))}, FIRST, "only data URLs"),
        ({"messages": about(part("data:image/png;base64,\ud800"))}, FIRST, "no valid base64"),
        ({"messages": about(part(GOOD, **{"\ud800": 1}))}, "messages.0.content.1.image_url", "not supported"),
        ({"messages": about({**part(GOOD), "\ud800": 1})}, "messages.0.content.1", "surrogate|unicode|valid"),
        ({"messages": about({"type": "image_url", "image_url": GOOD})}, FIRST, "an image is sent as"),
        ({"messages": about({"type": "image_url"})}, FIRST, "an image is sent as"),
        ({"messages": about({**part(GOOD), "text": "x"})}, "messages.0.content.1.text", "not supported"),
        ({"messages": about({"type": "text"})}, "messages.0.content.1.text", "needs a text"),
        ({"messages": about({"type": "input_audio", "input_audio": {}})}, "messages.0.content.1.type", "input_audio"),
        ({"messages": about(*[part(GOOD)] * 3)}, "messages.0.content.3.type", "at most 2 in a request"),
        ({"messages": [{**about(part(GOOD))[0], "role": "system"}]}, "messages.0.content.1.type", "the system's"),
        ({"messages": [{"role": "system", "content": "x"}, *about(part(GOOD))]}, "messages", "system messages"),
        ({"messages": about(part(GOOD)) * 2}, "messages", "in turn"),
        ({"messages": about(part(GOOD), question="left " * 300)}, "messages", "together they may be"),
        ({"user": "ann"}, "user", "personalization of 'scenes' is not available"),
        ({"personalization": {"beta": 1}}, "personalization.beta", "is not available"),
        ({"n": 9}, "n", "at most 4"),
        ({"top_logprobs": 17, "logprobs": True}, None, "top_log_probs"),
        ({"model": "palate"}, "messages.0.content.1.type", r"'palate' reads text only.*\(scenes\)"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, changes: dict[str, Any], param: str, message: str) -> None:
    body = {"model": "scenes", "messages": about(part(GOOD)), "max_completion_tokens": 4, **changes}
    answer = http.post("/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error["message"]


def test_a_failed_image_takes_no_place(server: tuple[str, Service], http: httpx.Client, client: openai.OpenAI) -> None:
    body = {"model": "scenes", "messages": about(part(data_url(photo(0)[:200])))}
    for _ in range(server[1].settings.max_in_flight + 1):
        assert http.post("/v1/chat/completions", json=body).status_code == 400
    assert ask(client, part(GOOD)).choices


def test_plain_completions_and_neutral_fields(client: openai.OpenAI, http: httpx.Client) -> None:
    whole = client.completions.create(model="scenes", prompt=["a red", "a blue"], max_tokens=4, temperature=0)
    assert [choice.index for choice in whole.choices] == [0, 1]
    with pytest.raises(openai.BadRequestError, match="not available"):
        client.completions.create(model="scenes", prompt="a", user="ann")
    body = {"model": "scenes", "messages": about(part(GOOD)), "user": None, "personalization": {"beta": 0}}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert PERSONALIZATION not in answer.headers


def test_it_is_listed_beside_the_runs(client: openai.OpenAI, http: httpx.Client) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"palate", "first", "scenes"}
    assert listed["scenes"].image_tokens == 4
    assert client.models.retrieve("scenes").live is False
    assert http.get("/healthz").json()["runs"] == 2
    assert re.search(r'palate_waiting\{replica="[^"]+",run="scenes"\} 0.0', http.get("/metrics").text)


def test_a_unified_model_alone_and_one_that_cannot_be_loaded(url: str, tmp_path: Path) -> None:
    given = settings(tmp_path, unified={"scenes": url, "lost": str(tmp_path / "lost")}, require_keys=False)
    with serving(given) as (base, service):
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
        assert ask(client, part(GOOD)).choices
        health = httpx.get(f"{base}/healthz")
        assert health.status_code == 200
        assert (health.json()["runs"], health.json()["failed"]) == (1, 1)
        assert "lost" not in health.text
        assert service.ready
        with pytest.raises(openai.NotFoundError, match="there are: scenes"):
            ask(client, model="palate")
    with pytest.raises(ValueError, match="alias"):
        Settings(unified={"palate": url})


def test_transparent_images_stand_on_white() -> None:
    clear = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(clear, "PNG")
    assert read_image(data_url(clear.getvalue()), 1000, 100).getpixel((0, 0)) == (255, 255, 255)


def test_half_precision_answers_too(url: str) -> None:
    served = load_unified(url, dtype=torch.bfloat16)
    ids = prompt_ids(served, [("user", "what is it")], 1)
    embeddings = prompt_embeddings(served, ids, [opened(photo(0))])
    assert embeddings.dtype == torch.bfloat16
    engine = Engine(served.loaded, slots=1, max_length=64)
    (answer,) = engine.generate([Request(ids, max_new_tokens=MOST, embeddings_Td=embeddings, barred=served.barred)])
    said = expected(served, ids, [opened(photo(0))])
    assert without_end(served, answer.token_ids)[:1] == said[:1]


def test_who_is_gone_or_does_not_fit_has_no_image_read(url: str, tmp_path: Path, monkeypatch: Any) -> None:
    given = settings(tmp_path, unified={"scenes": url}, require_keys=False, max_in_flight=1, slots=1, max_waiting=1)
    body = {"model": "scenes", "messages": about(part(GOOD)), "max_completion_tokens": 2}
    reading, may_end, reads = threading.Event(), threading.Event(), []
    read = http_module.prompt_embeddings

    def slow(*given: Any) -> torch.Tensor:
        reads.append(given)
        reading.set()
        assert may_end.wait(30)
        return read(*given)

    monkeypatch.setattr(http_module, "prompt_embeddings", slow)
    with serving(given) as (base, service):
        http = httpx.Client(base_url=base, timeout=60)
        with ThreadPoolExecutor() as pool:
            first = pool.submit(http.post, "/v1/chat/completions", json=body)
            assert reading.wait(30)
            busy = http.post("/v1/chat/completions", json=body)
            assert (busy.status_code, busy.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            may_end.set()
            assert first.result().status_code == 200
        may_end.clear()
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=body, timeout=0.3)
        may_end.set()
        for _ in range(100):  # its place is free as soon as the server has seen that it is gone
            answer = http.post("/v1/chat/completions", json=body)
            if answer.status_code != 429:
                break
            time.sleep(0.05)
        assert answer.status_code == 200
        count = len(reads)
        worker = service.unified["scenes"].worker
        monkeypatch.setattr(worker, "_active", 2)
        full = http.post("/v1/chat/completions", json=body)
        assert (full.status_code, full.json()["error"]["code"]) == (503, "overloaded")
        assert len(reads) == count
        monkeypatch.setattr(worker, "_active", 0)
        service.unified["scenes"].reader.shutdown()
        stopping = http.post("/v1/chat/completions", json=body)
        assert (stopping.status_code, stopping.json()["error"]["code"]) == (503, "engine_failed")


@pytest.mark.parametrize("texts", [["", " circle", " left"], [" ", " circle"], ["circle"], [" "], [""]])
def test_the_space_before_an_answer_is_not_the_answers(texts: list[str]) -> None:
    shape = http_module._Chat({}, None, False, LEAD)  # type: ignore[arg-type]
    whole = shape.whole(0, [], Completion([], "".join(texts), "stop", []))["message"]["content"]
    streamed, offset = "", 0
    for text in texts:
        event = Event(0, 0, 0.0, text, None)
        streamed += shape.chunk(0, event, offset)["delta"].get("content", "")
        offset += shape.length(event)
    assert streamed == whole == "".join(texts).removeprefix(" ")
