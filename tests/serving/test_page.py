"""The page at ``/``: its files and headers, and what a person does with it, in a real browser."""

import asyncio
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright
from playwright.sync_api import Route as PageRoute
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import toy_images
from palate.serving import page as page_module
from palate.serving.http import create_app
from palate.serving.image_http import create_image_app
from palate.serving.image_service import ImageService, ModelSource
from palate.serving.service import Service
from palate.users.images import png_of
from palate.users.keys import authenticate, create_key, revoke
from palate.users.records import PastText
from toy_serving import listening, settings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(page_module.__file__).parent / "page"
PROMPT = "Describe it."
PICTURE = "a small red circle on grey"
EVIL = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"


# The files


def test_the_page_needs_no_key_and_is_sent_with_strict_headers(server):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        answer = httpx.get(server[0] + path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
        policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'self'"
        assert policy["img-src"] == "'self' data: blob:"
        assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
        assert not {"script-src", "style-src", "script-src-elem", "style-src-attr"} & set(policy)
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert httpx.get(f"{server[0]}/v1/models").status_code == 401
    assert httpx.get(f"{server[0]}/page.py").status_code == 404
    assert "/" not in httpx.get(f"{server[0]}/openapi.json").json()["paths"]


def test_an_address_without_its_last_slash_leads_to_the_page():
    async def other(scope: Scope, receive: Receive, send: Send) -> None:
        await Response("other")(scope, receive, send)

    transport = httpx.ASGITransport(page_module.Slash(other), root_path="/images")

    async def get(path: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get(path)

    answer = asyncio.run(get("/images"))
    assert (answer.status_code, answer.headers["location"]) == (307, "/images/")
    assert asyncio.run(get("/images/")).text == "other"
    assert asyncio.run(get("/imagesque")).text == "other"


class _Tags(HTMLParser):
    """All tags with their attributes, and the text inside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.inline.append(data)


def test_the_page_is_complete_and_has_no_code_inside():
    parser = _Tags()
    parser.feed((FOLDER / "index.html").read_text())
    assert parser.inline == []
    for tag, attributes in parser.tags:
        assert tag != "style"
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        assert "name" not in attributes or tag == "meta"  # a field without a name gets into no URL
        for name in ("src", "href", "action"):
            where = attributes.get(name) or ""
            assert where in page_module.FILES or where.startswith(("data:", "#")) or not where, (tag, where)
    ids = [attributes["id"] for _, attributes in parser.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'\$\("([a-z-]+)"\)', (FOLDER / "page.js").read_text()))
    assert used <= set(ids)
    for tag, attributes in parser.tags:
        for name in ("for", "aria-describedby", "aria-labelledby"):
            assert set((attributes.get(name) or "").split()) <= set(ids), (tag, attributes)


def test_nothing_is_fetched_from_elsewhere_and_nothing_is_made_into_html():
    for name in page_module.FILES:
        text = (FOLDER / name).read_text()
        assert set(re.findall(r"https?://[^\s'\")]+", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert "@import" not in text
        assert "url(" not in text
    script = (FOLDER / "page.js").read_text()
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "localStorage",
    ):
        assert sink not in script, sink
    assert "cookie" not in script


def test_a_wheel_holds_the_page(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "platform", source / "platform", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        for name in page_module.FILES:
            assert held.read(f"palate/serving/page/{name}") == (FOLDER / name).read_bytes()
    assert {path.name for path in FOLDER.iterdir()} == set(page_module.FILES)


# In a browser


class Slowed:
    """An application whose bodies come in pieces, ``pause`` seconds apart."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.pause = app, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def slow(message: Message) -> None:
            if self.pause and message["type"] == "http.response.body" and message.get("more_body"):
                await asyncio.sleep(self.pause)
            await send(message)

        await self.app(scope, receive, slow)


@dataclass
class Site:
    """Text and images at one address, as two applications of Ray Serve are."""

    url: str
    key: str
    service: Service
    text: FastAPI
    images: FastAPI
    slowed: Slowed
    drawing: Slowed


@pytest.fixture(scope="module")
def site(run_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    service = Service(settings(folder, max_in_flight=8))
    service.register(run_url)
    service.start()
    sources = {
        "shapes": ModelSource(base="shapes", steps=3, guidance=3.0),
        "person": ModelSource(run=toy_images.person_run(folder / "person"), tenants=("acme",), steps=3, guidance=3.0),
    }
    config = toy_images.settings(folder, models=sources, feedback=str(folder / "ranked"))
    image_service = ImageService(config).start()
    key = create_key(service.store, "acme", "tests")
    for name, how in (("ann", "Well!!! thing {} is grand, grand, grand."), ("bob", "thing {}: plain and small")):
        texts = [PastText(f"Describe thing {n}.", how.format(n)) for n in range(6)]
        service.store.put_history("acme", name, texts)
    text, images = create_app(service), create_image_app(image_service)
    slowed, drawing = Slowed(text), Slowed(images)
    app = Starlette(
        routes=[
            Mount("/images", drawing),
            Mount("/", slowed),
        ]
    )
    with listening(app) as url:
        http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"})
        until(lambda: all(http.get(f"/v1/users/{name}").json()["status"] == "personal" for name in ("ann", "bob")))
        yield Site(url, key, service, text, images, slowed, drawing)
    service.stop()
    image_service.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        missing = "no chromium is found to open the page with: install Debian's package of this name"
        if os.environ.get("PALATE_REQUIRE_CHROMIUM"):
            pytest.fail(missing)
        pytest.skip(missing)
    arguments = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(site: Site, browser: Browser) -> Iterator[Page]:
    """A fresh tab on a desktop."""
    with tab(site.url, browser, viewport={"width": 1280, "height": 900}) as opened:
        yield opened


@contextmanager
def tab(url: str, browser: Browser, **options: Any) -> Iterator[Page]:
    """A tab with the page at ``url``; nothing in it may throw, break the policy, or ask another address."""
    wrong: list[str] = []

    def watch(request: Request) -> None:
        if not request.url.startswith((f"{url}/", "data:")):
            wrong.append(f"it asked {request.url}")
        if "palate-" in request.url:
            wrong.append(f"the key is in {request.url}")

    context = browser.new_context(**options)
    context.set_default_timeout(30_000)
    try:
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None)
        page.on("request", watch)
        page.goto(f"{url}/")
        yield page
    finally:
        context.close()
    assert wrong == []


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def connect(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Connect").click()
    expect(page.locator("#connected")).to_be_visible()


def answer(page: Page, kind: str) -> str:
    return page.locator(f".answer.{kind} .prose").inner_text()


def ask(page: Page, prompt: str = PROMPT, tokens: int = 16) -> None:
    page.get_by_label("What should be written?").fill(prompt)
    page.get_by_label("Most tokens").fill(str(tokens))
    page.get_by_role("button", name="Ask all three").click()
    expect(page.locator("#ask-said")).to_have_text("All three answers are there.")


def draw(page: Page) -> None:
    page.get_by_label("What should be drawn?").fill(PICTURE)
    page.get_by_role("button", name="Draw four").click()
    expect(page.locator("#draw-said")).to_contain_text("put the best first")


def order(page: Page) -> list[str]:
    return [name.removeprefix("Image ") for name in page.locator(".image .place .muted").all_inner_texts()]


def told(site: Site, user: str | None, personalization: dict[str, Any], prompt: str = PROMPT) -> str:
    """What the API itself answers."""
    body = {
        "model": "palate",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_completion_tokens": 16,
        "user": user,
        "personalization": personalization,
    }
    found = httpx.post(
        f"{site.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {site.key}"}, timeout=60
    )
    text: str = found.json()["choices"][0]["message"]["content"]
    return text


def fulfil(route: PageRoute, body: str) -> None:
    """Answer in the server's place."""
    route.fulfill(content_type="text/event-stream", body=body)


def spaces(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.slow
def test_three_answers_stream_and_the_slider_changes_the_personal_one(site, page):
    asked: list[dict[str, Any]] = []
    page.on("request", lambda one: "chat" in one.url and asked.append(one.post_data_json))
    expect(page.locator("#text-section")).to_be_hidden()
    connect(page, site.key)
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    page.get_by_label("Who").select_option("ann")
    expect(page.locator(".facts")).to_contain_text("their own")
    ask(page)
    assert [one["personalization"] for one in asked] == [{"base": True}, {"beta": 0}, {"beta": 1}]
    assert [one.get("user") for one in asked] == [None, "ann", "ann"]
    assert len({one["seed"] for one in asked}) == 1
    expected = {
        "base": told(site, None, {"base": True}),
        "cluster": told(site, "ann", {"beta": 0}),
        "personal": told(site, "ann", {"beta": 1}),
    }
    assert {kind: spaces(answer(page, kind)) for kind in expected} == {k: spaces(v) for k, v in expected.items()}
    assert len(set(expected.values())) == 3
    notes = page.locator(".answer .muted.small").all_inner_texts()
    assert notes == ["no adapter, no vector", "people who write like ann", "ann's own vector, beta 1.0"]

    page.get_by_label("Strength of the personal correction").focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#beta-value")).to_have_text("2.0")
    expect(page.locator(".answer.personal")).to_contain_text("beta 2.0")
    expect(page.locator(".answer.personal")).not_to_have_attribute("aria-busy", "true")
    assert len(asked) == 4  # the personal one alone, once the slider has come to rest
    assert asked[3] == {**asked[2], "personalization": {"beta": 2}}
    assert spaces(answer(page, "personal")) == spaces(told(site, "ann", {"beta": 2}))


@pytest.mark.slow
def test_answers_appear_as_they_are_written_and_can_be_stopped(site, page):
    connect(page, site.key)
    page.get_by_label("What should be written?").fill(PROMPT)
    site.slowed.pause = 0.3
    try:
        page.get_by_role("button", name="Ask all three").click()
        prose = page.locator(".answer.base .prose")
        expect(prose).not_to_have_text("")
        first = prose.inner_text()
        page.wait_for_function(
            "before => document.querySelector('.base .prose').textContent.length > before", arg=len(first)
        )
        until(lambda: site.text.state.in_flight.total() == 3)
        page.get_by_role("button", name="Stop").click()
        for kind in ("base", "cluster", "personal"):
            expect(page.locator(f".answer.{kind} .said")).to_have_text("Stopped.")
        expect(page.get_by_role("button", name="Stop")).to_have_count(0)
        until(lambda: not site.text.state.in_flight, 10)  # the server has stopped, too
    finally:
        site.slowed.pause = 0.0
    stopped = answer(page, "base")
    assert stopped
    time.sleep(0.5)
    assert answer(page, "base") == stopped


@pytest.mark.slow
def test_an_edited_answer_becomes_the_persons_latest_text(site, page):
    connect(page, site.key)
    ask(page)
    page.get_by_role("button", name="Edit the answer: Cluster").click()
    expect(page.locator("#cluster-problem")).to_contain_text("Choose a person above first")
    expect(page.get_by_label("Who")).to_be_focused()
    page.get_by_label("Who").select_option("new")
    page.get_by_label("Their id").fill("cy")
    page.get_by_label("Their id").press("Tab")
    expect(page.locator("#person-known")).to_contain_text("Nothing is known of cy yet")
    written = spaces(answer(page, "cluster"))
    page.get_by_role("button", name="Edit the answer: Cluster").click()
    box = page.get_by_label("How cy would write it")
    expect(box).to_be_focused()
    assert spaces(box.input_value()) == written
    box.fill("   ")
    page.get_by_role("button", name="Ask all three").click()
    expect(page.locator("#ask-problem")).to_contain_text('What you made of the answer "Cluster" is not sent yet')
    expect(box).to_be_focused()
    page.get_by_role("button", name="Send as cy's text").click()
    expect(page.locator("#cluster-problem")).to_contain_text("the text is empty")
    box.fill("thing 3? never heard of it")
    page.get_by_role("button", name="Send as cy's text").click()
    expect(page.locator(".answer.cluster .said")).to_contain_text("their vector is fitted to 1 text:")
    (kept,) = site.service.store.feedback("acme", "cy")
    assert (kept.prompt, spaces(kept.answer), kept.edited) == (PROMPT, written, "thing 3? never heard of it")
    person = site.service.store.person("acme", "cy")
    assert person is not None
    assert [text.output for text in person.texts] == ["thing 3? never heard of it"]
    expect(page.get_by_label("Who")).to_have_value("=cy")
    expect(page.locator(".facts")).to_contain_text("their own")


@pytest.mark.slow
def test_images_are_put_in_order_by_keys_buttons_and_mouse_and_sent(site, page):
    connect(page, site.key)
    page.get_by_label("Model").last.select_option("person")
    page.get_by_label("Who").select_option("ann")
    drawn: list[dict[str, Any]] = []
    page.on("request", lambda one: "generations" in one.url and drawn.append(one.post_data_json))
    draw(page)
    expect(page.locator("#draw-said")).to_have_text("Four images are there, in ann's taste: put the best first.")
    assert drawn == [{"model": "person", "prompt": PICTURE, "n": 4, "stream": True, "user": "ann"}]
    assert order(page) == list("ABCD")
    contents = dict(zip("ABCD", page.eval_on_selector_all(".image img", "all => all.map(one => one.src)"), strict=True))
    assert len(set(contents.values())) == 4
    grip = page.get_by_role("button", name="Move image C, place 3 of 4")
    grip.focus()
    page.keyboard.press("ArrowLeft")
    assert order(page) == list("ACBD")
    expect(page.locator("#moved")).to_have_text("Image C is now at place 2 of 4.")
    expect(page.locator("#moved")).to_have_attribute("aria-live", "assertive")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Move image C, place 2 of 4")
    page.keyboard.press("End")
    assert order(page) == list("ABDC")
    page.keyboard.press("ArrowRight")  # there is no further place
    assert order(page) == list("ABDC")
    page.keyboard.press("Home")
    assert order(page) == list("CABD")
    page.get_by_role("button", name="Move image B later").click()
    assert order(page) == list("CADB")

    def middle(name: str) -> tuple[float, float]:
        box = page.locator(".image", has_text=f"Image {name}").locator("img").bounding_box()
        assert box
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    target = middle("C")
    page.mouse.move(*middle("D"))
    page.mouse.down()
    page.mouse.move(*target, steps=12)
    page.mouse.up()
    assert order(page) == list("DCAB")
    expect(page.locator("#moved")).to_have_text("Image D is now at place 1 of 4.")
    assert page.locator(".dragged").count() == 0

    page.get_by_label("Who").select_option(label="Nobody in particular")
    page.get_by_role("button", name="Send this order").click()
    expect(page.locator("#rank-problem")).to_have_text("Whose order is it? Choose a person above first.")
    assert site.service.store.rankings("acme") == []
    page.get_by_label("Who").select_option("bob")
    page.get_by_role("button", name="Send this order").click()
    expect(page.locator("#rank-said")).to_have_text("Stored: bob likes D, then C, then A, then B.")
    (stored,) = site.service.store.rankings("acme")
    assert (stored.user_id, stored.prompt, stored.model) == ("bob", PICTURE, "person")
    files = {name: base64.b64decode(source.partition(",")[2]) for name, source in contents.items()}
    digests = {name: png_of(Image.open(io.BytesIO(file)).convert("RGB"))[0] for name, file in files.items()}
    assert stored.images == tuple(digests[name] for name in "DCAB")


@pytest.mark.slow
def test_drawing_shows_its_steps_and_can_be_stopped(site, page):
    connect(page, site.key)
    page.get_by_label("What should be drawn?").fill(PICTURE)
    site.drawing.pause = 0.5
    try:
        page.get_by_role("button", name="Draw four").click()
        expect(page.locator(".image").first).to_contain_text("of 3")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#draw-said")).to_have_text("Stopped.")
        until(lambda: not site.images.state.in_flight, 10)
    finally:
        site.drawing.pause = 0.0
    assert page.locator(".image .blank").count() == 0
    draw(page)


@pytest.mark.slow
def test_errors_are_told_where_they_arise(site, page, monkeypatch):
    page.get_by_label("API key").fill("palate-wrong")
    page.get_by_role("button", name="Connect").click()
    expect(page.locator("#key-problem")).to_contain_text("The server does not accept the key.")
    expect(page.get_by_label("API key")).to_have_attribute("aria-invalid", "true")
    assert page.evaluate("sessionStorage.length") == 0
    page.get_by_label("API key").fill("palate-\u00e4")
    page.get_by_role("button", name="Connect").click()
    expect(page.locator("#key-problem")).to_contain_text("This cannot be a key")
    connect(page, site.key)
    expect(page.locator("#key-problem")).to_be_hidden()

    caller = authenticate(site.service.store, site.key)
    assert caller is not None
    site.text.state.in_flight[caller.id] = 8
    page.get_by_label("What should be written?").fill(PROMPT)
    page.get_by_role("button", name="Ask all three").click()
    for kind in ("base", "cluster", "personal"):
        expect(page.locator(f"#{kind}-problem")).to_contain_text("Too much of this key is under way.")
        expect(page.locator(f"#{kind}-problem")).to_contain_text("Try again in 1 second.")
    del site.text.state.in_flight[caller.id]

    with monkeypatch.context() as patched:
        patched.setattr(type(site.service), "all_hosted", [])
        page.get_by_role("button", name="Ask all three").click()
        for kind in ("base", "cluster", "personal"):
            expect(page.locator(f"#{kind}-problem")).to_contain_text("No run is served yet. Try again in 5 seconds.")

    ask(page)
    expect(page.locator("#base-problem")).to_be_hidden()
    page.evaluate("document.querySelector('#text-model').options[0].value = 'gone'")
    page.get_by_role("button", name="Ask all three").click()
    expect(page.locator("#base-problem")).to_contain_text("The server has no such thing. There is no model 'gone' here")

    page.route("**/v1/images/generations", lambda route: route.abort())
    page.get_by_label("What should be drawn?").fill(PICTURE)
    page.get_by_role("button", name="Draw four").click()
    expect(page.locator("#draw-problem")).to_contain_text("The server cannot be reached")
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": "half of"}, "finish_reason": None}]})
    failure = json.dumps({"error": {"message": "the engine has failed", "type": "server_error"}})
    for rest, told_so in (("", "broke off"), (f"data: {failure}\n\n", "The server has failed. The engine has failed.")):
        body = f"data: {chunk}\n\n{rest}"
        page.route("**/v1/chat/completions", partial(fulfil, body=body))
        page.get_by_role("button", name="Ask all three").click()
        expect(page.locator("#base-problem")).to_contain_text(told_so)
        assert answer(page, "base") == "half of"
        page.unroute("**/v1/chat/completions")

    page.reload()
    expect(page.locator("#connected")).to_be_visible()  # the tab has kept the key
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


@pytest.mark.slow
def test_a_key_that_is_revoked_meanwhile_is_asked_for_again(site, page):
    key = create_key(site.service.store, "acme", "soon revoked")
    connect(page, key)
    ask(page)
    known = authenticate(site.service.store, key)
    assert known is not None
    revoke(site.service.store, known.id)
    page.get_by_role("button", name="Ask all three").click()
    expect(page.locator("#base-problem")).to_contain_text("The server does not accept the key.")
    expect(page.locator("#key-problem")).to_contain_text("was revoked")
    connect(page, site.key)
    ask(page)  # what was written is still there


@pytest.mark.slow
def test_a_server_without_keys_asks_for_none(browser, tmp_path):
    sources = {"shapes": ModelSource(base="shapes", steps=2)}
    service = ImageService(toy_images.settings(tmp_path, models=sources, require_keys=False)).start()
    try:
        with listening(create_image_app(service)) as url, tab(url, browser) as page:
            expect(page.locator("#connected-as")).to_have_text("Connected: this server wants no key")
            expect(page.get_by_label("API key")).to_be_hidden()
            expect(page.get_by_role("button", name="Forget the key")).to_be_hidden()
            sent = []
            page.on("request", lambda request: sent.append(request.headers))
            draw(page)
            assert sent
            assert [headers for headers in sent if "authorization" in headers] == []
    finally:
        service.stop()


@pytest.mark.slow
def test_what_a_model_or_a_person_wrote_is_shown_as_text(site, page):
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": EVIL}, "finish_reason": "stop"}]})
    stream = f"data: {chunk}\n\ndata: [DONE]\n\n"
    word = {"text": EVIL, "change": 0.1}
    known = {
        "id": EVIL,
        "texts": 1,
        "status": "personal",
        "cluster": 0,
        "vector": {"promoted": [word], "demoted": [word]},
    }
    refused = {"error": {"message": EVIL}}
    page.route("**/v1/users?*", lambda route: route.fulfill(json={"data": [EVIL]}))
    page.route("**/v1/users/*", lambda route: route.fulfill(json=known))
    page.route("**/v1/chat/completions", partial(fulfil, body=stream))
    page.route("**/v1/images/generations", lambda route: route.fulfill(status=400, json=refused))
    connect(page, site.key)
    ask(page, EVIL)
    for kind in ("base", "cluster", "personal"):
        assert answer(page, kind) == EVIL
    page.get_by_label("Who").select_option(EVIL)
    expect(page.locator(".facts .words").first).to_have_text(EVIL)
    page.get_by_role("button", name="Edit the answer: Personal").click()
    expect(page.locator("#personal-edited")).to_have_value(EVIL)
    page.get_by_label("What should be drawn?").fill(EVIL)
    page.get_by_role("button", name="Draw four").click()
    expect(page.locator("#draw-problem")).to_contain_text(EVIL)
    assert page.locator("main img, main b:not(.place b)").count() == 0
    assert page.title() == "Palate"


FOCUS = """() => {
    const one = document.activeElement;
    const style = getComputedStyle(one);
    return {
        name: one.labels?.[0]?.innerText || one.getAttribute("aria-label") || one.innerText,
        seen: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
        id: one.id,
    };
}"""


@pytest.mark.slow
def test_everything_can_be_done_by_keyboard(site, page):
    order_of_focus: list[str] = []

    def tab_to(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            found = page.evaluate(FOCUS)
            assert found["name"].strip(), found
            assert found["seen"], found
            order_of_focus.append(found["name"].strip())
            if found["name"].strip().startswith(name):
                return
        raise AssertionError(f"Tab never came to {name}: {order_of_focus}")

    tab_to("Skip to the content")
    page.keyboard.press("Enter")
    tab_to("API key")
    page.keyboard.type(site.key)
    page.keyboard.press("Enter")
    expect(page.locator("#connected")).to_be_visible()
    tab_to("Who")
    page.keyboard.type("ann")
    expect(page.locator(".facts")).to_contain_text("their own")
    order_of_focus.clear()
    tab_to("What should be written?")
    page.keyboard.type(PROMPT)
    tab_to("Strength")
    page.keyboard.press("ArrowLeft")
    tab_to("Most tokens")
    page.keyboard.type("16")
    tab_to("Ask all three")
    assert [name.split("\n")[0].split(",")[0] for name in order_of_focus] == [
        "What should be written?",
        "Strength of the personal correction",
        "Model",
        "Temperature",
        "Most tokens",
        "Ask all three",
    ]
    page.keyboard.press("Enter")
    expect(page.locator("#ask-said")).to_have_text("All three answers are there.")
    assert "beta 0.9" in page.locator(".answer.personal").inner_text()
    for _ in range(3):
        tab_to("Edit")
    page.keyboard.press("Enter")
    page.keyboard.type("Grand!!! ")
    tab_to("Send as ann's text")
    page.keyboard.press("Enter")
    expect(page.locator(".answer.personal .said")).to_contain_text("fitted to 7 texts")
    tab_to("What should be drawn?")
    page.keyboard.type(PICTURE)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#draw-said")).to_contain_text("put the best first")
    tab_to("Move image A, place 1")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    tab_to("Move image A later")
    page.keyboard.press("Space")
    assert order(page) == list("BCDA")
    tab_to("Send this order")
    page.keyboard.press("Enter")
    expect(page.locator("#rank-said")).to_contain_text("ann likes B, then C, then D, then A")


# Of every visible text its contrast with the nearest background; of every control whether it has a name.
LOOKS = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgb = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = ([r, g, b]) => [r, g, b].map((one) => one / 255)
        .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
        .reduce((sum, one, place) => sum + one * [0.2126, 0.7152, 0.0722][place], 0);
    const behind = (one) => {
        for (let here = one; here; here = here.parentElement) {
            const found = rgb(getComputedStyle(here).backgroundColor);
            if (found[3] === 255) return found;
        }
        return rgb("white");
    };
    const weak = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    let texts = 0;
    while (walker.nextNode()) {
        const one = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !one.checkVisibility()) continue;
        if (one.closest("[aria-disabled=true], noscript")) continue;
        texts += 1;
        const [high, low] = [light(rgb(getComputedStyle(one).color)), light(behind(one))].sort((a, b) => b - a);
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < 4.5) weak.push([walker.currentNode.data, ratio]);
    }
    const nameless = [...document.querySelectorAll("input, select, textarea, button, progress")]
        .filter((one) => one.checkVisibility())
        .filter((one) => !(one.labels?.[0]?.innerText || one.getAttribute("aria-label") || one.innerText).trim())
        .map((one) => one.outerHTML);
    const small = [...document.querySelectorAll("button, select, input")]
        .filter((one) => one.checkVisibility() && one.getBoundingClientRect().height < 44)
        .map((one) => one.outerHTML);
    const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
    return { weak, nameless, small, wide, texts, twice: ids.length - new Set(ids).size };
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_in_both_schemes(site, browser, scheme):
    size = {"width": 360, "height": 740}
    long = "w" * 128
    site.service.store.put_history("acme", long, [PastText("Describe thing 3.", "plain")])
    with tab(site.url, browser, viewport=size, color_scheme=scheme, has_touch=True, is_mobile=True) as page:

        def check(texts: int) -> None:
            found = page.evaluate(LOOKS)
            assert found["texts"] >= texts
            assert {name: found[name] for name in ("weak", "nameless", "small", "wide", "twice")} == {
                "weak": [],
                "nameless": [],
                "small": [],
                "wide": 0,
                "twice": 0,
            }

        expect(page.get_by_label("API key")).to_be_visible()
        check(6)
        page.get_by_label("API key").fill("palate-wrong")
        page.get_by_role("button", name="Connect").click()
        expect(page.locator("#key-problem")).to_be_visible()
        check(7)
        connect(page, site.key)
        page.get_by_label("Who").select_option(long)
        ask(page, "w" * 150)
        draw(page)
        page.get_by_role("button", name="Edit the answer: Base model").click()
        page.get_by_label("How www").fill("")
        page.get_by_role("button", name="Send as www").click()
        expect(page.locator("#base-problem")).to_be_visible()
        check(40)

        def point(name: str) -> dict[str, float]:
            box = page.get_by_role("button", name=f"Move image {name}, place").bounding_box()
            assert box
            return {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}

        page.get_by_role("button", name="Move image D, place").scroll_into_view_if_needed()
        start, end = point("A"), point("D")
        session = page.context.new_cdp_session(page)
        session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [start]})
        for step in range(1, 11):
            here = {axis: start[axis] + (end[axis] - start[axis]) * step / 10 for axis in ("x", "y")}
            session.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [here]})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        assert order(page)[3] == "A"
        assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")


@pytest.mark.slow
def test_each_application_alone_says_what_else_could_be_there(site, browser, server, key):
    with listening(site.images) as url, tab(url, browser) as page:
        connect(page, site.key)
        expect(page.locator("#text-section")).to_be_hidden()
        expect(page.locator("#text-absent")).to_contain_text("serve run serve/config.yaml")
        draw(page)
        page.get_by_role("button", name="Send this order").click()
        expect(page.get_by_label("Their id")).to_be_focused()
        page.get_by_label("Their id").fill("dee")
        page.get_by_role("button", name="Send this order").click()
        expect(page.locator("#rank-said")).to_contain_text("dee likes A, then B")
        assert site.service.store.rankings("acme")[-1].user_id == "dee"
    with tab(f"{site.url}/images", browser) as page:  # behind its prefix
        connect(page, site.key)
        draw(page)
    with tab(server[0], browser) as page:
        connect(page, key)
        expect(page.locator("#images-section")).to_be_hidden()
        expect(page.locator("#images-absent")).to_contain_text("route_prefix /images")
        ask(page)
