"""What a model costs, hardware aside. Made by `passes`, read by the planner, saved as `profile.json`.

[Note: affine in the micro-batch]
Shapes, FLOPs and bytes of a traced model grow with the micro-batch b as `constant + slope * b`. They are fitted at
b = 2 and 3 and verified at 4; a model for which that fails is refused, with the unit and the quantity named. Not at 1:
there PyTorch may take views and copies that it takes at no other size, and be off the line by a few tensors.

[Note: compute dtype]
Costs are kept once per compute dtype. `fp32`: parameters and activations as the model declares them. `bf16`: the
semantics of FSDP2's `MixedPrecisionPolicy(param_dtype=bf16)`: parameters are bf16 while they compute, floating-point
inputs of each block are cast, buffers keep their dtype. Every engine of ours trains bf16 that way, so one profile
serves them all.

[Note: who counts a boundary]
The activation that leaves one unit and enters the next is one storage. It is counted by the unit that it enters, in
that unit's `saved`, under every policy that keeps it alive; if only the producer saves it, the producer counts it. So
the bytes alive at the end of forward are the plain sum of `saved` over the units. What enters several blocks (rotary
tables, positions) is counted once, by the embedding or head that made it; these two are never checkpointed, and their
`saved` under `full` is what they keep once blocks are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

ComputeDtypeName = Literal["fp32", "bf16"]
ParallelAxis = Literal["tp", "cp", "ep"]
"""Axes of the mesh along which processes share the work of one copy of the model: tensor, context, expert parallel."""
Policy = Literal["none", "selective", "full"]
"""What of a block is recomputed in backward. `none`: it keeps all that backward needs; `selective`: it keeps its inputs
and the results of attention and of matrix products, and recomputes the rest; `full`: it keeps its inputs only."""
Phase = Literal["forward", "input_gradient", "weight_gradient"]
Kind = Literal["matmul", "attention", "elementwise"]
KEPT_BY_SELECTIVE: frozenset[Kind] = frozenset({"matmul", "attention"})
"""Operators whose results `selective` keeps, where they can be kept."""
UnitKind = Literal["embedding", "block", "head"]
Role = Literal["embedding", "matrix", "experts", "convolution", "vector", "unused"]
"""What a parameter does, by the operators that take it: rows that are looked up, a factor of a matrix product, a stack
of them for grouped products, a convolution's kernel, or an operand of elementwise work (norms, biases, scales)."""
TensorParallelRole = Literal["column", "row", "vocabulary", "replicated", "unknown"]
"""How tensor parallelism divides a parameter: by output features, by input features, by rows of the vocabulary, not at
all; `unknown` where the rules do not understand its use."""


class Affine(NamedTuple):
    """`constant + slope * micro_batch`, in bytes or FLOPs ([Note: affine in the micro-batch])."""

    constant: int
    slope: int

    def at(self, micro_batch: int) -> int:
        """The value for a micro-batch of that many sequences."""
        return self.constant + self.slope * micro_batch

    def plus(self, other: Affine) -> Affine:
        """The sum of both at every micro-batch."""
        return Affine(self.constant + other.constant, self.slope + other.slope)


