"""Rankings of images over HTTP: what is stored, what is refused, what deletion leaves."""

import base64
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from palate.serving.image_http import create_image_app
from palate.serving.image_service import ImageService
from palate.users.checks import MOST_TEXTS
from palate.users.images import RankedImages, png_of
from palate.users.keys import create_key
from palate.users.records import Ranking
from palate.users.store import ANNOUNCED_SECONDS, open_store
from toy_images import picture, settings
from toy_serving import listening

PROMPT = "a small red circle on grey"


def sent(*contents: bytes) -> list[dict[str, str]]:
    return [{"b64_json": base64.b64encode(content).decode()} for content in contents]


def digest(content: bytes) -> str:
    return png_of(Image.open(io.BytesIO(content)).convert("RGB"))[0]


def ranking(*colours: str, **changes: Any) -> dict[str, Any]:
    body = {"user": "ann", "prompt": PROMPT, "images": sent(*map(picture, colours or ("red", "green", "blue")))}
    return {**body, **changes}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ImageService]:
    config = settings(tmp_path, feedback=str(tmp_path / "feedback"), max_pixels=4096, max_body_bytes=100_000)
    made = ImageService(config)
    yield made
    made.stop()


@pytest.fixture
def client(service: ImageService) -> TestClient:
    return as_tenant(service, "acme")


def as_tenant(service: ImageService, tenant: str) -> TestClient:
    key = create_key(service.store, tenant, "tests")
    return TestClient(create_image_app(service), headers={"Authorization": f"Bearer {key}"})


def files(service: ImageService, tenant: str = "acme") -> set[str]:
    folder = Path(str(service.settings.feedback)) / tenant
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_a_ranking_is_stored_with_its_images_in_order(client: TestClient, service: ImageService) -> None:
    jpeg = picture("blue", (24, 16), "JPEG")
    body = ranking(images=sent(picture("red"), jpeg, picture("green")), id="first")
    answer = client.post("/v1/feedback", json=body)
    assert answer.status_code == 201
    assert answer.json() == {"object": "feedback.ranking", "id": "first", "images": 3}
    (stored,) = service.store.rankings("acme")
    assert stored.content == (
        "ann", "first", PROMPT, (digest(picture("red")), digest(jpeg), digest(picture("green"))), None
    )  # fmt: skip
    assert files(service) == {f"{one}.png" for one in stored.images}
    folder = Path(str(service.settings.feedback)) / "acme"
    with Image.open(folder / f"{stored.images[1]}.png") as kept, Image.open(io.BytesIO(jpeg)) as given:
        assert kept.format == "PNG"
        assert (np.asarray(kept) == np.asarray(given)).all()
    assert service.store.people("acme") == ["ann"]
    unnamed = client.post("/v1/feedback", json=ranking("blue", "red")).json()
    assert unnamed["id"] == service.store.rankings("acme")[1].id
    assert service.store.person("acme", "ann").version == 1


def test_the_same_id_again(client: TestClient, service: ImageService) -> None:
    first = client.post("/v1/feedback", json=ranking(id="one"))
    again = client.post("/v1/feedback", json=ranking(id="one"))
    assert (again.status_code, again.json()) == (201, first.json())
    for other in (
        ranking("red", "blue", "green", id="one"),
        ranking("red", "green", id="one"),
        ranking(id="one", prompt="another"),
        ranking(id="one", user="bob"),
    ):
        answer = client.post("/v1/feedback", json=other)
        assert answer.status_code == 409
        assert answer.json()["error"]["param"] == "id"
    assert len(service.store.rankings("acme")) == 1
    assert service.store.people("acme") == ["ann"]
    other = as_tenant(service, "other").post("/v1/feedback", json=ranking("red", "blue", id="one"))
    assert other.status_code == 201
    assert len(files(service, "other")) == 2


