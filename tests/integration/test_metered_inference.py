"""Limits, budgets, slots and usage records with the real ratelimit and metrics services."""

import asyncio
import contextlib
import uuid

import pytest
from support.inference_mesh import MODELS, InferenceMesh, inference_mesh
from support.polling import eventually, eventually_async

from agent360.client import (
    AnswerSource,
    GenerateRequest,
    MeshError,
    RateLimitedError,
    UnavailableError,
)
from agent360.mesh.inference.conversation import Message, Prompt
from agent360.mesh.inference.tokens import estimate_prompt
from agent360.metrics.v1 import metrics_pb2

SLIDING = """
[[limits]]
id = "{id}"
name = "inference.{what}"
algorithm = "sliding_window"
amount = {amount}
period = "1m"
"""
TOKENS = SLIDING.format(id="tokens", what="tokens", amount=1_000)
MANY_TOKENS = SLIDING.format(id="tokens", what="tokens", amount=100_000)
REQUESTS = SLIDING.format(id="requests", what="requests", amount=20)
BUDGET = SLIDING.format(id="budget", what="cost", amount=1_000)
SLOTS = """
[[limits]]
id = "slots"
name = "inference.concurrent"
algorithm = "concurrency"
amount = 2
"""
WORDS = "plan a journey along three rivers and describe every station of it"


async def ask(rig: InferenceMesh, text: str, **more):
    tenant = more.pop("tenant", "acme")
    return await rig.mesh.inference.generate(
        GenerateRequest(text, model="small", **more), tenant=tenant
    )


def spent(answer) -> int:
    return answer.usage.input_tokens + answer.usage.output_tokens


async def settled(rig: InferenceMesh, limit_id: str, amount: int) -> None:
    async def reached() -> bool:
        return await rig.used(limit_id) == amount

    await eventually_async(reached)


# ---------------------------------------------------------------- tokens


async def test_100_concurrent_requests_never_use_more_than_the_tokens_of_a_minute(tmp_path):
    async with inference_mesh(tmp_path, limits=TOKENS) as rig:
        most, done = 0, asyncio.Event()

        async def watch() -> None:
            nonlocal most
            while not done.is_set():
                most = max(most, await rig.used("tokens"))

        async def one(n: int) -> int:
            text = f"{WORDS} {n} [[sim:tokens=78]]"
            return spent(await ask(rig, text, max_tokens=78, no_cache=True))

        watching = asyncio.create_task(watch())
        results = await asyncio.gather(*(one(n) for n in range(100)), return_exceptions=True)
        used = [each for each in results if isinstance(each, int)]
        denied = [each for each in results if isinstance(each, RateLimitedError)]
        assert len(used) + len(denied) == 100
        assert all(90 <= each <= 110 for each in used)
        assert all(each.retry_after_s is not None for each in denied)
        # What was set aside and not used admits more, one at a time.
        for n in range(100, 110):
            try:
                used.append(await one(n))
            except RateLimitedError:
                break
        done.set()
        await watching
        await settled(rig, "tokens", sum(used))
        assert 850 < sum(used) <= 1_000
        assert most <= 1_000


async def test_what_was_used_is_settled_once_whether_it_succeeds_fails_or_is_retried(tmp_path):
    async with inference_mesh(tmp_path, limits=MANY_TOKENS) as rig:
        first = await ask(rig, "Name three rivers")
        await settled(rig, "tokens", spent(first))
        with pytest.raises(MeshError):
            await ask(rig, "[[sim:error=400]] Name three rivers")
        await settled(rig, "tokens", spent(first))
        cached = await ask(rig, "Name three rivers")
        assert cached.source is AnswerSource.CACHE
        await settled(rig, "tokens", spent(first))
    async with inference_mesh(
        tmp_path, limits=MANY_TOKENS, simulator={"error_rate": 0.3, "seed": 5}
    ) as rig:
        answers = []
        for n in range(10):
            with contextlib.suppress(UnavailableError):
                answers.append(await ask(rig, f"Name {n} rivers"))
        assert rig.upstream_calls > len(answers), "some were tried more than once"
        await settled(rig, "tokens", sum(map(spent, answers)))


async def test_a_cancelled_stream_is_settled_with_what_was_produced(tmp_path):
    async with inference_mesh(tmp_path, limits=MANY_TOKENS) as rig:
        said = "[[sim:itl=0.03]][[sim:tokens=2000]] go on"
        request = GenerateRequest(said, model="small", max_tokens=2_000)
        produced = 0
        async for delta in rig.mesh.inference.stream(request):
            assert await rig.used("tokens") >= 2_000, "all of it is set aside"
            # A word of the simulator is a token.
            produced += len(delta.text.split())
            if produced >= 50:
                break
        await eventually(lambda: rig.simulator.load.cancelled == 1)

        async def given_back() -> bool:
            return 0 < await rig.used("tokens") < 500

        await eventually_async(given_back)
        asked = estimate_prompt(Prompt(model="small", messages=(Message("user", said),)))
        assert await rig.used("tokens") - asked == pytest.approx(produced, rel=0.1)