_NOTHING = Affine(0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One distinct parameter of the model; a tied one appears once, with its other names."""

    name: str
    shape: tuple[int, ...]
    trainable: bool
    unit: int
    """Index into `ModelProfile.units` of the unit whose FSDP group owns it. Parameters outside all blocks belong to
    the root group, whatever unit uses them: index -1."""
    also: tuple[str, ...] = ()
    """The other names under which a tied parameter is reachable."""
    segments: tuple[int, ...] = ()
    """Where the forward and the loss use it: 0 is what runs before the first block, k the k-th block with what runs
    between the one before and it, and one more than there are blocks what runs after the last one. A model without
    blocks has segment 0 alone. Empty for what is not used. A use is a call that reads it, not one that reads what was
    made of it."""
    dtype: str = "float32"
    """As the model declares it: `float32`, `bfloat16`."""
    role: Role = "vector"
    tensor_parallel: TensorParallelRole = "unknown"
    tensor_parallel_dim: int = 0
    """The dimension that a `column`, `row` or `vocabulary` is divided along."""
    tensor_parallel_units: int = 0
    """Into how many equal pieces that dimension can be divided at most: attention heads (key-value heads for keys and
    values, and for a fused projection), features of an MLP, rows of the vocabulary. A number of processes must divide
    it. 0 for what is not divided."""
    tensor_parallel_parts: tuple[int, ...] = ()
    """Sizes along that dimension of the parts that are divided each on its own, where the parameter is several matrices
    in one: query, key and value; gate and up. Empty for one."""
    tensor_parallel_reason: str = ""
    """Why the role is `unknown`: the operator that the rules do not know, and its module."""
    experts: int = 0
    """How many experts dimension 0 counts, where the parameter belongs to an `ExpertLayer`; else 0."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    def local_shape(self, degree: int, rank: int = 0) -> tuple[int, ...]:
        """The shape of the part that one of so many processes of tensor parallelism has ([Note: parts]): the first has
        the most, the last ones may have fewer rows of a vocabulary."""
        if degree == 1 or self.tensor_parallel not in ("column", "row", "vocabulary"):
            return self.shape
        shape, dim = list(self.shape), self.tensor_parallel_dim
        if self.tensor_parallel == "vocabulary":
            most = -(-shape[dim] // degree)
            shape[dim] = max(0, min(most, shape[dim] - rank * most))
        else:
            shape[dim] //= min(degree, self.tensor_parallel_units)
        return tuple(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """All calls of one operator with one set of shapes in one phase of one unit, merged."""

    name: str
    """aten name, for instance `mm`."""
    module: str
    """Path of the calling module below the unit."""
    phase: Phase
    kind: Kind
    count: int
    """Calls merged here: each is one kernel launch at least."""
    flops: Affine
    """Of all calls together. Causal attention counts the half that is not masked."""
    bytes: Affine
    """Read plus written by all calls together, nothing fused."""
    shapes: tuple[tuple[int, ...], ...]
    """Input shapes of one call at micro-batch 1."""
    dtype: str
    """Of the operands: `float32`, `bfloat16`."""
    results: Affine = _NOTHING
    """Bytes of the new storages that all calls together return, in the forward of a block: what keeping them costs
    when the block is checkpointed. 0 also where PyTorch refuses to keep them, because a later operator writes into
    them."""
    kept: Affine = _NOTHING
    """Of `results`, the bytes that backward needs: those that a unit keeps when nothing is recomputed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a block's forward that makes new storages, as checkpointing sees it. All calls in order are enough
    to price every choice of operators whose results are kept."""

    operator: int
    """Index into `UnitCost.operators`."""
    results: Affine
    """Bytes that keeping the call's results takes; 0 if they cannot be kept."""
    elsewhere: Affine = _NOTHING
    """Of `results`, what leaves the block and is counted by another unit ([Note: who counts a boundary])."""
    again: bool
    """Whether the call runs again in backward unless its results are kept: it comes before the last saved tensor."""
    alive: Affine
    """Most bytes alive from this call to the next when everything runs again (`full`), beyond what was alive before
    backward; zero if it does not run again."""


class BackwardMoment(NamedTuple):
    """A moment of a unit's backward at which memory may peak."""

    bytes: Affine
    """Alive beyond what was alive before the backward, as `UnitCost.backward_peak` counts them."""
    gradients: int
    """Elements of the unit's parameters whose gradients exist by then."""
    in_loss: bool
    """Whether the gradient of what the model returned is not known yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """All collectives of one kind and size that the processes which share one copy of a unit make in one phase of it,
    merged. The compute waits for them."""

    axis: ParallelAxis
    kind: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
    phase: Literal["forward", "backward"]
    bytes: Affine
    """Of the whole tensor of one call: what is gathered, what enters a reduction or an exchange."""
    count: int
    """Calls merged here."""
    again: bool = False
    """Of forward: whether a checkpointed block makes them again in backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCost:
    """Cost of one unit for one compute dtype. Bytes exclude parameters, buffers and parameter gradients."""

    operators: tuple[Operator, ...]
    saved: dict[Policy, Affine]
    """Bytes kept from forward to backward. `full`: inputs only, the rest is recomputed."""
    output: Affine
    """Bytes of the activation that leaves the unit."""
    forward_peak: Affine
    """Most bytes alive at once during forward, nothing checkpointed, beyond what was alive before it, results
    included."""
    forward_in_model: Affine = _NOTHING
    """Of a head: the same until the model has returned and a loss outside of it begins."""
    backward_peak: dict[Policy, Affine]
    """Most bytes alive at once during backward beyond what was alive before it: gradients of activations and
    temporaries; under `full` also the recomputed activations. Never parameter gradients, nor the gradient of the
    unit's output, which was alive before."""
    backward_moments: dict[Policy, tuple[BackwardMoment, ...]] = field(default_factory=dict)
    """Every moment of backward that may be the worst once the parameter gradients that exist by then are counted too:
    no other moment has as much of both. `backward_peak` is the largest `bytes` of them."""
    not_recomputed: tuple[Operator, ...] = ()
    """Operators of a block's forward that do not run again under `full`: those after the last that saves something."""
    calls: tuple[Call, ...] = ()
    """The forward of a block in order; empty for what is never checkpointed."""
    moments_before: tuple[BackwardMoment, ...] = ()
    """Of a block under `full`: the moments of backward before forward runs again, without `crossing`."""
    moments_after: tuple[BackwardMoment, ...] = ()
    """The same after forward has run again."""
    crossing: Affine = _NOTHING
    """Of a block: bytes of gradients that are alive during its backward though it neither makes nor takes them, such as
    those of skip connections past it. Contained in `backward_peak` and `backward_moments`, not in the other peaks."""
    held_by_weight: Affine = _NOTHING
    """Bytes alive from the gradient of the unit's input to that of its weights, where the latter comes later: inputs
    and gradients of outputs of its linear layers, each storage once, whatever is checkpointed; see passes/held.py. What
    two units hold counts in both. 0 for a compiled block, whose layers do not wait."""
    exchanges: tuple[Exchange, ...] = ()
    """What the processes that share the unit tell one another; empty for a unit that one process has alone."""

    def flops(self, phase: Phase, micro_batch: int) -> int:
        """FLOPs of one phase."""
        return sum(op.flops.at(micro_batch) for op in self.operators if op.phase == phase)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A stretch of the model in order of execution. `embedding` is what runs before the first block, `head` what runs
    after the last, the loss included; a model without repeated blocks is one `head`."""

    kind: UnitKind
    paths: tuple[str, ...]
    """Module paths of the consecutive, equal blocks that this entry stands for; empty for embedding and head."""
    fingerprint: str
    """Equal for units of one kind that cost the same."""
    costs: dict[ComputeDtypeName, UnitCost]
    compiled: dict[ComputeDtypeName, UnitCost] = field(default_factory=dict)
    """The same under `torch.compile`, where it was asked for."""
    module: str = ""
    """Class of the blocks; empty for embedding and head."""
    divided: dict[int, dict[ComputeDtypeName, UnitCost]] = field(default_factory=dict)
    """For each degree of `TensorParallelism.degrees`, what the unit costs each of so many processes that share it."""

    @property
    def count(self) -> int:
        """How many times in a row the unit runs."""
        return max(1, len(self.paths))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A place between two units where the model could be divided into pipeline stages."""

    after: str
    """Module path of the block before the cut, or of any module in a model without blocks; `embedding` before the first
    block."""
    tensors: int
    """Activations alive across it."""
    bytes: int
    """Their bytes at micro-batch 1, in the dtypes that the model declares."""
    refused: str = ""
    """Why the runtime cannot divide the model here, for instance because a block keeps what is used after it;
    empty where no reason is seen, though the runtime, which sees more, may find one when it starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """Activations that one unit makes and another one takes, in order of execution. A block is named by its module
    path; `embedding`, `head`. What runs between two blocks belongs to the later one; what follows from the batch alone
    is not carried."""

    source: str
    target: str
    kind: Literal["chain", "skip"]
    """`chain`: to the next unit; `skip`: past at least one."""
    tensors: int
    bytes: int
    """At micro-batch 1, in the dtypes that the model declares."""


Style = Literal["region", "column", "row", "vocabulary", "scatter", "shared", "experts"]
"""What is done to a module under tensor parallelism ([Note: regions]).

`region`: everything between the module's inputs and the results of its rows is divided: its inputs enter there.
`column`, `vocabulary`, `row`: a layer whose weight is divided so; `vocabulary` is a table, a head is a `column`.
`scatter`: a whole table, of whose results each process takes its own part of the last dimension.
`shared`: a module whose own parameters are whole, while each process has a part of their gradient only.
`experts`: a module that holds columns and rows itself, called with (tokens, indices, weights): a region and a row.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleStyle:
    """What tensor parallelism does to one module.

    [Note: regions]
    Between columns and rows each process has its part of the features or heads. What enters there is equal on all
    processes, and each one has a part of its gradient, so backward adds them up (`f` of Megatron-LM, arXiv 1909.08053,
    section 3); what leaves the rows is added up in forward (`g`). With the sequence divided too (arXiv 2205.05198,
    section 4.2.2) each process has its part of the sequence outside of the regions: entering gathers it, and leaving
    adds up and scatters in one. Values enter at the inputs of a `region` module, all floating-point ones that need a
    gradient, where the dataflow permits that; else at each column (`enters`).

    Parameters without a division have a part of their gradient on each process if they are used in a region before its
    rows, and, where the sequence is divided, anywhere in a block: their modules are `shared`.
    """

    path: str
    """Of the module in the model."""
    style: Style
    enters: bool = False
    """Of a `column`: whether its input enters the divided part there, rather than at a `region`."""
    sequence_dim: int | None = None
    """Of what enters and leaves, the dimension that the sequence is divided along; 0 where (batch, sequence) have been
    flattened to tokens; None where values come or go whole."""
    attributes: tuple[str, ...] = ()
    """Integers of the module that count what is divided (heads, features), so that each process has its share of
    them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallelism:
    """How tensor parallelism runs the model.

    [Note: parts]
    A parameter is divided along one dimension into as many pieces as there are processes, each of its
    `tensor_parallel_parts` on its own. Where there are fewer units than processes (key-value heads), each piece is on
    several processes next to each other, which add up its gradients. Rows of the vocabulary are divided as
    `torch.chunk` does: the last processes may have fewer.
    """

    degrees: tuple[int, ...] = ()
    """Numbers of processes, above 1, that the model was profiled for: they divide what is divided."""
    sequence: bool = False
    """Whether the sequence is divided between the regions."""
    sequence_reason: str = ""
    """Why it is not."""
    refused: str = ""
    """Why the model cannot be divided at all, with the module; empty where it can."""
    styles: tuple[ModuleStyle, ...] = ()
    """In order of registration of the modules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextParallelism:
    """How context parallelism runs the model: each process has a part of every sequence in blocks and head."""

    refused: str = ""
    """Why it cannot: what mixes positions other than fused attention; empty where it can."""
    head: str = ""
    """Path of the module that makes the logits, from whose input on each process has its part of the sequence."""
    causal: bool = True
    """Whether the attention is causal."""
    heads: int = 0
    """Query heads of the fused attention with the fewest."""
    kv_heads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayer:
    """A module whose parameters are stacks of experts, called with (tokens, indices, weights)."""

    path: str
    experts: int
    chosen: int
    """Experts of one token."""
    features: int
    """Of a token."""
    attributes: tuple[str, ...] = ()
    """Integers of the module that count its experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """Everything the planner knows of a model."""

    name: str
    device_kind: Literal["cuda", "cpu"]
    sequence_length: int
    parameters: tuple[Parameter, ...]
    """In order of registration (`named_parameters`)."""
    buffer_bytes: int
    units: tuple[Unit, ...]
    cuts: tuple[Cut, ...]
    edges: tuple[Edge, ...] = ()
    tensor_parallelism: TensorParallelism = TensorParallelism()
    context_parallelism: ContextParallelism = ContextParallelism(refused="not looked at")
    expert_layers: tuple[ExpertLayer, ...] = ()
    """Those that expert parallelism can divide."""
    attention: dict[ComputeDtypeName, str]
    """The attention kernel assumed: `flash`, `efficient`, `math`, `cpu-flash`, or `none` when the model calls none."""
    init: Literal["constructor", "modules"]
    input_bytes: Affine
    """Bytes of one micro-batch of inputs and targets on the device."""
    local_sources: tuple[str, ...]
    """Files of the user's model, relative to the job's folder, that a script must bring along."""
    packages: tuple[str, ...]
    """Installed packages that the model needs beyond torch."""
    warnings: tuple[str, ...]
    digest: str
    """sha256 over everything above."""

    @property
    def numel(self) -> int:
        """Distinct parameters' elements."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def block_paths(self) -> tuple[str, ...]:
        """Module paths of all blocks, in order of execution: the units that FSDP wraps and checkpointing recomputes."""
        return tuple(path for unit in self.units if unit.kind == "block" for path in unit.paths)
