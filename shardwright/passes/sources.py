"""What a script needs of the user's code: files beside the job, and installed packages."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from shardwright.passes.imports import UserCode
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.job import JobSpec


def local_sources(job: JobSpec, code: UserCode) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files that the model, the loss and the dataset are made of, relative to the job's folder and sorted; and those
    among them that are no Python source. Found by following import statements, and by what was really imported."""
    found: set[Path] = set()
    todo = [Path(str(module.__file__)).resolve() for module in code.modules() if _beside_the_job(module, code)]
    todo += [file for name in _named(job) for file in _files_of(name, code.folder)]
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found.add(file)
        if file.suffix == ".py":
            for name in _imported(file, code.folder):
                todo += _files_of(name, code.folder)
    paths = sorted(code.relative(str(file)) for file in found)
    return tuple(paths), tuple(path for path in paths if not path.endswith(".py"))


def asked_for(job: JobSpec, sources: Sequence[str], folder: Path) -> set[str]:
    """Dotted names of all modules that the job and the sources import, whether there are such modules or not."""
    return {*_named(job), *(name for source in sources for name in _imported(folder / source, folder))}


def packages(job: JobSpec, sources: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Distributions that the job and the sources import beyond torch, sorted; one that is not installed is left out."""
    names = {name.split(".")[0] for name in asked_for(job, sources, folder)}
    names |= {"transformers"} if job.model.hf is not None else set()
    local = {Path(source).parts[0].removesuffix(".py") for source in sources}
    foreign = names - local - sys.stdlib_module_names - {"torch", "shardwright"}
    return tuple(sorted({distribution for name in foreign if (distribution := _distribution(name))}))


def elsewhere(job: JobSpec, folder: Path) -> list[str]:
    """Modules that the job names and that are neither beside it nor of an installed distribution."""
    return sorted({name for name in _named(job) if not (_files_of(name, folder) or _distribution(name.split(".")[0]))})


def _named(job: JobSpec) -> list[str]:
    """Modules that the job names."""
    paths = (job.model.factory, job.model.loss, job.data.dataset, job.data.validation_dataset)
    return [path.split(":")[0] for path in paths if path and ":" in path]


def _beside_the_job(module: ModuleType, code: UserCode) -> bool:
    """Whether a script finds a module under the same name where its file is copied to. One below the job's folder that
    is an installed distribution (in editable mode) is not copied; any other raises InputError."""
    file, name = code.relative(str(module.__file__)), module.__name__.replace(".", "/")
    if file.split(".")[0] in (name, f"{name}/__init__"):  # a compiled one has further suffixes
        return True
    if _distribution(module.__name__.split(".")[0]):
        return False
    message = f"`{module.__name__}` was imported from {file}, where a script would not find it"
    suggestion = "keep it beside the job file, or install it as a package"
    raise InputError(Diagnostic(key="model.factory", message=message, suggestion=suggestion))


def _files_of(module: str, folder: Path) -> list[Path]:
    """The files of a module beside the job, with those of the packages around it; empty if it lies elsewhere."""
    parts = module.split(".")
    inits = [folder.joinpath(*parts[:end], "__init__.py") for end in range(1, len(parts) + 1)]
    own = folder.joinpath(*parts[:-1], f"{parts[-1]}.py")
    return [path.resolve() for path in (*inits, own) if path.is_file()]


def _imported(file: Path, folder: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it; relative ones from the folder. `from a import b` gives both
    `a` and `a.b`, because b may be a module."""
    if file.suffix != ".py":
        return
    package = list(file.resolve().relative_to(folder.resolve()).with_suffix("").parts)[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            around = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*around, *([node.module] if node.module else [])])
            if base:
                yield base
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names if alias.name != "*")


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def _distribution(package: str) -> str | None:
    """The distribution that a top-level package belongs to: usually of the same name, else looked up in all."""
    try:
        return importlib.metadata.metadata(package)["Name"]
    except importlib.metadata.PackageNotFoundError:
        return next(iter(sorted(_distributions().get(package, []))), None)
