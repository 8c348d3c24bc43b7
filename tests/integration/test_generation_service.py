"""The generation service: a real HTTP backend, limits and a cache in memory."""

import asyncio
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field, replace

import grpc
import pytest
import structlog
from prometheus_client import CollectorRegistry
from support.inference_ports import Ledger, MemoryAnswers, TokenBudget
from support.polling import eventually

from agent360.client.errors import MeshError, RateLimitedError
from agent360.mesh.inference.answers import Source
from agent360.mesh.inference.backends.openai import OpenAIBackend
from agent360.mesh.inference.caching.settings import CoalescingSettings
from agent360.mesh.inference.catalogue import Catalogue
from agent360.mesh.inference.conversation import (
    CacheControl,
    EmbeddingInputs,
    Message,
    Prompt,
    Sampling,
)
from agent360.mesh.inference.counting.counter import TokenCounter
from agent360.mesh.inference.counting.tokenizers import Tokenizers
from agent360.mesh.inference.embedding import EmbeddingService
from agent360.mesh.inference.failover.breaker import Breakers
from agent360.mesh.inference.failover.settings import RetrySettings
from agent360.mesh.inference.failover.tally import Tally
from agent360.mesh.inference.fleet import Fleet
from agent360.mesh.inference.members import Health, Member
from agent360.mesh.inference.queueing import Queues, Statistics
from agent360.mesh.inference.routing import Router
from agent360.mesh.inference.selection import Selector
from agent360.mesh.inference.service import GenerationService
from agent360.mesh.inference.settings import BackendSettings, InferenceSettings, ModelSettings
from agent360.mesh.inference.upstream import Upstream
from agent360.mesh.runtime.call import Call, Principal
from agent360.mesh.simulator import Simulator, SimulatorSettings

SMALL = ModelSettings(
    name="small",
    backends=("sim",),
    upstream_model="sim-small",
    task_classes=("simple",),
    input_usd_per_million=1.0,
    output_usd_per_million=2.0,
)
EMBEDDER = ModelSettings(
    name="embedder", backends=("sim",), upstream_model="sim-embed", capabilities=("embeddings",)
)


@dataclass
class Rig:
    """A service and everything around it, to be looked at."""

    simulator: Simulator
    service: GenerationService
    embedding: EmbeddingService
    fleet: Fleet
    cache: MemoryAnswers = field(default_factory=MemoryAnswers)
    budget: TokenBudget = field(default_factory=TokenBudget)
    ledger: Ledger = field(default_factory=Ledger)

    async def ask(self, content: str, tenant: str = "acme", **more):
        return await self.service.generate(call(tenant), prompt(content, **more))

    async def hear(self, content: str, tenant: str = "acme", **more):
        pieces = []
        async with self.service.board(call(tenant), prompt(content, **more), streamed=True) as ride:
            while await ride.more():
                pieces.append(ride.take().content)
            return pieces, await ride.answered()

    @property
    def upstream_calls(self) -> int:
        return self.simulator.load.by_path["/v1/chat/completions"]


def call(tenant: str = "acme") -> Call:
    return Call("/x/Generate", Principal("t", frozenset({"*"})), tenant, math.inf)


def prompt(content: str, **more) -> Prompt:
    return Prompt(**{"model": "small", "messages": (Message("user", content),), **more})


@pytest.fixture
async def rig():
    settings = SimulatorSettings(port=0, first_token_s=0.03, inter_token_s=0.0)
    async with Simulator(settings) as simulator:
        configured = InferenceSettings(
            backends=(BackendSettings(name="sim", url=simulator.url),),
            models=(SMALL, EMBEDDER),
            max_answer_bytes=20_000,
        )
        catalogue = Catalogue(configured.models)
        backend = OpenAIBackend(configured.backends[0], max_answer_bytes=20_000)
        fleet = Fleet(
            [Member(backend, probed=True)],
            catalogue,
            structlog.get_logger(),
            discover=False,
            probe_interval_s=60,
        )
        await fleet.start()
        ports = (MemoryAnswers(), TokenBudget(), Ledger())
        counter = TokenCounter(Tokenizers(structlog.get_logger()), fleet.known_members)
        breakers = Breakers()
        upstream = Upstream(
            Queues(fleet, Selector(random.Random(0)).choose, {}, Statistics()),
            Tally(CollectorRegistry(), breakers),
            breakers,
            RetrySettings(max_tries=1),
        )
        router = Router(catalogue, configured.auto, 500)
        made = Rig(
            simulator,
            GenerationService(configured, router, upstream, counter, *ports),
            EmbeddingService(configured, router, upstream, counter, *ports),
            fleet,
            *ports,
        )
        yield made
        await made.service.close()
        await made.embedding.close()
        await fleet.close()
        assert not made.budget.open, "every reservation is settled"


