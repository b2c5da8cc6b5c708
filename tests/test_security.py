"""What SECURITY.md promises: keys on every route, no code that comes with weights, nothing of Python's own in files."""

import ast
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import LlamaConfig, LlamaForCausalLM

from palate.models.causal_lm import load_causal_lm
from palate.serving import http, image_http
from palate.serving.metrics import RequestMetrics
from palate.users.store import open_store

ROOT = Path(__file__).resolve().parents[1]
CODE = [p for folder in ("platform", "jobs", "serve", "tune") for p in sorted((ROOT / folder).rglob("*.py"))]
OPEN = {"/healthz", "/metrics", "/openapi.json", "/", "/page.css", "/page.js"}  # what is behind them names nobody


@pytest.mark.parametrize("routes", [http.routes, image_http.routes], ids=["text", "images"])
def test_every_route_of_the_api_wants_a_key(routes, tmp_path):
    settings = SimpleNamespace(require_keys=True, max_in_flight=1, max_body_bytes=100)
    service = SimpleNamespace(settings=settings, store=open_store(f"sqlite:///{tmp_path}/users.db"))
    client = TestClient(http.guarded_app("", routes, service, RequestMetrics()), raise_server_exceptions=False)
    asked = 0
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        if path in OPEN:
            continue
        assert path.startswith("/v1/")
        for method, headers in itertools.product(
            operations, ({}, {"Authorization": "Bearer guessed"}, {"Authorization": "Basic a2V5"})
        ):
            answer = client.request(method, path.replace("{", "").replace("}", ""), headers=headers, content=b"x" * 200)
            assert answer.status_code == 401, (method, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            asked += 1
    assert asked >= 3 * 5


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_that_comes_with_weights_is_never_asked_for(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        call, given = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert given.get("trust_remote_code", "False") == "False", f"{path}:{node.lineno}"
        assert call not in ("eval", "exec", "os.system"), f"{path}:{node.lineno} calls {call}"
        assert given.get("shell", "False") == "False", f"{path}:{node.lineno}"
        weights = call.endswith(".from_pretrained") and not any(
            part in call for part in ("Tokenizer", "Processor", "Config", "Peft", "Scheduler")
        )
        if weights and "gguf_file" not in given:
            assert given.get("use_safetensors") == "True", f"{path}:{node.lineno} might unpack others' objects"


@pytest.fixture
def model(tmp_path) -> Path:
    """A small model's folder, with a file of code that it asks to be run."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "model")
    load_causal_lm("tiny").tokenizer.save_pretrained(tmp_path / "model")
    folder = tmp_path / "model"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "harm.Harm", "AutoModelForCausalLM": "harm.Harm"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "harm.py").write_text(f"open({str(tmp_path / 'harmed')!r}, 'w').close()\nclass Harm: pass\n")
    return folder


def test_code_in_a_models_folder_is_not_run(model, tmp_path):
    loaded = load_causal_lm(str(model))
    assert type(loaded.model) is LlamaForCausalLM
    assert not (tmp_path / "harmed").exists()


def test_weights_that_are_not_safetensors_are_refused(model, tmp_path):
    class Harm:
        def __reduce__(self):
            return open, (str(tmp_path / "harmed"), "w")

    (model / "model.safetensors").unlink()
    torch.__dict__["save"]({"lm_head.weight": Harm()}, model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded"):
        load_causal_lm(str(model))
    assert not (tmp_path / "harmed").exists()
