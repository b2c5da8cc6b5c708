"""Images by a unified model's pixel decoder, through the routes that diffusion models have."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from palate.serving.answering import NotFinite
from palate.serving.image_http import create_image_app
from palate.serving.image_service import ImageService, ModelSource
from palate.serving.unified import load_images, load_unified
from palate.unihetero.generation import draw_images
from palate.users.keys import create_key
from toy_images import settings
from toy_serving import listening
from toy_unified import unified_run, vae

PROMPT = "a red circle left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unified-images")


@pytest.fixture(scope="module")
def source(folder: Path) -> ModelSource:
    return ModelSource(run=unified_run(folder / "run", "decoder"), vae=vae(folder / "vae"), steps=3)


@pytest.fixture(scope="module")
def server(folder: Path, source: ModelSource) -> Iterator[tuple[str, ImageService]]:
    models = {"scenes": source, "shapes": ModelSource(base="shapes", steps=2)}
    service = ImageService(settings(folder, models=models, safety="toy_unified:refuse_blue", max_steps=20)).start()
    with listening(create_image_app(service)) as url:
        yield url, service
    service.stop()


@pytest.fixture(scope="module")
def key(server: tuple[str, ImageService]) -> str:
    return create_key(server[1].store, "acme", "tests")


@pytest.fixture(scope="module")
def client(server: tuple[str, ImageService], key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key=key, max_retries=0)


def opened(image: Any) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(image.b64_json))) as found:
        return np.asarray(found, dtype=int)


def expected(source: ModelSource, seed: int, steps: int = 3, guidance: float = 1.0) -> np.ndarray:
    """What ``generation.draw_images`` draws, in levels of 255."""
    served = load_unified(str(source.run))
    ids = served.phrasing.ids(f"{served.phrasing.words.caption} {PROMPT}")
    decoder = AutoencoderKL.from_pretrained(source.vae).eval()
    drawn = draw_images(served.model, decoder, ids, [seed], steps, guidance)[0]
    return (255 * drawn).round().permute(1, 2, 0).numpy().astype(int)


def test_images_by_seed(client: openai.OpenAI, source: ModelSource) -> None:
    answer = client.images.generate(model="scenes", prompt=PROMPT, n=3, size="4x4", extra_body={"seed": 7})
    assert answer.size == "4x4"
    assert [image.seed for image in answer.data] == [7, 8, 9]
    found = [opened(image) for image in answer.data]
    for seed, image in zip((7, 8, 9), found, strict=True):
        assert image.shape == (4, 4, 3)
        assert abs(image - expected(source, seed)).max() <= 1
    assert abs(found[0] - found[1]).max() > 5
    again = client.images.generate(model="scenes", prompt=PROMPT, extra_body={"seed": 8, "steps": 5, "guidance": 2.0})
    assert abs(opened(again.data[0]) - expected(source, 8, 5, 2.0)).max() <= 1
    assert (opened(again.data[0]) != found[1]).any()


def test_streams_end_with_the_same_images(client: openai.OpenAI) -> None:
    whole = client.images.generate(model="scenes", prompt=PROMPT, n=2, extra_body={"seed": 1})
    given = {"model": "scenes", "prompt": PROMPT, "n": 2, "extra_body": {"seed": 1}}
    events = list(client.images.generate(stream=True, **given))
    last = {event.index: event for event in events if event.type == "image_generation.completed"}
    assert all((opened(last[index]) == opened(image)).all() for index, image in enumerate(whole.data))
    assert {event.type for event in events} == {"image_generation.progress", "image_generation.completed"}


def test_a_diffusion_head_draws_by_each_images_own_seed(folder: Path) -> None:
    run = unified_run(folder / "diffusion", "decoder", loss="diffusion")
    model = load_images(run, vae(folder / "vae"))
    drawn = {seed: np.asarray(model.draw(PROMPT, seed, 3, 1.0)) for seed in (3, 4)}
    assert (drawn[3] != drawn[4]).any()
    assert (np.asarray(model.draw(PROMPT, 4, 3, 1.0)) == drawn[4]).all()


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"size": "16x16"}, "size", "'scenes' draws images of 4x4 only"),
        ({"size": "1024x1024"}, "size", "4x4 only"),
        ({"user": "ann"}, "user", "personalization of 'scenes' is not available"),
        ({"steps": 21}, "steps", "at most 20"),
        ({"n": 5}, "n", "at most 4"),
        ({"style": "vivid"}, "style", "Extra"),
        ({"prompt": "red " * 400}, None, "this model reads 251 before an image"),
    ],
)
def test_what_is_wrong_is_named(
    server: tuple[str, ImageService], key: str, changes: dict[str, Any], param: str, message: str
) -> None:
    body = {"model": "scenes", "prompt": PROMPT, **changes}
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx.post(f"{server[0]}/v1/images/generations", json=body, headers=headers, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]


def test_it_is_listed_and_does_not_edit(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"scenes", "shapes"}
    found = listed["scenes"]
    assert (found.task, found.size, found.personal, found.base) == ("generate", "4x4", False, "unihetero")
    with pytest.raises(openai.BadRequestError, match="does not edit images"):
        client.images.edit(model="scenes", image=io.BytesIO(b"x"), prompt=PROMPT)


def test_the_safety_hook(client: openai.OpenAI, server: tuple[str, ImageService], monkeypatch: Any) -> None:
    model = server[1].hosted["scenes"].model
    monkeypatch.setattr(type(model), "draw", lambda *given: Image.new("RGB", (4, 4), "blue"))
    with pytest.raises(openai.BadRequestError, match="it is too blue") as refused:
        client.images.generate(model="scenes", prompt=PROMPT)
    assert refused.value.code == "content_policy_violation"


def test_numbers_that_are_not_finite_fail_that_image(folder: Path, source: ModelSource) -> None:
    model = load_images(str(source.run), str(source.vae))
    with torch.no_grad():
        model.vae.decoder.conv_out.bias.fill_(torch.nan)
    assert isinstance(model.draw(PROMPT, 1, 2, 1.0), NotFinite)


def test_models_that_cannot_draw_are_refused_when_they_are_loaded(folder: Path, source: ModelSource) -> None:
    decoder = vae(folder / "vae")
    with pytest.raises(ValueError, match="no pixel decoder"):
        load_images(unified_run(folder / "embedding"), decoder)
    with pytest.raises(ValueError, match="cannot draw"):
        load_images(unified_run(folder / "understanding", "understanding"), decoder)
    with pytest.raises(ValueError, match="has 4 channels: it is another's"):
        load_images(str(source.run), vae(folder / "other", channels=4))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_images(str(source.run), str(folder / "nowhere"))
    with pytest.raises(ValueError, match="'vae' goes with"):
        ModelSource(base="shapes", vae=decoder)
    with pytest.raises(ValueError, match="'vae' goes with"):
        ModelSource(run=source.run, base="shapes", vae=decoder)


def test_half_precision_draws_too(source: ModelSource) -> None:
    model = load_images(str(source.run), str(source.vae), dtype=torch.bfloat16)
    exact = expected(source, 1)
    assert abs(np.asarray(model.draw(PROMPT, 1, 3, 1.0), dtype=int) - exact).mean() < 30
