"""The plan: what was decided, what it is predicted to cost, what else was considered and why that lost.

This is a public contract (`plan.json`, with a JSON Schema). It holds no timings and no absolute paths, so the same job
gives the same bytes.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shardwright.schemas.base import Spec
from shardwright.schemas.job import JobSpec, ScheduleName

SCHEMA_VERSION = 1


class ModelFacts(Spec):
    """What the plan and a backend need to know of the profiled model."""

    name: str
    parameters: int
    """Number of distinct parameters' elements."""
    block_paths: tuple[str, ...]
    """Module paths of the repeated blocks, in order of execution."""
    init: Literal["constructor", "modules"]
    attention: str
    """The attention kernel that the prediction assumes."""
    local_sources: tuple[str, ...]
    """Files of the user's model (and loss, and dataset) to bring along, relative to the job's folder."""
    packages: tuple[str, ...]
    """Installed packages that the script needs beyond torch."""
    divisions: tuple[Division, ...] = ()
    """Of a plan with tensor parallelism: how the model is divided."""
    head: str = ""
    """Of a plan with context parallelism: path of the module that makes the logits."""
    causal: bool = True
    """Of a plan with context parallelism: whether attention is causal."""
    expert_modules: tuple[ExpertModules, ...] = ()
    """Of a plan with expert parallelism: the modules that hold experts."""


class Division(Spec):
    """What a parallel layout does to the modules of one pattern; see `schemas.profile.ModuleStyle`."""

    pattern: str
    """Path of the modules, with `*` for one part of it that differs."""
    style: Literal["region", "column", "row", "vocabulary", "scatter", "shared", "experts"]
    enters: bool = False
    sequence_dim: int | None = None
    attributes: tuple[str, ...] = ()
    dims: dict[str, int] = {}
    """Of each divided parameter of the module, the dimension."""
    units: int = 0
    """Into how many pieces they can be divided at most; 0 where nothing is divided."""
    parts: dict[str, tuple[int, ...]] = {}
    """Of parameters that are several matrices in one, the sizes of these along the dimension."""


class ExpertModules(Spec):
    """The modules of one pattern that hold experts; see `schemas.profile.ExpertLayer`."""

    pattern: str
    experts: int
    chosen: int
    attributes: tuple[str, ...] = ()


class MeshAxis(Spec):
    """One dimension of the device mesh: `dp_replicate` and `dp_shard` of fsdp2 and ddp; of amsp one for each step from
    one shard degree to the next, `dp_1` the fastest; `pp`, the slowest, where there are pipeline stages; `tp`, the
    fastest, where tensors are divided. Context and expert parallelism have no axis of their own here: so many
    neighbouring processes among those that differ in the data axes alone."""

    name: str = Field(pattern=r"^(pp|tp|dp_(replicate|shard|[1-9][0-9]?))$", examples=["dp_shard"])
    size: int = Field(gt=0)
    levels: tuple[str, ...]
    """Cluster levels that the axis spans, fastest first."""


class Mesh(Spec):
    """The device mesh, slowest axis first as torch's `init_device_mesh` wants it; neighbouring ranks lie on the last
    axis, inside the fastest level."""

    world_size: int = Field(gt=0)
    axes: tuple[MeshAxis, ...]


class StateSharding(Spec):
    """How one model state is sharded: one full copy is spread over `degree` devices."""

    degree: int = Field(gt=0)
    levels: tuple[str, ...]
    """Cluster levels that one copy spans, fastest first; empty for degree 1."""


class States(Spec):
    """The three model states (AMSP, arXiv 2311.00257, section 3), `parameters` and `optimizer_states` at rest,
    `gradients` while they accumulate from one micro-batch to the next."""

    parameters: StateSharding
    gradients: StateSharding
    optimizer_states: StateSharding
    secondary: StateSharding | None = None
    """A second copy of a block's parameters, in the compute dtype, kept from its forward for the gather of its backward
    (hpZ of ZeRO++, arXiv 2306.10209, section 3.2); null for none."""


class Communication(Spec):
    """Mesh axes over which numbers travel in fewer bits than the recipe computes with; none unless the job is `lossy`
    (ZeRO++, arXiv 2306.10209)."""

    int8_gathers: tuple[str, ...] = ()
    """Parameters are gathered for compute in blocks of int8 with a scale each (qwZ, section 3.1)."""
    int4_reductions: tuple[str, ...] = ()
    """Gradients are exchanged in blocks of int4 and added up in fp32, one hop an axis (qgZ, section 3.3)."""


class Checkpointing(Spec):
    """The first `blocks` of the model's `of` blocks are recomputed in backward; with pipeline stages so many in all,
    of which `pipeline.checkpointed` says where they are."""

    policy: Literal["none", "full"]
    blocks: int = Field(ge=0)
    of: int = Field(ge=0)


