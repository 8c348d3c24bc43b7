"""Tables of the cache's benchmark."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from agent360.mesh.bench.cache import MGET_KEYS, SHARED_TASKS, TASKS, CacheFigures
from agent360.mesh.bench.hit_rates import CAPACITY, KEYS
from agent360.mesh.bench.timing import MESSAGE_ITEMS

_SPEEDS = (
    (("near", "our get, near", 1, ""),),
    (
        ("bare_unary", "(a) bare unary", TASKS, ""),
        ("coalesced", "our get, in memory", TASKS, "(a)"),
    ),
    (
        ("bare_many", f"(b) bare stream of {MESSAGE_ITEMS:,}", 0, ""),
        ("many", f"our get_many of {MESSAGE_ITEMS:,}", 0, "(b)"),
    ),
    (
        ("redis", "(c) redis-py, GET", SHARED_TASKS, ""),
        ("shared", "our get, in Redis", SHARED_TASKS, "(c)"),
        ("redis_mget", f"redis-py, MGET of {MGET_KEYS}", 1, "(c)"),
    ),
)
"""Groups of (kind, title, tasks, what it is compared with); the first of a group is that."""

_POLICIES = {
    "ours": "ours",
    "theine": "theine",
    "lru": "LRU",
    "fixed": "best fixed set",
}


def print_cache_figures(figures: CacheFigures, flat: dict[str, float], console: Console) -> None:
    """Prints a table of speeds and one of hit rates.

    Args:
        figures: what was measured.
        flat: the same as promised figures.
        console: where to.
    """
    console.print(_speeds(figures))
    console.print(
        f"A get from the near cache takes {flat['near_hit_us']:.2f} µs. One run on this machine; "
        "every kind had its turn in every round. The mesh's policies were all on."
    )
    if figures.left_out:
        console.print(f"Redis is left out: {figures.left_out}.")
    else:
        console.print(
            f"The service's memory answered {figures.memory_share:.1%} of the gets that were meant "
            "for Redis."
        )
    console.print(_hit_rates(figures))
    console.print(
        f"{figures.operations:,} gets of {KEYS:,} keys and, in scan, of keys that come once; what "
        f"is missed is set; room for {CAPACITY:,} entries. The best fixed set knows the whole "
        "trace beforehand and never changes."
    )


def _speeds(figures: CacheFigures) -> Table:
    table = Table(title="cache: medians of the rounds", title_justify="left")
    for column in ("", "tasks", "gets/s", "p50 ms", "p99 ms", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for group in _SPEEDS:
        base = figures.series.get(group[0][0])
        if base is None:
            continue
        for kind, title, tasks, compared in group:
            series = figures.series[kind]
            p50, p99 = series.quantile_ms(0.5), series.quantile_ms(0.99)
            table.add_row(
                title,
                f"{tasks:,}" if tasks else "-",
                f"{series.median_per_s:,.0f}",
                "-" if p50 is None else f"{p50:.2f}",
                "-" if p99 is None else f"{p99:.2f}",
                f"{series.median_per_s / base.median_per_s:.2f} x {compared}" if compared else "",
            )
        table.add_section()
    return table


def _hit_rates(figures: CacheFigures) -> Table:
    table = Table(title="cache: hit rates", title_justify="left")
    table.add_column("trace")
    for title in _POLICIES.values():
        table.add_column(title, justify="right")
    for trace, rates in figures.hit_rates.items():
        table.add_row(trace, *(f"{rates[policy]:.3f}" for policy in _POLICIES))
    return table
