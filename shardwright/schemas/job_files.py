"""The files that a job names: whether they are there, and whether they fit each other. Nothing is imported or run."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from glob import glob
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.expected import nearest
from shardwright.schemas.hugging_face import architecture
from shardwright.schemas.job import JobSpec
from shardwright.schemas.paths import is_file, is_folder
from shardwright.schemas.weights import check_weights

TOKEN_BYTES = {".u8": 1, ".u16": 2, ".u32": 4}
"""Bytes of one token by the file's suffix."""


def expand(patterns: Sequence[str], folder: Path) -> tuple[str, ...]:
    """The files that the patterns match, relative to `folder`: by pattern, then sorted as paths. A file that two
    patterns match comes twice, and the name of a file is no pattern: the emitted script reads the same list."""
    found: list[str] = []
    for pattern in patterns:
        names = [pattern] if is_file(folder / pattern) else glob(pattern, root_dir=folder, recursive=True)
        found += sorted((name for name in names if is_file(folder / name)), key=Path)
    return tuple(found)


def check_model_files(job: JobSpec, folder: Path) -> Iterator[Diagnostic]:
    """The model's configuration or module, and the user's own loss."""
    if job.model.factory is not None:
        yield from _function("model.factory", job.model.factory, folder)
    if isinstance(job.model.hf, str):
        yield from _configuration(job.model.hf, folder)
    elif job.model.hf is not None:
        yield from _contents(job.model.hf, "the configuration")
    yield from check_weights(job.model, folder)
    if ":" in job.model.loss:
        yield from _function("model.loss", job.model.loss, folder)


def check_data_files(job: JobSpec, folder: Path) -> Iterator[Diagnostic]:
    """Data files, masks and the user's own datasets."""
    data = job.data
    kind = "bytes" if data.bytes is not None else "tokens"
    patterns = data.bytes or data.tokens
    if patterns:
        yield from _files(f"data.{kind}", patterns, "data.mask", data.mask, job, folder)
    if data.validation is not None:
        key = "data.validation"
        yield from _files(f"{key}.files", data.validation.files, f"{key}.mask", data.validation.mask, job, folder)
    for name in ("dataset", "validation_dataset"):
        if getattr(data, name) is not None:
            yield from _function(f"data.{name}", getattr(data, name), folder)


