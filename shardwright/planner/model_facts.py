"""What a plan says of the model: its own facts, and what its modules become where several processes share them.

[Note: patterns]
Modules whose paths differ in numbers alone (`model.layers.0.self_attn.q_proj`) are named together, with `*` for each
number, where all modules of such paths are treated alike; else with `*` for the first number, the block's, where that
holds (`blocks.*.mlp.0`, `blocks.*.mlp.2`); else each is named by its own path. Some places may have no such module:
of a model whose first layers are dense, only the others have experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from shardwright.planner.precisions import PRECISIONS
from shardwright.planner.space import Point
from shardwright.schemas.plan import Division, ExpertModules, ModelFacts
from shardwright.schemas.profile import ModelProfile, ModuleStyle, Parameter

_DIVIDED = ("column", "row", "vocabulary")
T = TypeVar("T")


def model_facts(profile: ModelProfile, point: Point) -> ModelFacts:
    """The model section of a point's plan."""
    shared, context = point.parallel, profile.context_parallelism
    return ModelFacts(
        name=profile.name,
        parameters=profile.numel,
        block_paths=profile.block_paths,
        init=profile.init,
        attention=profile.attention[PRECISIONS[point.precision].compute],
        local_sources=profile.local_sources,
        packages=profile.packages,
        divisions=divisions(profile) if shared.tp > 1 else (),
        head=context.head if shared.cp > 1 else "",
        causal=context.causal if shared.cp > 1 else True,
        expert_modules=expert_modules(profile) if shared.ep > 1 else (),
    )


def divisions(profile: ModelProfile) -> tuple[Division, ...]:
    """How tensor parallelism divides the modules. One module may have several: they keep their order."""
    parameters = _by_module(profile.parameters)
    styles: defaultdict[str, list[Division]] = defaultdict(list)
    for style in profile.tensor_parallelism.styles:
        styles[style.path].append(_division(style, parameters.get(style.path, {})))
    return tuple(
        division.model_copy(update={"pattern": pattern})
        for pattern, found in as_patterns(styles, _modules(profile)).items()
        for division in found
    )


def expert_modules(profile: ModelProfile) -> tuple[ExpertModules, ...]:
    """The modules that hold experts which several processes share."""
    layers = {
        each.path: ExpertModules(pattern="", experts=each.experts, chosen=each.chosen, attributes=each.attributes)
        for each in profile.expert_layers
    }
    found = as_patterns(layers, _modules(profile))
    return tuple(layer.model_copy(update={"pattern": pattern}) for pattern, layer in found.items())


def _division(style: ModuleStyle, parameters: Mapping[str, Parameter]) -> Division:
    """Without its pattern. `parameters`: the module's own, by their names in it."""
    divided = {name: each for name, each in parameters.items() if each.tensor_parallel in _DIVIDED}
    if style.style not in ("column", "row", "vocabulary", "experts"):
        divided = {}
    return Division(
        pattern="",
        style=style.style,
        enters=style.enters,
        sequence_dim=style.sequence_dim,
        attributes=style.attributes,
        dims={name: each.tensor_parallel_dim for name, each in divided.items()},
        units=_units(list(divided.values())),
        parts={name: each.tensor_parallel_parts for name, each in divided.items() if each.tensor_parallel_parts},
    )


def _units(parameters: Sequence[Parameter]) -> int:
    """Into how many pieces they can be divided; 0 for rows of the vocabulary, whose pieces need not be equal."""
    if any(each.tensor_parallel == "vocabulary" for each in parameters):
        return 0
    return min((each.tensor_parallel_units for each in parameters), default=0)


def as_patterns(treated: Mapping[str, T], modules: Iterable[str]) -> dict[str, T]:
    """What is done to each module, by pattern instead of by path ([Note: patterns]). `modules`: all that there are."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for path in dict.fromkeys((*modules, *treated)):
        for pattern in dict.fromkeys(_patterns(path)):
            alike[pattern].append(path)
    found: dict[str, T] = {}
    for path, treatment in treated.items():
        for pattern in (*_patterns(path), path):
            if all(other in treated and treated[other] == treatment for other in alike.get(pattern, [path])):
                found[pattern] = treatment
                break
    return found


def _patterns(path: str) -> tuple[str, str]:
    """With `*` for every number, and for the first one alone."""
    parts = path.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    every = ".".join("*" if at in numbers else part for at, part in enumerate(parts))
    first = ".".join("*" if at in numbers[:1] else part for at, part in enumerate(parts))
    return every, first


def _modules(profile: ModelProfile) -> dict[str, None]:
    """Paths of all modules that have parameters, or have modules with some."""
    names = [name for each in profile.parameters for name in (each.name, *each.also)]
    parts: Sequence[list[str]] = [name.split(".") for name in names]
    return {".".join(each[:end]): None for each in parts for end in range(1, len(each))}


def _by_module(parameters: Sequence[Parameter]) -> dict[str, dict[str, Parameter]]:
    """The parameters of each module itself, by their names in it."""
    found: defaultdict[str, dict[str, Parameter]] = defaultdict(dict)
    for each in parameters:
        for name in (each.name, *each.also):
            module, _, own = name.rpartition(".")
            found[module][own] = each
    return found
