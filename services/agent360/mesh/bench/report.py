"""Tables of benchmark results, result files, and the comparison of two of them."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agent360.mesh.bench.bare import CHECK, GET
from agent360.mesh.bench.calls import TASKS, Results
from agent360.mesh.bench.timing import MESSAGE_ITEMS

_TITLES = {
    "bare_unary": "(a) bare unary",
    "unary": "(b) our unary",
    "coalesced": "(c) our awaited call",
    "many": "(d) our many, 1,000 a message",
    "bare_many": "(e) bare stream, 1,000 a message",
}


def print_results(found: dict[str, Results], flat: dict[str, float], console: Console) -> None:
    """Prints a table for each subject: calls/s, p50, p99 and the ratios."""
    for subject in (CHECK, GET):
        results = found[subject.key]
        table = Table(title=f"{subject.title}: medians of the rounds", title_justify="left")
        for column in ("", "tasks", "calls/s", "p50 ms", "p99 ms", "ratio"):
            table.add_column(column, justify="left" if not column else "right")
        for tasks in TASKS:
            for kind in ("bare_unary", "unary", "coalesced"):
                ratio = (
                    results[kind, tasks].median_per_s / results["bare_unary", tasks].median_per_s
                )
                _add_row(table, results, kind, tasks, f"{ratio:.2f} x (a)")
            table.add_section()
        _add_row(table, results, "bare_many", MESSAGE_ITEMS, "", tasks="-")
        ratio = flat[f"{subject.key}_many_{MESSAGE_ITEMS}"]
        _add_row(table, results, "many", MESSAGE_ITEMS, f"{ratio:.2f} x (e)", tasks="-")
        console.print(table)
    console.print(
        "One run on this machine; every kind had its turn in every round. "
        "The mesh's policies were all on."
    )


def _add_row(
    table: Table, results: Results, kind: str, number: int, ratio: str, *, tasks: str = ""
) -> None:
    series = results[kind, number]
    p50, p99 = series.quantile_ms(0.5), series.quantile_ms(0.99)
    table.add_row(
        _TITLES[kind],
        tasks or f"{number:,}",
        f"{series.median_per_s:,.0f}",
        f"{p50:.2f}" if p50 is not None else "-",
        f"{p99:.2f}" if p99 is not None else "-",
        ratio if kind != "bare_unary" else "",
    )


def write_json(flat: dict[str, float], file: Path) -> None:
    """Writes one flat object."""
    file.write_text(json.dumps(flat, indent=2, sort_keys=True) + "\n")


def print_comparison(old: Path, new: Path, console: Console) -> None:
    """Prints the ratio of every figure that both files have.

    Raises:
        ValueError: a file is not a result file.
    """
    before, after = _read(old), _read(new)
    table = Table(title=f"{new} beside {old}", title_justify="left")
    for column in ("figure", "old", "new", "new / old"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        table.add_row(
            name,
            "-" if was is None else f"{was:,.3f}",
            "-" if now is None else f"{now:,.3f}",
            f"{now / was:.2f}" if was and now is not None else "-",
        )
    console.print(table)


def _read(file: Path) -> dict[str, float]:
    try:
        content = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read as a result file: {error}") from error
    if not isinstance(content, dict) or not all(
        isinstance(value, int | float) for value in content.values()
    ):
        raise ValueError(f"{file} is not a flat object of numbers")
    return content
