"""From a path to a tree of values."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.json_source import parse_json
from shardwright.schemas.nodes import Node, Source
from shardwright.schemas.yaml_source import parse_yaml

MAX_BYTES = 16 * 2**20
"""Largest file that is read; a job has a few kilobytes, a plan some hundred."""


def read_tree(path: Path) -> Node:
    """The values of a YAML file, or of a JSON file where its name ends in `.json`. Raises InputError."""
    source = Source(str(path), read_text(path))
    if not source.text.strip():
        raise InputError(Diagnostic(message="the file is empty", file=source.label))
    return (parse_json if path.suffix == ".json" else parse_yaml)(source)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, its lines ended by a line feed. Raises InputError."""
    label = str(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            message = f"the file is larger than {MAX_BYTES // 2**20} MiB, which no job or plan is"
            raise InputError(Diagnostic(message=message, file=label))
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}"
        raise InputError(Diagnostic(message=message, file=label, suggestion="save the file as UTF-8")) from None
    except FileNotFoundError:
        near = get_close_matches(path.name, _siblings(path), n=1)
        suggestion = f"did you mean {path.with_name(near[0])}?" if near else ""
        raise InputError(Diagnostic(message="there is no such file", file=label, suggestion=suggestion)) from None
    except OSError as error:
        raise InputError(Diagnostic(message=f"cannot be read: {error.strerror}", file=label)) from None


def _siblings(path: Path) -> list[str]:
    return [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
