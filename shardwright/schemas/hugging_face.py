"""What is read of a Hugging Face configuration without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from keyword import iskeyword
from typing import Any

from shardwright.schemas.diagnostics import Diagnostic, InputError, shown


def architecture(config: Mapping[str, Any]) -> str | None:
    """The class of transformers that a configuration names: the first of `architectures`; None where it names none,
    and transformers chooses by `model_type`. Raises InputError where that is no list or no name of a class."""
    names = config.get("architectures")
    if names is None:
        return None
    hint = "for example architectures: [LlamaForCausalLM]; without it, transformers chooses by model_type"
    if isinstance(names, str) and _is_name(names):
        hint = f"write architectures: [{names}]"
    if not isinstance(names, list) or not names:
        message = f"`architectures` lists classes of transformers, of which the first is built; found {shown(names)}"
    elif not _is_name(names[0]):
        message = f"architectures: {shown(names[0])} is not a model of transformers"
    else:
        return str(names[0])
    raise InputError(Diagnostic(key="model.hf", message=message, suggestion=hint))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isidentifier() and not iskeyword(value)
