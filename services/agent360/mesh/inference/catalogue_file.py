"""The TOML file that the catalogue of models comes from."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agent360.mesh.inference.settings import ModelSettings, faults_of
from agent360.mesh.runtime.toml_places import Places
from agent360.mesh.runtime.watched_file import WrongFileError


def read_models(file: Path, backends: Collection[str]) -> tuple[ModelSettings, ...]:
    """Reads a catalogue: ``[[models]]`` with the fields of ``ModelSettings``.

    Args:
        file: the catalogue.
        backends: names of the backends that models may have.

    Raises:
        WrongFileError: it cannot be read, or an entry is wrong; the message names file, line and
            field.
    """
    try:
        text = file.read_text()
        content = tomllib.loads(text)
    except OSError as error:
        raise WrongFileError(f"{file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WrongFileError(f"{file}: {error}") from error
    places = Places(file, text, "models")
    unknown = sorted(set(content) - {"models"})
    if unknown:
        line = places.of_key(unknown[0])
        raise WrongFileError(f"{line}: {unknown[0]!r} is not known; expected [[models]]")
    entries = content.get("models", [])
    tables = isinstance(entries, list) and all(isinstance(each, dict) for each in entries)
    if not tables or not entries:
        raise WrongFileError(f"{places.of_key('models')}: models are written as [[models]]")
    models = tuple(_read(number, entry, places) for number, entry in enumerate(entries))
    for number, field, fault in faults_of(models, backends):
        raise WrongFileError(f"{places.of(number, field)}: {field}: {fault}")
    return models


def _read(number: int, entry: dict[str, Any], places: Places) -> ModelSettings:
    try:
        return ModelSettings.model_validate(entry)
    except ValidationError as error:
        fault = error.errors()[0]
    path = [str(part) for part in fault["loc"]]
    name = entry.get("name", "without name")
    match fault["type"]:
        case "extra_forbidden":
            said = "is not known"
        case "missing":
            said = "is missing"
        case _:
            said = f"{fault['msg']}; is {fault['input']!r}"
    raise WrongFileError(
        f"{places.of(number, *reversed(path))}: model {number + 1} ({name}): "
        f"{'.'.join(path)}: {said}"
    )