def test_many_at_once_with_one_id_store_one(client: TestClient, service: ImageService) -> None:
    start, found = threading.Barrier(6), []

    def post(number: int) -> None:
        start.wait()
        colours = ("red", "green", "blue") if number % 2 else ("blue", "green", "red")
        found.append(client.post("/v1/feedback", json=ranking(*colours, id="one")).status_code)

    threads = [threading.Thread(target=post, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [201, 201, 201, 409, 409, 409]
    assert len(service.store.rankings("acme")) == 1


def bomb() -> bytes:
    """A small file of a large image."""
    return picture("red", (3000, 3000))


def large() -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"images": sent(picture("red"))}, "images", "at least 2"),
        ({"images": sent(*[picture("red", (16, 16 + n)) for n in range(9)])}, "images", "at most 8"),
        ({"images": sent(picture("red"), picture("red", kind="BMP"))}, "images.1.b64_json", "no PNG, JPEG, WEBP"),
        ({"images": sent(picture("red"), picture("red")[:50])}, "images.1.b64_json", "no PNG, JPEG, WEBP"),
        ({"images": sent(picture("red"), bomb())}, "images.1.b64_json", "at most 4096 pixels"),
        ({"images": sent(picture("red"), picture("red", (200, 2)))}, "images.1.b64_json", "50 times"),
        ({"images": sent(picture("red"), picture("blue"), picture("red"))}, "images.2", "the same as images.0"),
        ({"images": [{"b64_json": "!"}, {"b64_json": "AAAA"}]}, "images.0.b64_json", "no valid base64"),
        ({"images": [{"url": "x"}, {"b64_json": "AAAA"}]}, "images.0.b64_json", "required"),
        ({"images": [{"b64_json": "AAAA", "url": "x"}] * 2}, "images.0.url", "Extra"),
        ({"images": ["AAAA", "AAAA"]}, "images.0", "valid dictionary"),
        ({"user": "a/b"}, "user", "expected 1 to 128"),
        ({"id": ".."}, "id", "expected 1 to 128"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": "  "}, "prompt", "match"),
        ({"prompt": "a\0"}, "prompt", "NUL"),
        ({"model": "none"}, None, "no model"),
        ({"rating": 5}, "rating", "Extra"),
        ({"edited": "text"}, "edited", "Extra"),
    ],
)
def test_what_is_wrong_is_named_and_stores_nothing(
    client: TestClient, service: ImageService, changes: Any, param: str | None, message: str
) -> None:
    answer = client.post("/v1/feedback", json=ranking(**changes))
    assert answer.status_code == (503 if "model" in changes else 400)  # this server has no model yet
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]
    assert service.store.people("acme") == []
    assert files(service) == set()


