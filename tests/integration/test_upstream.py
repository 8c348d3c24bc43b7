"""Running models when backends fail, stall or are slow: real HTTP backends, simulated servers."""

import asyncio
import random
import time
from collections import Counter

import grpc
import pytest
from support.polling import eventually
from support.upstream_rig import all_settled, model, route, upstream_rig

from agent360.client.errors import MeshError
from agent360.mesh.inference.failover.breaker import State
from agent360.mesh.inference.failover.settings import HedgeSettings, RetrySettings

OFTEN = RetrySettings(max_tries=5, backoff_s=0.01)
NO_BREAKER = {"breaker": {"enabled": False}}
FORMS = pytest.mark.parametrize("streamed", [True, False])


@FORMS
async def test_another_backend_answers_at_once_when_one_fails(streamed):
    async with upstream_rig({"bad": {"error_rate": 1.0}, "good": {}}) as rig:
        for n in range(10):
            text, ran = await rig.ask(
                f"Hi {n}", route(model("m", "bad", "good")), streamed=streamed
            )
            assert text.startswith("This is a simulated answer")
            assert (ran.backend, ran.rule) == ("good", "explicit")
        assert rig.requests("good") == 10
        assert 0 < rig.requests("bad") <= 5
        assert rig.breakers.of("bad").state is State.OPEN or rig.requests("bad") < 5


@FORMS
async def test_a_fallback_answers_and_is_named(streamed):
    async with upstream_rig({"bad": {"error_rate": 1.0}, "good": {}}) as rig:
        way = route(model("first", "bad"), model("second", "good"))
        _, ran = await rig.ask("Hi", way, streamed=streamed)
        assert (ran.model.name, ran.backend, ran.rule) == ("second", "good", "fallback:second")
        assert ran.tries == 2
        assert rig.count("inference_fallbacks_total", model="first", fallback="second") == 1
        assert rig.bills[0].spent[0].model.name == "second"


async def test_vectors_fall_back_too():
    async with upstream_rig({"bad": {"error_rate": 1.0}, "good": {}}) as rig:
        embed = {"upstream_model": "sim-embed", "capabilities": ["embeddings"]}
        way = route(model("first", "bad", **embed), model("second", "good", **embed))
        ran = await rig.embed("a text", way)
        assert (ran.rule, len(ran.vectors[0])) == ("fallback:second", 8)


@FORMS
async def test_a_failure_that_passes_is_retried_after_a_pause(streamed):
    async with upstream_rig({"only": {"error_first": 2}}, retry=OFTEN) as rig:
        text, ran = await rig.ask("Hi", route(model("m", "only")), streamed=streamed)
        assert text
        assert ran.tries == 3
        assert rig.count("inference_retries_total", model="m", reason="UPSTREAM_FAILED") == 2


@pytest.mark.parametrize("status", [400, 413, 422])
@FORMS
async def test_a_request_that_is_at_fault_is_not_repeated(streamed, status):
    async with upstream_rig({"one": {}, "two": {}}, retry=OFTEN) as rig:
        way = route(model("m", "one", "two"), model("other", "two"))
        with pytest.raises(MeshError) as caught:
            await rig.ask(f"[[sim:error={status}]]", way, streamed=streamed)
        assert (caught.value.code, caught.value.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "UPSTREAM_REFUSED",
        )
        assert rig.requests("one") + rig.requests("two") == 1


async def test_a_backend_with_a_wrong_key_sends_to_another_and_is_not_repeated():
    async with upstream_rig({"locked": {"api_key": "sk"}, "open": {}}, retry=OFTEN) as rig:
        _, ran = await rig.ask("Hi", route(model("m", "locked"), model("n", "open")))
        assert ran.backend == "open"
        with pytest.raises(MeshError) as caught:
            await rig.ask("Hi", route(model("m", "locked")))
        assert caught.value.reason == "UPSTREAM_UNAUTHENTICATED"
        assert rig.count(
            "inference_tries_total",
            model="m", backend="locked", outcome="UPSTREAM_UNAUTHENTICATED",
        ) == 2  # fmt: skip