async def test_an_answer_without_a_bound_gets_one_where_limits_are_to_hold_exactly(tmp_path):
    bound = {"bound_answers": True, "expected_output_tokens": 40}
    async with inference_mesh(tmp_path, limits=TOKENS, replicas=({"limits": bound},)) as rig:
        answer = await ask(rig, "[[sim:tokens=400]] go on")
        assert answer.usage.output_tokens == 40


# ---------------------------------------------------------------- requests


async def test_requests_are_limited_without_asking_for_each(tmp_path):
    async with inference_mesh(tmp_path, limits=REQUESTS) as rig:
        results = await asyncio.gather(
            *(ask(rig, f"Name {n} rivers") for n in range(60)), return_exceptions=True
        )
        denied = [each for each in results if isinstance(each, RateLimitedError)]
        assert 40 <= len(denied) < 60
        assert rig.upstream_calls == 60 - len(denied)
        other = await ask(rig, "Name three rivers", tenant="globex")
        assert other.text


async def test_answers_from_the_cache_are_counted_by_limits_of_requests(tmp_path):
    async with inference_mesh(tmp_path, limits=REQUESTS) as rig:
        answers, denied = 0, 0
        for _ in range(40):
            try:
                await ask(rig, "Name three rivers")
                answers += 1
            except RateLimitedError as error:
                assert error.retry_after_s is not None  # noqa: PT017 - of each that is denied
                denied += 1
            await asyncio.sleep(0.01)
        assert (answers <= 20, denied >= 20) == (True, True)
        assert rig.upstream_calls == 1


# ---------------------------------------------------------------- money


async def test_a_budget_is_reserved_at_its_most_and_settled_with_the_cost(tmp_path):
    async with inference_mesh(tmp_path, limits=BUDGET) as rig:
        answer = await ask(rig, "Name three rivers", max_tokens=100)
        cost = answer.usage.cost_usd
        assert cost == pytest.approx(
            (answer.usage.input_tokens + 2 * answer.usage.output_tokens) / 1e6
        )
        await settled(rig, "budget", round(cost * 1e6))
        with pytest.raises(RateLimitedError, match=r"cost \(up to \$0.00"):
            await ask(rig, "Name four rivers", max_tokens=600)
        await settled(rig, "budget", round(cost * 1e6))


async def test_where_the_budget_denies_no_tokens_stay_set_aside(tmp_path):
    async with inference_mesh(tmp_path, limits=BUDGET + MANY_TOKENS) as rig:
        with pytest.raises(RateLimitedError):
            await ask(rig, "Name four rivers", max_tokens=600)
        await settled(rig, "tokens", 0)
        assert rig.upstream_calls == 0


@pytest.mark.parametrize(("billing", "times"), [("leader", 1), ("each", 10), ("split", 1)])
async def test_coalesced_answers_are_charged_as_the_settings_say(tmp_path, billing, times):
    async with inference_mesh(
        tmp_path, limits=MANY_TOKENS + BUDGET.replace("1000", "1000000"),
        coalescing={"billing": billing},
    ) as rig:  # fmt: skip
        text = "[[sim:ttft=0.3]] plan"
        answers = await asyncio.gather(*(ask(rig, text, max_tokens=100) for _ in range(10)))
        assert rig.upstream_calls == 1
        tokens = spent(answers[0])
        alone = (answers[0].usage.input_tokens + 2 * answers[0].usage.output_tokens) / 1e6
        await settled(rig, "tokens", times * tokens)
        assert sum(each.usage.cost_usd for each in answers) == pytest.approx(times * alone)
        if billing == "split":
            assert all(each.usage.cost_usd == pytest.approx(alone / 10) for each in answers)


async def test_who_joins_and_must_pay_is_denied_alone(tmp_path):
    limits = SLIDING.format(id="tokens", what="tokens", amount=450)
    async with inference_mesh(tmp_path, limits=limits, coalescing={"billing": "each"}) as rig:
        text = "[[sim:ttft=0.3]] plan"
        results = await asyncio.gather(
            *(ask(rig, text, max_tokens=100) for _ in range(10)), return_exceptions=True
        )
        answered = [each for each in results if not isinstance(each, Exception)]
        assert 1 < len(answered) < 10
        assert all(isinstance(each, RateLimitedError) for each in results if each not in answered)
        await settled(rig, "tokens", len(answered) * spent(answered[0]))


# ---------------------------------------------------------------- slots


async def test_slots_bound_what_runs_and_come_back_however_it_ends(tmp_path):
    models = [{**MODELS[0], "concurrency_slots": True}]
    async with inference_mesh(tmp_path, limits=SLOTS, models=models) as rig:
        running = [asyncio.create_task(ask(rig, f"[[sim:ttft=20]] {n}")) for n in range(2)]
        await eventually(lambda: rig.simulator.load.running == 2)
        with pytest.raises(RateLimitedError, match="requests at a time"):
            await ask(rig, "Name three rivers")
        for task in running:
            task.cancel()
        await settled(rig, "slots", 0)
        answers = await asyncio.gather(ask(rig, "one"), ask(rig, "two"))
        assert all(each.text for each in answers)
        await settled(rig, "slots", 0)
        with pytest.raises(MeshError):
            await ask(rig, "[[sim:error=400]]")
        await settled(rig, "slots", 0)


