"""What tensor, sequence, context and expert parallelism add to a script: tables, second meshes, and who counts what.

[Note: who reads what]
The rank of a process is (place * copies + copy) * parts + part: `place` along the pipeline, `copy` among the processes
that have the same part of every layer, `part` along tensor parallelism. Parts of one copy read the same samples and
have the same loss, so only the first of them counts targets. With context parallelism so many neighbouring copies read
the same samples, too; each has the loss of its own positions.
"""

from __future__ import annotations

from typing import Any

from shardwright.backends.pytorch.parallel_constants import data_processes, degrees, divided_head, expert_axes
from shardwright.backends.pytorch.recipes import COMPUTE_DTYPES, PRECISION_POLICIES, recipe_context
from shardwright.backends.pytorch.text import LINE_LENGTH, literal
from shardwright.planner.engines import ENGINES
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.plan import Decision, Plan


def is_divided(decision: Decision) -> bool:
    """Whether processes have parts of tensors, so that norm and checkpoints have to know of it."""
    return decision.tensor_parallel.degree > 1 or decision.expert_parallel.degree > 1


def parallel_context(plan: Plan) -> dict[str, Any]:
    """What the templates look up of parallelism; see [Note: who reads what].

    `copies`: processes that have the same part; `copy`, `part`, `place`: names of a process's rank among them, along
    tensor parallelism and along the pipeline; `counts`: the condition under which a process counts targets, empty where
    all do; `data_axes`: the part of the mesh that states are sharded over; `and_sequences`: what every call of the loss
    adds.
    """
    decision = plan.decision
    tp, cp, ep = degrees(decision)
    _check(plan)
    pipelined, copies = decision.pipeline.schedule != "none", data_processes(decision)
    place = "place" if pipelined and (copies > 1 or tp > 1) else "rank"
    copy, part = ("copy" if pipelined or tp > 1 else "rank"), ("part" if pipelined or copies > 1 else "rank")
    size = "COPIES" if pipelined or tp > 1 else "WORLD_SIZE"
    shares = " // CONTEXT_RANKS" if cp > 1 else ""
    counts = [f"{place} == 0"] * pipelined + [f"{part} == 0"] * (tp > 1) + [f"{copy} % CONTEXT_RANKS == 0"] * (cp > 1)
    inner = slice(1 if pipelined else None, -1 if tp > 1 else None)
    axes = ":".join("" if end is None else str(end) for end in (inner.start, inner.stop))
    return {
        "tp": tp,
        "cp": cp,
        "ep": ep,
        "divides_sequence": decision.tensor_parallel.sequence or cp > 1,
        "divided": is_divided(decision),
        "divided_head": tp > 1 and bool(divided_head(plan)),
        "divide_sequence": _divide_sequence(plan),
        "place": place,
        "copy": copy,
        "part": part,
        "copies": copies,
        "size": size,
        "batch_rank": f"{copy}{shares}",
        "batch_size": f"{size}{shares}",
        "shared_batches": copies == cp,
        "counts": " and ".join(counts),
        "data_axes": "mesh" if axes == ":" else f"mesh[MESH_AXES[{axes}]]",
        "and_sequences": ", sequences" if cp > 1 else "",
        "data": "data" if tp > 1 else "mesh",
        "loss_shares": "TENSOR_RANKS / " if tp > 1 and decision.engine.name != "single" else "",
        "counted": _counted(copy, cp),
        "tied_copies": " * ".join(["COPIES"] * (copies > 1) + ["TENSOR_RANKS"] * (tp > 1)) or "1",
        "several_meshes": ep > 1 and decision.engine.name == "fsdp2",
        "holder": _holder(decision, pipelined),
        "states_call": _states_call(plan, pipelined),
        "expert_precision": _expert_precision(decision),
        "norm_call": _norm(decision, pipelined),
        **_signatures(plan, pipelined, place),
        **_expert_context(decision),
    }


