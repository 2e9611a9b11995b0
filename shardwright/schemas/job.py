"""The job file: what a person describes. Every default stands here, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, PlainSerializer, PlainValidator, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from shardwright.schemas.base import Choice, SingleOrList, Spec, exactly_one, one_or_many
from shardwright.schemas.cluster import ClusterSpec, LevelName
from shardwright.schemas.units import Amount, Bytes, amount_parser, amount_pattern

IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*"
IMPORT_PATH = rf"^{IDENTIFIER}(\.{IDENTIFIER})*:{IDENTIFIER}$"

ImportPath = Annotated[str, Field(pattern=IMPORT_PATH, examples=["model:build"])]
"""`module:function`, resolved beside the job file first."""


BatchField = Annotated[str, Field(pattern=rf"^{IDENTIFIER}$", examples=["input_ids"])]
"""Name of an argument of `forward`, or of a field of the batch."""

FileList = Annotated[tuple[str, ...], BeforeValidator(one_or_many), Field(min_length=1), SingleOrList()]
"""Paths and patterns relative to the job file; a single one may stand for a list."""
MaskList = Annotated[tuple[str, ...], BeforeValidator(one_or_many), SingleOrList()]


def _amount(*units: str, bare: str | None = None, least: int = 1, examples: list[str | int]) -> Any:
    schema: dict[str, Any] = {"type": "string", "pattern": amount_pattern(*units), "examples": examples}
    if bare:
        schema |= {"type": ["string", "integer"], "minimum": least}
    return PlainValidator(amount_parser(*units, bare=bare, least=least)), PlainSerializer(str), WithJsonSchema(schema)


GlobalBatch = Annotated[Amount, *_amount("sequences", "tokens", bare="sequences", examples=[256, "1Mi tokens"])]
Until = Annotated[Amount, *_amount("tokens", "steps", examples=["20B tokens", "5000 steps"])]
Interval = Annotated[Amount, *_amount("steps", "seconds", bare="steps", examples=["500 steps", "1h"])]
Steps = Annotated[Amount, *_amount("steps", bare="steps", least=0, examples=["2000 steps"])]


class ProfileSpec(Spec):
    """How the model is measured, where it cannot be measured as it stands."""

    share: bool = True
    """Whether blocks that look equal are measured once. `false` measures every block by itself: for models whose blocks
    differ in what cannot be seen from outside."""
    moves_data: tuple[str, ...] = ()
    """Operators whose work PyTorch does not know and that only move data, for example `my_library::reorder`. (For one
    with arithmetic, register a formula with `torch.utils.flop_counter.register_flop_formula` in the model's file.)"""
    forwards: dict[str, ImportPath] = {}
    """Path of a module (`layers.0.router`) or name of its class to a function `f(module, *args, **kwargs)` that is run
    in place of its forward while it is measured: for a forward that decides by the values of tensors. It must cost
    what the real one costs, and return tensors of the same shapes."""


class ModelSpec(Spec):
    """Where the model comes from, how a batch enters it and who computes the loss. Exactly one of `factory`, `hf`."""

    factory: ImportPath | None = None
    """A function that returns the `nn.Module`, called with `args`."""
    args: dict[str, Any] = {}
    """Keyword arguments of the factory: plain YAML values."""
    hf: str | dict[str, Any] | None = None
    """A Hugging Face configuration: a `config.json`, a folder that holds one, or its content inline. Weights are
    random unless `weights` says otherwise; nothing is fetched."""
    loss: Literal["next_token", "model"] | ImportPath = "next_token"
    """`next_token`: cross-entropy of the logits against `targets`. `model`: `forward` returns the mean over its
    unmasked targets, as a scalar or as `.loss`. `module:function`: called as `f(output, batch)`, returns the sum over
    the unmasked targets. Whichever it is, the loss trained on is the sum over the unmasked targets of the global batch
    divided by their number."""
    inputs: dict[BatchField, BatchField] = {}
    """Argument of `forward` to field of the batch. Empty: `input_ids` is the only, positional, argument (a Hugging
    Face model gets it by name)."""
    init: Literal["auto", "constructor", "modules"] = "auto"
    """How weights start. `modules`: built on the meta device, then each module's `reset_parameters` (Hugging Face:
    `_init_weights`) runs for one block at a time, seeded by the block's name: no process ever holds the model.
    `constructor`: each process runs the factory itself on the CPU. `auto`: `modules` for Hugging Face models and above
    a billion parameters, else `constructor`. The choice depends on the model alone, so every plan starts equal."""
    weights: Literal["random", "load"] | str = "random"
    """Where weights come from: `random`; `load`, the safetensors files beside the configuration of `hf`; or a folder
    (relative to the job file) that holds safetensors files with the model's parameter names. They are read shard by
    shard: no process ever holds the model."""
    profile: ProfileSpec = ProfileSpec()
    rehearse: dict[str, Any] = {}
    """What to change in `args` (or in the Hugging Face configuration) for a rehearsal, which needs a small model."""

    @classmethod
    def conflicts(cls, given: AbstractSet[str]) -> Iterator[tuple[str, str]]:
        """One source of the model; `args` only for a factory."""
        yield from exactly_one(given, {"factory": "module:function", "hf": "a Hugging Face configuration"})
        if {"args", "hf"} <= given and "factory" not in given:
            yield "args", "`args` belongs to `factory`; a Hugging Face configuration holds its own numbers"


class SyntheticSpec(Spec):
    """Random tokens, to measure speed without data."""

    vocabulary: int = Field(gt=1)
    """Token ids are below this."""


class ValidationSpec(Spec):
    """Held-out data of the same kind as the training data."""

    files: FileList
    """Paths and patterns, relative to the job file."""
    mask: MaskList = ()
    """One file of bytes per file, as for the training data."""


def _validation_files(value: Any) -> Any:
    """`val.u32` and `[a.u32, b.u32]` stand for `{files: ...}`."""
    return {"files": one_or_many(value)} if isinstance(value, str | list | tuple) else value


class _ValidationForms:
    """For the JSON Schema: files without masks may be written directly."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        files = {"type": "array", "items": {"type": "string"}, "minItems": 1}
        return {"anyOf": [{"type": "string"}, files, handler(core_schema)]}


Validation = Annotated[ValidationSpec, BeforeValidator(_validation_files), _ValidationForms()]
_SOURCES = ("bytes", "tokens", "synthetic", "dataset")
_OF_DATASETS = {"args": "holds the arguments of `dataset`", "validation_dataset": "is held-out data of `dataset`"}
"""The keys that only datasets have."""
_INSTEAD_OF_FILES = {
    "dataset": {"mask": "a dataset marks unlearnt targets with -100", "validation": "write `validation_dataset`"},
    "synthetic": {"mask": "random tokens are all learnt", "validation": "random tokens have no held-out part"},
}
"""The keys that only files have, and what holds in their place."""


class DataSpec(Spec):
    """What is trained on: exactly one of `bytes`, `tokens`, `synthetic`, `dataset`. Paths and patterns are relative to
    the job file. A single path may stand for a list."""

    bytes: FileList | None = None
    """Files read as they are: token ids 0 to 255."""
    tokens: FileList | None = None
    """Files of little-endian token ids, `.u8`, `.u16` or `.u32`, memory-mapped."""
    mask: MaskList = ()
    """One file of bytes per file of `bytes` or `tokens`, one byte a token: 0 where the token is not to be learnt
    (a prompt), 1 where it is."""
    synthetic: SyntheticSpec | None = None
    dataset: ImportPath | None = None
    """A function, called with `args`, that returns an indexable dataset of dictionaries of tensors (one sample each).
    It must hold what `model.inputs` names, and `targets` unless the loss needs none; -100 marks what is not learnt."""
    args: dict[str, Any] = {}
    """Keyword arguments of `dataset`."""
    validation: Validation | None = None
    """Held-out files, of the same kind as the training files."""
    validation_dataset: ImportPath | None = None
    """A function, called with `args`, that returns the held-out dataset beside `dataset`."""

    @classmethod
    def conflicts(cls, given: AbstractSet[str]) -> Iterator[tuple[str, str]]:
        """One source of samples; the keys that only some of them have."""
        yield from exactly_one(given, dict.fromkeys(_SOURCES, ""))
        sources = given & set(_SOURCES)
        if sources and "dataset" not in sources:
            yield from (
                (key, f"`{key}` {what}, which is not given") for key, what in _OF_DATASETS.items() if key in given
            )
        if sources and not sources & {"bytes", "tokens"}:
            help_ = _INSTEAD_OF_FILES[min(sources)]
            yield from ((key, f"`{key}` belongs to `bytes` or `tokens`; {help_[key]}") for key in help_ if key in given)


Beta = Annotated[float, Field(ge=0, lt=1)]

NamePattern = Annotated[str, Field(min_length=1, examples=["*.bias"])]
"""A shell pattern over whole names of parameters, as `fnmatch` reads it: `*` also crosses dots; case matters."""


def _no_decay(value: Any) -> Any:
    """`auto`, one pattern or a list of patterns."""
    if value == "auto" or value is None:
        return "auto"
    patterns = one_or_many(value)
    if not patterns:
        raise ValueError("an empty list names no parameters; write `auto`, or patterns such as `*.bias`")
    return patterns


class ParameterGroupSpec(Spec):
    """Parameters that are trained with numbers of their own."""

    match: Annotated[tuple[NamePattern, ...], Field(min_length=1), BeforeValidator(one_or_many), SingleOrList()]
    """Shell patterns over names of parameters, such as `blocks.0.*`. A tied parameter goes by any of its names."""
    lr_scale: float = Field(gt=0, default=1.0)
    """Their learning rate, as a multiple of the scheduled one."""
    weight_decay: float | None = Field(ge=0, default=None)
    """Their weight decay, where they have any (`no_decay`). Null: the optimizer's."""


class OptimizerSpec(Spec):
    """The optimizer and its numbers. A number that the named optimizer does not have is refused."""

    name: Literal["adamw", "sgd"] = "adamw"
    """The optimizer of `torch.optim`."""
    lr: float = Field(gt=0, default=3e-4)
    """Highest learning rate; `train.schedule` scales it."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW: decay of the running means of the gradient and of its square."""
    eps: float = Field(gt=0, default=1e-8)
    """AdamW: added to the denominator."""
    momentum: float = Field(ge=0, lt=1, default=0.9)
    """SGD: decay of the velocity."""
    weight_decay: float = Field(ge=0, default=0.1)
    """Weight decay of the parameters that `no_decay` does not exempt."""
    no_decay: Annotated[
        Literal["auto"] | tuple[NamePattern, ...], BeforeValidator(_no_decay), SingleOrList(least=1)
    ] = "auto"
    """Parameters without weight decay, whatever their group. `auto`: those of fewer than two dimensions, such as norms
    and biases. Shell patterns over names (`embed*`, `*.bias`) exempt what they match as well."""
    groups: tuple[ParameterGroupSpec, ...] = ()
    """Parameters with a learning rate or a weight decay of their own. The first group that matches a parameter counts;
    what none matches has the numbers above."""
    clip_grad_norm: float | None = Field(gt=0, default=1.0)
    """Highest norm of the whole gradient; null for no clipping."""


class ScheduleSpec(Spec):
    """Learning rate over steps: a linear warm-up, then the named curve down to `final_ratio` of `lr`."""

    name: Literal["constant", "linear", "cosine"] = "cosine"
    """The curve after the warm-up."""
    warmup: Steps = Amount(0, "steps")
    """Steps over which the learning rate rises from zero."""
    final_ratio: float = Field(ge=0, le=1, default=0.1)
    """Share of `lr` that the last step has."""


class TrainSpec(Spec):
    """The recipe. Exactly one of `steps`, `until`."""

    sequence_length: int = Field(gt=0, default=1)
    """Tokens of one sample that enter the model. Only a `dataset` can do without it: a sample that is no sequence of
    tokens, such as an image, counts as one token."""
    global_batch: GlobalBatch
    """Samples (or tokens, rounded to a round number of samples) of one optimizer step over all processes. The same for
    every plan."""
    steps: int | None = Field(gt=0, default=None)
    """Optimizer steps of the whole run."""
    until: Until | None = None
    """Length of the run in tokens, rounded up to whole steps, or in steps."""
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    ema: float | None = Field(gt=0, lt=1, default=None)
    """Keep an exponential moving average of the trained parameters beside them: after each step it becomes ema x
    average + (1 - ema) x parameter; it begins as the parameter after its first step. Null: none."""
    seed: int = Field(ge=0, lt=2**32, default=0)
    """Of the initial weights, the order of the data and dropout."""
    save_every: Interval | None = None
    """Null: at the end only. SIGTERM always saves."""
    keep: int = Field(gt=0, default=2)
    """Checkpoints kept; older ones are removed after a newer one is in place."""
    evaluate_every: Interval | None = None
    """How often the held-out loss is measured, besides at the end. Null: at the end only."""
    evaluate_batches: int = Field(gt=0, default=8)
    """Global batches of one evaluation."""

    @classmethod
    def conflicts(cls, given: AbstractSet[str]) -> Iterator[tuple[str, str]]:
        """One length of the run."""
        yield from exactly_one(given, {"steps": "optimizer steps", "until": "for example 20B tokens"})

    @property
    def global_batch_sequences(self) -> int:
        """Samples of one optimizer step. Tokens that are no whole number of sequences become the nearest one with three
        significant bits, at most 12.5 % away: 1M tokens of 8192 are 122.07 sequences, so 128. The cluster plays no
        part, so every world size trains on the same batches."""
        batch = self.global_batch
        if batch.unit == "sequences":
            return int(batch.value)
        whole, rest = divmod(int(batch.value), self.sequence_length)
        if rest == 0:
            return whole
        scale = 1 << max(0, whole.bit_length() - 3)
        return max(1, round(batch.value / self.sequence_length / scale) * scale)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; tokens are rounded up to whole steps."""
        if self.steps is not None:
            return self.steps
        assert self.until is not None
        if self.until.unit == "steps":
            return int(self.until.value)
        return -(-int(self.until.value) // (self.global_batch_sequences * self.sequence_length))


class BudgetSpec(Spec):
    """What a plan may use. Null: all that the cluster has."""

    device_memory: Bytes | None = None
    """Limit on the bytes that the allocator reserves on one device."""
    host_memory: Bytes | None = None
    """Limit on host memory of one node."""


Degree = Annotated[int, Field(gt=0)] | Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$", examples=["node", "all"])]
"""A shard degree, or the name of a cluster level (up to and including it), or `all`."""


class StatesSpec(Spec):
    """Over how many devices each model state is sharded, independently of the others (AMSP, arXiv 2311.00257)."""

    parameters: Choice[Degree] = "auto"
    """At rest, between their uses."""
    gradients: Choice[Degree] = "auto"
    """While they accumulate from one micro-batch to the next."""
    optimizer_states: Choice[Degree] = "auto"
    """The optimizer's moments, and the fp32 copy of the parameters where there is one. Never fewer devices than the
    other two."""
    secondary: Choice[Degree] = "auto"
    """A second copy of the parameters that the backward gathers from (hpZ of ZeRO++), over fewer devices than
    `parameters`; `none` for no such copy."""


ScheduleName = Literal[
    "gpipe",
    "1f1b",
    "interleaved-1f1b",
    "breadth-first",
    "zb-h1",
    "zb-h2",
    "zb-1p",
    "zb-2p",
    "zb-v",
    "v-half",
    "v-min",
    "dualpipe-v",
    "hanayo",
    "zeropp",
    "zb-auto",
]
"""Pipeline schedules; `zb-auto` is searched, the others are published ones (planner/schedules/table.py)."""


class TensorParallelSpec(Spec):
    """How tensor parallelism divides the model, where the rules need help."""

    sequence: Choice[bool] = "auto"
    """Whether activations between the divided layers are divided along the sequence. `auto`: wherever the model lets
    them."""
    overrides: dict[
        Annotated[str, Field(min_length=1, examples=["layers.*.mixer.in_proj"])],
        Literal["column", "row", "vocabulary", "replicated"],
    ] = {}
    """Path of a module, or a shell pattern over paths, to how its weights are divided, in place of what the rules
    find. Columns and rows must pair up."""


class StrategySpec(Spec):
    """Decisions of the plan: each `auto`, pinned to one value, or restricted to a list."""

    tp: Choice[Annotated[int, Field(gt=0)]] = "auto"
    """Devices that share every layer (tensor parallelism); 1 for none. `auto`: inside the fastest level."""
    tensor_parallel: TensorParallelSpec = TensorParallelSpec()
    cp: Choice[Annotated[int, Field(gt=0)]] = "auto"
    """Devices that share each sequence (context parallelism); 1 for none."""
    context_method: Choice[Literal["ring", "gather", "ulysses"]] = "auto"
    """How devices that have parts of a sequence attend to all of it."""
    ep: Choice[Annotated[int, Field(gt=0)]] = "auto"
    """Devices that share the experts of each layer (expert parallelism); 1 for none."""
    expert_imbalance: float = Field(ge=1, default=1.2)
    """Of expert parallelism: tokens of the fullest device as a multiple of the mean. The prediction assumes it; the
    script logs what it is."""

    pp: Choice[Annotated[int, Field(gt=0)]] = "auto"
    """Devices that share one copy of the model as a pipeline of stages; 1 for no pipeline."""
    schedule: Choice[ScheduleName] = "auto"
    """The order in which a pipeline's stages run their micro-batches."""
    chunks: Choice[Annotated[int, Field(gt=0)]] = "auto"
    """Stages that each device of a pipeline has."""
    late_step: Choice[bool] = "auto"
    """Whether the optimizer of a pipeline steps before the norm of the whole gradient is known, and steps again where
    it turns out to be above `clip_grad_norm`, so that no rank waits for the last one between two steps. `auto` is
    false: how often gradients will be clipped is not known beforehand."""
    states: StatesSpec = StatesSpec()
    reshard_after_forward: Choice[bool] = "auto"
    """Whether gathered parameters are freed after a block's forward and gathered again for its backward."""
    micro_batch: Choice[Annotated[int, Field(gt=0)]] = "auto"
    """Sequences of one forward on one device."""
    checkpointing: Choice[Literal["none", "full"] | Annotated[int, Field(ge=0)]] = "auto"
    """Blocks whose forward is recomputed in backward: `none`, `full`, or how many."""
    precision: Choice[Literal["fp32", "bf16_mixed"]] = "auto"
    """`fp32`, or `bf16_mixed`: bf16 compute with fp32 parameters, gradient reduction and optimizer."""
    int8_gathers: Choice[LevelName] = "auto"
    """The fastest cluster level over which parameters are gathered in int8 (qwZ of ZeRO++), and all slower ones; `none`
    for exact gathers. `auto` is `none` unless `quality: lossy`."""
    int4_reductions: Choice[LevelName] = "auto"
    """The same for gradients that are exchanged in int4 (qgZ of ZeRO++)."""
    engine: Choice[Literal["stock", "single", "ddp", "fsdp2", "amsp"]] = "auto"
    """What runs it: one process, DistributedDataParallel, fully_shard (`stock` stands for these three), or this
    project's own runtime, in which every state has a degree of its own. `auto` takes a stock one unless `amsp` is
    predicted to be at least 5 % faster, or alone fits."""


STOCK_ENGINES = ("single", "ddp", "fsdp2")
"""What `stock` stands for."""


class JobSpec(Spec):
    """A whole job, resolved: the cluster is looked up, defaults are filled in."""

    model: ModelSpec
    data: DataSpec
    train: TrainSpec
    cluster: ClusterSpec
    budget: BudgetSpec = BudgetSpec()
    strategy: StrategySpec = StrategySpec()
    quality: Literal["exact", "standard", "lossy"] = "standard"
    """`exact`: fp32 only. `standard`: also what is routinely trained with (bf16 compute, fp32 master weights and
    reduction). `lossy`: also what may change the result: parameters gathered in int8, gradients exchanged in int4."""

    @property
    def host_memory_limit(self) -> int:
        """Bytes that the plan may use on one host."""
        return self.budget.host_memory or self.cluster.host_memory
