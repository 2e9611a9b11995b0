"""Python files compared by their syntax alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator


def shape(tree: ast.AST) -> Iterator[str]:
    """The tree without what constants hold."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            yield f"constant {type(node.value).__name__}"
        elif isinstance(node, ast.Name | ast.Attribute):
            yield f"{type(node).__name__} {node.id if isinstance(node, ast.Name) else node.attr}"
        else:
            yield type(node).__name__