def _expert_context(decision: Decision) -> dict[str, Any]:
    """`expert_mesh`: the part of the second mesh that fsdp2 shards experts over; of amsp `expert_data`, the axes of the
    mesh beyond those that share experts, and `expert_gathers` and `expert_reductions`, those of fewer bits there."""
    ep, copies = decision.expert_parallel.degree, data_processes(decision)
    if ep == 1:
        return {}
    if decision.engine.name == "fsdp2":
        names = tuple(name for name in expert_axes(decision, copies, ep) if name != "ep")
        written = ", ".join(map(literal, names))
        options = ["layer", "mesh=shared"] + ["mp_policy=expert_precision"] * (decision.precision != "fp32")
        options.append(f"reshard_after_forward={_expert_reshard(decision, copies)}")
        return {
            "expert_mesh": f"expert_mesh[{written}]",
            "sums_experts": expert_axes(decision, copies, ep)["expert_shard"] > 1,
            "shard_experts": wrapped("sharded = fully_shard(", options, ")", 12),
        }
    left, axes = ep, [axis for axis in decision.mesh.axes if axis.name.startswith("dp_")]
    while left > 1 and axes and left % axes[-1].size == 0:
        left //= axes.pop().size
    if left > 1:
        message = f"{ep} processes that share experts are no product of the fastest data axes"
        raise InputError(Diagnostic(key="decision.expert_parallel.degree", message=message))
    names = tuple(axis.name for axis in axes)
    sent = decision.communication
    return {
        "expert_data": f"mesh[{', '.join(map(literal, names))}]" if names else "None",
        "expert_gathers": tuple(name for name in sent.int8_gathers if name in names),
        "expert_reductions": tuple(name for name in sent.int4_reductions if name in names),
    }


def _expert_reshard(decision: Decision, copies: int) -> str:
    """`reshard_after_forward` of experts: over so many devices fewer, where the blocks' is a number."""
    if decision.states.secondary is None:
        return "RESHARD_AFTER_FORWARD"
    ep = decision.expert_parallel.degree
    kept = decision.states.secondary.degree // ep
    return literal(False if kept <= 1 else True if kept >= expert_axes(decision, copies, ep)["expert_shard"] else kept)


def _divide_sequence(plan: Plan) -> str:
    decision = plan.decision
    cp = decision.context_parallel.degree
    options = ["model", "BLOCKS"] + ['tensor=mesh["tp"]'] * decision.tensor_parallel.sequence
    if cp > 1:
        options += [
            "context=context",
            *(["head=HEAD"] if plan.model.head else []),
            "method=CONTEXT_METHOD",
            f"causal={plan.model.causal}",
        ]
    return wrapped(f"{'sequences = ' * (cp > 1)}divide_sequence(", options, ")", 4)


def _counted(copy: str, cp: int) -> str:
    """Learnt targets, as a tensor to be summed over the copies."""
    number = "learnt_targets(micro_batches)"
    if cp > 1:
        return f"""counted = torch.zeros((), dtype=torch.float64, device=device)
        if {copy} % CONTEXT_RANKS == 0:  # one of the processes that share each sequence
            counted += {number}"""
    return f"counted = torch.tensor({number}, dtype=torch.float64, device=device)"


def _holder(decision: Decision, pipelined: bool) -> str:
    """What knows where tensors lie; empty where the stock one does."""
    flat = pipelined or ENGINES[decision.engine.name].flat
    if is_divided(decision):
        tensor = ', tensor=mesh["tp"]' if decision.tensor_parallel.degree > 1 else ""
        return f"DividedHolder(model{', FlatHolder(states)' if flat else ''}{tensor})"
    return "FlatHolder(states)" if flat else ""


def _norm(decision: Decision, pipelined: bool) -> str:
    """The norm of the whole gradient."""
    if pipelined:
        return 'states.gradient_norm(mesh.get_group("pp"))'
    if ENGINES[decision.engine.name].flat:
        return "states.gradient_norm()"
    return (
        f"divided_gradient_norm(model, {_tensor_ranks(decision)})"
        if is_divided(decision)
        else "gradient_norm(model.parameters())"
    )


def _tensor_ranks(decision: Decision) -> str:
    return "TENSOR_RANKS" if decision.tensor_parallel.degree > 1 else "1"


def _states_call(plan: Plan, pipelined: bool) -> str:
    """`states = ShardedStates(...)`."""
    decision = plan.decision
    reshards = decision.engine.reshard_after_forward is not None and plan.model.block_paths and not pipelined
    options = ["levels", f"torch.{COMPUTE_DTYPES[decision.precision]}"]
    options += ["reshard_after_forward=RESHARD_AFTER_FORWARD"] if reshards else []
    options += ["kind_of=kinds"] if recipe_context(plan.job.train)["own_groups"] else []
    if decision.expert_parallel.degree > 1:
        options += ["experts=expert_levels", "is_expert=experts.has"]
    if is_divided(decision):
        options += [f"share_of=share_of(model, {_tensor_ranks(decision)})"]
    return wrapped("states = ShardedStates(", options, ")", 4)


