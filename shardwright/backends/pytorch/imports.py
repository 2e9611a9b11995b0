"""The import lines of a script, found from the names that its code uses, sorted as `ruff check --select I` wants."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import groupby
from types import MappingProxyType
from typing import NamedTuple


class Import(NamedTuple):
    """Where a name comes from. `section`: 0 standard library, 1 installed packages, 2 files beside the script."""

    section: int
    module: str
    name: str = ""
    """Empty: the module itself is imported."""
    alias: str = ""


KNOWN: Mapping[str, Import] = MappingProxyType(
    {
        "argparse": Import(0, "argparse"),
        "functools": Import(0, "functools"),
        "json": Import(0, "json"),
        "math": Import(0, "math"),
        "time": Import(0, "time"),
        "Sequence": Import(0, "collections.abc", "Sequence"),
        "ExitStack": Import(0, "contextlib", "ExitStack"),
        "nullcontext": Import(0, "contextlib", "nullcontext"),
        "Path": Import(0, "pathlib", "Path"),
        "Any": Import(0, "typing", "Any"),
        "torch": Import(1, "torch"),
        "dist": Import(1, "torch.distributed", alias="dist"),
        "Tensor": Import(1, "torch", "Tensor"),
        "nn": Import(1, "torch", "nn"),
        "DeviceMesh": Import(1, "torch.distributed.device_mesh", "DeviceMesh"),
        "init_device_mesh": Import(1, "torch.distributed.device_mesh", "init_device_mesh"),
        "FSDPModule": Import(1, "torch.distributed.fsdp", "FSDPModule"),
        "MixedPrecisionPolicy": Import(1, "torch.distributed.fsdp", "MixedPrecisionPolicy"),
        "ParallelStyle": Import(1, "torch.distributed.tensor.parallel", "ParallelStyle"),
        "parallelize_module": Import(1, "torch.distributed.tensor.parallel", "parallelize_module"),
        "fully_shard": Import(1, "torch.distributed.fsdp", "fully_shard"),
        "DistributedDataParallel": Import(1, "torch.nn.parallel", "DistributedDataParallel"),
        "checkpoint": Import(1, "torch.utils.checkpoint", "checkpoint"),
        "AutoConfig": Import(1, "transformers", "AutoConfig"),
        "AutoModelForCausalLM": Import(1, "transformers", "AutoModelForCausalLM"),
        **{
            name: Import(2, f"shardwright_runtime.{module}", name)
            for module, names in {
                "average": ("update_average",),
                "checkpoint": ("Checkpoints", "TrainState"),
                "meshes": ("by_mesh", "clip_by_mesh"),
                "late": ("LateStep", "LateSum", "heads"),
                "pipeline": ("Pipeline",),
                "program": ("read_program",),
                "stage_states": ("StageStates",),
                "stages": ("stages_of",),
                "data": (
                    "Batch",
                    "Batches",
                    "SyntheticTokens",
                    "byte_files",
                    "learnt_targets",
                    "to_device",
                    "token_files",
                ),
                "divided_holder": ("DividedHolder",),
                "experts": ("Experts", "divide_experts"),
                "export": ("export_model",),
                "gradients": ("gradient_norm",),
                "groups": ("ParameterGroup", "kind_of", "kind_options", "parameter_groups"),
                "held_flat": ("FlatHolder",),
                "hugging_face": ("hugging_face_names", "stored_form"),
                "initialize": ("allocate", "initialize", "parameters_on_meta"),
                "losses": ("model_loss", "next_token_loss"),
                "sequence": ("Sequences", "divide_sequence"),
                "session": ("MetricsLog", "Signals", "Timer", "only_device", "process_group", "seed_for"),
                "states": ("Levels", "ShardedStates"),
                "shares": ("divided_gradient_norm", "share_of"),
                "tensor_parallel": (
                    "Column",
                    "Region",
                    "Row",
                    "Scatter",
                    "Shared",
                    "TensorExperts",
                    "Vocabulary",
                    "matching",
                ),
                "tensor_parallel_loss": ("divide_cross_entropy",),
                "tensorfile": ("FormatError",),
                "weights": ("load_weights",),
            }.items()
            for name in names
        },
    }
)
"""Every name that a template may use without defining it."""


def imports_for(code: str, known: Mapping[str, Import]) -> tuple[str, frozenset[str]]:
    """The import lines that `code` needs, and the names of the runtime's modules among them."""
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    needed = sorted({known[name] for name in used & known.keys()}, key=_order)
    sections = ["\n".join(_lines(group)) for _, group in groupby(needed, key=lambda item: item.section)]
    runtime = (item.module.split(".")[1] for item in needed if item.module.startswith("shardwright_runtime."))
    return "\n\n".join(["from __future__ import annotations", *sections]), frozenset(runtime)


def _order(item: Import) -> tuple[int, bool, str]:
    return item.section, bool(item.name), item.module


def _lines(items: Iterable[Import]) -> list[str]:
    lines = []
    members: dict[str, list[Import]] = defaultdict(list)
    for item in items:
        if item.name:
            members[item.module].append(item)
        else:
            lines.append(f"import {item.module}" + (f" as {item.alias}" if item.alias else ""))
    for module, names in members.items():
        # Constants, then classes, then functions, each in alphabetical order.
        ordered = sorted(names, key=lambda item: (_rank(item.name), item.name))
        plain = [item.name for item in ordered if not item.alias]
        lines += [f"from {module} import {item.name} as {item.alias}" for item in ordered if item.alias]
        lines += [f"from {module} import {', '.join(plain)}"] if plain else []
    return lines


def _rank(name: str) -> int:
    return 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