def test_bounds_and_keys(client: TestClient, service: ImageService, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.post("/v1/feedback", json=ranking(images=sent(large(), picture("red")))).status_code == 413
    anonymous = TestClient(create_image_app(service))
    assert anonymous.post("/v1/feedback", json=ranking()).status_code == 401
    assert anonymous.delete("/v1/users/ann").status_code == 401
    monkeypatch.setattr("palate.users.store.MOST_TEXTS", 1)
    assert client.post("/v1/feedback", json=ranking()).status_code == 201
    answer = client.post("/v1/feedback", json=ranking())
    assert answer.status_code == 400
    assert "the most that are kept" in answer.json()["error"]["message"]
    assert MOST_TEXTS == 10_000


def test_a_model_is_one_of_those_served(tmp_path: Path) -> None:
    models = {"shapes": {"base": "shapes"}, "theirs": {"base": "shapes", "tenants": ["other"]}}
    service = ImageService(settings(tmp_path, feedback=f"{tmp_path}/feedback", models=models)).start()
    with listening(create_image_app(service)) as url:
        key = create_key(service.store, "acme", "tests")
        http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"})
        drawn = http.post("/v1/images/generations", json={"prompt": PROMPT, "model": "shapes", "n": 2, "steps": 1})
        body = {"user": "ann", "prompt": PROMPT, "model": "shapes"}
        body["images"] = [{"b64_json": one["b64_json"]} for one in drawn.json()["data"]]
        assert http.post("/v1/feedback", json=body).status_code == 201
        assert http.post("/v1/feedback", json={**body, "model": "theirs"}).status_code == 404
        assert [one.model for one in service.store.rankings("acme")] == ["shapes"]
        text = http.get("/metrics").text
        assert 'route="/v1/feedback",status="201"' in text
    service.stop()


def test_a_server_that_keeps_no_images_says_which_setting_is_missing(tmp_path: Path) -> None:
    service = ImageService(settings(tmp_path))
    answer = as_tenant(service, "acme").post("/v1/feedback", json=ranking())
    assert answer.status_code == 501
    assert "'feedback'" in answer.json()["error"]["message"]
    service.stop()


def test_deletion_takes_rankings_and_the_images_that_nobody_else_ranked(
    client: TestClient, service: ImageService
) -> None:
    other = as_tenant(service, "other")
    client.post("/v1/feedback", json=ranking("red", "green"))
    client.post("/v1/feedback", json=ranking("green", "blue", user="bob"))
    other.post("/v1/feedback", json=ranking("red", "green"))
    exported = client.get("/v1/users/ann/export").json()
    assert [(one["prompt"], one["images"]) for one in exported["rankings"]] == [
        (PROMPT, [digest(picture("red")), digest(picture("green"))])
    ]
    assert client.delete("/v1/users/ann").json() == {"id": "ann", "object": "user.deleted", "deleted": True}
    assert [one.user_id for one in service.store.rankings("acme")] == ["bob"]
    assert files(service) == {f"{digest(picture(colour))}.png" for colour in ("green", "blue")}
    assert len(files(service, "other")) == 2
    for answer in (client.delete("/v1/users/ann"), client.get("/v1/users/ann/export")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "user_not_found")
    assert client.delete("/v1/users/bob").status_code == 200
    assert files(service) == set()
    assert service.store.remove_images(lambda *_: None) == 0


def test_what_a_text_server_deletes_is_removed_by_the_next_image_server(client: TestClient, service: Any) -> None:
    client.post("/v1/feedback", json=ranking())
    with open_store(service.settings.database) as text_server:
        assert text_server.delete("acme", "ann")
    assert len(files(service)) == 3
    service.remove_images()
    assert files(service) == set()


def test_an_image_that_is_being_removed_is_put_back_for_whoever_ranks_it(service: ImageService) -> None:
    content = {digest(picture(colour)): picture(colour) for colour in ("red", "green")}
    ranked = RankedImages(str(service.settings.feedback))
    service.rank("acme", Ranking("ann", "one", PROMPT, tuple(content)), content)
    service.store.delete("acme", "ann")
    service.store.announce_images("acme", list(content))
    ranked.keep("acme", content)
    assert service.store.remove_images(ranked.remove) == 0  # announced: they may stay a while
    for one in content:
        ranked.remove("acme", one)  # as another server might, just before the row is written
    service.store.add_ranking(
        "acme", Ranking("bob", "two", PROMPT, tuple(content)), lambda: ranked.keep("acme", content)
    )
    service.remove_images()
    assert files(service) == {f"{one}.png" for one in content}


def test_images_whose_ranking_never_came_go_after_a_while(
    service: ImageService, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {digest(picture(colour)): picture(colour) for colour in ("red", "green")}
    monkeypatch.setattr(service.store, "add_ranking", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        service.rank("acme", Ranking("ann", "one", PROMPT, tuple(content)), content)
    assert len(files(service)) == 2
    service.remove_images()
    assert len(files(service)) == 2
    now = service.store.now
    monkeypatch.setattr(service.store, "now", lambda: now() + ANNOUNCED_SECONDS + 1)
    service.remove_images()
    assert files(service) == set()


def test_a_file_that_cannot_be_removed_is_tried_again(service: ImageService, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {digest(picture(colour)): picture(colour) for colour in ("red", "green")}
    service.rank("acme", Ranking("ann", "one", PROMPT, tuple(content)), content)
    service.store.delete("acme", "ann")

    def refuse(*_: Any) -> None:
        raise OSError("read-only")

    with pytest.raises(OSError, match="read-only"):
        service.store.remove_images(refuse)
    service.rank("acme", Ranking("bob", "two", PROMPT, tuple(content)), content)
    with monkeypatch.context() as broken:
        broken.setattr(service.ranked, "remove", refuse)
        assert service.delete_person("acme", "bob")
    assert len(files(service)) == 2
    service.remove_images()
    assert files(service) == set()


def test_images_at_a_url(tmp_path: Path) -> None:
    service = ImageService(settings(tmp_path, feedback="memory://ranked"))
    client = as_tenant(service, "acme")
    assert client.post("/v1/feedback", json=ranking()).status_code == 201
    memory = fsspec.filesystem("memory")
    assert len(memory.find("/ranked/acme")) == 3
    assert client.delete("/v1/users/ann").status_code == 200
    assert memory.find("/ranked/acme") == []
    service.stop()
