"""Kept and shared answers with the real cache service: who gets whose, and what nobody is asked."""

import asyncio

import grpc
import pytest
from support.inference_mesh import MODELS, inference_mesh
from support.polling import eventually, eventually_async

from agent360.client import AnswerSource, GenerateRequest, MeshError, Tool
from agent360.mesh.inference.settings import ModelSettings

CACHE, COALESCED, MODEL = AnswerSource.CACHE, AnswerSource.COALESCED, AnswerSource.MODEL


@pytest.fixture
async def rig(tmp_path):
    async with inference_mesh(tmp_path) as made:
        yield made


async def ask(mesh, text, tenant="acme", **more):
    return await mesh.inference.generate(
        GenerateRequest(text, model="small", **more), tenant=tenant
    )


async def hear(mesh, text, tenant="acme", **more):
    stream = mesh.inference.stream(GenerateRequest(text, model="small", **more), tenant=tenant)
    pieces = [delta.text async for delta in stream]
    return pieces, stream.answer


async def kept(rig, tenant="acme", namespace="inference.generate") -> int:
    async for stats in rig.mesh.cache.stats(namespaces=[namespace], tenant=tenant):
        return stats.entries
    return 0


async def test_an_answer_is_kept_and_replayed_whole_and_as_a_stream(rig):
    first = await ask(rig.mesh, "Name three rivers")
    again = await ask(rig.mesh, "Name three rivers")
    pieces, streamed = await hear(rig.mesh, "Name three rivers")
    assert [each.source for each in (first, again, streamed)] == [MODEL, CACHE, CACHE]
    assert first.text == again.text == streamed.text == "".join(pieces)
    assert (first.usage.cost_usd > 0, again.usage.cost_usd) == (True, 0)
    assert again.usage.output_tokens == first.usage.output_tokens
    assert rig.upstream_calls == 1


async def test_a_streamed_answer_is_kept_too(rig):
    pieces, first = await hear(rig.mesh, "Name three rivers")
    await eventually_async(lambda: kept(rig))
    again = await ask(rig.mesh, "Name three rivers")
    assert (first.source, again.source) == (MODEL, CACHE)
    assert again.text == "".join(pieces)


async def test_tool_calls_survive_the_cache(rig):
    tools = [Tool("find", "Finds", {"properties": {"q": {"type": "string"}}})]
    first = await ask(rig.mesh, "find rivers", tools=tools)
    again = await ask(rig.mesh, "find rivers", tools=tools)
    assert again.source is CACHE
    assert again.tool_calls == first.tool_calls
    assert first.tool_calls


async def test_a_hot_hit_asks_nobody(rig):
    await ask(rig.mesh, "Name three rivers")
    near = rig.inside().cache
    async with asyncio.timeout(10):
        while not near.near_stats.hits:
            await ask(rig.mesh, "Name three rivers")
            await asyncio.sleep(0.01)
    asked, before = await cache_gets(rig), near.near_stats.hits
    answers = await asyncio.gather(*(ask(rig.mesh, "Name three rivers") for _ in range(100)))
    assert {each.source for each in answers} == {CACHE}
    assert near.near_stats.hits == before + 100
    assert await cache_gets(rig) == asked
    assert rig.upstream_calls == 1


async def heated(rig, text="Name three rivers", tenant="acme"):
    """Asks until the answer is given from this process, and then known by the request's bytes."""
    near = rig.inside().cache
    for _ in range(2):
        before = near.near_stats.hits
        async with asyncio.timeout(10):
            while near.near_stats.hits == before:
                await ask(rig.mesh, text, tenant)
                await asyncio.sleep(0.01)


async def test_a_known_request_of_one_tenant_is_unknown_for_another(rig):
    await heated(rig)
    other = await ask(rig.mesh, "Name three rivers", "globex")
    assert (other.source, rig.upstream_calls) == (MODEL, 2)


async def test_a_known_request_of_a_model_that_changed_is_asked_anew(rig):
    await heated(rig)
    newer = ModelSettings.model_validate({**MODELS[0], "version": "2"})
    rig.servers[0]._servicer._catalogue.replace([newer])
    assert (await ask(rig.mesh, "Name three rivers")).source is MODEL


async def test_a_known_request_of_a_tenant_that_may_not_use_the_model_any_more_is_refused(rig):
    await heated(rig)
    other = ModelSettings.model_validate({**MODELS[0], "tenants": ["globex"]})
    rig.servers[0]._servicer._catalogue.replace([other])
    with pytest.raises(MeshError, match="no model 'small'"):
        await ask(rig.mesh, "Name three rivers")


