"""The layers of the package: who may import whom, what may be imported at all, and who may print."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardwright

PACKAGE = Path(shardwright.__file__).parent

MAY_IMPORT = {
    "hardware": set(),
    "schemas": {"hardware"},
    "passes": {"schemas"},
    "planner": {"schemas"},
    "backends": {"schemas", "planner"},
    "report": {"schemas", "planner"},
    "rehearse": {"schemas", "passes", "planner", "backends"},
    "cli": {"schemas", "passes", "planner", "backends", "report", "rehearse"},
}
"""Which parts each part may import at run time, besides itself."""

# Copied into the user's folder or into the emitted script's, where shardwright is not there and printing is their own.
BROUGHT_ALONG = ("backends/pytorch/runtime/", "backends/pytorch/templates/", "cli/starter/")
TORCH_FREE = ("schemas", "planner", "hardware", "report")


# A program that the library starts in a process of its own: its stdout is the pipe to the process that started it.
PROGRAMS = ("rehearse/stage.py",)


MODULES = [(path.relative_to(PACKAGE).as_posix(), path) for path in sorted(PACKAGE.rglob("*.py"))]
"""Each module of the package, by its path below it."""


def part_of(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a module, but for what only a type checker sees; a relative
    import begins with its dots."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)
        yield from imports(node)


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_a_module_imports_only_the_layers_below_it(name: str, path: Path) -> None:
    part = part_of(name)
    if part not in MAY_IMPORT:
        assert name in ("__init__.py", "__main__.py"), f"{name} belongs to no layer"
        return
    known = {
        dotted.split(".")[1] for dotted in imports(ast.parse(path.read_text())) if dotted.startswith("shardwright.")
    }
    assert known <= MAY_IMPORT[part] | {part, "__version__"}


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_only_what_is_copied_as_a_whole_imports_relatively(name: str, path: Path) -> None:
    relative = [dotted for dotted in imports(ast.parse(path.read_text())) if dotted.startswith(".")]
    assert not relative or name.startswith("backends/pytorch/runtime/")


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_rich_and_typer_stay_in_report_and_cli(name: str, path: Path) -> None:
    roots = {dotted.split(".")[0] for dotted in imports(ast.parse(path.read_text()))}
    assert "typer" not in roots or part_of(name) == "cli"
    assert "rich" not in roots or part_of(name) in ("cli", "report")


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_a_module_brought_along_does_not_need_shardwright(name: str, path: Path) -> None:
    if name.startswith(BROUGHT_ALONG):
        assert "shardwright" not in {dotted.split(".")[0] for dotted in imports(ast.parse(path.read_text()))}


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_the_library_never_prints(name: str, path: Path) -> None:
    if part_of(name) == "cli" or name.startswith(BROUGHT_ALONG) or name in PROGRAMS:
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.parametrize("part", TORCH_FREE)
def test_a_torch_free_part_never_names_torch(part: str) -> None:
    for name, path in MODULES:
        if part_of(name) == part:
            assert "torch" not in {dotted.split(".")[0] for dotted in imports(ast.parse(path.read_text()))}, name


@pytest.mark.parametrize("module", [*(f"shardwright.{part}" for part in TORCH_FREE), "shardwright.cli"])
def test_a_fresh_process_imports_it_without_torch(module: str) -> None:
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=PACKAGE.parent, check=False).returncode == 0
