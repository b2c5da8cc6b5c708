"""Images over HTTP through the unmodified OpenAI client and plain requests."""

import asyncio
import base64
import io
import json
import re
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from palate.serving.http import PERSONALIZATION
from palate.serving.image_http import create_image_app
from palate.serving.image_schemas import FormError, fitted_size, read_form, read_upload
from palate.serving.image_service import ImageService, ModelSource
from palate.users.keys import create_key
from toy_images import PROMPT, lora_run, person_run, picture, settings
from toy_serving import listening

QUICK = {"steps": 2, "guidance": 3.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ImageService]]:
    folder = tmp_path_factory.mktemp("images")
    models = {
        "shapes": ModelSource(base="shapes", **QUICK),
        "edit": ModelSource(base="shapes-edit", **QUICK),
        "person": ModelSource(run=person_run(folder / "person"), tenants=("acme",), **QUICK),
    }
    config = settings(
        folder,
        models=models,
        registry=str(folder / "models.json"),
        default_model="shapes",
        max_pixels=4096,
        max_upload_pixels=65536,
        max_body_bytes=200_000,
        max_waiting=4,
        max_in_flight=6,
        max_steps=1000,
    )
    (folder / "models.json").write_text("{}")
    service = ImageService(config).start()
    with listening(create_image_app(service)) as url:
        yield url, service
    service.stop()


@pytest.fixture(scope="module")
def key(server: tuple[str, ImageService]) -> str:
    return create_key(server[1].store, "acme", "tests")


