"""What the emission of tensor, context and expert parallelism holds; `test_parallel_scripts.py` runs such scripts."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from support.hostile import HOSTILE
from support.parallel_plans import GPT2_DIVISIONS, LLAMA_DIVISIONS, MIXTRAL_EXPERTS, parallel_plan
from support.pipeline_plans import pipeline_plan
from support.plans import make_plan
from support.shapes import shape

from shardwright.backends.pytorch import emit
from shardwright.backends.pytorch.parallel_constants import STYLES
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.plan import Division, ExpertModules, Plan

SUPPORT = Path(__file__).parents[1] / "support"


def script(of: Plan) -> str:
    return emit(of, SUPPORT, SUPPORT / "out").files["train.py"]


def divided(*divisions: Division, **made: Any) -> Plan:
    return parallel_plan(make_plan(world=2, engine="fsdp2", shard=2, **made), tp=2, divisions=divisions)


def table(text: str, name: str = "TENSOR_PARALLEL") -> dict[str, tuple[str, dict[str, Any]]]:
    """The constant `TENSOR_PARALLEL`: of each pattern the class and its arguments."""
    assigned = next(
        node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name
    )
    assert isinstance(assigned, ast.Dict)
    found = {}
    for key, value in zip(assigned.keys, assigned.values, strict=True):
        assert key is not None
        assert isinstance(value, ast.Call)
        assert not value.args
        arguments = {str(each.arg): ast.literal_eval(each.value) for each in value.keywords}
        found[ast.literal_eval(key)] = (ast.unparse(value.func), arguments)
    return found


@pytest.mark.parametrize("divisions", [LLAMA_DIVISIONS, GPT2_DIVISIONS])
def test_the_table_says_what_the_plan_does(divisions: tuple[Division, ...]) -> None:
    found = table(script(divided(*divisions)))
    assert list(found) == [division.pattern for division in divisions]
    for division in divisions:
        style, arguments = found[division.pattern]
        assert style == STYLES[division.style]
        assert {name: value for name, value in division if name not in ("pattern", "style")} == {
            "enters": False,
            "sequence_dim": None,
            "attributes": (),
            "dims": {},
            "units": 0,
            "parts": {},
        } | arguments


def named(name: str) -> Plan:
    """A plan with this name at every place that takes one of a module, a parameter or an attribute."""
    division = Division(pattern=name, style="column", attributes=(name,), dims={name: 0}, parts={name: (1, 2)}, units=2)
    return parallel_plan(
        make_plan(world=4, engine="fsdp2", shard=4),
        tp=2,
        cp=2,
        ep=2,
        divisions=(division,),
        head=name,
        expert_modules=(ExpertModules(pattern=name, experts=4, chosen=2, attributes=(name,)),),
    )


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_of_modules_are_values(hostile: str) -> None:
    """Patterns and attributes come from a model's own names."""
    plan = named(hostile)
    text, made = script(plan), plan.model.divisions[0]  # pydantic replaces what no UTF-8 can hold in keys
    assert list(shape(ast.parse(text))) == list(shape(ast.parse(script(named("a")))))
    arguments = {"attributes": (hostile,), "dims": made.dims, "units": 2, "parts": made.parts}
    assert table(text) == {hostile: ("Column", arguments)}
    for name, expected in (("HEAD", hostile), ("EXPERT_LAYERS", {hostile: (hostile,)})):
        assert value_of(text, name) == expected


def value_of(text: str, name: str) -> Any:
    """The value of a constant."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) == name:
                return ast.literal_eval(node.value)
    return None


def experts(world: int, **made: Any) -> Plan:
    return parallel_plan(make_plan(world=world, **made), ep=2, expert_modules=MIXTRAL_EXPERTS)


@pytest.mark.parametrize(
    ("shard", "mesh", "axes", "sums"),
    [
        (8, (4, 2), ("expert_shard", "ep"), True),
        (4, (2, 2, 2), ("expert_replicate", "expert_shard", "ep"), True),
        (2, (4, 1, 2), ("expert_replicate", "expert_shard", "ep"), False),
    ],
)
def test_experts_are_sharded_over_the_processes_with_the_same_ones(
    shard: int, mesh: tuple[int, ...], axes: tuple[str, ...], sums: bool
) -> None:
    text = script(experts(8, engine="fsdp2", shard=shard))
    assert value_of(text, "EXPERT_MESH") == mesh
    assert value_of(text, "EXPERT_AXES") == axes
    # gloo has no operation that divides and adds up in one.
    assert ("set_force_sum_reduction_for_comms" in text) == sums


def test_amsp_shards_experts_over_the_slower_axes() -> None:
    text = script(experts(8, engine="amsp", axes=(2, 4), shard=2, optimizer=8))
    assert 'expert_levels = Levels(\n        mesh["dp_2"],' in text
    with pytest.raises(InputError, match="no product of the fastest"):
        script(experts(8, engine="amsp", axes=(4, 2), shard=4, optimizer=8))


def test_one_of_the_processes_that_read_the_same_samples_counts_them() -> None:
    both = parallel_plan(make_plan(world=4, engine="fsdp2", shard=4), tp=2, cp=2, divisions=LLAMA_DIVISIONS)
    assert "if part == 0 and copy % CONTEXT_RANKS == 0 else 0.0" in script(both)
    assert "if rank % CONTEXT_RANKS == 0 else 0.0" in script(parallel_plan(make_plan(world=2, engine="ddp"), cp=2))
    assert "if rank == 0 else 0.0" in script(parallel_plan(make_plan(), tp=2, divisions=LLAMA_DIVISIONS))
    staged = pipeline_plan(make_plan(world=4, engine="amsp", axes=(2,)), ranks=2, copies=2, micro_batches=3)
    piped = parallel_plan(staged, tp=2, cp=2, divisions=LLAMA_DIVISIONS)
    assert "if place == 0 and part == 0 and copy % CONTEXT_RANKS == 0 else 0.0" in script(piped)


def test_without_a_divided_head_logits_are_whole() -> None:
    assert "divide_cross_entropy" in script(divided(*LLAMA_DIVISIONS))
    inside = Division(pattern="blocks.*.up", style="column", enters=True, dims={"weight": 0}, units=2)
    assert "divide_cross_entropy" not in script(divided(inside))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: divided(), "needs them"),
        (lambda: divided(LLAMA_DIVISIONS[0], LLAMA_DIVISIONS[0]), "twice"),
        (lambda: experts(2, engine="ddp"), "cannot share experts"),
        (lambda: parallel_plan(make_plan(world=2, engine="fsdp2", shard=2), ep=2), "needs them"),
        (lambda: parallel_plan(make_plan(world=3, engine="fsdp2", shard=3), cp=2), "do not divide"),
        (
            lambda: parallel_plan(make_plan(world=2, engine="ddp", model={"loss": "custom:loss"}), cp=2),
            "sum over positions",
        ),
    ],
)
def test_what_no_script_can_do_is_refused(plan: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        script(plan())
