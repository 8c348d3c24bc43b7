"""Every reason that an error can carry is documented, and none that it cannot."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTED = ROOT / "docs/errors.md"
REASON = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*")
POSITION = {"MeshError": 1, "_unauthenticated": 0, "_refused": 0}
"""Where the reason stands among the arguments of what makes errors, where it is not named."""


def sources() -> Iterator[ast.Module]:
    for folder in ("clients/agent360/client", "services/agent360/mesh"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield ast.parse(file.read_text())


def constants(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value


def raised() -> set[str]:
    """The reasons in the code: of calls that make errors, and defaults of ``reason``."""
    found: set[str] = set()
    for tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                given = [each.value for each in node.keywords if each.arg == "reason"]
                position = POSITION.get(name)
                if position is not None and len(node.args) > position:
                    given.append(node.args[position])
                for each in given:
                    found.update(constants(each))
            elif isinstance(node, ast.arguments):
                named = zip(reversed(node.args), reversed(node.defaults), strict=False)
                for argument, default in [
                    *named,
                    *zip(node.kwonlyargs, node.kw_defaults, strict=True),
                ]:
                    if argument.arg == "reason" and default is not None:
                        found.update(constants(default))
    return {reason for reason in found if REASON.fullmatch(reason) and len(reason) > 3}


def documented() -> set[str]:
    """The first column of the table; ``UPSTREAM_*`` stands for all that begin so."""
    rows = re.findall(r"^\| ([A-Z][A-Z0-9_*, ]+?) \|", DOCUMENTED.read_text(), re.MULTILINE)
    return {reason.strip() for row in rows for reason in row.split(",")}


def test_every_reason_is_documented() -> None:
    known = documented()
    prefixes = tuple(each.removesuffix("*") for each in known if each.endswith("*"))
    missing = {
        reason
        for reason in raised()
        if reason not in known and not (prefixes and reason.startswith(prefixes))
    }
    assert missing == set()


def test_every_documented_reason_can_occur() -> None:
    everywhere: set[str] = set()
    for tree in sources():
        everywhere.update(constants(tree))
    gone = {each for each in documented() if not each.endswith("*") and each not in everywhere}
    assert gone == set()


def test_the_reasons_are_found_at_all() -> None:
    assert {"RATE_LIMITED", "ANSWER_LOST", "API_KEY_MISSING", "MODEL_UNKNOWN"} <= raised()