@FORMS
async def test_retry_after_is_obeyed(streamed):
    settings = {"error_first": 1, "error_status": 429, "error_retry_after_s": 0.5}
    async with upstream_rig({"only": settings}, retry=OFTEN) as rig:
        began = time.monotonic()
        way = route(model("m", "only"))
        first = asyncio.create_task(rig.ask("Hi", way, streamed=streamed))
        await eventually(lambda: not rig.breakers.allows("only", "m"))
        others = [asyncio.create_task(rig.ask(f"Hi {n}", way)) for n in range(5)]
        while time.monotonic() - began < 0.45:
            assert rig.requests("only") == 1
            await asyncio.sleep(0.01)
        answers = await asyncio.gather(first, *others)
        assert all(text for text, _ in answers)
        assert answers[0][1].tries == 2


async def test_who_waits_for_a_turn_waits_for_the_end_of_a_rest_too():
    settings = {"error_first": 1, "error_status": 429, "error_retry_after_s": 0.4}
    one_at_a_time = {"concurrency": {"mode": "fixed", "maximum": 1}}
    async with upstream_rig(
        {"only": settings}, backends={"only": one_at_a_time}, retry=OFTEN
    ) as rig:
        way, began = route(model("m", "only")), time.monotonic()
        answers = await asyncio.gather(*(rig.ask(f"Hi {n}", way) for n in range(10)))
        assert len(answers) == 10
        assert time.monotonic() - began >= 0.4
        assert rig.requests("only") == 11


async def test_a_rest_that_is_too_long_is_told_and_a_fallback_need_not_wait():
    settings = {"error_rate": 1.0, "error_status": 429, "error_retry_after_s": 60}
    async with upstream_rig({"limited": settings, "free": {}}, retry=OFTEN) as rig:
        limited = model("m", "limited")
        for _ in range(3):
            _, ran = await rig.ask("Hi", route(limited, model("n", "free")))
            assert ran.rule == "fallback:n"
        with pytest.raises(MeshError) as caught:
            await rig.ask("Hi", route(limited))
        assert caught.value.reason == "BACKENDS_RESTING"
        assert 50 < caught.value.retry_after_s <= 60
        assert rig.requests("limited") == 1


async def test_no_pause_goes_beyond_the_deadline():
    settings = {"error_rate": 1.0, "error_status": 429, "error_retry_after_s": 2}
    async with upstream_rig({"only": settings}, retry=OFTEN) as rig:
        began = time.monotonic()
        with pytest.raises(MeshError) as caught:
            await rig.ask("Hi", route(model("m", "only")), deadline=began + 1.0)
        assert caught.value.reason == "UPSTREAM_RATE_LIMITED"
        assert time.monotonic() - began < 0.9


@FORMS
async def test_a_stalled_server_is_left_at_the_deadline_of_a_try(streamed):
    retry = (
        RetrySettings(first_token_timeout_s=0.2) if streamed else RetrySettings(try_timeout_s=0.2)
    )
    async with upstream_rig(
        {"stalls": {"stall_rate": 1.0, "stall_s": 30}, "good": {}}, retry=retry
    ) as rig:
        began = time.monotonic()
        way = route(model("m", "stalls"), model("n", "good"))
        text, ran = await rig.ask("Hi", way, streamed=streamed)
        assert text
        assert ran.backend == "good"
        assert 0.2 <= time.monotonic() - began < 1.0
        await eventually(lambda: rig.simulators["stalls"].load.running == 0)
        wasted, used = rig.bills[0].spent
        assert (wasted.wasted, used.wasted) == (True, False)
        assert rig.bills[0].tokens == used.usage.input_tokens + used.usage.output_tokens


async def test_a_model_that_thinks_is_not_silent_and_its_thoughts_are_paid_for():
    retry = RetrySettings(first_token_timeout_s=0.3)
    async with upstream_rig({"thinks": {}, "other": {}}, retry=retry) as rig:
        way = route(model("m", "thinks"), model("n", "other"))
        said = "[[sim:itl=0.05]] [[sim:think=12]] [[sim:no_usage]] [[sim:tokens=4]]"
        _, ran = await rig.ask(said, way)
        assert (ran.backend, ran.tries) == ("thinks", 1)
        (used,) = rig.bills[0].spent
        assert used.usage.estimated
        assert used.usage.output_tokens == 12 + 4


