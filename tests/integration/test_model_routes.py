"""Choosing models and backends over gRPC: real servers, several simulators behind them."""

import asyncio
from collections import Counter, defaultdict
from contextlib import AsyncExitStack

import pytest
from support.polling import eventually, eventually_async
from support.servers import connected

from agent360.client import GenerateRequest, MeshError, Tool
from agent360.mesh.simulator import Simulator, SimulatorSettings

ALONE = {
    "cache": {"enabled": False},
    "limits": {"enabled": False},
    "coalescing": {"enabled": False},
}
TOOLS = [Tool("look", parameters={"type": "object"})]


@pytest.fixture
async def simulators():
    async with AsyncExitStack() as stack:
        settings = SimulatorSettings(port=0, first_token_s=0.01, inter_token_s=0.0)
        yield [await stack.enter_async_context(Simulator(settings)) for _ in range(3)]


def backends(simulators: list[Simulator]) -> list[dict[str, str]]:
    return [{"name": f"b{n}", "url": each.url} for n, each in enumerate(simulators)]


def model(**settings) -> dict:
    return {
        "name": "small",
        "upstream_model": "sim-small",
        "backends": ["b0", "b1", "b2"],
        **settings,
    }


def chats(simulators: list[Simulator]) -> list[int]:
    return [each.load.by_path["/v1/chat/completions"] for each in simulators]


async def test_a_session_stays_at_its_backend_and_sessions_are_spread(simulators):
    models = [model(policy="two_choices")]
    async with connected(
        "inference", backends=backends(simulators), models=models, **ALONE
    ) as mesh:
        homes = defaultdict(set)
        for turn in range(3):
            answers = [
                await mesh.inference.generate(
                    GenerateRequest(f"Turn {turn}", model="small", session_id=f"s{number}")
                )
                for number in range(24)
            ]
            for number, answer in enumerate(answers):
                homes[number].add(answer.backend)
                assert (answer.rule, answer.policy) == ("explicit", "session")
    assert all(len(places) == 1 for places in homes.values())
    assert len(set.union(*homes.values())) == 3


async def test_sessions_of_a_backend_that_left_are_the_only_ones_to_move(simulators):
    models = [model()]
    asks = [
        GenerateRequest("Hello", model="small", session_id=f"s{number}") for number in range(30)
    ]
    async with connected(
        "inference", backends=backends(simulators), models=models, probe_interval_s=0.1, **ALONE
    ) as mesh:
        before = [(await mesh.inference.generate(ask)).backend for ask in asks]
        await simulators[2].close()

        async def down() -> bool:
            states = (await mesh.inference.get_model("small")).backend_states
            return states[2].health == 3

        await eventually_async(down)
        after = [(await mesh.inference.generate(ask)).backend for ask in asks]
    assert "b2" in before
    assert "b2" not in after
    assert all(old in ("b2", new) for old, new in zip(before, after, strict=True))


async def test_backends_take_turns_in_proportion_to_their_weights(simulators):
    models = [model(policy="weights", weights={"b0": 3, "b1": 2, "b2": 1})]
    async with connected(
        "inference", backends=backends(simulators), models=models, **ALONE
    ) as mesh:
        answers = [await mesh.inference.generate(f"Ask {n}", model="small") for n in range(36)]
    assert Counter(answer.backend for answer in answers) == {"b0": 18, "b1": 12, "b2": 6}
    assert {answer.policy for answer in answers} == {"weights"}
    assert chats(simulators) == [18, 12, 6]


async def test_concurrent_requests_go_where_the_fewest_tokens_are_outstanding(simulators):
    models = [model(max_tokens=50)]
    async with connected(
        "inference", backends=backends(simulators), models=models, **ALONE
    ) as mesh:
        stalled = [
            asyncio.create_task(mesh.inference.generate(f"{n} [[sim:stall=0.3]]", model="small"))
            for n in range(30)
        ]
        await asyncio.gather(*stalled)
    assert chats(simulators) == [10, 10, 10]


async def test_one_who_may_say_very_much_does_not_keep_all_others_from_a_backend(simulators):
    wide = [
        {**each, "concurrency": {"mode": "fixed", "maximum": 1000}} for each in backends(simulators)
    ]
    async with connected(
        "inference", backends=wide, models=[model(max_tokens=50)], **ALONE
    ) as mesh:
        endless = asyncio.create_task(
            mesh.inference.generate("[[sim:stall=30]]", model="small", max_tokens=2**32 - 1)
        )
        await eventually(lambda: sum(chats(simulators)) == 1)
        (mine,) = [at for at, count in enumerate(chats(simulators)) if count]
        others = [
            asyncio.create_task(mesh.inference.generate(f"{n} [[sim:stall=30]]", model="small"))
            for n in range(300)
        ]
        # Each of them counts as about 60 tokens, the one as about 4,100.
        await eventually(lambda: sum(chats(simulators)) == 301, 20)
        assert chats(simulators)[mine] > 10
        for task in (endless, *others):
            task.cancel()
        await asyncio.gather(endless, *others, return_exceptions=True)