class Pipeline(Spec):
    """The model cut into stages that lie on the devices of the mesh axis `pp`, and the order in which these run.

    The embedding belongs to the first stage and the head to the last one.
    """

    ranks: int = Field(gt=0, default=1)
    """Devices that share one copy of the model: the size of `pp`. 1: no pipeline."""
    chunks: int = Field(gt=0, default=1)
    """Stages of one device."""
    placement: Literal["loop", "wave"] = "loop"
    """`loop`: stage s on rank s mod ranks; `wave`: back and forth, so that with two chunks first and last stage share a
    rank (a V)."""
    schedule: Literal["none"] | ScheduleName = "none"
    cuts: tuple[int, ...] = ()
    """For every stage but the last, the number of the model's blocks before its end."""
    checkpointed: tuple[int, ...] = ()
    """Of every stage, how many of its blocks are recomputed in backward, the first ones."""
    activation_limits: tuple[int, ...] = ()
    """Of every rank, the bytes of activations that the schedule was searched under; empty for schedules that are not
    searched."""
    late_step: bool = False
    """Whether the optimizer steps before the norm of the whole gradient is known, and again where it has to be clipped
    (arXiv 2401.10241, section 4)."""


class TensorParallel(Spec):
    """Neighbouring devices that share every layer: matrices are divided by columns and rows (arXiv 1909.08053)."""

    degree: int = Field(gt=0, default=1)
    """The size of the mesh axis `tp`."""
    sequence: bool = False
    """Whether activations between the divided layers are divided along the sequence (arXiv 2205.05198)."""


ContextMethod = Literal["ring", "gather", "ulysses"]
"""How processes that have parts of a sequence attend to all of it. `ring`: keys and values travel around while each
part is attended to (arXiv 2310.01889). `gather`: they are gathered (arXiv 2407.21783, section 3.3.2). `ulysses`: an
all-to-all gives each process whole sequences of some heads (arXiv 2309.14509)."""


class ContextParallel(Spec):
    """Neighbouring devices, among those with the same part of every layer, that share each sequence."""

    degree: int = Field(gt=0, default=1)
    method: Literal["none"] | ContextMethod = "none"


class ExpertParallel(Spec):
    """Neighbouring devices, among those with the same part of every layer, that share the experts of each layer; their
    tokens travel to the experts and back. The states of the experts are sharded over the devices that have the same
    ones: a shard degree of `states` is divided by this one, down to 1."""

    degree: int = Field(gt=0, default=1)


class Offload(Spec):
    """The memory tier of each state; the device for now."""

    parameters: Literal["device"] = "device"
    gradients: Literal["device"] = "device"
    optimizer_states: Literal["device"] = "device"
    activations: Literal["device"] = "device"


class Engine(Spec):
    """What shards the states at run time. `single`: nothing. `ddp`: DistributedDataParallel. `fsdp2`: fully_shard.
    `amsp`: the runtime's own `ShardedStates`, each state sharded independently of the others."""

    name: Literal["single", "ddp", "fsdp2", "amsp"]
    reshard_after_forward: bool | None = None
    """fsdp2 and amsp: whether a block's gathered parameters are freed after its forward. Kept ones stay gathered from
    the first micro-batch's forward to the last one's backward. The root group is always kept. Null where parameters
    are not sharded."""


class Decision(Spec):
    """The decision vector. A person may edit it and compile again: it is checked and predicted anew."""

    mesh: Mesh
    states: States
    micro_batch: int = Field(gt=0)
    """Sequences of one forward on one device."""
    accumulation: int = Field(gt=0)
    """Micro-batches of one optimizer step on one device."""
    checkpointing: Checkpointing
    precision: Literal["fp32", "bf16_mixed"]
    pipeline: Pipeline = Pipeline()
    tensor_parallel: TensorParallel = TensorParallel()
    context_parallel: ContextParallel = ContextParallel()
    expert_parallel: ExpertParallel = ExpertParallel()
    offload: Offload = Offload()
    communication: Communication = Communication()
    engine: Engine


class TimePart(Spec):
    """One part of the step, in seconds. The parts add up to the step."""

    name: str
    seconds: float
    note: str = ""


class MemoryPhase(Spec):
    """Bytes alive at the worst moment of one phase of the step, by category. The categories add up to `total_bytes`."""

    name: str
    bytes: dict[str, int]
    total_bytes: int


class StageMemory(Spec):
    """Memory of the fullest device of one rank of the pipeline, with all its stages."""

    stage: int
    """The rank on the axis `pp`; 0 without a pipeline."""
    phases: tuple[MemoryPhase, ...]
    peak_phase: str
    peak_allocated_bytes: int
    peak_reserved_bytes: int