async def test_a_known_request_whose_answer_was_removed_is_asked_anew(rig):
    await heated(rig)
    await rig.mesh.cache.invalidate(namespace="inference.generate")
    await eventually_async(lambda: made_anew(rig))
    assert rig.upstream_calls == 2


async def cache_gets(rig) -> int:
    async for stats in rig.mesh.cache.stats(namespaces=["inference.generate"], tenant="acme"):
        return stats.l1_hits + stats.l2_hits + stats.misses
    return 0


async def test_an_invalidated_answer_is_made_anew_although_a_copy_was_near(rig):
    await ask(rig.mesh, "Name three rivers")
    await ask(rig.mesh, "Name three rivers")
    await ask(rig.mesh, "Name three rivers")
    await rig.mesh.cache.invalidate(namespace="inference.generate", prefix="small@/")
    await eventually_async(lambda: made_anew(rig))


async def made_anew(rig) -> bool:
    return (await ask(rig.mesh, "Name three rivers")).source is MODEL


async def test_requests_decide_whether_and_how_long_answers_are_kept(rig):
    await ask(rig.mesh, "a", no_store=True)
    assert await kept(rig) == 0
    await ask(rig.mesh, "a", cache_ttl=0.2)
    assert await kept(rig) == 1
    assert (await ask(rig.mesh, "a", no_cache=True, no_store=True)).source is MODEL
    await asyncio.sleep(0.25)
    assert (await ask(rig.mesh, "a")).source is MODEL


async def test_failed_and_broken_answers_are_not_kept(rig):
    for text in ("[[sim:error=400]] a", "[[sim:break=5]] a"):
        with pytest.raises(MeshError):
            await hear(rig.mesh, text)
    assert await kept(rig) == 0


@pytest.mark.parametrize("streamed", [False, True])
async def test_tenants_see_each_others_answers_only_if_both_agreed(tmp_path, streamed):
    sharing = {"sharing_tenants": ["acme", "globex"]}

    async def asked(rig, tenant, share):
        if streamed:
            return (await hear(rig.mesh, "the secret plan", tenant, share=share))[1]
        return await ask(rig.mesh, "the secret plan", tenant, share=share)

    async with inference_mesh(tmp_path, cache=sharing) as rig:
        assert (await asked(rig, "acme", False)).source is MODEL
        await eventually_async(lambda: kept(rig))
        for tenant, share in (
            ("globex", False),  # neither asked
            ("globex", True),  # acme did not ask
            ("initech", True),  # not agreed to in the settings
        ):
            assert (await asked(rig, tenant, share)).source is MODEL, (tenant, share)
        await eventually_async(lambda: kept(rig, "shared-answers"))
        assert rig.upstream_calls == 4
        assert (await asked(rig, "acme", True)).source is CACHE, "globex shared it"


async def test_calls_in_flight_are_not_shared_between_tenants_that_did_not_agree(tmp_path):
    sharing = {"sharing_tenants": ["acme", "globex"]}
    async with inference_mesh(tmp_path, cache=sharing) as rig:
        text = "[[sim:ttft=0.3]] plan"
        own = await asyncio.gather(
            *(ask(rig.mesh, text, tenant) for tenant in ("acme", "globex", "initech"))
        )
        assert [each.source for each in own] == [MODEL] * 3
        text = "[[sim:ttft=0.3]] another plan"
        shared = await asyncio.gather(
            *(ask(rig.mesh, text, t, share=True) for t in ("acme", "globex", "initech"))
        )
        assert sorted(each.source for each in shared) == [MODEL, MODEL, COALESCED]
        assert rig.upstream_calls == 5


async def test_nobody_may_call_in_the_name_of_the_shared_answers(rig):
    with pytest.raises(MeshError) as refused:
        await ask(rig.mesh, "Hi", "shared-answers")
    assert (refused.value.code, refused.value.reason) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "TENANT_RESERVED",
    )


async def test_another_version_of_a_model_does_not_give_the_answers_of_the_one_before(tmp_path):
    newer = [{**MODELS[0], "version": "2"}]
    async with (
        inference_mesh(tmp_path, replicas=({}, {"models": newer})) as rig,
        rig.connect(replica=1) as upgraded,
    ):
        await ask(rig.mesh, "Name three rivers")
        assert (await ask(upgraded, "Name three rivers")).source is MODEL
        assert (await ask(upgraded, "Name three rivers")).source is CACHE
        assert (await ask(rig.mesh, "Name three rivers")).source is CACHE


