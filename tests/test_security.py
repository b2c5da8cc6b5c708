"""What SECURITY.md promises: keys on every route, no code that comes with weights, nothing of Python's own in files."""

import ast
import asyncio
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import LlamaConfig, LlamaForCausalLM

from palate.lpo.networks import WeightsConfig, tuned
from palate.models.causal_lm import load_causal_lm
from palate.models.diffusion import load_diffusion
from palate.serving import http, image_http
from palate.serving.metrics import RequestMetrics
from palate.users.keys import authenticate, create_key
from palate.users.store import open_store

ROOT = Path(__file__).resolve().parents[1]
CODE = [p for folder in ("platform", "jobs", "serve", "tune") for p in sorted((ROOT / folder).rglob("*.py"))]
OPEN = {"/healthz", "/metrics", "/openapi.json", "/", "/page.css", "/page.js"}  # what is behind them names nobody


@pytest.fixture(params=[http.routes, image_http.routes], ids=["text", "images"])
def app(request, tmp_path):
    """Each server's routes, with nothing behind them but a database; a key may have one request under way."""
    settings = SimpleNamespace(require_keys=True, max_in_flight=1, max_body_bytes=100)
    with open_store(f"sqlite:///{tmp_path}/users.db") as store:
        service = SimpleNamespace(settings=settings, store=store)
        yield http.guarded_app("", request.param, service, RequestMetrics())


def test_every_route_of_the_api_wants_a_key(app):
    client = TestClient(app, raise_server_exceptions=False)
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


def test_every_route_refuses_a_key_without_a_free_place_before_it_reads_the_body(app):
    key = create_key(app.state.service.store, "acme", "tests")
    place = authenticate(app.state.service.store, key).id
    paths = TestClient(app).get("/openapi.json").json()["paths"]
    app.state.in_flight[place] = 1
    asked = 0
    for path, operations in paths.items():
        for method in operations if path not in OPEN else ():
            assert answer_without_reading(app, method.upper(), path.replace("{", "").replace("}", ""), key) == 429
            asked += 1
    assert asked >= 5
    assert app.state.in_flight[place] == 1


def answer_without_reading(app, method: str, path: str, key: str) -> int:
    """The status of the answer to a request whose body never comes."""
    sent = []

    async def receive():
        raise AssertionError(f"{method} {path} reads the body")

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "http_version": "1.1"}
    scope["headers"] = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")]
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_request_has_one_place_for_as_long_as_it_lasts(app, monkeypatch, fails):
    store, taken = app.state.service.store, []
    key = create_key(store, "acme", "tests")

    def export(tenant, user_id):
        taken.append(app.state.in_flight.total())
        if fails:
            raise RuntimeError("a fault")

    monkeypatch.setattr(store, "export", export)
    client = TestClient(app, headers={"Authorization": f"Bearer {key}"}, raise_server_exceptions=False)
    for _ in range(3):
        assert client.get("/v1/users/ann/export").status_code == (500 if fails else 404)
    assert taken == [1, 1, 1]
    assert not app.state.in_flight


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_that_comes_with_weights_is_never_asked_for(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        call, given = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert given.get("trust_remote_code", "False") == "False", f"{path}:{node.lineno}"
        assert call not in ("eval", "exec", "os.system"), f"{path}:{node.lineno} calls {call}"
        assert given.get("shell", "False") == "False", f"{path}:{node.lineno}"
        assert call != "Image.open" or "formats" in given, f"{path}:{node.lineno} tries every decoder of Pillow"
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


@pytest.fixture
def harm(tmp_path):
    """Something that leaves a file ``harmed`` behind where it is unpacked."""

    class Harm:
        def __reduce__(self):
            return open, (str(tmp_path / "harmed"), "w")

    return Harm()


def test_weights_that_are_not_safetensors_are_refused(model, harm, tmp_path):
    (model / "model.safetensors").unlink()
    torch.__dict__["save"]({"lm_head.weight": harm}, model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded"):
        load_causal_lm(str(model))
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("setting", ["start_lora", "reference_lora"])
@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "lora.pt", "lora"])
def test_a_lora_that_is_no_safetensors_is_refused(setting, name, harm, tmp_path):
    loaded = load_diffusion("shapes")
    file = tmp_path / "lora" / name
    file.parent.mkdir()
    torch.__dict__["save"]({f"{loaded.denoiser_name}.x.lora_A.weight": harm}, file)
    with pytest.raises(ValueError, match=r"of the kind .* read from \.safetensors only"):
        tuned(loaded, WeightsConfig(**{setting: str(file)}))
    with pytest.raises(ValueError, match="cannot be read as a LoRA"):
        tuned(load_diffusion("shapes"), WeightsConfig(**{setting: str(file.parent)}))
    assert not (tmp_path / "harmed").exists()
