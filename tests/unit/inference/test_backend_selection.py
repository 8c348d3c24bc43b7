"""Which backend is asked: in proportion to weights, least loaded, or where a session was before."""

from collections import Counter
from dataclasses import dataclass, replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent360.mesh.inference.backends.openai import OpenAIBackend
from agent360.mesh.inference.conversation import Hints, Message, Prompt
from agent360.mesh.inference.members import Health, Member
from agent360.mesh.inference.rendezvous import score
from agent360.mesh.inference.selection import Selector, affinity_key, policy_of
from agent360.mesh.inference.settings import BackendSettings, ModelSettings

NAMES = ("a", "b", "c", "d", "e")


@dataclass(frozen=True)
class Asked:
    """What a request says of itself."""

    session: str = ""
    tokens: int = 100


def member(name: str, outstanding_tokens: int = 0) -> Member:
    return Member(
        OpenAIBackend(BackendSettings(name=name)),
        probed=True,
        outstanding_tokens=outstanding_tokens,
    )


def model(**settings) -> ModelSettings:
    return ModelSettings(**{"name": "m", "backends": NAMES, **settings})


def owner(key: str, names: tuple[str, ...], weights: dict[str, float]) -> str:
    return max(names, key=lambda name: score(key, name, weights.get(name, 1.0)))


names = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=6, unique=True).map(tuple)


@given(names, st.lists(st.text(max_size=12), max_size=50))
def test_a_member_that_leaves_moves_only_its_own_keys(members, keys):
    gone, *left = members
    for key in keys:
        before = owner(key, members, {})
        after = owner(key, tuple(left), {})
        assert after == before or before == gone


def test_about_one_key_in_n_moves_to_a_new_member():
    keys = [f"session:{number}" for number in range(4_000)]
    moved = [key for key in keys if owner(key, NAMES, {}) != owner(key, NAMES[:-1], {})]
    assert len(moved) == pytest.approx(4_000 / 5, rel=0.15)
    assert all(owner(key, NAMES, {}) == "e" for key in moved)


def test_keys_are_shared_in_proportion_to_weights():
    weights = {"a": 3.0}
    owners = Counter(owner(f"k{number}", ("a", "b"), weights) for number in range(4_000))
    assert owners["a"] / owners["b"] == pytest.approx(3.0, rel=0.15)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 5),
)
def test_turns_by_weight_are_exact_over_a_round(weights, rounds):
    members = [member(name) for name in NAMES[: len(weights)]]
    weighted = model(
        policy="weights",
        weights={each.name: float(weight) for each, weight in zip(members, weights, strict=True)},
    )
    selector = Selector(Random(0))
    counts = Counter(
        selector.choose(weighted, members, Asked()).name for _ in range(rounds * sum(weights))
    )
    expected = {each.name: rounds * weight for each, weight in zip(members, weights, strict=True)}
    assert counts == expected


def test_the_heaviest_does_not_get_all_its_turns_in_a_row():
    members = [member("a"), member("b")]
    weighted = model(policy="weights", weights={"a": 3})
    selector = Selector(Random(0))
    order = "".join(selector.choose(weighted, members, Asked()).name for _ in range(8))
    assert order == "aabaaaba"


loads = st.lists(st.integers(0, 10_000), min_size=2, max_size=5)


@given(loads, st.integers(0, 99))
def test_the_fewest_outstanding_tokens_are_preferred(outstanding, seed):
    members = [member(n, load) for n, load in zip(NAMES, outstanding, strict=False)]
    chosen = Selector(Random(seed)).choose(model(), members, Asked())
    assert chosen.outstanding_tokens == min(outstanding)


@given(loads, st.integers(0, 99))
def test_the_better_of_two_is_never_the_most_loaded_alone(outstanding, seed):
    members = [member(n, load) for n, load in zip(NAMES, outstanding, strict=False)]
    chosen = Selector(Random(seed)).choose(model(policy="two_choices"), members, Asked())
    assert sorted(outstanding).index(chosen.outstanding_tokens) < len(outstanding) - 1


def test_of_two_equally_loaded_the_faster_one_is_taken_until_its_slowness_is_old():
    fast, slow = member("a"), member("b")
    fast.worked(0.0, 0.1)
    slow.worked(0.0, 0.4)
    now = [1.0]
    selector = Selector(Random(0), lambda: now[0])
    both = model(policy="two_choices")
    assert selector.choose(both, [fast, slow], Asked()) is fast
    now[0] = 100.0
    fast.worked(100.0, 0.1)
    assert selector.choose(both, [fast, slow], Asked()) is slow


