"""A unified model behind Ray Serve, named in the settings as in serve/config.yaml."""

import socket
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from palate.users.keys import create_key
from palate.users.store import open_store
from toy_unified import data_url, photo, unified_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_question_about_an_image(ray_cluster: Any, tmp_path: Path) -> None:
    from ray import serve

    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from serve.text import TextSettings, app

    # What the example's comment says is a setting.
    lines = [line.replace("# ", "", 1) for line in (ROOT / "serve/config.yaml").read_text().splitlines()[1:]]
    example = yaml.safe_load("\n".join(lines))["applications"][0]["args"]
    assert TextSettings(**example).unified == {"scenes": "runs/unified"}

    database = f"sqlite:///{tmp_path}/palate.db"
    with open_store(database) as store:
        key = create_key(store, "acme", "tests")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = TextSettings(database=database, unified={"scenes": unified_run(tmp_path / "run")}, slots=2, threads=1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(app(settings), name="unified", route_prefix="/unified")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/unified/v1", api_key=key)
        image = {"type": "image_url", "image_url": {"url": data_url(photo(0))}}
        content = [image, {"type": "text", "text": "what is it"}]
        messages: Any = [{"role": "user", "content": content}]
        given: dict[str, Any] = {"model": "scenes", "messages": messages, "temperature": 0, "max_completion_tokens": 8}
        whole = client.chat.completions.create(**given).choices[0].message.content
        chunks = client.chat.completions.create(**given, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
        assert whole
        image["image_url"] = {"url": "http://127.0.0.1/a.png"}
        with pytest.raises(openai.BadRequestError, match="fetches nothing"):
            client.chat.completions.create(**given)
    finally:
        serve.shutdown()