async def test_what_comes_whole_may_be_silent_for_longer_than_a_stream():
    retry = RetrySettings(first_token_timeout_s=0.1)
    async with upstream_rig(
        {"only": {}}, backends={"only": {"stall_timeout_s": 0.1}}, retry=retry
    ) as rig:
        text, ran = await rig.ask("[[sim:ttft=0.4]]", route(model("m", "only")), streamed=False)
        assert text
        assert ran.tries == 1


async def test_a_try_that_stalls_after_its_first_word_is_cut_and_not_repeated():
    retry = RetrySettings(first_token_timeout_s=5, try_timeout_s=0.3)
    async with upstream_rig({"one": {}, "two": {}}, retry=retry) as rig:
        with pytest.raises(MeshError) as caught:
            await rig.ask("[[sim:stall=30@5]]", route(model("m", "one", "two")))
        error = caught.value
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "STREAM_BROKEN")
        assert error.metadata["cause"] == "UPSTREAM_TIMEOUT"
        assert error.metadata["partial_text"] == "This is a simulated answer,"
        assert error.metadata["produced_tokens_estimate"] == "5"
        assert rig.requests("one") + rig.requests("two") == 1


async def test_one_request_that_is_failed_again_and_again_counts_once_against_a_backend():
    breaker = {"breaker": {"consecutive_failures": 3, "open_s": 30}}
    async with upstream_rig({"only": {}}, backends={"only": breaker}, retry=OFTEN) as rig:
        way = route(model("m", "only"))
        with pytest.raises(MeshError) as caught:
            await rig.ask("[[sim:error=500]]", way)
        assert int(caught.value.metadata["tries"]) > 3
        assert rig.breakers.of("only").state is State.CLOSED
        assert (await rig.ask("Hi", way))[0]
        for number in range(3):
            with pytest.raises(MeshError):
                await rig.ask(f"[[sim:error=500]] {number}", way)
        assert rig.breakers.of("only").state is State.OPEN


async def test_a_fallback_says_no_more_than_its_own_limits_allow():
    tight = model("n", "good", limits={"max_output_tokens": 5})
    async with upstream_rig({"bad": {"error_rate": 1.0}, "good": {}}) as rig:
        _, ran = await rig.ask("[[sim:tokens=50]]", route(model("m", "bad"), tight))
        assert ran.model.name == "n"
        assert (ran.usage.output_tokens, ran.ending.finish_reason) == (5, "length")


async def test_requests_of_one_tenant_that_break_a_backend_do_not_keep_another_from_it():
    breaker = {"breaker": {"consecutive_failures": 3, "open_s": 30}}
    async with upstream_rig({"only": {}}, backends={"only": breaker}) as rig:
        way = route(model("m", "only"))

        async def break_it(times: int) -> None:
            for number in range(times):
                with pytest.raises(MeshError):
                    await rig.ask(f"[[sim:error=500]] {number}", way, tenant="breaks")

        await break_it(3)
        assert rig.breakers.of("only").state is State.OPEN, "nobody else was known"
        text, _ = await rig.ask("hello", way, tenant="works")
        assert text
        assert rig.breakers.of("only").state is State.CLOSED
        await break_it(6)
        assert rig.breakers.of("only").state is State.CLOSED
        await rig.ask("hello again", way, tenant="works")


async def test_the_breaker_keeps_requests_away_and_lets_one_probe():
    breaker = {"breaker": {"consecutive_failures": 3, "open_s": 0.3}}
    async with upstream_rig(
        {"flaky": {"error_first": 3}, "good": {}},
        backends={"flaky": breaker},
        retry=RetrySettings(max_tries=1),
    ) as rig:
        way = route(model("m", "flaky"), model("n", "good"))
        for _ in range(10):
            await rig.ask("Hi", way)
        assert rig.requests("flaky") == 3
        assert rig.count("inference_breaker_state", backend="flaky") == State.OPEN.value
        await eventually(lambda: rig.breakers.of("flaky").state is State.HALF_OPEN)
        answers = await asyncio.gather(*(rig.ask("[[sim:ttft=0.1]]", way) for _ in range(5)))
        assert sorted(ran.backend for _, ran in answers) == ["flaky", *["good"] * 4]
        assert rig.count("inference_breaker_state", backend="flaky") == State.CLOSED.value
        assert (await rig.ask("Hi", way))[1].backend == "flaky"


