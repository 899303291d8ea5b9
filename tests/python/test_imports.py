"""The package's modules import each other in one direction: the static import graph has no circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import flashspark


def modules() -> dict[str, Path]:
    root = Path(flashspark.__path__[0])
    found = {}
    for path in root.rglob("*.py"):
        parts = ("flashspark", *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def run_time_imports(node: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """Every import statement, those inside functions as well, but for what only type checkers see."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return []
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [node]
    return [found for child in ast.iter_child_nodes(node) for found in run_time_imports(child)]


def imported(module: str, path: Path, known: set[str]) -> set[str]:
    """Modules of the package that this one names in an import. Their parent packages are not counted."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    result = set()
    for node in run_time_imports(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
            continue
        parents = package.split(".")
        above = parents[: len(parents) + 1 - node.level] if node.level else []
        base = ".".join(filter(None, [*above, node.module]))
        for alias in node.names:
            name = f"{base}.{alias.name}"
            result.add(name if name in known else base)
    return result & known


def test_no_circle():
    known = modules()
    graph = {module: imported(module, path, {*known}) for module, path in known.items()}
    assert "flashspark.vllm.takeover" in graph["flashspark._hook"] and len(known) > 20
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_names_import_nothing():
    assert not run_time_imports(ast.parse(modules()["flashspark.vllm.names"].read_text()))
