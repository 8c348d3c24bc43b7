"""A board as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from agent360.mesh.cli.top.board import Board

_WARN_ERRORS = 0.01


def tables(board: Board) -> Iterator[Table]:
    """The tables of a board: services, tenants, models and, if there are any, alerts."""
    yield _services(board)
    yield _tenants(board)
    yield _models(board)
    if board.alerts:
        yield _alerts(board)


def summary(board: Board) -> Text:
    """One line: the cache's hits, the alerts, and what could not be asked for."""
    hits = "-" if board.cache_hits is None else f"{board.cache_hits:.1%}"
    firing = sum(alert.state == "firing" for alert in board.alerts)
    text = Text(f"cache hits {hits}   alerts firing {firing}, pending {len(board.alerts) - firing}")
    if firing:
        text.stylize("bold red")
    for line in board.missing:
        text.append(f"\nnot known: {line}", style="yellow")
    return text


def _services(board: Board) -> Table:
    table = _table("services", ("service", "calls/s", "errors", "p50 ms", "p95 ms", "p99 ms"))
    for row in board.services:
        errors = Text(f"{row.errors:.2%}", style="red" if row.errors >= _WARN_ERRORS else "")
        table.add_row(
            row.service, f"{row.per_s:,.1f}", errors, *map(_ms, (row.p50_s, row.p95_s, row.p99_s))
        )
    return table


def _tenants(board: Board) -> Table:
    table = _table("tenants", ("tenant", "calls/s", "errors/s", "denied/s", "tokens/s", "USD/h"))
    for row in board.tenants:
        table.add_row(
            row.tenant,
            f"{row.per_s:,.1f}",
            f"{row.errors_per_s:,.1f}",
            Text(f"{row.denied_per_s:,.1f}", style="yellow" if row.denied_per_s else ""),
            f"{row.tokens_per_s:,.0f}",
            f"{row.usd_per_hour:,.2f}",
        )
    return table


def _models(board: Board) -> Table:
    table = _table(
        "models",
        ("model", "answers/s", "kept", "tokens in/s", "tokens out/s", "batch", "USD/h"),
    )
    for row in board.models:
        table.add_row(
            row.model,
            f"{row.per_s:,.1f}",
            f"{row.kept:.1%}",
            f"{row.tokens_in_per_s:,.0f}",
            f"{row.tokens_out_per_s:,.0f}",
            "-" if row.batch_size is None else f"{row.batch_size:.1f}",
            f"{row.usd_per_hour:,.2f}",
        )
    return table


def _alerts(board: Board) -> Table:
    table = _table("alerts", ("rule", "state", "labels", "value", "summary"))
    for row in board.alerts:
        labels = ", ".join(f"{key}={value}" for key, value in sorted(row.labels.items()))
        style = "bold red" if row.state == "firing" else "yellow"
        table.add_row(row.rule, Text(row.state, style=style), labels, f"{row.value:g}", row.summary)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", expand=True)
    for column in columns:
        texts = column in {"service", "tenant", "model", "rule", "state", "labels", "summary"}
        table.add_column(column, justify="left" if texts else "right", no_wrap=texts)
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.2f}"