async def test_an_answer_tells_where_it_came_from_and_what_it_cost(rig):
    answered = await rig.ask("Name three rivers")
    usage = answered.answer.usage
    assert answered.source is Source.MODEL
    assert (answered.answer.model, answered.answer.backend) == ("small", "sim")
    assert answered.route.rule == "explicit"
    assert answered.cost_usd == pytest.approx((usage.input_tokens + 2 * usage.output_tokens) / 1e6)
    assert 0.03 <= answered.timing.first_token_s <= answered.timing.total_s
    assert rig.ledger.usages == [("acme", "small", usage, answered.cost_usd)]
    await eventually(lambda: not rig.budget.open)
    assert rig.budget.used_tokens["acme"] == usage.input_tokens + usage.output_tokens


async def test_a_repeated_request_is_answered_from_the_cache_whole_or_streamed(rig):
    first = await rig.ask("Name three rivers")
    again = await rig.ask("Name three rivers")
    pieces, streamed = await rig.hear("Name three rivers")
    assert [again.source, streamed.source] == [Source.CACHE, Source.CACHE]
    assert again.answer == streamed.answer == first.answer
    assert "".join(pieces) == first.answer.content
    assert again.cost_usd == 0
    assert again.timing.first_token_s is None
    assert rig.upstream_calls == 1


async def test_tenants_do_not_share_answers(rig):
    await rig.ask("Name three rivers")
    other = await rig.ask("Name three rivers", tenant="globex")
    assert other.source is Source.MODEL
    assert rig.upstream_calls == 2


async def test_cache_control_is_obeyed(rig):
    await rig.ask("a", cache=CacheControl(no_store=True))
    assert not rig.cache.entries
    await rig.ask("a", cache=CacheControl(ttl_s=7.5))
    await rig.ask("b", cache=CacheControl(ttl_s=1e9))
    assert sorted(rig.cache.ttls.values()) == [7.5, 86_400.0]
    fresh = await rig.ask("a", cache=CacheControl(no_cache=True))
    assert fresh.source is Source.MODEL


async def test_identical_requests_in_flight_share_one_call(rig):
    answers = await asyncio.gather(*(rig.ask("[[sim:ttft=0.1]] plan") for _ in range(20)))
    sources = [answered.source for answered in answers]
    assert rig.upstream_calls == 1
    assert sources.count(Source.MODEL) == 1
    assert sources.count(Source.COALESCED) == 19
    assert len({answered.answer for answered in answers}) == 1
    assert sum(answered.cost_usd for answered in answers) == answers[0].cost_usd
    assert len(rig.ledger.usages) == 1


async def test_a_streaming_follower_that_joins_late_hears_everything(rig):
    asked = "[[sim:itl=0.01]][[sim:tokens=30]] plan"
    first = asyncio.create_task(rig.hear(asked))
    await eventually(lambda: rig.simulator.load.running == 1)
    await asyncio.sleep(0.1)
    (pieces, leader), (late_pieces, late), whole = await asyncio.gather(
        first, rig.hear(asked), rig.ask(asked)
    )
    assert len(pieces) > 10
    assert "".join(late_pieces) == "".join(pieces) == leader.answer.content
    assert [late.source, whole.source] == [Source.COALESCED, Source.COALESCED]
    assert rig.upstream_calls == 1