async def test_prompts_that_begin_alike_share_a_backend(simulators):
    models = [model(affinity="prefix", affinity_prefix_bytes=64)]
    async with connected(
        "inference", backends=backends(simulators), models=models, **ALONE
    ) as mesh:
        places = defaultdict(set)
        for document in range(12):
            for question in range(3):
                text = f"Document {document:02} " + "x" * 64 + f" Question {question}"
                answer = await mesh.inference.generate(text, model="small")
                assert answer.policy == "prefix"
                places[document].add(answer.backend)
    assert all(len(found) == 1 for found in places.values())
    assert len(set.union(*places.values())) > 1


CLASSES = [
    model(task_classes=["simple"], output_usd_per_million=1),
    model(name="large", upstream_model="sim-large", task_classes=["complex"], weight=2),
]


async def test_auto_tells_rule_and_reason_and_a_session_only_moves_up(simulators):
    async with connected(
        "inference", backends=backends(simulators), models=CLASSES, **ALONE
    ) as mesh:

        async def ask(**more) -> tuple[str, str, str]:
            answer = await mesh.inference.generate(GenerateRequest("Hi", **more))
            return answer.model, answer.rule, answer.because

        assert await ask(session_id="s") == ("small", "auto:simple", "length: 5 tokens")
        assert await ask(session_id="s", tools=TOOLS) == ("large", "auto:complex", "tools")
        assert await ask(session_id="s") == ("large", "auto:complex", "session")
        assert await ask(session_id="s", task_class="simple") == (
            "large",
            "auto:complex",
            "session",
        )
        assert await ask(session_id="other") == ("small", "auto:simple", "length: 5 tokens")


async def test_auto_answers_from_the_next_of_its_class_when_the_first_breaks(simulators):
    models = [
        model(name="first", backends=["b0"], output_usd_per_million=1),
        model(name="second", backends=["b1"], output_usd_per_million=2),
        model(name="third", backends=["b2"], output_usd_per_million=3),
    ]
    async with connected(
        "inference", backends=backends(simulators), models=models, **ALONE
    ) as mesh:
        assert (await mesh.inference.generate("Hi")).model == "first"
        await simulators[0].close()
        answer = await mesh.inference.generate("Hello")
        assert (answer.model, answer.backend) == ("second", "b1")
        assert answer.rule.startswith("fallback:")
        assert answer.because == "length: 6 tokens"


async def test_parameters_of_a_class_reach_the_model_unless_the_request_has_its_own(simulators):
    auto = {"simple": {"max_tokens": 5, "temperature": 0.1}}
    async with connected(
        "inference", backends=backends(simulators), models=CLASSES, auto=auto, **ALONE
    ) as mesh:
        plain = await mesh.inference.generate("Tell me a story [[sim:tokens=40]]")
        own = await mesh.inference.generate(
            GenerateRequest("Tell me a story [[sim:tokens=40]]", max_tokens=9)
        )
        explicit = await mesh.inference.generate("Tell [[sim:tokens=40]]", model="small")
    assert (plain.model, plain.usage.output_tokens) == ("small", 5)
    assert own.usage.output_tokens == 9
    assert explicit.usage.output_tokens == 40


async def test_a_latency_target_turns_to_the_model_that_was_measured_to_meet_it(simulators):
    slow_but_cheap = model(name="slow", upstream_model="sim-large", output_usd_per_million=1)
    fast = model(name="fast", output_usd_per_million=5)
    async with connected(
        "inference", backends=backends(simulators), models=[slow_but_cheap, fast], **ALONE
    ) as mesh:
        for n in range(4):
            await mesh.inference.generate(f"{n} [[sim:ttft=0.4]]", model="slow")
            await mesh.inference.generate(f"{n}", model="fast")
        relaxed = await mesh.inference.generate("Hi")
        hurried = await mesh.inference.generate(GenerateRequest("Hi", max_latency=0.3))
    assert (relaxed.model, hurried.model) == ("slow", "fast")
    assert "latency" in hurried.because


async def test_a_request_beyond_the_models_limits_is_refused_with_the_limit(simulators):
    models = [model(limits={"max_prompt_tokens": 30})]
    async with connected(
        "inference", backends=backends(simulators), models=models, **ALONE
    ) as mesh:
        with pytest.raises(MeshError, match="at most 30") as caught:
            await mesh.inference.generate("x" * 400, model="small")
        assert caught.value.reason == "MODEL_LIMIT_EXCEEDED"
        assert (await mesh.inference.generate("Hi", model="small")).text
    assert sum(chats(simulators)) == 1
