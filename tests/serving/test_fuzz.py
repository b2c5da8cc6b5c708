"""Requests made up from the OpenAPI document, valid and not: none may make the server fail."""

from collections.abc import Iterator
from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

from palate.serving.image_http import create_image_app
from palate.serving.image_service import ImageService, ModelSource
from palate.users.keys import create_key
from toy_images import person_run
from toy_images import settings as image_settings
from toy_serving import listening

MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]


WANTED = {
    "text": {"PUT /v1/users/{user_id}", "POST /v1/chat/completions", "POST /v1/users/{user_id}/import"},
    "images": {"POST /v1/images/generations", "POST /v1/images/edits", "POST /v1/feedback", "GET /v1/models"},
}


@pytest.fixture(scope="module")
def image_server(tmp_path_factory) -> Iterator[tuple[str, ImageService]]:
    folder = tmp_path_factory.mktemp("images")
    models = {
        "person": ModelSource(run=person_run(folder / "person"), tenants=("acme",), steps=1),
        "edit": ModelSource(base="shapes-edit", steps=1),
    }
    service = ImageService(
        image_settings(folder, models=models, max_pixels=4096, max_steps=4, feedback=str(folder / "feedback"))
    ).start()
    with listening(create_image_app(service)) as url:
        yield url, service
    service.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "images"])
def test_no_request_makes_the_server_fail(request, kind):
    url, service = request.getfixturevalue({"text": "server", "images": "image_server"}[kind])
    key = create_key(service.store, "acme", "fuzz")
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    seen: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in MODES:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            def call(case):
                response = case.call(headers={"Authorization": f"Bearer {key}"}, timeout=60)
                assert response.status_code < 500, (case.as_curl_command(), response.text)
                if response.status_code >= 400:
                    assert "error" in response.json(), response.text
                seen.setdefault(case.operation.label, set()).add(response.status_code)

            with suppress(Unsatisfiable):  # nothing can be wrong with a request that has no parameter
                call()
    assert WANTED[kind] <= set(seen)
    assert any(400 in statuses for statuses in seen.values())
