"""The HTTP side through the unmodified OpenAI client and plain requests."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from palate.models.causal_lm import load_causal_lm, render_chat
from palate.serving.http import PERSONALIZATION
from palate.serving.text import decode
from palate.users.database import DatabaseUnavailable
from palate.users.keys import create_key

TEXTS = [{"input": f"Describe thing {n}.", "output": f"Well!!! thing {n} is grand, grand, grand."} for n in range(6)]
OTHERS = [{"input": f"Describe thing {n}.", "output": f"thing {n}: plain and small"} for n in range(6)]


@pytest.fixture(scope="module")
def client(server, key) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def http(server, key) -> httpx.Client:
    return httpx.Client(base_url=server[0], headers={"Authorization": f"Bearer {key}"}, timeout=60)


def put(http: httpx.Client, user: str, texts=TEXTS) -> dict:
    answer = http.put(f"/v1/users/{user}", params={"wait": True}, json={"texts": texts})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ask(client: openai.OpenAI, user: str | None = None, **changes):
    fields = {
        "model": "palate",
        "temperature": 0,
        "max_completion_tokens": 16,
        "messages": [{"role": "user", "content": "Describe it."}],
    }
    if user:
        fields["user"] = user
    return client.chat.completions.with_raw_response.create(**{**fields, **changes})


def test_a_person_is_unknown_then_pending_then_personal(client, http):
    unknown = ask(client, "ann")
    assert unknown.headers[PERSONALIZATION] == "population"
    assert ask(client).parse().choices[0].message.content == unknown.parse().choices[0].message.content
    assert put(http, "ann")["status"] == "personal"
    personal = ask(client, "ann")
    assert personal.headers[PERSONALIZATION] == "personal"
    put(http, "bob", OTHERS)
    answers = {who: ask(client, who).parse().choices[0].message.content for who in ("ann", "bob", None)}
    assert len(set(answers.values())) > 1  # whose vector it is makes a difference
    without = ask(client, "ann", extra_body={"personalization": {"beta": 0}}).parse()
    assert without.choices[0].message.content != answers["ann"]


def test_the_base_model_answers_as_if_nothing_had_been_trained(client, http):
    put(http, "ann")
    found = ask(client, "ann", extra_body={"personalization": {"base": True}})
    assert found.headers[PERSONALIZATION] == "base"
    text = found.parse().choices[0].message.content
    loaded = load_causal_lm("tiny")
    prompt = torch.tensor([render_chat(loaded, [("user", "Describe it.")])])
    expected = loaded.model.generate(prompt, max_new_tokens=16, do_sample=False)[0, prompt.shape[1] :]
    assert text == decode(loaded.tokenizer, expected.tolist())
    assert text != ask(client, "ann", extra_body={"personalization": {"beta": 0}}).parse().choices[0].message.content
    plain = {"model": "palate", "prompt": "the", "max_tokens": 6, "temperature": 0}
    bare = client.completions.with_raw_response.create(**plain, extra_body={"personalization": {"base": True}})
    assert bare.headers[PERSONALIZATION] == "base"
    with pytest.raises(openai.BadRequestError, match="leave one of them out"):
        ask(client, extra_body={"personalization": {"base": True, "beta": 1}})
    with pytest.raises(openai.BadRequestError, match="user"):
        ask(client, "no/id", extra_body={"personalization": {"base": True}})


def test_streams_and_whole_answers_are_equal_and_counted(client):
    whole = ask(client, seed=3, temperature=1, n=2, logprobs=True, top_logprobs=2).parse()
    assert {choice.finish_reason for choice in whole.choices} <= {"stop", "length"}
    assert whole.choices[0].message.content != whole.choices[1].message.content
    first = whole.choices[0].logprobs.content[0]
    assert len(first.top_logprobs) == 2
    assert first.top_logprobs[0].logprob >= first.logprob
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = client.chat.completions.create(
        model="palate",
        temperature=1,
        seed=3,
        n=2,
        max_completion_tokens=16,
        messages=[{"role": "user", "content": "Describe it."}],
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
        usage = chunk.usage or usage
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage


def test_plain_completions(client):
    whole = client.completions.create(
        model="palate", prompt=["the", "and the"], max_tokens=6, temperature=0, logprobs=1
    )
    assert [choice.index for choice in whole.choices] == [0, 1]
    found = whole.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs)
    assert found.token_logprobs[0] == pytest.approx(max(found.top_logprobs[0].values()), abs=1e-5)  # greedy
    chunks = client.completions.create(model="palate", prompt="the", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    drawn = {"model": "palate", "prompt": "the", "max_tokens": 8, "temperature": 1.5, "seed": 5, "logprobs": 1}
    found = client.completions.create(**drawn).choices[0].logprobs
    assert all(token in top for token, top in zip(found.tokens, found.top_logprobs, strict=True))
    streamed = [chunk.choices[0].logprobs.text_offset[0] for chunk in client.completions.create(**drawn, stream=True)]
    assert streamed == found.text_offset
    with pytest.raises(openai.BadRequestError, match="a prompt is empty"):
        client.completions.create(model="palate", prompt="")


def test_stop_strings_end_the_answer(client):
    text = ask(client, max_completion_tokens=40).parse().choices[0].message.content
    cut = text[5:8]
    stopped = ask(client, max_completion_tokens=40, stop=[cut]).parse().choices[0]
    assert stopped.message.content == text[: text.index(cut)]
    assert stopped.finish_reason == "stop"


def test_models_name_the_live_run(client, run_url):
    listed = {model.id: model for model in client.models.list()}
    name = run_url.rpartition("/")[2]
    assert set(listed) == {"palate", name}
    assert listed["palate"].run == name
    assert listed["palate"].beta == 1.0
    assert client.models.retrieve(name).live
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5'"):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        ask(client, model="gpt-5")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 10**9}, "n"),
        ({"n": 0}, "n"),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens"),
        ({"max_completion_tokens": None, "max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": 4}, "max_tokens"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": True}, "top_p"),
        ({"response_format": {"type": "text", "strict": True}}, "response_format"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "more": 1}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, "messages"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 3}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"personalization": {"beta": -1}}, "personalization.beta"),
        ({"personalization": {"gamma": 1}}, "personalization.gamma"),
        ({"user": "../etc"}, "user"),
        ({"made_up": 1}, "made_up"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        ({"seed": 2**70}, "seed"),
    ],
)
def test_what_is_wrong_is_named(http, changes, param):
    body = {"model": "palate", "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 4, **changes}
    answer = http.post("/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(param)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_fields_that_ask_for_nothing_are_accepted(client):
    answer = ask(client, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, tools=[], store=False, metadata={})
    assert answer.parse().choices


def test_bodies_that_are_no_json_or_too_large(http, server):
    headers = {"Content-Type": "application/json"}
    for content in (b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000):
        assert http.post("/v1/chat/completions", content=content, headers=headers).status_code == 400
    large = b'"' + b"x" * server[1].settings.max_body_bytes + b'"'
    answer = http.put("/v1/users/large", content=large, headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"

    def pieces():
        for _ in range(5):
            yield b"x" * 1_000_000

    assert http.put("/v1/users/large", content=pieces(), headers=headers).status_code == 413  # no length is stated
    assert http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"


def test_without_a_key_no_body_is_read(server):
    headers = {"Content-Type": "application/json"}
    assert httpx.post(f"{server[0]}/v1/chat/completions", content=b"{", headers=headers).status_code == 401
    assert httpx.post(f"{server[0]}/v1/feedback", content=b"x" * 5_000_000, headers=headers).status_code == 401


def test_waiting_for_somebody_who_is_deleted_ends(server, http, monkeypatch):
    monkeypatch.setattr(server[1].store, "claim_stale", lambda *arguments, **keywords: [])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(http.put, "/v1/users/gus", params={"wait": True}, json={"texts": TEXTS})
        while http.get("/v1/users/gus").status_code != 200:
            pass
        http.delete("/v1/users/gus")
        assert waiting.result(10).status_code == 404


def test_keys_are_needed_and_tenants_are_apart(server, http):
    bare = httpx.Client(base_url=server[0], timeout=60)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic abc"}):
        for method, path in (("GET", "/v1/models"), ("GET", "/v1/users/ann"), ("DELETE", "/v1/users/ann")):
            answer = bare.request(method, path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    put(http, "carla")
    other = httpx.Client(
        base_url=server[0], headers={"Authorization": f"Bearer {create_key(server[1].store, 'rival', 'r')}"}, timeout=60
    )
    assert other.get("/v1/users/carla").status_code == 404
    assert other.delete("/v1/users/carla").status_code == 404
    assert "carla" not in other.get("/v1/users").json()["data"]
    body = {"model": "palate", "user": "carla", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    assert other.post("/v1/chat/completions", json=body).headers[PERSONALIZATION] == "population"
    assert http.post("/v1/chat/completions", json=body).headers[PERSONALIZATION] == "personal"


def test_the_life_of_a_person(server, http):
    first = http.put("/v1/users/dora", json={"texts": TEXTS})
    assert first.status_code in (200, 202)
    assert first.json()["status_url"] == "/v1/users/dora"
    done = put(http, "dora")
    again = put(http, "dora")
    assert again["version"] == done["version"] == first.json()["version"]  # equal texts do nothing
    shown = http.get("/v1/users/dora").json()
    assert shown["texts"] == 6
    assert shown["cluster"] in (0, 1)
    assert shown["vector"]["promoted"]
    assert shown["vector"]["demoted"]
    edited = {"user": "dora", "prompt": "Describe it.", "answer": "dull", "edited": "Grand!!!"}
    told = http.post("/v1/feedback", params={"wait": True}, json=edited)
    assert told.status_code == 200
    assert told.json()["texts"] == 7
    exported = http.get("/v1/users/dora/export").json()
    assert http.delete("/v1/users/dora").json() == {"id": "dora", "object": "user.deleted", "deleted": True}
    for path in ("/v1/users/dora", "/v1/users/dora/export"):
        assert http.get(path).status_code == 404
    assert http.delete("/v1/users/dora").status_code == 404
    restored = http.post("/v1/users/dora/import", json={**exported, "version": 2**53})
    assert restored.status_code in (200, 202)
    assert http.get("/v1/users/dora").json()["texts"] == 7
    for changes in ({"texts": 5}, {"version": 2**70}, {"created": "0001-01-01T00:00:00+14:00"}, {"more": 1}):
        assert http.post("/v1/users/dora/import", json={**exported, **changes}).status_code == 400
    assert http.delete("/v1/users/dora").status_code == 200
    assert put(http, "fay")["status"] == "personal"  # the tenant goes on


def test_feedback_to_a_full_history_is_refused_by_name(http, monkeypatch):
    put(http, "gwen")
    monkeypatch.setattr("palate.users.store.MOST_TEXTS", len(TEXTS))
    edited = {"user": "gwen", "prompt": "Describe it.", "answer": "dull", "edited": "Grand!!!"}
    refused = http.post("/v1/feedback", json=edited)
    assert refused.status_code == 400
    assert "the most that are kept" in refused.json()["error"]["message"]
    monkeypatch.undo()
    monkeypatch.setattr("palate.users.store.MOST_CHARACTERS", 200)
    long = [http.put("/v1/users/gwen", json={"texts": [{"output": "x" * 201}]}), http.post("/v1/feedback", json=edited)]
    for refused in long:
        assert refused.status_code == 400
        assert refused.json()["error"]["type"] == "invalid_request_error"
        assert "at most 200 are kept of one person: delete" in refused.json()["error"]["message"]
    assert http.get("/v1/users/gwen").json()["texts"] == len(TEXTS)


@pytest.mark.parametrize("user", ["..%2F..%2Fetc", "a%2Fb", "a/b/c", "a b", "x" * 129, "%2E%2E", "%00", "ü"])
def test_ids_with_a_path_in_them_are_refused(http, user):
    for method in ("GET", "PUT", "DELETE"):
        answer = http.request(method, f"/v1/users/{user}", json={"texts": TEXTS} if method == "PUT" else None)
        assert answer.status_code == 400
        assert "expected 1 to 128 characters" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "texts", [[], [{"output": ""}], [{"input": "x"}], [{"output": "x", "more": 1}], [{"output": "\ud800"}], "text"]
)
def test_texts_that_are_none_are_refused(http, texts):
    answer = http.put(
        "/v1/users/eve", content=json.dumps({"texts": texts}), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("texts")
    assert http.get("/v1/users/eve").status_code == 404


CHAT = {"model": "palate", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    ("method", "path", "content", "kind", "status", "said"),
    [
        ("POST", "/v1/chat/completions", json.dumps(CHAT), "text/plain", 400, "'Content-Type: application/json'"),
        ("POST", "/v1/chat/completions", "", "application/json", 400, "a JSON object is expected"),
        ("POST", "/v1/chat/completions", b'{"a": "\xff"}', "application/json", 400, "JSON in UTF-8"),
        (
            "POST",
            "/v1/chat/completions",
            json.dumps({**CHAT, "stop": ["x"] * 9}),
            "application/json",
            400,
            "stop: List",
        ),
        (
            "PUT",
            "/v1/users/eve",
            json.dumps({"texts": [{"output": "x" * 100_001}]}),
            "application/json",
            400,
            "at most 100000 characters, found 100001",
        ),
        ("POST", "/v1/chat", "{}", "application/json", 404, "'/v1/chat': /openapi.json names all"),
        ("PATCH", "/v1/chat/completions", "{}", "application/json", 405, "this route takes POST, not PATCH"),
    ],
)
def test_a_refusal_says_what_was_found_and_what_is_expected(http, method, path, content, kind, status, said):
    answer = http.request(method, path, content=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_an_unknown_field_is_not_said_at_length(http):
    answer = http.post("/v1/chat/completions", json={**CHAT, "x" * 100_000: 1})
    assert answer.status_code == 400
    assert len(answer.json()["error"]["message"]) == 2_000
    assert len(answer.json()["error"]["param"]) == 200


def test_while_the_database_is_away_requests_are_told_to_come_back(server, http, monkeypatch):
    body = {"model": "palate", "user": "ann", "messages": [{"role": "user", "content": "hello"}]}

    def away(*arguments):
        raise DatabaseUnavailable("secret-host does not answer")

    monkeypatch.setattr("palate.serving.http.authenticate", away)
    asked = [http.post("/v1/chat/completions", json=body)]
    monkeypatch.undo()
    monkeypatch.setattr(server[1].store, "put_history", away)
    asked.append(http.put("/v1/users/ann", json={"texts": TEXTS}))
    for answer in asked:
        assert answer.status_code == 503, answer.text
        assert answer.headers["Retry-After"] == "2"
        assert answer.headers["X-Request-Id"]
        assert answer.json()["error"]["code"] == "database_unavailable"
        assert "secret-host" not in answer.text


def test_health_and_metrics(server, http, client):
    ask(client)
    assert http.get("/healthz").json()["status"] == "ok"
    assert http.head("/healthz").status_code == 200
    text = http.get("/metrics").text
    assert re.search(r'palate_requests_total\{replica="[^"]+",route="/v1/chat/completions",status="200"\}', text)
    assert "palate_first_token_seconds_count" in text
    assert "palate_running" in text