@pytest.fixture(scope="module")
def client(server: tuple[str, ImageService], key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def http(server: tuple[str, ImageService], key: str) -> httpx.Client:
    return httpx.Client(base_url=server[0], headers={"Authorization": f"Bearer {key}"}, timeout=60)


def opened(image: Any) -> np.ndarray:
    data = image["b64_json"] if isinstance(image, dict) else image.b64_json
    with Image.open(io.BytesIO(base64.b64decode(data))) as found:
        assert found.format == "PNG"
        return np.asarray(found, dtype=int)


def until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


def test_images_by_seed(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="shapes", prompt=PROMPT, n=3, size="16x16", extra_body={"seed": 7})
    assert answer.size == "16x16"
    assert answer.output_format == "png"
    assert [image.seed for image in answer.data] == [7, 8, 9]
    found = [opened(image) for image in answer.data]
    assert all(image.shape == (16, 16, 3) for image in found)
    assert abs(found[0] - found[1]).max() > 20
    again = client.images.generate(prompt=PROMPT, response_format="b64_json", extra_body={"seed": 8})
    assert abs(opened(again.data[0]) - found[1]).max() <= 1  # the default model, in another batch
    unseeded = [client.images.generate(prompt=PROMPT).data[0].seed for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    wide = client.images.generate(prompt=PROMPT, size="32x16", extra_body={"steps": 1})
    assert opened(wide.data[0]).shape == (16, 32, 3)


def test_streams_say_how_far_they_are_and_end_with_the_same_image(client: openai.OpenAI) -> None:
    whole = client.images.generate(model="shapes", prompt=PROMPT, n=2, extra_body={"seed": 7})
    events = list(
        client.images.generate(model="shapes", prompt=PROMPT, n=2, stream=True, extra_body={"seed": 7, **QUICK})
    )
    for index in range(2):
        *steps, last = [event for event in events if event.index == index]
        assert [(event.type, event.step, event.of) for event in steps] == [
            ("image_generation.progress", step, 2) for step in (1, 2)
        ]
        assert last.type == "image_generation.completed"
        assert last.size == "16x16"
        assert last.seed == 7 + index
        assert (opened(last) == opened(whole.data[index])).all()


def test_edits_of_an_upload(client: openai.OpenAI) -> None:
    red, blue = picture("red"), picture("blue")
    ask = {"model": "edit", "prompt": "make the circle red", "extra_body": {"seed": 1}}
    one = client.images.edit(image=("red.png", red, "image/png"), **ask)
    listed = client.images.edit(image=[("red.png", red, "image/png")], n=1, size="16x16", **ask)
    other = client.images.edit(image=io.BytesIO(blue), **ask)
    assert (opened(one.data[0]) == opened(listed.data[0])).all()
    assert abs(opened(other.data[0]) - opened(one.data[0])).max() > 20
    assert client.images.edit(image=red, model="edit", prompt="5", user="7").data
    guided = {**ask, "extra_body": {"seed": 1, "image_guidance": 5.5}}
    assert (opened(client.images.edit(image=red, **guided).data[0]) != opened(one.data[0])).any()
    large = client.images.edit(image=picture("red", (200, 100), "JPEG"), **ask)
    assert large.size == "88x40"  # of its proportions, as large as may be
    *steps, last = list(client.images.edit(image=red, stream=True, **ask))
    assert [event.type for event in steps] == ["image_edit.progress"] * 2
    assert last.type == "image_edit.completed"
    assert (opened(last) == opened(one.data[0])).all()


def test_a_person_and_a_stranger(client: openai.OpenAI) -> None:
    def ask(model: str, **given: Any) -> Any:
        return client.images.with_raw_response.generate(model=model, prompt=PROMPT, extra_body={"seed": 3}, **given)

    base = opened(ask("shapes").parse().data[0])
    for given in ({}, {"user": "zoe"}):
        stranger = ask("person", **given)
        assert stranger.headers[PERSONALIZATION] == "population"
        assert (opened(stranger.parse().data[0]) == base).all()
    known = ask("person", user="ann")
    assert known.headers[PERSONALIZATION] == "personal"
    assert abs(opened(known.parse().data[0]) - base).max() > 20


def test_models_of_ones_own_tenant(client: openai.OpenAI, server: tuple[str, ImageService]) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"shapes", "edit", "person"}
    assert (listed["edit"].task, listed["person"].personal, listed["shapes"].size) == ("edit", True, "16x16")
    rival = openai.OpenAI(base_url=f"{server[0]}/v1", api_key=create_key(server[1].store, "rival", "r"), max_retries=0)
    assert "person" not in {model.id for model in rival.models.list()}
    for call in (
        lambda: rival.models.retrieve("person"),
        lambda: rival.images.generate(model="person", prompt=PROMPT, user="ann"),
        lambda: client.images.generate(model="dall-e-3", prompt=PROMPT),
    ):
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            call()


def test_a_lora_is_served_without_a_restart(
    client: openai.OpenAI, server: tuple[str, ImageService], tmp_path: Any
) -> None:
    service = server[1]
    entry = {"tuned": {"run": lora_run(tmp_path / "run"), **QUICK}}
    registry = service.settings.registry
    assert registry is not None
    with open(registry, "w") as file:  # noqa: PTH123
        json.dump(entry, file)
    until(lambda: "tuned" in service.hosted)
    given = {"prompt": PROMPT, "extra_body": {"seed": 3}}
    base, tuned = (opened(client.images.generate(model=name, **given).data[0]) for name in ("shapes", "tuned"))
    assert abs(base - tuned).max() > 20
    assert client.models.retrieve("tuned").base == "shapes"
    with open(registry, "w") as file:  # noqa: PTH123
        file.write("{}")
    until(lambda: "tuned" not in service.hosted)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": "2"}, "n"),
        ({"size": "17x16"}, "size"),
        ({"size": "0x16"}, "size"),
        ({"size": "128x64"}, "size"),
        ({"size": "99999x99999"}, "size"),
        ({"size": "large"}, "size"),
        ({"size": "16x16\n"}, "size"),
        ({"seed": 2**70}, "seed"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"guidance": -1}, "guidance"),
        ({"guidance": True}, "guidance"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "webp"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"background": "transparent"}, "background"),
        ({"quality": "hd"}, "quality"),
        ({"style": "vivid"}, "style"),
        ({"moderation": "low"}, "moderation"),
        ({"partial_images": 2}, "partial_images"),
        ({"stream": "yes"}, "stream"),
        ({"user": "../etc"}, "user"),
        ({"made_up": 1}, "made_up"),
        ({"image_guidance": 2}, "image_guidance"),
        ({"model": "edit"}, "model"),
        ({"model": 5}, "model"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, changes: dict[str, Any], param: str) -> None:
    body = {"model": "shapes", "prompt": PROMPT, **changes}
    answer = http.post("/v1/images/generations", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_fields_that_ask_for_nothing_are_accepted(client: openai.OpenAI) -> None:
    neutral = {"background": "auto", "quality": "auto", "output_format": "png", "output_compression": 100}
    more = {"partial_images": 0, "moderation": "auto", "style": None, "stream": False}
    assert client.images.generate(prompt=PROMPT, extra_body={**neutral, **more}).data
    image = picture("red")
    given = {**neutral, "partial_images": 0, "input_fidelity": "low"}
    assert client.images.edit(model="edit", image=image, prompt=PROMPT, extra_body=given).data


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that unpacks into ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(side, 1000) * (side // 8 + 1)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no PNG"),
        (b"GIF89a" + bytes(40), "no PNG"),
        (picture("red", (8, 8), "BMP"), "no PNG"),
        (picture("red", (100, 100))[:-30], "no PNG"),
        (bomb(2000), "2000x2000 pixels"),
        (bomb(60_000), "no PNG"),  # Pillow's own bound
    ],
)
def test_uploads_that_are_none_or_unpack_too_far(http: httpx.Client, content: bytes, message: str) -> None:
    answer = http.post(
        "/v1/images/edits",
        data={"model": "edit", "prompt": PROMPT},
        files={"image": ("x.png", content, "image/png")},
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "image"
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"prompt": PROMPT, "model": "edit"}, {}, None),  # sent as another type of body
        ({"model": "edit"}, {"image": picture("red")}, "prompt"),
        ({"prompt": PROMPT, "model": "edit", "n": "two"}, {"image": picture("red")}, "n"),
        ({"prompt": PROMPT, "model": "edit", "n": "9"}, {"image": picture("red")}, "n"),
        ({"prompt": PROMPT, "model": "edit", "image_guidance": "0"}, {"image": picture("red")}, "image_guidance"),
        ({"prompt": PROMPT, "model": "edit", "input_fidelity": "high"}, {"image": picture("red")}, "input_fidelity"),
        ({"prompt": PROMPT, "model": "edit", "made_up": "1"}, {"image": picture("red")}, "made_up"),
        ({"prompt": PROMPT, "model": "edit"}, {"image": picture("red"), "mask": picture("red")}, "mask"),
        ({"prompt": PROMPT, "model": "edit", "image": "text"}, {"other": b""}, "other"),
        ({"prompt": PROMPT, "model": "shapes"}, {"image": picture("red")}, "model"),
    ],
)
def test_forms_that_are_wrong(
    http: httpx.Client, fields: dict[str, str], files: dict[str, bytes], param: str | None
) -> None:
    sent = {name: (f"{name}.png", content, "image/png") for name, content in files.items()}
    answer = http.post("/v1/images/edits", data=fields, files=sent or None)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_bodies_are_bounded_and_keys_needed(http: httpx.Client, server: tuple[str, ImageService]) -> None:
    for _ in range(2):
        too_large = {"image": ("x.png", bytes(200_001), "image/png")}
        answer = http.post("/v1/images/edits", data={"prompt": PROMPT, "model": "edit"}, files=too_large)
        assert answer.status_code == 413

        def pieces() -> Iterator[bytes]:
            for _ in range(5):
                yield bytes(100_000)

        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        assert http.post("/v1/images/edits", content=pieces(), headers=headers).status_code == 413
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/images/generations"), ("POST", "/v1/images/edits")):
        assert httpx.request(method, f"{server[0]}{path}").status_code == 401
    assert http.post("/v1/images/variations").status_code == 404
    assert not server[1].worker.load.running


