"""What is wrong with the roles that a job gives modules (`strategy.tensor_parallel.overrides`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from shardwright.passes.tensor_parallel import Analysis, Override
from shardwright.schemas.diagnostics import Diagnostic

KEY = "strategy.tensor_parallel.overrides"
_PAIRED = ("column", "row")


def unmatched(model: nn.Module, overrides: Mapping[str, Override]) -> Iterator[Diagnostic]:
    """For patterns that no module with weights matches."""
    paths = [path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    for pattern in overrides:
        if not any(fnmatchcase(path, pattern) for path in paths):
            known = list(dict.fromkeys(re.sub(r"\d+", "*", path) for path in paths))
            near = get_close_matches(pattern, known, n=1, cutoff=0)
            yield Diagnostic(
                key=f"{KEY}.{pattern}",
                message="no module with weights of its own has a path like this",
                suggestion=f"did you mean `{near[0]}`?" if near else "",
            )


def impossible(analysis: Analysis, overrides: Mapping[str, Override]) -> Iterator[Diagnostic]:
    """For patterns that give a role to a module without a matrix that could have it, or to one side of a pair alone."""
    paired = {name for group in analysis.groups for name in group.divisions}
    for pattern, role in overrides.items():
        if role == "replicated":
            continue
        roles = {
            name: division.role
            for name, division in analysis.divisions.items()
            if fnmatchcase(name.rpartition(".")[0], pattern)
        }
        having = {name.rpartition(".")[0] for name, found in roles.items() if found == role}
        without = next((name for name in roles if name.rpartition(".")[0] not in having), None)
        alone = next((name for name, found in roles.items() if found in _PAIRED and name not in paired), None)
        if without is not None:
            yield _wrong(pattern, without, f"has no matrix that can be `{role}`", "`replicated`, or leave it out")
        elif alone is not None and role == "row":
            yield _wrong(pattern, alone, "is a `row`, and no `column` comes before it", "`column`, or leave it out")
        elif alone is not None and role == "column":
            yield _wrong(pattern, alone, "is a `column`, and no `row` comes after it", "`row`, or leave it out")


def _wrong(pattern: str, parameter: str, why: str, instead: str) -> Diagnostic:
    module = parameter.rpartition(".")[0]
    return Diagnostic(key=f"{KEY}.{pattern}", message=f"{module} {why}", suggestion=f"write {instead}")