async def test_vectors_are_kept(rig):
    first = await rig.mesh.inference.embed(["one text", "another"], model="embedder")
    await eventually_async(lambda: kept(rig, namespace="inference.embed"))
    again = await rig.mesh.inference.embed(["one text", "another"], model="embedder")
    assert again.vectors == first.vectors
    assert rig.simulator.load.by_path["/v1/embeddings"] == 1


# ---------------------------------------------------------------- coalescing


async def test_200_identical_requests_at_once_are_one_call_and_200_answers(rig):
    answers = await asyncio.gather(*(ask(rig.mesh, "[[sim:ttft=0.3]] plan") for _ in range(200)))
    assert rig.upstream_calls == 1
    assert len({each.text for each in answers}) == 1
    sources = [each.source for each in answers]
    assert (sources.count(MODEL), sources.count(COALESCED)) == (1, 199)
    assert sum(each.usage.cost_usd > 0 for each in answers) == 1


async def test_199_are_answered_although_the_first_of_200_leaves_after_10_ms(rig):
    text = "[[sim:ttft=0.3]] plan"
    leader = asyncio.create_task(ask(rig.mesh, text))
    await eventually(lambda: rig.upstream_calls == 1)
    others = [asyncio.create_task(ask(rig.mesh, text)) for _ in range(199)]
    await asyncio.sleep(0.01)
    leader.cancel()
    answers = await asyncio.gather(*others)
    assert leader.cancelled()
    assert {each.source for each in answers} == {COALESCED}
    assert rig.upstream_calls == 1
    assert rig.simulator.load.cancelled == 0


async def test_streams_and_whole_answers_share_one_call(rig):
    text = "[[sim:ttft=0.2]][[sim:itl=0.002]][[sim:tokens=50]] plan"
    streams = [asyncio.create_task(hear(rig.mesh, text)) for _ in range(20)]
    await eventually(lambda: rig.upstream_calls == 1)
    whole = await asyncio.gather(*(ask(rig.mesh, text) for _ in range(20)))
    heard = await asyncio.gather(*streams)
    assert {"".join(pieces) for pieces, _ in heard} == {each.text for each in whole}
    assert all(len(pieces) > 5 for pieces, _ in heard)
    assert rig.upstream_calls == 1


async def test_identical_texts_at_once_are_one_call_for_vectors_although_the_first_leaves(tmp_path):
    async with inference_mesh(tmp_path, simulator={"first_token_s": 0.3}) as rig:

        async def embed():
            return await rig.mesh.inference.embed(["one text", "another"], model="embedder")

        def asked() -> int:
            return rig.simulator.load.by_path["/v1/embeddings"]

        leader = asyncio.create_task(embed())
        await eventually(lambda: asked() == 1)
        others = [asyncio.create_task(embed()) for _ in range(49)]
        await asyncio.sleep(0.01)
        leader.cancel()
        found = await asyncio.gather(*others)
        assert asked() == 1
        assert len({each.vectors for each in found}) == 1


async def test_replicas_share_one_call_where_they_are_told_to(tmp_path):
    async with (
        inference_mesh(tmp_path, replicas=({}, {}), coalescing={"across_replicas": True}) as rig,
        rig.connect(replica=1) as other,
    ):
        text = "[[sim:ttft=0.3]] plan"
        answers = await asyncio.gather(
            *(ask(mesh, text) for _ in range(50) for mesh in (rig.mesh, other))
        )
        assert rig.upstream_calls == 1
        assert len({each.text for each in answers}) == 1


async def test_the_other_replica_goes_on_where_the_one_that_ran_the_model_fails(tmp_path):
    async with (
        inference_mesh(tmp_path, replicas=({}, {}), coalescing={"across_replicas": True}) as rig,
        rig.connect(replica=1) as other,
    ):
        text = "[[sim:ttft=30]] plan"
        first = asyncio.create_task(ask(rig.mesh, text))
        await eventually(lambda: rig.upstream_calls == 1)
        second = asyncio.create_task(ask(other, text))
        await asyncio.sleep(0.1)
        assert rig.upstream_calls == 1
        first.cancel()
        await eventually(lambda: rig.upstream_calls == 2)
        second.cancel()
        await asyncio.wait((first, second))
