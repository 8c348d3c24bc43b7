"""HTTP errors of model servers as canonical codes."""

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import grpc
import pytest

from agent360.mesh.inference.backends.openai_errors import from_response, retry_after_s

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (400, Code.INVALID_ARGUMENT, "UPSTREAM_REFUSED"),
        (401, Code.FAILED_PRECONDITION, "UPSTREAM_UNAUTHENTICATED"),
        (403, Code.FAILED_PRECONDITION, "UPSTREAM_UNAUTHENTICATED"),
        (404, Code.FAILED_PRECONDITION, "UPSTREAM_MODEL_UNKNOWN"),
        (408, Code.UNAVAILABLE, "UPSTREAM_TIMEOUT"),
        (418, Code.FAILED_PRECONDITION, "UPSTREAM_REFUSED"),
        (422, Code.INVALID_ARGUMENT, "UPSTREAM_REFUSED"),
        (429, Code.RESOURCE_EXHAUSTED, "UPSTREAM_RATE_LIMITED"),
        (500, Code.UNAVAILABLE, "UPSTREAM_FAILED"),
        (501, Code.UNIMPLEMENTED, "UPSTREAM_LACKS_FEATURE"),
        (503, Code.UNAVAILABLE, "UPSTREAM_FAILED"),
        (504, Code.UNAVAILABLE, "UPSTREAM_TIMEOUT"),
    ],
)
def test_a_status_has_a_canonical_code(status, code, reason):
    error = from_response("gpu", status, {}, b'{"error": {"message": "no"}}', "")
    assert (error.code, error.reason) == (code, reason)
    assert error.metadata == {"backend": "gpu", "http_status": str(status)}


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "too long", "code": "context_length_exceeded"}},
        {"error": {"message": "too long", "code": 400, "type": "exceed_context_size_error"}},
    ],
)
def test_a_prompt_that_does_not_fit_is_told_apart(body):
    assert from_response("gpu", 400, {}, json.dumps(body).encode(), "").reason == "CONTEXT_TOO_LONG"


def test_the_servers_words_are_passed_on_cut_short_and_without_the_key():
    body = json.dumps({"error": {"message": "key sk-secret " + "x" * 2_000}}).encode()
    error = from_response("gpu", 400, {}, body, "sk-secret")
    assert "key ***" in error.message
    assert "sk-secret" not in str(error)
    assert len(error.message) < 600


def test_words_about_this_services_credentials_go_nowhere():
    error = from_response("gpu", 401, {}, b'{"error": {"message": "Incorrect key sk-ab**yz"}}', "")
    assert "sk-" not in error.message


@pytest.mark.parametrize("body", [b"", b"<html>bad gateway</html>", b"[1]", b'{"error": "text"}'])
def test_a_body_of_any_shape_is_survived(body):
    assert from_response("gpu", 502, {}, body, "").reason == "UPSTREAM_FAILED"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "9", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": format_datetime(datetime(2020, 1, 1, tzinfo=UTC), usegmt=True)}, 0.0),
    ],
)
def test_retry_after_is_read(headers, expected):
    assert retry_after_s(headers) == expected


def test_retry_after_may_be_a_date():
    when = datetime.now(UTC) + timedelta(seconds=60)
    found = retry_after_s({"retry-after": format_datetime(when, usegmt=True)})
    assert found == pytest.approx(60, abs=2)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"remaining-requests": "0", "reset-requests": "1s", "reset-tokens": "6m0s"}, 1.0),
        ({"remaining-tokens": "0", "reset-tokens": "1m30.5s"}, 90.5),
        ({"remaining-tokens": "0", "reset-tokens": "250ms"}, 0.25),
        ({"remaining-tokens": "12", "reset-tokens": "6m0s"}, None),
        ({"remaining-tokens": "0", "reset-tokens": "soon"}, None),
    ],
)
def test_a_rate_limit_without_retry_after_tells_when_it_is_refilled(headers, expected):
    headers = {f"x-ratelimit-{name}": value for name, value in headers.items()}
    assert from_response("gpu", 429, headers, b"", "").retry_after_s == expected
    assert from_response("gpu", 503, headers, b"", "").retry_after_s is None