class Memory(Spec):
    """Bytes of the fullest device. The budget limits `peak_reserved_bytes`."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    stages: tuple[StageMemory, ...]
    at_rest: dict[Literal["parameters", "gradients", "optimizer_states"], int]
    """Of rank 0, exact. `gradients`: when the optimizer steps. `optimizer_states`: with amsp's fp32 copy of parameters
    that rest in bf16."""
    host_bytes: int
    """Of one node."""


class Collective(Spec):
    """All collectives of one kind, size and group in one optimizer step of one rank."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]
    axis: str = Field(pattern=r"^(world|pp|tp|cp|ep|expert_(replicate|shard)|dp_(replicate|shard|[1-9][0-9]?))$")
    group_size: int
    bytes: int
    """Of the whole tensor of one call: what is gathered, what enters a reduction or an exchange."""
    count: int
    """Calls per optimizer step."""
    purpose: Literal["parameters", "gradients", "grad_norm", "metrics", "activations"]
    """`activations`: between stages and between the processes that share a layer, and their gradients back."""


class StageTime(Spec):
    """What one pipeline stage costs for one micro-batch."""

    stage: int
    rank: int
    """On the axis `pp`."""
    forward_s: float
    input_gradient_s: float
    weight_gradient_s: float
    send_s: float
    """To the next stage, and of the gradient back; 0 for the last one, and where both lie on one rank."""
    activation_bytes: int
    """Kept from the forward of a micro-batch to its input gradient."""
    held_by_weight_bytes: int
    """Kept from there to its weight gradient."""


class PipelinePrediction(Spec):
    """One iteration of the pipeline, without what follows it (reductions that are left, the optimizer)."""

    stages: tuple[StageTime, ...]
    edges: tuple[tuple[int, int], ...]
    """Stages of which the first makes activations for the second."""
    timetable: tuple[str, ...]
    """For each rank its actions in order, as `shardwright schedule --check` reads them."""
    makespan_s: float
    """From the first action to the end of the last one."""
    bubble_rate: float
    """Of the rank that is longest at work, the share of its time in which it waits (arXiv 2401.10241, section 3.2)."""
    lower_bound_s: float
    """No schedule of these stages under these limits keeps that rank for less."""
    gap: float
    """By how much this one is longer, as a share of the bound."""


class Prediction(Spec):
    """What the decision is predicted to cost."""

    step_time_s: float
    time: tuple[TimePart, ...]
    tokens_per_s: float
    """Of the whole cluster."""
    mfu: float
    mfu_formula: str
    model_flops_per_step: float
    memory: Memory
    collectives: tuple[Collective, ...]
    pipeline: PipelinePrediction | None = None
    """Null without pipeline stages."""


class Alternative(Spec):
    """A point that was considered and lost."""

    summary: str
    decision: Decision
    step_time_s: float
    peak_reserved_bytes: int
    fits: bool
    lost_because: str


class Search(Spec):
    """What the search looked at. The alternatives are the best of each kind, not all."""

    considered: int
    measured: int
    """Of these, predicted in full; bounds of time or memory rule the others out."""
    feasible: int
    """Of the measured ones, those that fit."""
    alternatives: tuple[Alternative, ...]


class Assumption(Spec):
    """A number that the prediction rests on and that the job did not state."""

    name: str
    value: str
    origin: Literal["measured", "catalogue", "default", "job"]
    source: str = ""


class Reason(Spec):
    """Why one key of the decision has its value: what it buys, the runner-up and its price."""

    key: str
    value: str
    because: str


class Plan(Spec):
    """A complete plan: with the job it holds, it is all that a backend needs."""

    schema_version: Literal[1] = 1
    name: str
    """The field's name of the point, for example `FSDP2 x 8 (ZeRO-3), 12 of 32 blocks checkpointed`."""
    job: JobSpec
    defaults: tuple[str, ...]
    """Keys of the job that the person did not write."""
    job_file: str
    """The job's file, relative to the folder of this plan; relative paths of the job start from its folder."""
    profile_digest: str
    model: ModelFacts
    decision: Decision
    prediction: Prediction
    search: Search
    reasons: tuple[Reason, ...]
    assumptions: tuple[Assumption, ...]


class Infeasible(Spec):
    """No plan fits: a result, not an error."""

    needed_bytes: int
    available_bytes: int
    nearest: Alternative
    """The point that misses the budget by least."""
    by_category: dict[str, int]
    """Bytes of the nearest point's peak phase."""
    changes: tuple[str, ...]
    """Changes of the job that would fit, cheapest first."""
    considered: int


def json_fields(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values."""
    return plan.model_dump(mode="json")
