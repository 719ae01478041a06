"""The import rule of ARCHITECTURE.md, checked on the syntax trees: only downwards, and no torch above the runner."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nybble"
LEVELS = [
    {"core"},
    {"kernels", "formats", "text"},
    {"grammar", "layers", "models"},
    {"engine", "runner"},
    {"build", "progress"},
    {"llm", "async_llm", "engine_process", "server"},
    {"bench"},
    {"compare", "perf"},
    {"__init__", "__main__", "cli", "commands"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
MAY_ALSO_IMPORT = {
    "models": {"layers"},
    "formats": {"kernels"},  # for Int4Weight, what a format's repack makes and a kernel's prepare takes
    "commands": {"__init__"},
    "bench": {"__init__"},  # for the version
    "cli": {"commands", "__init__"},
    "__main__": {"cli"},
}
TORCH_FREE = {"core", "text", "engine", "server", "bench", "compare", "__init__", "__main__", "cli"}
HEAVY = {"torch", "triton"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The top-level folder or module inside nybble that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module a file imports, function bodies included; `if TYPE_CHECKING` blocks left out."""
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute in nybble"
            yield node.module or "", node.lineno
            if node.module == "nybble":
                yield from ((f"nybble.{alias.name}", node.lineno) for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    part = part_of(path)
    assert part in LEVEL, f"{part} has no level: add it to ARCHITECTURE.md and to LEVELS"
    for name, line in imports(path):
        top, _, rest = name.partition(".")
        if top == "nybble" and rest:
            target = rest.split(".")[0]
            if target not in LEVEL:  # a public name of nybble/__init__.py
                target = "__init__"
            allowed = target == part or target in MAY_ALSO_IMPORT.get(part, ()) or LEVEL[target] < LEVEL[part]
            assert allowed, f"{path}:{line}: {part} (L{LEVEL[part]}) imports {target} (L{LEVEL[target]})"
        assert not (part in TORCH_FREE and top in HEAVY), f"{path}:{line}: {part} must not import {top}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable(path: Path) -> None:
    """At most 500 lines a file, and each says on top what it is."""
    text = path.read_text()
    assert len(text.splitlines()) <= 500, f"{path} has over 500 lines"
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{path} has no docstring on top"


def test_relative_levels_cover_the_tree() -> None:
    parts = {part_of(path) for path in MODULES}
    assert parts <= set(LEVEL)
    assert {"core", "kernels", "engine", "runner"} <= parts