async def test_who_has_no_other_backend_waits_for_the_probe_of_one_that_comes_back():
    breaker = {"breaker": {"consecutive_failures": 2, "open_s": 0.2}}
    async with upstream_rig(
        {"only": {"error_first": 2}}, backends={"only": breaker}, retry=RetrySettings(max_tries=1)
    ) as rig:
        way = route(model("m", "only"))
        for _ in range(2):
            with pytest.raises(MeshError, match="503"):
                await rig.ask("Hi", way)
        answers = await asyncio.gather(*(rig.ask(f"[[sim:ttft=0.2]] {n}", way) for n in range(9)))
        assert len(answers) == 9
        assert rig.count("inference_breaker_opened", backend="only") == 1


async def test_who_has_no_other_backend_is_told_when_to_come_back_if_it_stays_away():
    breaker = {"breaker": {"consecutive_failures": 2, "open_s": 30.0}}
    async with upstream_rig({"only": {"error_rate": 1.0}}, backends={"only": breaker}) as rig:
        way, began = route(model("m", "only")), time.monotonic()
        for _ in range(2):
            with pytest.raises(MeshError) as failed:
                await rig.ask("Hi", way)
            assert failed.value.reason == "UPSTREAM_FAILED"
        with pytest.raises(MeshError) as resting:
            await rig.ask("Hi", way)
        assert resting.value.reason == "BACKENDS_RESTING"
        assert "the last time with UPSTREAM_FAILED" in resting.value.message
        assert 25 < resting.value.retry_after_s <= 30
        assert time.monotonic() - began < 3.0
        # The first request tries three times, which is one failure to the breaker.
        assert rig.requests("only") == 4


@FORMS
async def test_the_retry_budget_bounds_the_tries_during_an_outage(streamed):
    retry = RetrySettings(max_tries=5, backoff_s=0.001, budget=0.1, budget_burst=10)
    async with upstream_rig(
        {"down": {"error_rate": 1.0}}, backends={"down": NO_BREAKER}, retry=retry
    ) as rig:
        way = route(model("m", "down"))
        outcomes = []
        for _ in range(10):
            outcomes += await all_settled(
                *(rig.ask("Hi", way, streamed=streamed) for _ in range(20))
            )
        assert {outcome.reason for outcome in outcomes} == {"UPSTREAM_FAILED"}
        assert 200 < rig.requests("down") <= 200 + 0.1 * 200 + 10
        assert rig.count("inference_retries_denied_total", model="m") > 0


HEDGE = HedgeSettings(enabled=True, quantile=0.9, min_delay_s=0.05, min_samples=20, budget=0.05)


@FORMS
async def test_a_hedge_cuts_a_slow_try_within_its_budget(streamed):
    slow = {"stall_rate": 0.06, "stall_s": 30.0, "seed": 3}
    async with upstream_rig({"one": slow, "two": {}}, hedge=HEDGE) as rig:
        way = route(model("m", "one", "two"))
        for n in range(60):
            await rig.ask(f"[[sim:stall=0]] {n}", way, streamed=streamed)
        longest, hedged = 0.0, 0
        for n in range(100):
            asked = time.monotonic()
            text, ran = await rig.ask(f"Hi {n}", way, streamed=streamed)
            assert text
            longest = max(longest, time.monotonic() - asked)
            hedged += ran.rule == "hedge"
        assert hedged >= 1
        assert longest < 5.0
        assert rig.requests("one") + rig.requests("two") <= 160 * 1.05
        assert rig.count("inference_hedges_total", model="m", outcome="won") == hedged
        await eventually(lambda: not rig.simulators["one"].load.running)
        wasted = [each for bill in rig.bills for each in bill.spent if each.wasted]
        assert len(wasted) >= hedged
        assert all(each.usage.estimated and each.usage.output_tokens == 0 for each in wasted)


