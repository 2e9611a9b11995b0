"""Profiles of models that several processes may share, made by hand: a Llama divided as Megatron-LM divides it, and one
with experts.

Of t processes each has 1/t of all that a layer computes between its columns and rows; with the sequence divided too,
also of what it does between these (arXiv 2205.05198, section 4.2.2). What they tell one another is theirs as well: four
gathers and four scatters of b s h a layer, as many bytes as four all-reduces.
"""

from __future__ import annotations

from dataclasses import replace

from shardwright.schemas.profile import (
    Affine,
    ComputeDtypeName,
    ContextParallelism,
    Exchange,
    ExpertLayer,
    ModelProfile,
    ModuleStyle,
    Operator,
    Parameter,
    TensorParallelism,
    Unit,
    UnitCost,
)
from tests.planner.profiles import BYTES, NAMES, cuttable, llama

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


def divisible(
    *,
    layers: int = 4,
    heads: int = 32,
    kv_heads: int = 8,
    hidden: int = 4096,
    sequence: int = 8192,
    context: bool = True,
) -> ModelProfile:
    """A Llama that 2, 4 and 8 processes may share, that can be cut, and whose sequences may be divided."""
    profile = cuttable(llama(layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, sequence=sequence))
    degrees = (2, 4, 8)
    units = tuple(_divisible(unit, degrees, hidden, sequence, heads, kv_heads) for unit in profile.units)
    return replace(
        profile,
        parameters=tuple(_role(each, heads, kv_heads) for each in profile.parameters),
        units=units,
        tensor_parallelism=TensorParallelism(degrees=degrees, sequence=True, styles=_styles(profile)),
        context_parallelism=ContextParallelism(
            refused="" if context else "it mixes positions", causal=True, heads=heads, kv_heads=kv_heads
        ),
    )


def with_experts(profile: ModelProfile, *, experts: int = 8, chosen: int = 2, ffn: int = 1024) -> ModelProfile:
    """The profile with a layer of experts in each block; of its operators, `mlp.experts` are theirs."""
    hidden = next(each for each in profile.parameters if each.name.endswith("norm.weight")).shape[0]
    stacks, layers = [], []
    for path in profile.block_paths:
        layers.append(ExpertLayer(path=f"{path}.experts", experts=experts, chosen=chosen, features=hidden))
        for name, shape in (("up", (experts, ffn, hidden)), ("down", (experts, hidden, ffn))):
            stacks.append(
                Parameter(name=f"{path}.experts.{name}", shape=shape, trainable=True, unit=1, experts=experts)
            )
    units = tuple(
        replace(unit, costs={dtype: _routed(cost, dtype, ffn, hidden, chosen) for dtype, cost in unit.costs.items()})
        if unit.kind == "block"
        else unit
        for unit in profile.units
    )
    first, rest = profile.parameters[0], profile.parameters[1:]
    return replace(
        profile,
        parameters=(first, *stacks, *rest),
        units=units,
        expert_layers=tuple(layers),
        tensor_parallelism=TensorParallelism(refused="its experts are"),
    )


def _routed(cost: UnitCost, dtype: ComputeDtypeName, ffn: int, hidden: int, chosen: int) -> UnitCost:
    work = 4 * 8192 * chosen * ffn * hidden
    made = tuple(
        Operator(
            name="mm",
            module="experts",
            phase=phase,
            kind="matmul",
            count=2,
            flops=Affine(0, work),
            bytes=Affine(800, 1000),
            shapes=(),
            dtype=NAMES[dtype],
            results=Affine(0, 100),
            kept=Affine(0, 50),
        )
        for phase in ("forward", "input_gradient", "weight_gradient")
    )
    return replace(cost, operators=(*cost.operators, *made))


def _role(parameter: Parameter, heads: int, kv_heads: int) -> Parameter:
    module = parameter.name.split(".")[-2]
    if module in ("embed_tokens", "lm_head"):
        role = "vocabulary" if module == "embed_tokens" else "column"
        return replace(parameter, tensor_parallel=role, tensor_parallel_units=parameter.shape[0])  # type: ignore[arg-type]
    units = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads, "o_proj": heads}
    if module in COLUMNS:
        count = units.get(module, parameter.shape[0])
        return replace(parameter, tensor_parallel="column", tensor_parallel_units=count)
    if module in ROWS:
        count = units.get(module, parameter.shape[1])
        return replace(parameter, tensor_parallel="row", tensor_parallel_dim=1, tensor_parallel_units=count)
    return replace(parameter, tensor_parallel="replicated")


def _styles(profile: ModelProfile) -> tuple[ModuleStyle, ...]:
    found = [ModuleStyle(path="model.embed_tokens", style="vocabulary")]
    for path in profile.block_paths:
        found += [ModuleStyle(path=f"{path}.input_layernorm", style="shared")]
        for name in ("q_proj", "k_proj", "v_proj"):
            found.append(ModuleStyle(path=f"{path}.self_attn.{name}", style="column"))
        found.append(ModuleStyle(path=f"{path}.self_attn.o_proj", style="row", sequence_dim=1))
    return (*found, ModuleStyle(path="lm_head", style="column", enters=True))


def _divisible(unit: Unit, degrees: tuple[int, ...], hidden: int, sequence: int, heads: int, kv_heads: int) -> Unit:
    def shaped(cost: UnitCost, degree: int) -> UnitCost:
        size = hidden // heads
        shapes = tuple((1, count, sequence, size) for count in (heads // degree, *[max(1, kv_heads // degree)] * 2))
        operators = tuple(replace(each, shapes=shapes) if each.kind == "attention" else each for each in cost.operators)
        return replace(cost, operators=operators)

    def local(cost: UnitCost, dtype: ComputeDtypeName, degree: int) -> UnitCost:
        row = Affine(0, sequence * hidden * BYTES[dtype])
        exchanges = tuple(
            Exchange(axis="tp", kind=kind, phase=phase, bytes=row, count=2, again=phase == "forward")  # type: ignore[arg-type]
            for phase in ("forward", "backward")
            for kind in ("all_gather", "reduce_scatter")
        )
        part = lambda line: Affine(line.constant // degree, line.slope // degree)  # noqa: E731
        return replace(
            cost,
            operators=tuple(replace(each, flops=part(each.flops), bytes=part(each.bytes)) for each in cost.operators),
            saved={policy: part(line) for policy, line in cost.saved.items()},
            forward_peak=part(cost.forward_peak),
            backward_peak={policy: part(line) for policy, line in cost.backward_peak.items()},
            exchanges=exchanges if unit.kind == "block" else (),
        )

    costs = {dtype: shaped(cost, 1) for dtype, cost in unit.costs.items()}
    divided = {
        degree: {dtype: shaped(local(cost, dtype, degree), degree) for dtype, cost in unit.costs.items()}
        for degree in degrees
    }
    return replace(unit, costs=costs, divided=divided)