async def test_who_forbids_the_cache_gets_a_call_of_their_own(rig):
    fresh = CacheControl(no_cache=True)
    await asyncio.gather(*(rig.ask("sample", cache=fresh) for _ in range(3)))
    assert rig.upstream_calls == 3


async def test_followers_survive_the_leaders_cancellation(rig):
    leader = asyncio.create_task(rig.ask("[[sim:ttft=0.2]] plan"))
    await eventually(lambda: rig.simulator.load.running == 1)
    follower = asyncio.create_task(rig.ask("[[sim:ttft=0.2]] plan"))
    await asyncio.sleep(0)
    leader.cancel()
    assert (await follower).source is Source.COALESCED
    assert rig.upstream_calls == 1
    assert rig.simulator.load.cancelled == 0


async def test_the_model_is_stopped_when_nobody_waits_any_more(rig):
    callers = [asyncio.create_task(rig.hear("[[sim:itl=0.02]][[sim:tokens=500]]")) for _ in "ab"]
    await eventually(lambda: rig.simulator.load.running == 1)
    await asyncio.sleep(0.2)
    for caller in callers:
        caller.cancel()
    await eventually(lambda: rig.simulator.load.cancelled == 1)
    await eventually(lambda: not rig.budget.open)
    (usage,) = (usage for _, _, usage, _ in rig.ledger.usages)
    assert usage.estimated
    assert 0 < rig.budget.used_tokens["acme"] == usage.input_tokens + usage.output_tokens < 200
    assert [reason for _, _, reason in rig.ledger.failures] == ["CANCELLED", "CANCELLED"]
    assert not rig.cache.entries


async def test_a_break_in_the_middle_is_told_within_100_ms_with_what_was_produced(rig):
    heard, last = [], 0.0

    async def listen() -> None:
        nonlocal last
        async with rig.service.board(call(), prompt("[[sim:break=10]]"), streamed=True) as ride:
            while await ride.more():
                heard.append(ride.take().content)
                last = time.monotonic()

    with pytest.raises(MeshError) as caught:
        await listen()
    assert time.monotonic() - last < 0.1
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "STREAM_BROKEN")
    assert "".join(heard) == "This is a simulated answer, made without a model, about"
    assert error.metadata["cause"] == "UPSTREAM_BROKE"
    assert error.metadata["partial_text"] == "".join(heard)
    assert error.metadata["produced_bytes"] == str(len("".join(heard)))
    assert int(error.metadata["produced_tokens_estimate"]) > 0
    assert not rig.cache.entries
    await eventually(lambda: not rig.budget.open)
    assert rig.budget.used_tokens["acme"] > 0


async def test_a_failure_is_neither_kept_nor_charged_and_the_next_try_succeeds(rig):
    with pytest.raises(MeshError, match="503"):
        await rig.ask("[[sim:error=503]]")
    await eventually(lambda: not rig.budget.open)
    assert rig.budget.used_tokens["acme"] == 0
    assert rig.ledger.failures == [("acme", "small", "UPSTREAM_FAILED")]
    assert rig.fleet.health(SMALL) is Health.DEGRADED
    await rig.ask("fine")
    assert rig.fleet.health(SMALL) is Health.READY


async def test_limits_of_requests_and_tokens_deny_with_a_time_to_come_back(rig):
    rig.budget.tokens = 100
    with pytest.raises(RateLimitedError) as caught:
        await rig.ask("Hi", sampling=Sampling(max_tokens=200))
    assert caught.value.retry_after_s == 1.5
    assert caught.value.quotas
    await rig.ask("Hi", sampling=Sampling(max_tokens=20))
    rig.budget.requests = 2
    with pytest.raises(RateLimitedError, match="requests"):
        await rig.ask("Hi", sampling=Sampling(max_tokens=20))
    assert rig.upstream_calls == 1


async def test_one_users_limit_does_not_deny_another_who_joined(rig):
    rig.budget.user_tokens["poor"] = 1
    poor = rig.ask("same", user="poor")
    rich = rig.ask("same", user="rich")
    denied, answered = await asyncio.gather(poor, rich, return_exceptions=True)
    assert isinstance(denied, RateLimitedError)
    assert answered.source is Source.MODEL


