"""A process that holds a concurrency slot and renews it when it is told to, to be killed.

Started with the addresses of replicas and a tenant. Writes a line when it holds a slot; for each
line it reads it renews the slot, and writes between which times of the machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from agent360.client import Mesh


async def hold(addresses: list[str], tenant: str) -> None:
    """Holds a slot of ``run`` until its input ends."""
    loop = asyncio.get_running_loop()
    async with Mesh.connect(ratelimit=addresses, tenant=tenant, api_key="") as mesh:
        while True:
            slot = await mesh.ratelimit.acquire("run", ttl=5.0)
            if slot.decision.allowed:
                break
            await asyncio.sleep(0.05)
        print("held", flush=True)
        while await loop.run_in_executor(None, sys.stdin.readline):
            before = time.monotonic()
            renewed = await mesh.ratelimit.renew(slot.slot_id)
            print(json.dumps([bool(renewed), before, time.monotonic()]), flush=True)


if __name__ == "__main__":
    asyncio.run(hold(sys.argv[1].split(","), sys.argv[2]))
