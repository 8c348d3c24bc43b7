"""Generates clients/agent360/client/synchronous.py from the asynchronous clients.

Run by `make synchronous`; with --check it only tells whether the file is as it should be.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

PACKAGE: Final = Path(__file__).parents[1] / "clients/agent360/client"
TARGET: Final = PACKAGE / "synchronous.py"
CLIENTS: Final = {
    "cache": "CacheClient",
    "ratelimit": "RateLimitClient",
    "inference": "InferenceClient",
    "metrics": "MetricsClient",
    "audit": "AuditClient",
    "logs": "LogsClient",
    "profiling": "ProfilingClient",
}
INTERNAL: Final = {
    "AuditClient": {"settle"},
    "CacheClient": {"abandon", "settle"},
    "RateLimitClient": {"settle_leases"},
}
"""Methods of a client that are for the Mesh and the client itself."""
NEEDS_A_LOOP: Final = {"CacheClient": {"cached", "watch"}}
"""Methods that make no sense without an event loop: what they give is asynchronous itself."""
TYPES: Final = {
    "AsyncIterator": "Iterator",
    "AsyncGenerator": "Iterator",
    "Results": "SyncResults",
    "AnswerStream": "SyncAnswerStream",
}
HEADER: Final = '''"""The clients for code without an event loop: scripts and notebooks.

Generated from the asynchronous clients by scripts/synchronous.py; do not edit.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from agent360.client.mesh import Addresses, Mesh
from agent360.client.portal import Portal, SyncAnswerStream, SyncResults
'''
MESH: Final = '''

class SyncMesh:
    """A Mesh whose calls block; it may be shared by threads.

    Example:
        >>> with SyncMesh.connect(tenant="acme") as mesh:
        ...     print(mesh.inference.generate("Say hello.").text)

    Attributes:
{attributes}
    """

    def __init__(self, mesh: Mesh, portal: Portal) -> None:
        """Use ``SyncMesh.connect``.

        Args:
            mesh: connected on the portal's loop.
            portal: runs the calls.
        """
        self._mesh = mesh
        self._portal = portal
{clients}

    @classmethod
    def connect(cls, {signature}) -> Self:
        """{docstring}"""
        portal = Portal()
        try:
            mesh = portal.call(Mesh.connect, {passed})
        except BaseException:
            portal.close()
            raise
        return cls(mesh, portal)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self, grace: float = 1.0) -> None:
        """Reports what was measured, waits for what is in flight, and closes all connections.

        Args:
            grace: seconds that both may take together; then the rest fails with UNAVAILABLE.
        """
        if not self._portal.closed:
            self._portal.run(self._mesh.close(grace))
            self._portal.close()
