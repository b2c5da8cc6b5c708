"""The judge against a local server of OpenAI's shape."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from palate.corpora.schema import Item, Question
from palate.evaluation import judge

QUESTIONS = [Question(f"q{n}", f"u{n // 2}", "s", f"Write about {n}.", None, None, ()) for n in range(6)]
EXAMPLES = {f"u{n}": [Item(f"u{n}", "i", 0, "", "", f"style of u{n}")] for n in range(3)}
FIRST = {question.question_id: f"good {question.question_id}" for question in QUESTIONS}
SECOND = {question.question_id: f"bad {question.question_id}" for question in QUESTIONS}


class Server:
    """Answers every chat completion by ``reply(prompt)`` and keeps the requests."""

    def __init__(self, reply: Callable[[str], str], status: int = 200) -> None:
        self.requests: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({**request, "path": self.path, "key": self.headers["Authorization"]})
                text = reply(request["messages"][0]["content"])
                message = {"role": "assistant", "content": text}
                body = {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": "m",
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                }
                content = json.dumps(body if status == 200 else {"error": {"message": "no such model"}}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(reply: Callable[[str], str], status: int = 200) -> Server:
        servers.append(Server(reply, status))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def test_the_better_answer_wins_in_both_orders(serve: Callable[..., Server]) -> None:
    server = serve(lambda prompt: "A" if "A: good" in prompt else "B")
    found = judge.compare(judge.Judge(server.url, "m"), QUESTIONS, FIRST, SECOND, EXAMPLES)
    assert found.scores.values.tolist() == [1.0] * 6
    assert (found.asked, found.unread, found.swayed) == (12, 0, 0)
    assert found.scores.users == ("u0", "u0", "u1", "u1", "u2", "u2")
    other = judge.compare(judge.Judge(server.url, "m"), QUESTIONS, SECOND, FIRST, EXAMPLES)
    assert other.scores.values.tolist() == [0.0] * 6
    prompts = [request["messages"][0]["content"] for request in server.requests]
    prompt = next(prompt for prompt in prompts if "Write about 4." in prompt)
    assert "style of u2" in prompt
    assert server.requests[0]["path"] == "/v1/chat/completions"
    assert (server.requests[0]["model"], server.requests[0]["temperature"]) == ("m", 0.0)


def test_a_judge_that_always_names_the_first_is_worth_nothing(serve: Callable[..., Server]) -> None:
    server = serve(lambda prompt: "A")
    found = judge.compare(judge.Judge(server.url, "m"), QUESTIONS, FIRST, SECOND, EXAMPLES)
    assert found.scores.values.tolist() == [0.5] * 6
    assert found.swayed == 6


def test_replies_that_name_nobody_are_counted_and_left_out(serve: Callable[..., Server]) -> None:
    server = serve(
        lambda prompt: "Both are fine, I think" if "about 3" in prompt else "A" if "A: good" in prompt else "B"
    )
    found = judge.compare(judge.Judge(server.url, "m", parallel=1), QUESTIONS, FIRST, SECOND, EXAMPLES)
    assert found.unread == 2
    assert "q3" not in found.scores.questions
    assert len(found.scores.questions) == 5
    assert "2 named nobody" in found.note


def test_judgements_survive_json(serve: Callable[..., Server]) -> None:
    server = serve(lambda prompt: "A" if "about 3" not in prompt else "nobody")
    found = judge.compare(judge.Judge(server.url, "m"), QUESTIONS, FIRST, SECOND, EXAMPLES)
    again = judge.Judgement.from_json(json.loads(json.dumps(found.to_json())))
    assert again.note == found.note
    assert again.scores.questions == found.scores.questions
    assert again.scores.by_user() == found.scores.by_user()
    assert again.scores.chance == 0.5


def test_the_key_comes_from_the_environment(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(judge.API_KEY, "secret")
    server = serve(lambda prompt: "tie")
    found = judge.compare(judge.Judge(server.url, "m"), QUESTIONS[:1], FIRST, SECOND, EXAMPLES)
    assert server.requests[0]["key"] == "Bearer secret"
    assert found.scores.values.tolist() == [0.5]
    assert found.swayed == 0


def test_a_judge_that_refuses_is_named(serve: Callable[..., Server]) -> None:
    server = serve(lambda prompt: "", status=404)
    with pytest.raises(ValueError, match=r"the judge m at http.*no such model.*--judge-url"):
        judge.compare(judge.Judge(server.url, "m"), QUESTIONS, FIRST, SECOND, EXAMPLES)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("A", "A"),
        (" b.\n", "B"),
        ("**B**", "B"),
        ("Tie", "tie"),
        ("Answer: A", "A"),
        ("The answer is unclear", None),
        ("A good answer", None),
        ("", None),
        ("AB", None),
    ],
)
def test_verdicts_are_read_strictly(reply: str, expected: str | None) -> None:
    assert judge.parse(reply) == expected
