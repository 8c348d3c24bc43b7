"""Which model answers: by name, or by a rule that can be told."""

from collections import deque
from dataclasses import replace

import grpc
import pytest
import structlog
from pydantic import ValidationError

from agent360.client.errors import MeshError
from agent360.mesh.inference.catalogue import Catalogue
from agent360.mesh.inference.classifier import classifier_of
from agent360.mesh.inference.conversation import (
    Hints,
    ImagePart,
    Message,
    Prompt,
    Sampling,
    SchemaJson,
    Tool,
)
from agent360.mesh.inference.members import Health, ModelLoad
from agent360.mesh.inference.routing import Router
from agent360.mesh.inference.settings import (
    AutoSettings,
    BackendSettings,
    ClassParameters,
    InferenceSettings,
    ModelLimits,
    ModelSettings,
)
from agent360.mesh.runtime.settings import SettingError

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
        (ASK, "small", "auto:simple", "length: 5 tokens"),
        (replace(ASK, hints=Hints(task_class="complex")), "large", "auto:complex", "hint"),
        (replace(ASK, tools=(Tool("t"),)), "large", "auto:complex", "tools"),
        (
            replace(ASK, tools=(Tool("t"),), hints=Hints(task_class="simple")),
            "small",
            "auto:simple",
            "hint",
        ),
        (replace(ASK, response_format=SchemaJson("s", {})), "large", "auto:complex", "schema"),
        (replace(ASK, messages=ASK.messages * 8), "large", "auto:complex", "turns: 8"),
        (
            replace(ASK, messages=(Message("user", "x" * 3_000),)),
            "large",
            "auto:complex",
            "length: 754 tokens",
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


SIMPLE_IN_SESSION = replace(ASK, hints=Hints(session_id="chat-7"))
COMPLEX_IN_SESSION = replace(SIMPLE_IN_SESSION, tools=(Tool("t"),))


def test_a_session_that_was_complex_stays_so_for_its_tenant_alone():
    chosen = router(LARGE, SMALL)
    assert chosen.choose(SIMPLE_IN_SESSION, "acme").model is SMALL
    assert chosen.choose(COMPLEX_IN_SESSION, "acme").model is LARGE
    route = chosen.choose(SIMPLE_IN_SESSION, "acme")
    assert (route.model, route.rule, route.because) == (LARGE, "auto:complex", "session")
    hinted = replace(SIMPLE_IN_SESSION, hints=Hints(task_class="simple", session_id="chat-7"))
    assert chosen.choose(hinted, "acme").model is LARGE
    assert chosen.choose(SIMPLE_IN_SESSION, "globex").model is SMALL
    assert chosen.choose(ASK, "acme").model is SMALL


def test_parameters_of_the_class_apply_only_where_the_request_names_none():
    settings = AutoSettings(
        simple=ClassParameters(temperature=0.2, max_tokens=100),
        complex=ClassParameters(temperature=0.9),
    )
    bounded = SMALL.model_copy(update={"max_tokens": 50})
    chosen = Router(Catalogue([bounded, LARGE]), settings, 500)

    def sampling(prompt: Prompt) -> Sampling:
        return chosen.choose(prompt, "acme").completed(prompt).sampling

    assert sampling(ASK) == Sampling(temperature=0.2, max_tokens=100)
    own = Sampling(temperature=0.0, max_tokens=7, top_p=0.5)
    assert sampling(replace(ASK, sampling=own)) == own
    hard = replace(ASK, hints=Hints(task_class="complex"))
    assert sampling(hard) == Sampling(temperature=0.9)
    assert sampling(replace(ASK, model="small")) == Sampling(max_tokens=50)
    assert sampling(replace(ASK, model="large")) == Sampling()


def test_fallbacks_can_do_what_is_needed_and_may_be_used():
    deaf = ModelSettings(name="deaf", capabilities=("chat",))
    main = ModelSettings(name="main", fallbacks=("deaf", "secret", "small"))
    chosen = router(main, deaf, SMALL, SECRET)

    def names(prompt: Prompt, tenant: str) -> list[str]:
        return [each.name for each in chosen.choose(prompt, tenant).fallbacks]

    explicit = replace(ASK, model="main")
    assert names(explicit, "globex") == ["deaf", "small"]
    assert names(explicit, "acme") == ["deaf", "secret", "small"]
    assert names(replace(explicit, tools=(Tool("t"),)), "globex") == ["small"]


def test_auto_falls_back_to_the_others_of_the_class_within_the_ceiling():
    named = LARGE.model_copy(update={"fallbacks": ("small",)})
    chosen = router(HUGE, named, SMALL)
    hard = replace(ASK, hints=Hints(task_class="complex"))
    assert [m.name for m in chosen.choose(hard, "acme").fallbacks] == ["small", "huge"]
    cheap = replace(ASK, hints=Hints(task_class="complex", max_cost_usd=0.006))
    assert [m.name for m in chosen.choose(cheap, "acme").fallbacks] == ["small"]


class Measured:
    """Models with known latencies and health."""

    def __init__(self, latencies: dict[str, list[float]], down: set[str] = frozenset()) -> None:
        self._latencies = latencies
        self._down = down

    def health(self, model: ModelSettings) -> Health:
        return Health.UNAVAILABLE if model.name in self._down else Health.READY

    def load(self, model: str) -> ModelLoad:
        return ModelLoad(latencies_s=deque(self._latencies.get(model, ())))


CHEAP = ModelSettings(name="cheap", output_usd_per_million=1)
MIDDLE = ModelSettings(name="middle", output_usd_per_million=2)
DEAR = ModelSettings(name="dear", output_usd_per_million=3)


@pytest.mark.parametrize(
    ("latencies", "target", "model"),
    [
        ({"cheap": [2.0] * 10, "dear": [0.2] * 10}, 1.0, "dear"),
        ({"cheap": [0.3] * 10, "dear": [0.2] * 10}, 1.0, "cheap"),
        ({"cheap": [0.3] * 5 + [3.0] * 5, "dear": [0.2] * 10}, 1.0, "dear"),
        ({"cheap": [0.3] * 6 + [3.0] * 4, "middle": [4.0], "dear": [5.0]}, 1.0, "cheap"),
        ({"cheap": [2.0] * 10}, 1.0, "middle"),
        ({"cheap": [4.0], "middle": [3.0], "dear": [5.0]}, 1.0, "middle"),
        ({"cheap": [4.0], "middle": [3.0], "dear": [0.1]}, None, "cheap"),
    ],
)
def test_a_latency_target_prefers_the_cheapest_that_was_measured_to_meet_it(
    latencies, target, model
):
    chosen = Router(
        Catalogue([CHEAP, MIDDLE, DEAR]), AutoSettings(), 500, conditions=Measured(latencies)
    )
    route = chosen.choose(replace(ASK, hints=Hints(max_latency_s=target)), "acme")
    assert route.model.name == model
    assert ("latency" in route.because) is (target is not None)


def test_auto_avoids_a_model_that_is_down_and_keeps_it_as_the_last_resort():
    measured = Measured({}, down={"cheap"})
    chosen = Router(Catalogue([CHEAP, MIDDLE]), AutoSettings(), 500, conditions=measured)
    route = chosen.choose(ASK, "acme")
    assert (route.model, route.fallbacks) == (MIDDLE, (CHEAP,))


def test_models_that_fit_equally_share_by_weight_and_a_repeated_request_stays():
    twice, once = ModelSettings(name="twice", weight=2), ModelSettings(name="once", weight=1)
    chosen = router(ModelSettings(name="spare"), twice, once)
    asks = [replace(ASK, messages=(Message("user", f"Question {n}"),)) for n in range(1_500)]
    taken = [chosen.choose(ask, "acme").model.name for ask in asks]
    assert taken == [chosen.choose(ask, "acme").model.name for ask in asks]
    assert taken.count("twice") / 1_500 == pytest.approx(2 / 3, abs=0.05)


def test_models_that_fit_equally_and_have_no_weight_follow_in_their_order():
    first, second = ModelSettings(name="z"), ModelSettings(name="a")
    asks = [replace(ASK, messages=(Message("user", f"Question {n}"),)) for n in range(20)]
    routes = [router(first, second).choose(ask, "acme") for ask in asks]
    assert all((route.model, route.fallbacks) == (first, (second,)) for route in routes)


def test_limits_of_a_model_are_kept():
    tight = SMALL.model_copy(
        update={"limits": ModelLimits(max_prompt_tokens=20, max_output_tokens=64)}
    )
    chosen = router(tight, LARGE)
    long = replace(ASK, model="small", messages=(Message("user", "x" * 200),))
    much = replace(ASK, model="small", sampling=Sampling(max_tokens=65))
    assert refusal(chosen, long).reason == "MODEL_LIMIT_EXCEEDED"
    assert refusal(chosen, much).reason == "MODEL_LIMIT_EXCEEDED"
    assert chosen.choose(replace(long, model="auto"), "acme").model is LARGE
    small = replace(ASK, model="small")
    assert chosen.choose(small, "acme").completed(small).sampling.max_tokens == 64


def test_a_fallback_is_left_out_where_the_request_is_beyond_its_limits():
    first = SMALL.model_copy(update={"fallbacks": ("tight", "short", "large")})
    tight = ModelSettings(name="tight", limits=ModelLimits(max_output_tokens=64))
    short = ModelSettings(name="short", context_tokens=100)
    chosen = router(first, tight, short, LARGE)

    def fallbacks(**more):
        route = chosen.choose(replace(ASK, model="small", **more), "acme")
        return [each.name for each in route.fallbacks]

    assert fallbacks() == ["tight", "short", "large"]
    assert fallbacks(sampling=Sampling(max_tokens=65)) == ["short", "large"]
    assert fallbacks(messages=(Message("user", "x" * 2_000),)) == ["tight", "large"]


def test_auto_leaves_out_models_whose_context_is_too_short():
    short = SMALL.model_copy(update={"context_tokens": 40})
    long = replace(ASK, messages=(Message("user", "x" * 200),))
    assert router(short, LARGE).choose(long, "acme").model is LARGE
    assert refusal(router(short), long).reason == "NO_MODEL_FITS"


POLITENESS = """
from agent360.mesh.inference.classifier import Verdict

def by_politeness(prompt):
    said = prompt.messages[-1].content
    if "crash" in said:
        raise RuntimeError("no idea")
    return Verdict("complex" if "please" in said else "simple", "manners")
"""


def test_a_classifier_of_ones_own_decides_and_the_rules_stand_in_when_it_fails(
    tmp_path, monkeypatch
):
    (tmp_path / "manners.py").write_text(POLITENESS)
    monkeypatch.syspath_prepend(tmp_path)
    settings = AutoSettings(classifier="manners:by_politeness")
    classifier = classifier_of(settings, structlog.get_logger())
    chosen = Router(Catalogue([SMALL, LARGE]), settings, 500, classifier=classifier)

    def route(text: str) -> tuple[str, str]:
        found = chosen.choose(replace(ASK, messages=(Message("user", text),)), "acme")
        return found.rule, found.because

    assert route("Hi, please") == ("auto:complex", "manners")
    assert route("Hi") == ("auto:simple", "manners")
    assert route("crash") == ("auto:simple", "length: 6 tokens")


@pytest.mark.parametrize("path", ["nowhere:f", "json:nothing", "json", "json:__doc__"])
def test_a_classifier_that_is_not_there_is_told_at_the_start(path):
    with pytest.raises(SettingError, match=path):
        classifier_of(AutoSettings(classifier=path), structlog.get_logger())


def test_embedding_models_have_fallbacks_that_embed():
    spare = ModelSettings(name="spare", capabilities=("embeddings",))
    main = EMBEDDER.model_copy(update={"fallbacks": ("small", "spare")})
    route = router(main, spare, SMALL).choose_embedder("embedder", "acme")
    assert route.fallbacks == (spare,)
    with pytest.raises(MeshError) as caught:
        router(SMALL).choose_embedder("small", "acme")
    assert caught.value.reason == "MODEL_LACKS_CAPABILITY"


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