'''


def main() -> int:
    """Writes the file, or compares it."""
    wanted = formatted(generate())
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(wanted)
        return 0
    if TARGET.exists() and TARGET.read_text() == wanted:
        return 0
    print(f"{TARGET.name} is not what the clients make of it: run `make synchronous`")
    return 1


def generate() -> str:
    """The module's source, not formatted."""
    imports: dict[str, str] = {}
    bodies = []
    for attribute, name in CLIENTS.items():
        sources = lineage(attribute, name, imports)
        bodies.append(client(sources, attribute))
    mesh_tree = ast.parse((PACKAGE / "mesh.py").read_text())
    imports |= origins(mesh_tree, "agent360.client.mesh")
    text = "".join(bodies) + mesh(find_class(mesh_tree, "Mesh"))
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    known = {"Mesh", "Addresses", "Self", "TracebackType"}
    lines = [imports[name] for name in sorted(used & imports.keys() - known)]
    lines.append("from collections.abc import Iterator")
    return HEADER + "\n".join(lines) + "\n" + text


def lineage(module: str, name: str, imports: dict[str, str]) -> list[ast.ClassDef]:
    """A class and those of this package that it extends, the most basic one first.

    Args:
        module: where the class is.
        name: of the class.
        imports: gets the import statement of each name that these modules have.
    """
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    found = find_class(tree, name)
    above = []
    names = origins(tree, f"agent360.client.{module}")
    for base in found.bases:
        statement = names.get(ast.unparse(base), "")
        if matched := re.fullmatch(r"from agent360\.client\.(\w+) import (\w+)", statement):
            above += lineage(matched[1], matched[2], imports)
    imports |= names
    return [*above, found]


def client(sources: list[ast.ClassDef], attribute: str) -> str:
    """The synchronous form of one client, with what it inherits."""
    source = sources[-1]
    left_out = INTERNAL.get(source.name, set()) | NEEDS_A_LOOP.get(source.name, set())
    methods = [
        method(each)
        for each in (each for part in sources for each in part.body)
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
        and not each.name.startswith("_")
        and each.name not in left_out
    ]
    return (
        f'\n\nclass Sync{source.name}:\n    """{documented(source, 1)}"""\n\n'
        f"    def __init__(self, client: {source.name}, portal: Portal) -> None:\n"
        f'        """``SyncMesh.{attribute}`` is one.\n\n'
        "        Args:\n"
        "            client: makes the calls.\n"
        '            portal: runs them.\n        """\n'
        "        self._client = client\n        self._portal = portal\n" + "".join(methods)
    )


def method(source: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The synchronous form of one method."""
    returns = ast.unparse(source.returns) if source.returns is not None else "None"
    call = f"self._client.{source.name}"
    if any(ast.unparse(each) == "property" for each in source.decorator_list):
        return (
            f"\n    @property\n    def {source.name}(self) -> {returns}:\n"
            f'        """{documented(source, 2)}"""\n        return {call}\n'
        )
    passed = arguments(source.args)
    for given in source.args.args:
        if given.annotation is not None and "Awaitable[" in ast.unparse(given.annotation):
            there = re.compile(rf"\b{given.arg}\b")
            passed = there.sub(f"self._portal.in_thread({given.arg})", passed, count=1)
    if isinstance(source, ast.FunctionDef):
        made = f"self._portal.call({call}, {passed})"
    else:
        made = f"{call}({passed})"
    if returns.startswith(("Results[", "AnswerStream")):
        made = f"{TYPES[returns.partition('[')[0]]}(self._portal, {made})"
    elif returns.startswith(("AsyncIterator[", "AsyncGenerator[")):
        made = f"self._portal.iterate({made})"
    elif isinstance(source, ast.AsyncFunctionDef):
        made = f"self._portal.run({made})"
    for name, other in TYPES.items():
        returns = re.sub(rf"\b{name}\b", other, returns)
    statement = made if returns == "None" else f"return {made}"
    signature = re.sub(r"\bAwaitable\[(\w+)\]", r"\1", ast.unparse(source.args))
    return (
        f"\n    def {source.name}({signature}) -> {returns}:\n"
        f'        """{documented(source, 2)}"""\n        {statement}\n'
    )


def mesh(source: ast.ClassDef) -> str:
    """The synchronous Mesh."""
    (connect,) = (
        each for each in source.body if isinstance(each, ast.FunctionDef) and each.name == "connect"
    )
    lines = (ast.get_docstring(source) or "").partition("Attributes:\n")[2].splitlines()
    clients = [
        f"        self.{attribute} = Sync{name}(mesh.{attribute}, portal)"
        for attribute, name in CLIENTS.items()
    ]
    return MESH.format(
        attributes="\n".join(f"    {line}" for line in lines),
        clients="\n".join(clients),
        signature=ast.unparse(connect.args).removeprefix("cls, "),
        docstring=documented(connect, 2).replace(
            "Makes a Mesh; must be called while an event loop runs.", "Makes a SyncMesh."
        ),
        passed=arguments(connect.args),
    )


def arguments(source: ast.arguments) -> str:
    """What hands a method's own arguments on."""
    positional = [each.arg for each in source.args if each.arg not in {"self", "cls"}]
    return ", ".join([*positional, *(f"{each.arg}={each.arg}" for each in source.kwonlyargs)])


def documented(source: ast.AST, depth: int) -> str:
    """A docstring as it holds for code without an event loop."""
    text = ast.get_docstring(source) or ""  # type: ignore[arg-type]
    text = re.sub(r"\bawait ", "", text)
    text = re.sub(r"\basync (for|with)\b", r"\1", text)
    lines = text.splitlines()
    rest = ["    " * depth + line if line else "" for line in lines[1:]]
    if not rest:
        return lines[0]
    return "\n".join([lines[0], *rest, "    " * depth])


def origins(tree: ast.Module, module: str) -> dict[str, str]:
    """The import statement of each name that a module has."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            found |= {each.name: f"from {node.module} import {each.name}" for each in node.names}
        elif isinstance(node, ast.ClassDef):
            found[node.name] = f"from {module} import {node.name}"
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    found[target.id] = f"from {module} import {target.id}"
    return found


def find_class(tree: ast.Module, name: str) -> ast.ClassDef:
    """A class of a module."""
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return found


def formatted(text: str) -> str:
    """As ruff would have it."""
    ruff = (str(Path(sys.executable).with_name("ruff")),)
    name = f"--stdin-filename={TARGET}"
    for arguments_ in (
        ("check", "--quiet", "--select=I,F401", "--fix", name, "-"),
        ("format", "--quiet", name, "-"),
    ):
        text = subprocess.run(  # noqa: S603 - the program and its arguments are our own
            [*ruff, *arguments_], input=text, capture_output=True, text=True, check=True
        ).stdout
    return text


if __name__ == "__main__":
    sys.exit(main())