async def test_hedges_beyond_the_budget_are_denied():
    hedge = HEDGE.model_copy(update={"quantile": 0.5, "budget": 0.02})
    async with upstream_rig({"one": {}, "two": {}}, hedge=hedge) as rig:
        way = route(model("m", "one", "two"))
        for n in range(20):
            await rig.ask(f"Hi {n}", way)
        await asyncio.gather(*(rig.ask(f"[[sim:ttft=0.2]] {n}", way) for n in range(80)))
        assert rig.requests("one") + rig.requests("two") <= 100 * 1.02
        assert rig.count("inference_hedges_total", model="m", outcome="denied") >= 70


async def test_cancelling_ends_both_tries_of_a_race():
    hedge = HEDGE.model_copy(update={"budget": 1.0})
    async with upstream_rig({"one": {}, "two": {}}, hedge=hedge) as rig:
        way = route(model("m", "one", "two"))
        for n in range(25):
            await rig.ask(f"Hi {n}", way)
        loads = [rig.simulators[name].load for name in ("one", "two")]
        task = asyncio.create_task(rig.ask("[[sim:stall=60]]", way))
        await eventually(lambda: all(load.running == 1 for load in loads))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: all(load.running == 0 for load in loads))


async def test_vectors_are_hedged_too():
    hedge = HEDGE.model_copy(update={"budget": 1.0})
    embed = {"upstream_model": "sim-embed", "capabilities": ["embeddings"]}
    async with upstream_rig({"one": {}, "two": {}}, hedge=hedge) as rig:
        way = route(model("e", "one", "two", **embed))
        for n in range(25):
            await rig.embed(f"text {n}", way)
        before = rig.requests("one") + rig.requests("two")
        ran = await rig.embed("[[sim:stall=0.5]] text", way)
        assert len(ran.vectors) == 1
        assert rig.requests("one") + rig.requests("two") == before + 2
        assert sorted(each.wasted for each in rig.bills[-1].spent) == [False, True]


async def test_after_a_storm_of_failures_and_leaving_callers_nothing_is_left_behind():
    stormy = {
        "error_rate": 0.2, "stall_rate": 0.1, "stall_s": 60, "break_rate": 0.1,
        "first_token_s": 0.005, "inter_token_s": 0.0005,
    }  # fmt: skip
    retry = RetrySettings(first_token_timeout_s=0.3, try_timeout_s=1.0, backoff_s=0.01)
    hedge = HedgeSettings(enabled=True, min_delay_s=0.02, budget=0.5)
    breaker = {"breaker": {"consecutive_failures": 3, "open_s": 0.05, "max_open_s": 0.1}}
    before = asyncio.all_tasks()
    async with upstream_rig(
        {"one": {**stormy, "seed": 1}, "two": {**stormy, "seed": 2}},
        backends={"one": breaker, "two": breaker},
        retry=retry,
        hedge=hedge,
    ) as rig:
        way = route(model("m", "one", "two"), model("n", "two", "one"))
        chance = random.Random(5)

        async def caller(number: int) -> str:
            patience_s = chance.choice([0.01, 0.05, 0.2, 5.0])
            try:
                async with asyncio.timeout(patience_s):
                    await rig.ask(f"Hi {number}", way, streamed=number % 3 > 0)
            except MeshError as error:
                return error.reason
            except TimeoutError:
                return "LEFT"
            return "OK"

        ends = Counter()
        for n in range(8):
            ends += Counter(await asyncio.gather(*(caller(50 * n + k) for k in range(50))))
        assert ends["OK"] > 50
        assert ends["LEFT"] > 50
        loads = [simulator.load for simulator in rig.simulators.values()]
        await eventually(lambda: all(load.running == 0 for load in loads))
        assert [member.running for member in rig.members] == [0, 0]
        assert [member.outstanding_tokens for member in rig.members] == [0, 0]
        # A probe that was never ended would keep its backend away for ever.
        await eventually(lambda: all(rig.breakers.allows(name, "m") for name in ("one", "two")))
    assert not [task for task in asyncio.all_tasks() - before if "_attempt" in repr(task)]