def test_keys_are_needed_behind_a_prefix_too(server: tuple[str, ImageService], key: str) -> None:
    app = create_image_app(server[1])

    async def ask(headers: dict[str, str]) -> int:
        transport = httpx.ASGITransport(app, root_path="/images")
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            return (await http.get("/images/v1/models", headers=headers)).status_code

    assert asyncio.run(ask({})) == 401
    assert asyncio.run(ask({"Authorization": f"Bearer {key}"})) == 200


def test_forms_are_read_to_the_byte() -> None:
    content = bytes(range(256)) + b"\r\n--edge\n\r\n\r\n-\r\n"
    body = (
        b'preamble\r\n--edges\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        + content
        + b"\r\n--edges\r\ncontent-disposition: form-data; name=prompt\r\n\r\nr\xc3\xa9d\r\n--edges--\r\n"
    )
    fields, files = read_form('multipart/form-data; boundary="edges"', body)
    long = b'--edges\r\nContent-Disposition: form-data; a="' + b";" * 100_000 + b"\r\n\r\nx\r\n--edges--"
    with pytest.raises(FormError, match="more than 2048 bytes"):
        read_form("multipart/form-data; boundary=edges", long)
    assert fields == {"prompt": "réd"}
    assert files == {"image": [content]}
    part = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
    for kind, wrong, message in (
        ("text/plain", body, "must be multipart"),
        ("multipart/form-data", body, "must be multipart"),
        ("multipart/form-data; boundary=x", part, "cut off"),
        ("multipart/form-data; boundary=x", b"", "cut off"),
        ("multipart/form-data; boundary=x", part * 65 + b"--x--", "more than 64 parts"),
        ("multipart/form-data; boundary=x", part * 2 + b"--x--", "given twice"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n1\r\n--x--", "no name"),
        ("multipart/form-data; boundary=x", part.replace(b"\r\n1", b"\r\n\xff") + b"--x--", "no UTF-8"),
    ):
        with pytest.raises(FormError, match=message):
            read_form(kind, wrong)


def test_uploads_are_upright_and_opaque() -> None:
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    stream = io.BytesIO()
    half.save(stream, "PNG")
    assert read_upload(stream.getvalue(), 64).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    assert read_upload(picture("red", (16, 8), "JPEG", exif=exif), 128).size == (8, 16)
    assert read_upload(picture("red", (16, 8), "WEBP"), 128).size == (16, 8)


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (1000, 3), (3, 100_000), (5000, 4000), (64, 64)])
def test_sizes_that_fit(size: tuple[int, int]) -> None:
    width, height = fitted_size(size, 8, 4096)
    assert width % 8 == height % 8 == 0
    assert 64 <= width * height <= 4096
    assert size != (64, 64) or (width, height) == size


