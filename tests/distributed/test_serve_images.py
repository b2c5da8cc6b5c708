"""The Ray Serve application for images, behind a prefix as beside the text server."""

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from palate.users.keys import create_key
from palate.users.store import open_store
from toy_images import PROMPT, lora_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_images_and_a_run_that_comes_later(ray_cluster: Any, tmp_path: Path) -> None:
    from ray import serve

    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from serve.images import ImageServerSettings, app

    database = f"sqlite:///{tmp_path}/palate.db"
    with open_store(database) as store:
        key = create_key(store, "acme", "tests")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    registry = tmp_path / "models.json"
    registry.write_text("{}")
    quick = {"steps": 2, "guidance": 3.0}
    settings = ImageServerSettings(
        models={"shapes": {"base": "shapes", **quick}},  # type: ignore[dict-item]
        registry=str(registry),
        database=database,
        threads=1,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(app(settings), name="images", route_prefix="/images")
        url = f"http://127.0.0.1:{port}/images/v1"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
        address = url.removesuffix("/v1")
        page = httpx.get(address, follow_redirects=True)  # its links are relative: it must end in a slash
        assert (page.status_code, str(page.url)) == (200, f"{address}/")
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        assert httpx.get(f"{address}/page.js").status_code == 200
        client = openai.OpenAI(base_url=url, api_key=key)
        ask = {"prompt": PROMPT, "extra_body": {"seed": 3}}
        base = client.images.generate(model="shapes", **ask).data[0].b64_json
        *steps, last = list(client.images.generate(model="shapes", stream=True, **ask))
        assert [event.step for event in steps] == [1, 2]
        assert last.b64_json == base
        registry.write_text(json.dumps({"tuned": {"run": lora_run(tmp_path / "run"), **quick}}))
        deadline = time.monotonic() + 30
        while "tuned" not in {model.id for model in client.models.list()}:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert client.images.generate(model="tuned", **ask).data[0].b64_json != base
    finally:
        serve.shutdown()
