"""The index of a tenant's counts in Redis: bounded, and read a part at a time."""

from pathlib import Path

from support.redis_servers import RedisServer
from support.servers import running

from agent360.client import Mesh

LIMITS = """
[[limits]]
id = "users"
name = "x"
per = ["tenant", "user"]
amount = 10
period = "10h"
"""


async def test_an_index_is_bounded_and_rows_that_are_no_counts_are_passed_over(
    tmp_path: Path,
) -> None:
    file = tmp_path / "limits.toml"
    _ = file.write_text(LIMITS)
    async with (
        RedisServer() as redis,
        running("ratelimit", store=redis.url, limits=file) as server,
        Mesh.connect(ratelimit=server.address, tenant="acme", api_key="") as mesh,
    ):
        await mesh.ratelimit.check("x", descriptor={"user": "u0"})
        (index,) = await redis.command("KEYS", "*:i")
        (key,) = await redis.command("ZRANGE", index, 0, -1)
        base, text = index[:-2].decode(), key.decode()
        for row in (f"{base}:n:users", f"{text}|more", text.rpartition("|")[0], "strange"):
            await redis.command("ZADD", index, 1, row)
        for user in range(1, 450):
            await mesh.ratelimit.check("x", descriptor={"user": f"u{user}"}, hits=2)
        listed = {each.counted_by["user"]: each.used async for each in mesh.ratelimit.list_usage()}
        assert listed == {"u0": 1, **{f"u{user}": 2 for user in range(1, 450)}}
        commands = await redis.command("INFO", "commandstats")
        usage = await mesh.ratelimit.get_usage("users", counted_by={"user": "u7"})
        assert (usage.used, usage.remaining) == (2, 8)
        assert (await mesh.ratelimit.get_usage("users", counted_by={"user": "no"})).used == 0
        after = await redis.command("INFO", "commandstats")
        assert _calls(after, b"zrevrange") == _calls(commands, b"zrevrange")
        fill = "for i = 1, 10050 do redis.call('ZADD', KEYS[1], i, 'old' .. i) end"
        await redis.command("EVAL", fill, 1, index)
        await mesh.ratelimit.check("x", descriptor={"user": "last"})
        assert await redis.command("ZCARD", index) == 10_000
        assert await redis.command("ZSCORE", index, text.rpartition("|")[0] + "|last") is not None


def _calls(stats: bytes, command: bytes) -> bytes:
    return stats.partition(b"cmdstat_" + command + b":calls=")[2].partition(b",")[0]