@given(loads, st.text(min_size=1, max_size=8), st.integers(1, 5_000))
def test_a_session_stays_unless_its_backend_has_more_than_its_share(outstanding, key, tokens):
    members = [member(n, load) for n, load in zip(NAMES, outstanding, strict=False)]
    sticky = model(affinity_load=1.25)
    chosen = Selector(Random(0)).choose(sticky, members, Asked(f"session:{key}", tokens))
    share = 1.25 * (sum(outstanding) + tokens) / len(members)
    preferred = sorted(members, key=lambda each: -score(f"session:{key}", each.name, 1.0))
    assert chosen is next(each for each in preferred if each.outstanding_tokens < share)


def test_sessions_of_idle_backends_are_spread_and_do_not_move():
    members = [member(name) for name in NAMES]
    selector = Selector(Random(0))

    def places() -> list[str]:
        return [selector.choose(model(), members, Asked(f"session:{n}")).name for n in range(200)]

    first = places()
    assert places() == first
    assert set(first) == set(NAMES)


def test_a_model_without_affinity_takes_no_notice_of_sessions():
    members = [member("a", 50), member("b", 10)]
    plain = model(affinity="none")
    chosen = {Selector(Random(0)).choose(plain, members, Asked(f"s:{n}")).name for n in range(20)}
    assert chosen == {"b"}


def test_the_failing_and_the_cold_are_passed_over_while_another_is_fit():
    failing, cold, warm = member("a"), member("b"), member("c", 1_000_000)
    warming = model(warm_up="Hello")
    warm.warm.add("m")
    failing.warm.add("m")
    failing.failed(0.0, at_work=True)
    failing.failed(0.0, at_work=True)
    selector = Selector(Random(0))
    assert selector.choose(warming, [failing, cold, warm], Asked()) is warm
    assert selector.choose(warming, [failing, cold], Asked("session:x")) is cold
    assert selector.choose(warming, [failing], Asked()) is failing


def test_a_lone_failure_does_not_send_everybody_elsewhere():
    stumbled, fine = member("a"), member("b", 500)
    stumbled.failed(0.0, at_work=True)
    assert stumbled.health is Health.DEGRADED
    assert Selector(Random(0)).choose(model(), [stumbled, fine], Asked()) is stumbled


def test_a_failure_at_work_is_forgiven_by_time_and_not_by_a_list_of_models():
    one = member("a")
    for _ in range(3):
        one.failed(10.0, at_work=True)
    assert one.health is Health.UNAVAILABLE
    one.answered_probe(11.0, forgiven_after_s=5.0)
    assert one.health is Health.UNAVAILABLE
    one.answered_probe(15.0, forgiven_after_s=5.0)
    assert one.health is Health.READY


def test_a_server_that_was_away_is_back_with_its_first_answer():
    one = member("a")
    for _ in range(3):
        one.failed(10.0, at_work=False)
    assert one.health is Health.UNAVAILABLE
    one.answered_probe(10.1, forgiven_after_s=5.0)
    assert one.health is Health.READY


def test_going_down_forgets_what_was_warm():
    one = member("a")
    one.warm.add("m")
    for _ in range(3):
        one.failed(0.0, at_work=False)
    assert not one.is_warm(model(warm_up="Hello"))


ASK = Prompt(model="m", messages=(Message("system", "You are terse."), Message("user", "Hi")))


def test_what_keeps_requests_together_is_told_and_is_of_one_tenant():
    prefix = model(affinity="prefix")
    in_session = replace(ASK, hints=Hints(session_id="7"))
    assert affinity_key(model(), in_session, "acme") != affinity_key(model(), in_session, "globex")
    assert affinity_key(model(), ASK, "acme") == ""
    assert (policy_of(model(), ASK), policy_of(model(), in_session)) == ("least_tokens", "session")
    assert (policy_of(prefix, ASK), policy_of(prefix, in_session)) == ("prefix", "session")
    assert policy_of(model(affinity="none", policy="weights"), in_session) == "weights"
    assert policy_of(model(backends=("a",)), in_session) == "only"


def test_prompts_that_begin_alike_have_the_same_key():
    prefix = model(affinity="prefix", affinity_prefix_bytes=16)
    other = replace(ASK, messages=(ASK.messages[0], Message("user", "Something else")))
    apart = replace(ASK, messages=(Message("system", "Be kind."), ASK.messages[1]))
    assert affinity_key(prefix, ASK, "acme") == affinity_key(prefix, other, "acme")
    assert affinity_key(prefix, ASK, "acme") != affinity_key(prefix, apart, "acme")
