"""The example files are what the services take."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from agent360.mesh.inference import InferenceSettings
from agent360.mesh.inference.catalogue_file import read_models
from agent360.mesh.ratelimit.limits_file import read_limits
from agent360.mesh.runtime.config import load
from agent360.mesh.services import NAMES, service_kind

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_holds_for_every_service(name: str) -> None:
    settings = load(service_kind(name).settings, config=EXAMPLES / "mesh.toml", environ={}).settings
    assert settings.deadline.maximum_s == 300
    if name == "ratelimit":
        assert ROOT / settings.limits == EXAMPLES / "limits.toml"


def test_the_limits_apply_as_their_comments_say() -> None:
    limits = read_limits(EXAMPLES / "limits.toml")
    assert limits.of("acme")["requests-per-minute"].size == 100
    assert limits.of("umbrella-labs")["requests-per-minute"].amount == 60
    assert limits.of("acme")["tool-calls"].shadow
    assert limits.of("acme")["searches"].per == ("tenant", "user")


def test_the_catalogue_holds_for_the_backends_of_the_configuration() -> None:
    loaded = load(service_kind("inference").settings, config=EXAMPLES / "mesh.toml", environ={})
    small, large, embedder = read_models(EXAMPLES / "models.toml", loaded.settings.backend_names)
    assert (small.fallbacks, small.affinity) == (("large",), "prefix")
    assert (small.task_classes, large.task_classes) == (("simple",), ("complex",))
    assert embedder.capabilities == ("embeddings",)


def test_the_settings_shown_in_the_documentation_hold() -> None:
    text = (ROOT / "docs" / "inference.md").read_text()
    blocks = [tomllib.loads(each) for each in re.findall(r"```toml\n(.*?)```", text, re.DOTALL)]
    for block in blocks:
        if "models" in block:
            names = sorted({name for model in block["models"] for name in model["backends"]})
            block["backends"] = [{"name": name} for name in names]
            block["models"] += [
                {"name": name, "backends": names}
                for model in block["models"]
                for name in model["fallbacks"]
            ]
        InferenceSettings.model_validate(block.get("inference", block))
    assert len(blocks) > 5


def test_the_requests_are_those_of_an_agent_platform() -> None:
    lines = (EXAMPLES / "agent_requests.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) >= 300
    assert len({row["tenant"] for row in rows}) == 4
    assert len({json.dumps(row["messages"]) for row in rows}) < len(rows), "some repeat"
    assert any(row.get("tools") for row in rows)