@pytest.mark.parametrize("billing", ["leader", "each", "split"])
async def test_callers_who_come_and_go_leave_nothing_open_and_one_true_record_each(rig, billing):
    rig.service._settings = rig.service._settings.model_copy(
        update={"coalescing": CoalescingSettings(billing=billing)}
    )
    chance = random.Random(7)

    async def come_and_go(n: int) -> None:
        text = f"[[sim:ttft=0.03]][[sim:itl=0.003]][[sim:tokens=20]] plan {n % 5}"
        if n % 20 == 0:
            text += " [[sim:break=4]]"
        work = (rig.ask, rig.hear)[n % 2](text, cache=CacheControl(no_store=n % 7 != 0))
        task = asyncio.create_task(work)
        await asyncio.sleep(chance.random() * 0.15)
        if chance.random() < 0.5:
            task.cancel()
        await asyncio.wait((task,))

    for _ in range(3):
        await asyncio.gather(*(come_and_go(n) for n in range(100)))
    await eventually(lambda: not rig.budget.open)
    await eventually(lambda: len(rig.ledger.records) == 300)
    charged = sum(record.charged_tokens for record in rig.ledger.records)
    assert charged == rig.budget.used_tokens["acme"] > 0
    sources = Counter(record.source for record in rig.ledger.records)
    assert min(sources[None], sources[Source.COALESCED], sources[Source.MODEL]) > 0
    if billing == "leader":
        assert charged == sum(u.input_tokens + u.output_tokens for _, _, u, _ in rig.ledger.usages)


async def test_an_answer_without_usage_is_metered_by_an_estimate(rig):
    answered = await rig.ask("Hi [[sim:no_usage]]")
    assert answered.answer.usage.estimated
    assert answered.answer.usage.output_tokens > 0


async def test_an_endless_answer_is_cut_off(rig):
    with pytest.raises(MeshError) as caught:
        await rig.ask("[[sim:tokens=90000]]")
    assert caught.value.reason in ("ANSWER_TOO_LONG", "UPSTREAM_MALFORMED")
    with pytest.raises(MeshError) as caught:
        await rig.hear("[[sim:tokens=90000]]")
    assert caught.value.reason == "ANSWER_TOO_LONG"
    await eventually(lambda: rig.simulator.load.running == 0)


async def test_the_models_own_bound_holds_where_a_request_has_none(rig):
    bounded = Catalogue([replace_model(SMALL, max_tokens=4)])
    rig.service._router = Router(bounded, InferenceSettings().auto, 500)
    assert (await rig.ask("Hi")).answer.usage.output_tokens == 4
    own = await rig.ask("Hi", sampling=Sampling(max_tokens=6))
    assert own.answer.usage.output_tokens == 6


async def test_closing_ends_what_is_in_flight(rig):
    waiting = asyncio.create_task(rig.ask("[[sim:stall=60]]"))
    await eventually(lambda: rig.simulator.load.running == 1)
    await rig.service.close()
    with pytest.raises(MeshError, match="stopping"):
        await waiting
    await eventually(lambda: rig.simulator.load.running == 0)


async def test_vectors_are_limited_kept_and_metered(rig):
    request = EmbeddingInputs("embedder", ("one text", "another"), dimensions=8)
    first = await rig.embedding.embed(call(), request)
    await eventually(lambda: rig.cache.entries)
    again = await rig.embedding.embed(call(), request)
    assert [first.source, again.source] == [Source.MODEL, Source.CACHE]
    assert list(again.found.vectors) == list(first.found.vectors)
    assert rig.budget.used_requests["acme"] == 2
    await eventually(lambda: not rig.budget.open)
    assert rig.budget.used_tokens["acme"] == first.found.usage.input_tokens == 3
    with pytest.raises(MeshError) as caught:
        await rig.embedding.embed(call(), replace(request, model="small"))
    assert caught.value.reason == "MODEL_LACKS_CAPABILITY"


def replace_model(model: ModelSettings, **changes) -> ModelSettings:
    return model.model_copy(update=changes)