def test_a_full_queue_and_a_busy_key(
    client: openai.OpenAI, http: httpx.Client, server: tuple[str, ImageService], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, go, begun = server[1], threading.Event(), threading.Event()
    draw = service.worker._draw_all

    def held(requests: Any, on_step: Any) -> Any:
        begun.set()
        assert go.wait(20)
        return draw(requests, on_step)

    monkeypatch.setattr(service.worker, "_draw_all", held)
    body = {"model": "shapes", "prompt": PROMPT, "n": 4}
    others = httpx.Client(
        base_url=server[0], headers={"Authorization": f"Bearer {create_key(service.store, 'acme', 'b')}"}, timeout=60
    )
    answers: list[int] = []

    def post(by: httpx.Client) -> None:
        answers.append(by.post("/v1/images/generations", json=body).status_code)

    running = threading.Thread(target=post, args=(http,))
    running.start()
    assert begun.wait(10)
    busy = http.post("/v1/images/generations", json=body)  # eight of six
    assert busy.status_code == 429
    assert busy.headers["Retry-After"]
    assert busy.json()["error"]["code"] == "rate_limit_exceeded"
    waiting = threading.Thread(
        target=lambda: answers.append(others.post("/v1/images/generations", json=body).status_code)
    )
    waiting.start()
    until(lambda: service.worker.load.waiting == 4)
    full = http.post("/v1/images/generations", json={**body, "n": 1})
    assert full.status_code == 503
    assert full.headers["Retry-After"]
    assert full.json()["error"]["code"] == "overloaded"
    go.set()
    running.join()
    waiting.join()
    assert answers == [200, 200]
    assert http.post("/v1/images/generations", json=body).status_code == 200  # all places are free again


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_is_gone_frees_its_place(
    http: httpx.Client, server: tuple[str, ImageService], stream: bool
) -> None:
    worker = server[1].worker
    body = {"model": "shapes", "prompt": PROMPT, "n": 4, "steps": 1000, "stream": stream}
    if stream:
        with http.stream("POST", "/v1/images/generations", json=body) as answer:
            lines = answer.iter_lines()
            assert '"step": 1' in next(lines)
            assert worker.load.running == 4
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/images/generations", json=body, timeout=0.5)
    until(lambda: not worker.load.running)
    quick = http.post("/v1/images/generations", json={**body, "stream": False, "steps": 1})
    assert quick.status_code == 200, quick.text  # long before 1,000 steps are done


def test_the_safety_hook(tmp_path: Any) -> None:
    models = {"shapes": ModelSource(base="shapes", **QUICK)}
    service = ImageService(
        settings(tmp_path, models=models, safety="toy_images:refuse_red", require_keys=False)
    ).start()
    colour = ["red"]
    service.worker._draw_all = lambda requests, on_step: (  # type: ignore[method-assign]
        on_step(1, 1) or [Image.new("RGB", (16, 16), colour[0]) for _ in requests]
    )
    with listening(create_image_app(service)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="it is too red") as refused:
            client.images.generate(model="shapes", prompt=PROMPT)
        assert refused.value.code == "content_policy_violation"
        with pytest.raises(openai.APIError, match="it is too red"):
            list(client.images.generate(model="shapes", prompt=PROMPT, stream=True))
        assert re.search(r'palate_images_refused_total\{replica="[^"]+"\} 2.0', httpx.get(f"{url}/metrics").text)
        colour[0] = "green"
        assert opened(client.images.generate(model="shapes", prompt=PROMPT).data[0])[0, 0].tolist() == [0, 128, 0]
    service.stop()


def test_health_metrics_and_the_document(http: httpx.Client, client: openai.OpenAI, tmp_path: Any) -> None:
    client.images.generate(prompt=PROMPT)
    health = http.get("/healthz").json()
    assert health["status"] == "ok"
    assert (health["models"], health["failed"]) == (len(client.models.list().data), 0)
    text = http.get("/metrics").text
    assert re.search(r'palate_requests_total\{replica="[^"]+",route="/v1/images/generations",status="200"\}', text)
    assert "palate_image_seconds_count" in text
    assert re.search(r'palate_images_waiting\{replica="[^"]+"\} 0.0', text)
    assert "multipart/form-data" in json.dumps(http.get("/openapi.json").json()["paths"]["/v1/images/edits"])
    empty = ImageService(settings(tmp_path, models={"lost": ModelSource(base="/nowhere")}, require_keys=False)).start()
    with listening(create_image_app(empty)) as url:
        found = httpx.get(f"{url}/healthz")
        assert found.status_code == 503
        assert found.json()["failed"] == 1
        assert "lost" not in found.text
        asked = httpx.post(f"{url}/v1/images/generations", json={"prompt": PROMPT})
        assert asked.status_code == 503
        assert asked.headers["Retry-After"]
    empty.stop()