def _files(
    key: str, patterns: Sequence[str], mask_key: str, masks: Sequence[str], job: JobSpec, folder: Path
) -> Iterator[Diagnostic]:
    unmatched = list(_unmatched(key, patterns, folder))
    files = [folder / name for name in expand(patterns, folder)]
    unfit = [] if job.data.tokens is None else list(_token_files(key, files))
    yield from (*unmatched, *unfit, *_unmatched(mask_key, masks, folder))
    if unmatched or unfit:
        return
    tokens = [(file, file.stat().st_size // _width(job, file)) for file in files]
    longest, most = max(tokens, key=lambda each: each[1])
    if most <= job.train.sequence_length:
        message = f"the longest file, '{longest.name}', has {most} tokens, too few for one sample"
        need = f"a sample takes {job.train.sequence_length + 1} of one file: `train.sequence_length` and the next one"
        yield Diagnostic(key=key, message=message, suggestion=need)
    if masks:
        yield from _masks(mask_key, [folder / name for name in expand(masks, folder)], tokens)


def _unmatched(key: str, patterns: Sequence[str], folder: Path) -> Iterator[Diagnostic]:
    for index, pattern in enumerate(patterns):
        if not expand([pattern], folder):
            yield Diagnostic(
                key=f"{key}.{index}",
                message=f"no file matches '{pattern}'",
                suggestion="paths start from the folder of the job file",
            )


def _width(job: JobSpec, file: Path) -> int:
    return 1 if job.data.bytes is not None else TOKEN_BYTES[file.suffix]


def _token_files(key: str, files: Sequence[Path]) -> Iterator[Diagnostic]:
    for file in files:
        width = TOKEN_BYTES.get(file.suffix)
        if width is None:
            message = f"'{file.name}' does not say how wide its tokens are"
            yield Diagnostic(key=key, message=message, suggestion=f"name token files {', '.join(TOKEN_BYTES)}")
        elif file.stat().st_size % width:
            message = f"'{file.name}' has {file.stat().st_size} bytes, which are no whole tokens of {width} bytes"
            yield Diagnostic(key=key, message=message)


def _masks(key: str, masks: Sequence[Path], tokens: Sequence[tuple[Path, int]]) -> Iterator[Diagnostic]:
    if not masks:
        return
    if len(masks) != len(tokens):
        message = f"{len(masks)} mask files for {len(tokens)} data files"
        yield Diagnostic(
            key=key, message=message, suggestion="give one mask file for each data file, in the same order"
        )
        return
    for mask, (file, count) in zip(masks, tokens, strict=True):
        if mask.stat().st_size != count:
            message = f"'{mask.name}' has {mask.stat().st_size} bytes for the {count} tokens of '{file.name}'"
            yield Diagnostic(key=key, message=message, suggestion="a mask has one byte a token")


def _configuration(written: str, folder: Path) -> Iterator[Diagnostic]:
    path = folder / written
    in_folder = is_folder(path)
    file = path / "config.json" if in_folder else path
    if not is_file(file):
        missing = f"the folder '{written}' holds no config.json" if in_folder else f"there is no file '{written}'"
        suggestion = "nothing is fetched from the hub: save the model's config.json beside the job and name its path"
        yield Diagnostic(key="model.hf", message=missing, suggestion=suggestion)
        return
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        yield Diagnostic(key="model.hf", message=f"'{written}' is not JSON: {error}")
        return
    yield from _contents(values, f"'{written}'")


def _contents(values: Any, name: str) -> Iterator[Diagnostic]:
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        yield Diagnostic(
            key="model.hf",
            message=f"{name} is no Hugging Face configuration: it has no `model_type`",
            suggestion="for example model_type: llama",
        )
        return
    try:
        architecture(values)
    except InputError as error:
        yield from error.diagnostics


def _function(key: str, path: str, folder: Path) -> Iterator[Diagnostic]:
    """`module:function` beside the job file, else in an installed package, which is only looked for."""
    module, _, function = path.partition(":")
    file = _module_file(module, folder)
    if file is None:
        top = module.partition(".")[0]
        if not _is_module_here(top, folder) and PathFinder.find_spec(top) is not None:
            return
        beside = [each.stem for each in folder.glob("*.py")] if folder.is_dir() else []
        near = nearest(module, beside)
        yield Diagnostic(
            key=key,
            message=f"there is no module `{module}` beside the job file, and no such package is installed",
            suggestion=f"did you mean `{near}:{function}`?" if near else f"expected {module.replace('.', '/')}.py",
        )
        return
    yield from _defined(key, module, function, file)


def _module_file(module: str, folder: Path) -> Path | None:
    base = folder.joinpath(*module.split("."))
    return next((file for file in (base.with_name(f"{base.name}.py"), base / "__init__.py") if file.is_file()), None)


def _is_module_here(top: str, folder: Path) -> bool:
    return (folder / top).is_dir() or (folder / f"{top}.py").is_file()


def _defined(key: str, module: str, function: str, file: Path) -> Iterator[Diagnostic]:
    try:
        tree = ast.parse(file.read_bytes(), filename=file.name)
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        yield Diagnostic(key=key, message=f"{file.name}{where} is not Python: {getattr(error, 'msg', error)}")
        return
    names = {name for statement in ast.walk(tree) for name in _names(statement)}
    if function not in names and "*" not in names and "__getattr__" not in names:
        near = nearest(function, names)
        suggestion = f"did you mean `{module}:{near}`?" if near else ""
        yield Diagnostic(key=key, message=f"{file.name} defines no `{function}`", suggestion=suggestion)


def _names(statement: ast.AST) -> Iterator[str]:
    """Names that a statement may bind, at any depth: enough to tell that one is nowhere."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.Name) and isinstance(statement.ctx, ast.Store):
        yield statement.id
