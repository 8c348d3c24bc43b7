"""Which model answers: by name, or by a rule that can be told."""

from dataclasses import replace

import grpc
import pytest
from pydantic import ValidationError

from agent360.client.errors import MeshError
from agent360.mesh.inference.catalogue import Catalogue
from agent360.mesh.inference.conversation import (
    Hints,
    ImagePart,
    Message,
    Prompt,
    SchemaJson,
    Tool,
)
from agent360.mesh.inference.routing import Router
from agent360.mesh.inference.settings import (
    AutoSettings,
    BackendSettings,
    InferenceSettings,
    ModelSettings,
)

SMALL = ModelSettings(name="small", task_classes=("simple",), output_usd_per_million=1)
LARGE = ModelSettings(name="large", task_classes=("complex",), output_usd_per_million=10)
HUGE = ModelSettings(name="huge", task_classes=("complex",), output_usd_per_million=90)
SECRET = ModelSettings(name="secret", tenants=("acme",))
EMBEDDER = ModelSettings(name="embedder", capabilities=("embeddings",))

ASK = Prompt(model="auto", messages=(Message("user", "Hi"),))


def router(*models: ModelSettings) -> Router:
    return Router(Catalogue(models), AutoSettings(), 500)


ALL = router(HUGE, LARGE, SMALL, SECRET, EMBEDDER)


@pytest.mark.parametrize(
    ("prompt", "model", "rule", "because"),
    [
        (ASK, "small", "auto:simple", "length"),
        (replace(ASK, hints=Hints(task_class="complex")), "large", "auto:complex", "hint"),
        (replace(ASK, tools=(Tool("t"),)), "large", "auto:complex", "tools"),
        (
            replace(ASK, tools=(Tool("t"),), hints=Hints(task_class="simple")),
            "small",
            "auto:simple",
            "hint",
        ),
        (replace(ASK, response_format=SchemaJson("s", {})), "large", "auto:complex", "schema"),
        (replace(ASK, messages=ASK.messages * 8), "large", "auto:complex", "turns"),
        (
            replace(ASK, messages=(Message("user", "x" * 3_000),)),
            "large",
            "auto:complex",
            "length",
        ),
        (replace(ASK, model="huge"), "huge", "explicit", ""),
    ],
)
def test_a_model_is_chosen_by_a_rule_that_is_told(prompt, model, rule, because):
    route = ALL.choose(prompt, "globex")
    assert (route.model.name, route.rule, route.because) == (model, rule, because)


def refusal(chosen: Router, prompt: Prompt, tenant: str = "globex") -> MeshError:
    with pytest.raises(MeshError) as caught:
        chosen.choose(prompt, tenant)
    return caught.value


def test_an_unknown_model_is_refused_with_the_known_ones():
    error = refusal(ALL, replace(ASK, model="gpt"))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_UNKNOWN")
    assert error.metadata["known"] == "embedder, huge, large, small"


def test_a_model_of_another_tenant_is_unknown():
    wanted = replace(ASK, model="secret")
    assert refusal(ALL, wanted).reason == "MODEL_UNKNOWN"
    assert ALL.choose(wanted, "acme").model is SECRET


def test_a_model_is_not_asked_for_what_it_cannot_do():
    image = replace(ASK, model="small", messages=(Message("user", parts=(ImagePart("data:"),)),))
    assert refusal(ALL, image).reason == "MODEL_LACKS_CAPABILITY"
    assert refusal(ALL, replace(image, model="auto")).reason == "NO_MODEL_FITS"
    assert refusal(ALL, replace(ASK, model="embedder")).reason == "MODEL_LACKS_CAPABILITY"


def test_a_cost_ceiling_is_kept():
    cheap = Hints(task_class="complex", max_cost_usd=0.001)
    assert refusal(ALL, replace(ASK, hints=cheap)).reason == "NO_MODEL_FITS"
    enough = replace(ASK, hints=replace(cheap, max_cost_usd=0.006))
    assert ALL.choose(enough, "globex").model is LARGE


def test_without_task_classes_any_model_that_chats_may_answer():
    plain = ModelSettings(name="plain")
    assert router(EMBEDDER, plain).choose(ASK, "globex").model is plain


def test_discovered_models_replace_each_other():
    catalogue = Catalogue()
    catalogue.discovered({"a": ["llama", "shared"], "b": ["shared", "text-embed"]})
    assert catalogue.get("shared", "t").backends == ("a", "b")
    assert catalogue.get("text-embed", "t").capabilities == ("embeddings",)
    catalogue.discovered({"a": ["llama"]})
    assert [model.name for model in catalogue.usable("t")] == ["llama"]


def test_a_service_that_knows_no_models_yet_says_that_instead_of_denying_them():
    error = refusal(router(), replace(ASK, model="small"))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_MODELS")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"models": (SMALL, SMALL)}, "more than one is named small"),
        ({"models": (ModelSettings(name="auto"),)}, "meaning of its own"),
        ({"models": (ModelSettings(name="m", backends=("nowhere",)),)}, "unknown backends"),
        ({"backends": (BackendSettings(), BackendSettings())}, "more than one is named default"),
    ],
)
def test_a_catalogue_that_contradicts_itself_is_refused(settings, match):
    with pytest.raises(ValidationError, match=match):
        InferenceSettings(**settings)


def test_a_backends_key_comes_from_the_settings_or_the_environment(monkeypatch):
    monkeypatch.setenv("MODEL_KEY", "from-environment")
    assert BackendSettings(api_key_env="MODEL_KEY").key() == "from-environment"
    own = BackendSettings(api_key="own", api_key_env="MODEL_KEY")
    assert own.key() == "own"
    assert "own" not in repr(own)
