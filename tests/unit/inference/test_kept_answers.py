"""Where answers are kept, for whom, and for how long."""

import pytest
from support.inference_ports import MemoryAnswers

from agent360.client.errors import MeshError
from agent360.mesh.inference.answers import Answer, Usage
from agent360.mesh.inference.caching.keeper import Keeper
from agent360.mesh.inference.caching.settings import AnswerCacheSettings
from agent360.mesh.inference.conversation import CacheControl, Message, Prompt
from agent360.mesh.inference.fingerprint import of_prompt
from agent360.mesh.inference.settings import ModelSettings

ANSWER = Answer("abc", (), "stop", Usage(1, 1), "m", "b")
PROMPT = Prompt(model="m", messages=(Message("user", "Hi"),))
SHARE = CacheControl(share=True)


async def ttl_of(control: CacheControl, task_class, **settings) -> float:
    answers = MemoryAnswers()
    keeper = Keeper(answers, AnswerCacheSettings(**settings))
    await keeper.keep_answer(keeper.answer_place("acme", "k"), ANSWER, control, task_class)
    return answers.ttls["k"]


async def test_the_request_decides_then_its_class_then_the_settings_and_never_beyond_the_bound():
    settings = {"ttl_s": 100, "ttl_by_task_class": {"simple": 50}, "max_ttl_s": 1000}
    assert await ttl_of(CacheControl(ttl_s=7), "simple", **settings) == 7
    assert await ttl_of(CacheControl(), "simple", **settings) == 50
    assert await ttl_of(CacheControl(), "complex", **settings) == 100
    assert await ttl_of(CacheControl(), None, **settings) == 100
    assert await ttl_of(CacheControl(ttl_s=5000), None, **settings) == 1000


@pytest.mark.parametrize(
    ("sharing", "control", "scope"),
    [
        (("acme",), SHARE, "shared-answers"),
        (("*",), SHARE, "shared-answers"),
        (("acme",), CacheControl(), "acme"),
        (("globex",), SHARE, "acme"),
        ((), SHARE, "acme"),
    ],
)
def test_only_a_tenant_that_agreed_and_asks_shares(sharing, control, scope):
    keeper = Keeper(MemoryAnswers(), AnswerCacheSettings(sharing_tenants=sharing))
    assert keeper.scope("acme", control) == scope


def test_nobody_calls_in_the_name_under_which_shared_answers_are_held():
    keeper = Keeper(MemoryAnswers(), AnswerCacheSettings(shared_tenant="common"))
    keeper.refuse_reserved("acme")
    with pytest.raises(MeshError) as refused:
        keeper.refuse_reserved("common")
    assert refused.value.reason == "TENANT_RESERVED"


@pytest.mark.parametrize(
    "changed",
    [
        {"version": "2"},
        {"name": "n"},
        {"upstream_model": "other"},
        {"quantization": "Q8_0"},
    ],
)
def test_another_version_of_a_model_has_answers_of_its_own(changed):
    model = ModelSettings(name="m", version="1")
    other = model.model_copy(update=changed)
    assert of_prompt(PROMPT, model) != of_prompt(PROMPT, other)


def test_a_name_that_looks_like_another_models_version_is_told_apart():
    one, other = ModelSettings(name="a@1"), ModelSettings(name="a", version="1@")
    assert of_prompt(PROMPT, one) != of_prompt(PROMPT, other)


def test_keys_begin_with_model_and_version_so_that_they_can_be_removed_together():
    model = ModelSettings(name="m", version="7")
    assert of_prompt(PROMPT, model).startswith("m@7/")


async def test_garbled_entries_are_misses():
    answers = MemoryAnswers()
    keeper = Keeper(answers, AnswerCacheSettings())
    place = keeper.answer_place("acme", "k")
    for garbage in (b"", b"\xff", b"[]", b"{}", b"[1,2]"):
        answers.entries[tuple(place)] = garbage
        assert await keeper.find_answer(place) is None