async def test_a_service_that_stops_gives_back_its_slots_first(tmp_path):
    models = [{**MODELS[0], "concurrency_slots": True}]
    many = SLOTS.replace("amount = 2", "amount = 50")
    async with inference_mesh(tmp_path, limits=many, models=models, grace_s=0.1) as rig:
        running = [asyncio.create_task(ask(rig, f"[[sim:ttft=20]] {n}")) for n in range(40)]
        await eventually(lambda: rig.simulator.load.running == 40)
        assert await rig.used("slots") == 40
        await rig.servers[0].stop()
        assert await rig.used("slots") == 0
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def test_a_slot_is_kept_for_as_long_as_the_model_runs(tmp_path):
    models = [{**MODELS[0], "concurrency_slots": True}]
    own = {"models": models, "limits": {"slot_ttl_s": 1.5}}
    async with inference_mesh(tmp_path, limits=SLOTS, replicas=(own,)) as rig:
        running = asyncio.create_task(ask(rig, "[[sim:ttft=4]] plan"))
        await eventually(lambda: rig.simulator.load.running == 1)
        for _ in range(30):
            assert await rig.used("slots") == 1
            await asyncio.sleep(0.1)
        await running
        await settled(rig, "slots", 0)


# ---------------------------------------------------------------- records


async def test_every_request_leaves_one_usage_record_in_the_audit_log(tmp_path):
    async with inference_mesh(tmp_path, usage={"records": "audit"}, limits=REQUESTS) as rig:
        answer = await ask(rig, "Name three rivers", user="ana")
        await ask(rig, "Name three rivers", user="ana")
        with pytest.raises(MeshError):
            await ask(rig, "[[sim:error=400]]")
        await rig.mesh.inference.embed(["a text"], model="embedder")

        async def events():
            return [event async for event in rig.mesh.audit.list_events()]

        async def recorded() -> bool:
            return len(await events()) == 4

        await eventually_async(recorded)
        found = {}
        for event in await events():
            uuid.UUID(event.event_id)
            facts = dict(event.attributes)
            key = event.action, facts.get("source"), facts.get("reason")
            found[key] = event.actor, facts
        actor, facts = found["inference.generate", "model", None]
        assert actor == "ana"
        assert int(facts["charged_tokens"]) == spent(answer)
        assert float(facts["charged_usd"]) == pytest.approx(answer.usage.cost_usd)
        assert (facts["backend"], facts["rule"]) == ("default", "explicit")
        _, facts = found["inference.generate", "cache", None]
        assert facts["charged_tokens"] == "0"
        assert any(action == "inference.generate" and reason for action, _, reason in found)
        assert ("inference.embed", "model", None) in found


async def test_the_record_of_a_cancelled_stream_says_what_was_charged(tmp_path):
    async with inference_mesh(tmp_path, usage={"records": "audit"}, limits=MANY_TOKENS) as rig:
        request = GenerateRequest("[[sim:itl=0.01]][[sim:tokens=2000]] go on", model="small")
        async for _ in rig.mesh.inference.stream(request):
            break
        found = []

        async def recorded() -> bool:
            found[:] = [event async for event in rig.mesh.audit.list_events()]
            return bool(found)

        await eventually_async(recorded)
        (event,) = found
        assert event.attributes["reason"] == "CANCELLED"
        charged = int(event.attributes["charged_tokens"])
        assert charged > 0
        await settled(rig, "tokens", charged)


async def test_usage_is_added_up_by_tenant_and_model_in_the_metrics_service(tmp_path):
    async with inference_mesh(tmp_path) as rig:
        answers = [await ask(rig, text) for text in ("one", "two", "one")]
        await ask(rig, "one", tenant="globex")
        await rig.inside().metrics.flush()

        async def total(name: str, tenant: str = "acme") -> float:
            request = metrics_pb2.QueryRequest(name=name, aggregation=metrics_pb2.AGGREGATION_SUM)
            groups = [g async for g in rig.mesh.metrics.query(request, tenant=tenant)]
            return sum(point.value for group in groups for point in group.points)

        assert await total("inference_usage_requests_total") == 3
        assert await total("inference_usage_requests_total", "globex") == 1
        assert await total("inference_usage_tokens_total") == sum(map(spent, answers[:2]))
        cost = sum(each.usage.cost_usd for each in answers)
        assert await total("inference_usage_usd_total") == pytest.approx(cost)
        assert await total("inference_cost_usd_total") == pytest.approx(cost)


async def test_no_request_waits_for_its_usage_record(tmp_path):
    async with inference_mesh(tmp_path, replicas=({"usage": {"records": "audit"}},)) as rig:
        audit = rig.inside().audit
        audit._notes.update(asyncio.create_task(asyncio.sleep(60)) for _ in range(1_000))
        try:
            assert (await ask(rig, "Name three rivers")).text
            assert audit.lost == 1
        finally:
            for task in list(audit._notes):
                task.cancel()
