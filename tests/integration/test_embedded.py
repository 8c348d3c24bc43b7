"""The four services inside the caller's process."""

import time

from agent360.mesh import embedded


async def test_embedded_services_answer_and_are_measured() -> None:
    async with embedded(tenant="acme") as mesh:
        await mesh.cache.set("greeting", b"hello")
        assert (await mesh.cache.get("greeting")).value == b"hello"
        assert (await mesh.ratelimit.check("search")).allowed
        mesh.metrics.count("plans", 3)
        await mesh.metrics.flush()
        assert [each.name async for each in mesh.metrics.list_series("plans")] == ["plans"]
        assert [each async for each in mesh.inference.list_models()] == []
        await mesh.cache.invalidate()
        deadline = time.monotonic() + 5
        events = []
        while not events and time.monotonic() < deadline:
            events = [each async for each in mesh.audit.list_events()]
        assert [each.action for each in events] == ["cache.entries.invalidate"]
