"""Settings: where they come from, which wins, and what is said of a wrong one."""

from pathlib import Path
from typing import Any

import pytest

from agent360.mesh.cache import CacheSettings
from agent360.mesh.inference import InferenceSettings
from agent360.mesh.runtime.config import ConfigError, describe, load
from agent360.mesh.runtime.settings import ServerSettings


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "mesh.toml"


def loaded(**sources: Any) -> ServerSettings:
    return load(CacheSettings, **{"environ": {}, **sources}).settings


def fault(**sources: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(**sources)
    return str(caught.value)


def test_without_any_source_the_defaults_hold() -> None:
    found = load(CacheSettings, environ={})
    assert found.settings == CacheSettings()
    assert not found.origins
    assert {origin for _, _, origin in describe(found)} == {"default"}


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (("common_environment",), 1.0),
        (("common_environment", "environment"), 2.0),
        (("common_environment", "environment", "common_file"), 3.0),
        (("environment", "common_file", "file"), 4.0),
        (("common_environment", "environment", "common_file", "file", "flag"), 5.0),
        (("common_environment", "flag"), 5.0),
    ],
)
def test_flags_win_over_the_file_and_it_over_the_environment_and_a_service_over_all(
    config: Path, sources: tuple[str, ...], expected: float
) -> None:
    environ = {}
    if "common_environment" in sources:
        environ["AGENT360_COMMON__DEADLINE__DEFAULT_S"] = "1"
    if "environment" in sources:
        environ["AGENT360_CACHE__DEADLINE__DEFAULT_S"] = "2"
    text = ""
    if "common_file" in sources:
        text += "[common]\ndeadline.default_s = 3\n"
    if "file" in sources:
        text += "[cache]\ndeadline.default_s = 4\n"
    config.write_text(text)
    flags = {"deadline.default_s": "5"} if "flag" in sources else {}
    assert loaded(environ=environ, config=config, flags=flags).deadline.default_s == expected


def test_every_value_says_where_it_came_from(config: Path) -> None:
    config.write_text("[cache]\nlog.level = 'debug'\n[common]\ngrace_s = 3\n")
    environ = {"AGENT360_CACHE__PORT": "7000", "AGENT360_COMMON__LOG__ACCESS": "all"}
    found = load(CacheSettings, environ=environ, config=config, flags={"host": "localhost"})
    origins = {path: origin for path, _, origin in describe(found)}
    assert origins["port"] == "environment AGENT360_CACHE__*"
    assert origins["log.access"] == "environment AGENT360_COMMON__*"
    assert origins["log.level"] == f"{config} [cache]"
    assert origins["grace_s"] == f"{config} [common]"
    assert origins["host"] == "command line"
    assert origins["http_port"] == "default"


def test_another_services_table_and_variables_are_left_alone(config: Path) -> None:
    config.write_text("[metrics]\nstore = 'sqlite:///x.db'\n")
    environ = {"AGENT360_METRICS__STORE": "x", "AGENT360_CACHE_ADDRESS": "h:1", "PATH": "/"}
    assert loaded(environ=environ, config=config) == CacheSettings()


def test_lists_and_tables_can_be_given_as_json_in_a_variable() -> None:
    environ = {
        "AGENT360_INFERENCE__BACKENDS": '[{"name": "a", "url": "http://127.0.0.1:1/v1"}]',
        "AGENT360_INFERENCE__TENANTS__KNOWN": '["acme"]',
    }
    settings = load(InferenceSettings, environ=environ).settings
    assert [each.name for each in settings.backends] == ["a"]
    assert settings.tenants.known == ("acme",)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"AGENT360_CACHE__NO_SUCH": "1"}, "AGENT360_CACHE__NO_SUCH: cache has no setting"),
        ({"AGENT360_COMMON__STORE": "1"}, "AGENT360_COMMON__STORE: common has no setting"),
        ({"AGENT360_CACHE__DEADLINE__NO_SUCH": "1"}, "cache.deadline.no_such (environment"),
        ({"AGENT360_CACHE__PORT": "many"}, "cache.port (environment AGENT360_CACHE__*)"),
        ({"AGENT360_CACHE__DEADLINE__DEFAULT_S": "-1"}, "cache.deadline.default_s (environment"),
        ({"AGENT360_CACHE__TENANTS__KNOWN": "[acme"}, "AGENT360_CACHE__"),
    ],
)
def test_a_wrong_variable_is_named(environ: dict[str, str], said: str) -> None:
    assert said in fault(environ=environ)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[cach]\n", "unknown table [cach]; known: cache, common"),
        ("[cache]\nportt = 1\n", "cache.portt ("),
        ("[cache]\nlog.level = 'loud'\n", "cache.log.level ("),
        ("[cache\n", "mesh.toml: "),
    ],
)
def test_a_wrong_line_of_the_file_is_named(config: Path, text: str, said: str) -> None:
    config.write_text(text)
    message = fault(config=config)
    assert said in message
    assert str(config) in message


def test_a_file_that_is_not_there_is_named(config: Path) -> None:
    assert "No such file" in fault(config=config)


def test_a_wrong_flag_is_named() -> None:
    assert "cache.deadline.default_s (command line)" in fault(flags={"deadline.default_s": "soon"})
    assert "cache.no (command line)" in fault(flags={"no.such": "1"})


def test_all_faults_are_told_at_once() -> None:
    message = fault(flags={"port": "70000", "grace_s": "-1"})
    assert "cache.port" in message
    assert "cache.grace_s" in message


def test_a_secret_is_never_shown() -> None:
    environ = {"AGENT360_CACHE__MESH__API_KEY": "very-secret"}
    found = load(CacheSettings, environ=environ)
    assert found.settings.mesh.api_key.get_secret_value() == "very-secret"
    assert "very-secret" not in str(list(describe(found)))
    assert "very-secret" not in repr(found)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://ana:very-secret@h:1/2", "redis://ana:***@h:1/2"),
        ("rediss+cluster://:very-s%40cret@h:1,i:2", "rediss+cluster://:***@h:1,i:2"),
        ("redis://h:1/2", "redis://h:1/2"),
    ],
)
def test_the_password_of_a_store_is_not_shown(url: str, shown: str) -> None:
    found = load(CacheSettings, environ={"AGENT360_CACHE__STORE": url})
    rows = {path: value for path, value, _ in describe(found)}
    assert rows["store"] == shown
    assert found.settings.store == url, "and is used all the same"
