"""A small model of the same make: fewer layers, narrower, without dropout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwright.rehearse.report_types import Change
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.job import ModelSpec

DEPTH = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "layers", "num_blocks", "n_blocks", "depth")
"""Names under which configurations and factories take their number of blocks."""
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff")
_DROPOUT = ("dropout", "pdrop", "drop_rate")

BLOCKS = 3
"""A first, a last and one between: what wraps, recomputes or prefetches blocks treats these differently."""
_HEAD_DIM = 16
SMALL_VOCABULARY = 256


def shrink_model(
    model: ModelSpec, folder: Path, vocabulary: int | None, blocks: int = BLOCKS, heads: int = 1
) -> tuple[ModelSpec, list[Change]]:
    """The model for a rehearsal, and what became of which of its numbers.

    `folder`: where relative paths of the job start. `vocabulary`: the number of token ids that the rehearsal's data may
    hold, or None to leave the model's own. `blocks`: at most so many are kept. `heads`: a multiple of so many key-value
    heads stays where the model has as many. `model.rehearse` has the last word.
    Raises InputError if the configuration cannot be read.
    """
    if model.hf is None:
        before, changed, key = model.args, _small_args(model.args, blocks), "model.args"
    else:
        before, key = _configuration(model.hf, folder), "model.hf"
        changed = _small_configuration(_complete(before), vocabulary, blocks, heads)
    after = dict(before) | changed | model.rehearse
    changes = [
        Change(key=f"{key}.{name}", before=str(before.get(name, "default")), after=str(value), because=_why(name))
        for name, value in after.items()
        if name not in before or before[name] != value
    ]
    if model.weights != "random":
        why = "stored weights do not fit a smaller model"
        changes.append(Change(key="model.weights", before=model.weights, after="random", because=why))
    field = "args" if model.hf is None else "hf"
    return model.model_copy(update={field: after, "rehearse": {}, "weights": "random"}), changes


def _why(name: str) -> str:
    return "random numbers would differ between the runs" if _is_dropout(name) else ""


def _small_args(args: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """Fewer blocks and no dropout; a factory's other arguments mean what only its author knows."""
    small: dict[str, Any] = {name: min(value, blocks) for name, value in args.items() if _is_count(name, value, DEPTH)}
    return small | _without_dropout(args)


def _small_configuration(full: Mapping[str, Any], vocabulary: int | None, blocks: int, least: int) -> dict[str, Any]:
    """What to change in a Hugging Face configuration, given with its defaults filled in."""
    small: dict[str, Any] = _without_dropout(full)
    depth = next((full[name] for name in DEPTH if _is_count(name, full.get(name), DEPTH)), None)
    if depth is not None and depth > blocks:
        small |= {name: blocks for name in DEPTH if full.get(name) == depth}
        small |= {
            name: value[:blocks] for name, value in full.items() if isinstance(value, list) and len(value) == depth
        }
    small |= _small_width(full, least)
    known = full.get("vocab_size")
    if vocabulary is not None and isinstance(known, int) and known > vocabulary:
        small["vocab_size"] = vocabulary
        small |= {
            name: vocabulary - 1
            for name, value in full.items()
            if name.endswith("_token_id") and isinstance(value, int) and value >= vocabulary
        }
    return {name: value for name, value in small.items() if full.get(name) != value}


def _small_width(full: Mapping[str, Any], least: int) -> dict[str, Any]:
    """At most four heads of 16, or as many as are divided; grouped queries stay grouped; the inner width keeps its
    ratio to the width."""
    heads = next(((name, full[name]) for name in _HEADS if _is_count(name, full.get(name), _HEADS)), None)
    width = next(((name, full[name]) for name in _WIDTH if _is_count(name, full.get(name), _WIDTH)), None)
    if heads is None or width is None:
        return {}
    shared = full.get("num_key_value_heads") or heads[1]
    group = min(heads[1] // shared, 2)
    few = min(shared, max(4 // group, least))
    hidden = few * group * _HEAD_DIM
    if hidden >= width[1]:
        return {}
    small: dict[str, Any] = {width[0]: hidden, heads[0]: few * group}
    if full.get("num_key_value_heads"):
        small["num_key_value_heads"] = few
    if isinstance(full.get("head_dim"), int):
        small["head_dim"] = _HEAD_DIM
    for name in _INNER:
        if _is_count(name, full.get(name), _INNER):
            small[name] = max(_HEAD_DIM, round(full[name] * hidden / width[1] / _HEAD_DIM) * _HEAD_DIM)
    return small


def _without_dropout(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: 0.0
        for name, value in values.items()
        if _is_dropout(name) and isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    }


def _is_dropout(name: str) -> bool:
    return any(part in name for part in _DROPOUT)


def _is_count(name: str, value: Any, names: tuple[str, ...]) -> bool:
    return name in names and isinstance(value, int) and not isinstance(value, bool)


def _configuration(hf: str | Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration's own content: inline, a JSON file, or a folder with a `config.json`."""
    if not isinstance(hf, str):
        return dict(hf)
    path = folder / hf
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"no Hugging Face configuration can be read from {hf!r}: {error}"
        raise InputError(Diagnostic(key="model.hf", message=message)) from error
    return dict(content)


def _complete(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the defaults of its model type filled in, dropout among them."""
    from transformers import AutoConfig

    rest = {name: value for name, value in configuration.items() if name != "model_type"}
    return dict(AutoConfig.for_model(configuration["model_type"], **rest).to_dict())
