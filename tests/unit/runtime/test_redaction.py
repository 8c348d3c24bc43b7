"""What is taken out of texts, fields and JSON values, and what is left as it is."""

import pytest

from agent360.mesh.runtime.redaction import REDACTED, Redactor
from agent360.mesh.runtime.settings import RedactionSettings

redactor = Redactor(RedactionSettings())


SECRET = """password db.password Password_2 apiKey x-api-key API_KEY Set-Cookie refresh_token token
Authorization client.secret aws_secret_key"""


@pytest.mark.parametrize("name", SECRET.split())
def test_fields_of_these_names_are_secret(name: str) -> None:
    assert redactor.named(name, "anything") == REDACTED


@pytest.mark.parametrize("name", ["tokens", "max_tokens", "key", "path", "author", "pass"])
def test_fields_of_these_names_are_not(name: str) -> None:
    assert redactor.named(name, "anything") == "anything"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("GET /p?token=s3cret&page=2", "GET /p?token=[redacted]&page=2"),
        ("/p?page=2&client_secret=s3cret#top", "/p?page=2&client_secret=[redacted]#top"),
        ("redis://ana:s3cret@host/1", "redis://ana:[redacted]@host/1"),
        ("authorization: Bearer s3crets3cret", "authorization: [redacted]"),
        ("sent Bearer s3crets3cret", "sent Bearer [redacted]"),
        ('{"password": "s3cret x", "n": 1}', '{"password": [redacted], "n": 1}'),
        ("apiKey='s3cret x' then", "apiKey=[redacted] then"),
        ("key a360_s3crets3crets3crets3cret is old", "key [redacted] is old"),
    ],
)
def test_secrets_in_texts_go_and_the_rest_stays(text: str, left: str) -> None:
    assert redactor.text(text) == left
    assert redactor.text(left) == left


@pytest.mark.parametrize(
    "text",
    ["max_tokens=5, input_tokens: 7", "plans/42", "10:30: done", "http://host:80/a?b=c", "a = b"],
)
def test_texts_without_secrets_stay_as_they_are(text: str) -> None:
    assert redactor.text(text) == text


def test_json_values_are_redacted_at_any_depth() -> None:
    value = {"a": [{"token": 5, "n": [1, None, True, "password=x"]}], "b": ("x",)}
    assert redactor.value(value) == {
        "a": [{"token": REDACTED, "n": [1, None, True, f"password={REDACTED}"]}],
        "b": ["x"],
    }
    deep: list[object] = []
    for _ in range(50):
        deep = [deep]
    assert "..." in str(redactor.value(deep))


def test_names_and_looks_can_be_set_and_a_broken_pattern_is_refused() -> None:
    own = Redactor(RedactionSettings(names=("ssn",), values=(r"\d{3}-\d{4}",)))
    assert own.named("password", "call 555-1234") == f"call {REDACTED}"
    assert own.named("SSN", "1") == REDACTED
    none = Redactor(RedactionSettings(names=(), values=()))
    assert none.named("password", "password=x") == "password=x"
    with pytest.raises(ValueError, match="not a regular expression"):
        RedactionSettings(values=("(",))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('{"password": "a b\\"c", "page": 2}', '{"password": [redacted], "page": 2}'),
        ('password="cut off bef', "password=[redacted]"),
        ("password='cut off after \\", "password=[redacted]"),
        ("a=token=abc&page=2", "a=token=[redacted]&page=2"),
        ("plan:password:abc", "plan:password:[redacted]"),
    ],
)
def test_a_secret_goes_whole_whatever_stands_around_it(text: str, left: str) -> None:
    assert Redactor(RedactionSettings()).text(text) == left


@pytest.mark.parametrize("word", ["api_key", "password", "token ", "x", "-", "secret="])
def test_long_texts_of_names_without_values_are_read_in_linear_time(word: str) -> None:
    """Quadratic time would be hours: of what can be sent in one message."""
    text = "a=1 " + word * 500_000
    redactor = Redactor(RedactionSettings())
    redacted = redactor.text(text)
    assert redacted.startswith("a=1 ")
