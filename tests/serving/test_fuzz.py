"""Requests made up from the OpenAPI document, valid and not: none may make the server fail."""

from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]


@pytest.mark.slow
def test_no_request_makes_the_server_fail(server, key):
    schema = schemathesis.openapi.from_url(f"{server[0]}/openapi.json")
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
    assert {"PUT /v1/users/{user_id}", "POST /v1/chat/completions", "POST /v1/users/{user_id}/import"} <= set(seen)
    assert any(400 in statuses for statuses in seen.values())