def _expert_precision(decision: Decision) -> str:
    """What `fully_shard` gets for experts: inputs keep their dtypes, for the weights of tokens come in fp32."""
    policy = PRECISION_POLICIES[decision.precision]
    if policy is None:
        return ""
    head, _, rest = policy.partition("(")
    items = [*rest.removesuffix(")").split(", "), "cast_forward_inputs=False"]
    return wrapped(f"expert_precision = {head}(", items, ")", 4)


def _signatures(plan: Plan, pipelined: bool, place: str) -> dict[str, Any]:
    """Parameters, arguments and results of `build_model`."""
    decision = plan.decision
    tp, cp, ep = degrees(decision)
    engine, flat = decision.engine.name, pipelined or ENGINES[decision.engine.name].flat
    on_cuda = plan.job.cluster.device.kind == "cuda"
    needs_mesh = tp > 1 or (engine == "fsdp2" and not pipelined)
    takes_device = flat or engine != "fsdp2" or plan.model.init == "modules"
    parameters = [
        *([("device", "torch.device", "device")] if takes_device else []),
        *([("mesh", "DeviceMesh", "mesh")] if needs_mesh else []),
        *([("context", "DeviceMesh", "context")] if cp > 1 else []),
        *([("expert_mesh", "DeviceMesh", "expert_mesh")] if ep > 1 else []),
        *([("levels", "Levels", "levels")] if flat else []),
        *([("expert_levels", "Levels", "expert_levels")] if flat and ep > 1 else []),
    ]
    if pipelined:
        batch = "to_device(batches(0), device)" if on_cuda else "batches(0)"
        parameters += [(place, "int", place), ("batch", "Batch", batch)]
    results = [("model", "nn.Module")]
    results += [("placed", "StageStates")] if pipelined else [("states", "ShardedStates")] if flat else []
    results += [("sequences", "Sequences")] * (cp > 1 and not pipelined) + [("experts", "Experts")] * (ep > 1)
    types = ", ".join(kind for _, kind in results)
    returns = types if len(results) == 1 else f"tuple[{types}]"
    made = ", ".join(name for name, _ in results)
    loss = "functools.partial(summed_loss, sequences=sequences)" if cp > 1 else "summed_loss"
    compute = COMPUTE_DTYPES[decision.precision]
    followed = ["model", "BLOCKS", "STAGE_CUTS", "own", loss, "batch", f"torch.{compute}"]
    return {
        "build_signature": wrapped(
            "def build_model(", [f"{name}: {kind}" for name, kind, _ in parameters], f") -> {returns}:", 0
        ),
        "build_call": wrapped(f"{made} = build_model(", [given for _, _, given in parameters], ")", 4),
        "made": made,
        "stages_call": wrapped("stages = stages_of(", followed, ")", 4).removeprefix("stages = "),
    }


def wrapped(head: str, items: list[str], tail: str, indent: int) -> str:
    """A call or signature as `ruff format` lays it out where its first line is indented so far; the first line comes
    without the indent."""
    flat = ", ".join(items)
    if indent + len(head) + len(flat) + len(tail) <= LINE_LENGTH:
        return f"{head}{flat}{tail}"
    inner, outer = " " * (indent + 4), " " * indent
    if len(inner) + len(flat) <= LINE_LENGTH:
        return f"{head}\n{inner}{flat}\n{outer}{tail}"
    lines = [f"{inner}{item}," for item in items]
    return "\n".join([head, *lines, f"{outer}{tail}"])


def _check(plan: Plan) -> None:
    """Raises InputError for what no script can do."""
    decision = plan.decision
    tp, cp, ep = degrees(decision)
    problems = []
    if tp > 1 and not plan.model.divisions:
        problems.append(("model.divisions", "a plan with tensor parallelism needs them"))
    if tp > 1 and len({division.pattern for division in plan.model.divisions}) < len(plan.model.divisions):
        problems.append(("model.divisions", "a pattern comes twice"))
    if cp > 1 and plan.job.model.loss != "next_token":
        problems.append(("decision.context_parallel", "only the loss next_token is known to be a sum over positions"))
    if ep > 1 and not plan.model.expert_modules:
        problems.append(("model.expert_modules", "a plan with expert parallelism needs them"))
    if ep > 1 and decision.engine.name not in ("fsdp2", "amsp"):
        problems.append(("decision.expert_parallel", f"the engine {decision.engine.name} cannot share experts"))
    if tp * cp * ep > 1 and data_processes(decision) % cp + data_processes(decision) % ep:
        problems.append(
            ("decision", f"{data_processes(decision)} processes do not divide into groups of {cp} and {ep}")
        )
    if problems:
        raise InputError([Diagnostic(key=key, message=message) for key, message in problems])
