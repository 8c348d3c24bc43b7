"""Settings from the environment, a TOML file and flags, and where each value came from."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from pydantic import BaseModel, ValidationError, create_model
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from agent360.mesh.runtime.settings import ServerSettings

S = TypeVar("S", bound=ServerSettings)

_URL_PASSWORD: Final = re.compile(r"(\w+://[^\s/?#:@]*:)[^\s/?#]*@")
COMMON: Final = "common"
"""The TOML table and environment prefix whose values apply to all services."""


class ConfigError(Exception):
    """The configuration is wrong; the message names the field, its source and the fix."""


@dataclass(frozen=True, slots=True)
class Loaded(Generic[S]):
    """Settings and their origins."""

    settings: S
    """What is in force."""
    origins: Mapping[str, str]
    """Source of each value that is not a default, by dotted path."""


def load(
    settings_class: type[S],
    *,
    config: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded[S]:
    """Loads the settings of one service; later sources win: environment, file, flags.

    Args:
        settings_class: of the service.
        config: a TOML file with a table for each service and, for all, ``[common]``.
        flags: values by dotted path, from the command line.
        environ: None: the process's environment.

    Raises:
        ConfigError: a name is unknown or a value is not valid.
    """
    service = settings_class.service
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, layer in _layers(settings_class, service, config, flags or {}, environ):
        for path, value in _leaves(layer):
            _put(values, path.split("."), value)
            origins[path] = source
    try:
        return Loaded(settings_class.model_validate(values), origins)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            path = ".".join(str(part) for part in fault["loc"])
            origin = _origin_of(path, origins)
            lines.append(f"{service}.{path} ({origin}): {fault['msg']}")
        raise ConfigError("; ".join(lines)) from None


def describe(loaded: Loaded[Any]) -> Iterator[tuple[str, str, str]]:
    """Path, value and origin of every setting, in the order of declaration.

    Passwords in URLs are not shown.
    """
    for path, value in _leaves(loaded.settings.model_dump(mode="json"), empty=True):
        shown = _URL_PASSWORD.sub(r"\1***@", str(value))
        yield path, shown, _origin_of(path, loaded.origins)


def _layers(
    settings_class: type[ServerSettings],
    service: str,
    config: Path | None,
    flags: Mapping[str, Any],
    environ: Mapping[str, str] | None,
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, model in ((COMMON, ServerSettings), (service, settings_class)):
        yield f"environment AGENT360_{name.upper()}__*", _from_environment(name, model, environ)
    if config is not None:
        tables = _read_toml(config)
        for name in (COMMON, service):
            yield f"{config} [{name}]", tables.get(name, {})
    layer: dict[str, Any] = {}
    for path, value in flags.items():
        _put(layer, path.split("."), value)
    yield "command line", layer


def _read_toml(config: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(config.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {config}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{config}: {error}") from error
    known = {COMMON, "inference", "cache", "ratelimit", "metrics"}
    unknown = sorted(set(tables) - known)
    if unknown:
        raise ConfigError(
            f"{config}: unknown table [{unknown[0]}]; known: {', '.join(sorted(known))}"
        )
    return tables


def _from_environment(
    name: str, model: type[BaseModel], environ: Mapping[str, str] | None
) -> dict[str, Any]:
    prefix = f"AGENT360_{name.upper()}__"
    variables = os.environ if environ is None else environ
    ours = {key: value for key, value in variables.items() if key.upper().startswith(prefix)}
    for key in ours:
        first = key[len(prefix) :].split("__")[0].lower()
        if first not in model.model_fields:
            raise ConfigError(f"environment variable {key}: {name} has no setting {first!r}")
    fields: dict[str, Any] = {
        field_name: (field.annotation, field) for field_name, field in model.model_fields.items()
    }
    reader = create_model(
        "EnvironmentSettings", __base__=_PlainEnvironment, __cls_kwargs__=None, **fields
    )
    source = EnvSettingsSource(reader, env_prefix=prefix, env_nested_delimiter="__")
    source.env_vars = {key.lower(): value for key, value in ours.items()}
    try:
        return source()
    except Exception as error:
        raise ConfigError(f"environment {prefix}*: {error}") from error


class _PlainEnvironment(BaseSettings):
    model_config = SettingsConfigDict(extra="ignore", case_sensitive=False)


def _leaves(
    tree: Mapping[str, Any], prefix: str = "", *, empty: bool = False
) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and (value or not empty):
            yield from _leaves(value, f"{path}.", empty=empty)
        else:
            yield path, value


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _origin_of(path: str, origins: Mapping[str, str]) -> str:
    """The source of a value: its own, that of what holds it, or of something it holds."""
    parent = path
    while parent:
        if parent in origins:
            return origins[parent]
        parent = parent.rpartition(".")[0]
    within = (origin for each, origin in origins.items() if each.startswith(f"{path}."))
    return next(within, "default")
