"""How tensor parallelism runs a model: the styles of its modules, the attributes that they divide, the degrees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from shardwright.passes.blocks import Block
from shardwright.passes.counts import Attention, Candidates, Counts, wrong_heads
from shardwright.passes.dataflow import Dataflow, operator_name_of
from shardwright.passes.divided_run import LocalRun, runs_locally
from shardwright.passes.flow import Flow
from shardwright.passes.graph import Exported
from shardwright.passes.kernels import AttentionCall, attention_calls
from shardwright.passes.parameters import with_roles
from shardwright.passes.positions import mixing
from shardwright.passes.styles import Refused, Styles, adjusted, find_styles, with_equals
from shardwright.passes.trace import Tracer
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ModuleStyle, Parameter, TensorParallelism

MOST_PROCESSES = 8
"""What is profiled where the job names no degree: more share a layer only where the fastest level is larger."""
MOST_TRIALS = 48
"""Sets of attributes that are tried."""


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of the model when its parallelism is looked for."""

    job: JobSpec
    tracer: Tracer
    blocks: Sequence[Block]
    draw: float
    flow: Flow
    parameters: Sequence[Parameter]
    """With their roles."""
    whole: LocalRun
    """The operators of the whole model."""
    attention: Sequence[AttentionCall]
    """Its calls of fused attention."""

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self.tracer.built.module


@dataclass(frozen=True, slots=True)
class Divided:
    """What was found."""

    parallelism: TensorParallelism
    parameters: tuple[Parameter, ...]


def wanted_degrees(job: JobSpec) -> tuple[int, ...]:
    """Numbers of processes to profile, above 1: those that the job names, else powers of two inside the fastest
    level, as far as they divide the world."""
    named = job.strategy.tp
    world = job.cluster.world_size
    if named != "auto":
        return tuple(sorted({degree for degree in named if degree > 1 and world % degree == 0}))
    fastest = min(job.cluster.levels[0].size, MOST_PROCESSES)
    return tuple(d for d in (2, 4, 8) if d <= fastest and job.cluster.levels[0].size % d == 0)


def find_parallelism(model: Model, exported: Exported, flow: Dataflow) -> Divided:
    """The styles of all modules, and the degrees that they permit. Raises InputError for a degree that the job pins and
    the model cannot have."""
    try:
        found = _Search(model, exported, flow).run()
    except Refused as error:
        check_pinned(model.job, str(error))
        return Divided(TensorParallelism(refused=str(error)), tuple(model.parameters))
    return found


def check_pinned(job: JobSpec, reason: str) -> None:
    """Raises InputError if the job wants tensor parallelism, which is refused for this reason."""
    named = job.strategy.tp
    if named != "auto" and 1 not in named:
        message = f"tensor parallelism cannot divide the model: {reason}"
        raise InputError(Diagnostic(key="strategy.tp", message=message, suggestion="write strategy.tp: 1"))


class _Search:
    def __init__(self, model: Model, exported: Exported, flow: Dataflow) -> None:
        self.model, self.exported, self.flow, self.analysis = model, exported, flow, flow.analysis

    def run(self) -> Divided:
        styles = find_styles(self.model.module, self.exported, self.flow)
        degrees = self._degrees()
        parameters = self._parameters(styles.whole)
        if not degrees:
            return Divided(TensorParallelism(styles=self._all(styles, {})), parameters)
        try:
            counts = self._counts(styles, parameters, degrees[0])
        except Refused:
            if not any(division.role == "vocabulary" for division in self.analysis.divisions.values()):
                raise
            styles, parameters = self._with_whole_vocabulary(styles)
            counts = self._counts(styles, parameters, degrees[0])
        plain = self._all(styles, counts)
        doubtful = [degree for degree in degrees[1:] if self._repeats(degree)]
        wrong = {degree: self._wrong(styles, plain, parameters, degree) for degree in doubtful}
        degrees = tuple(degree for degree in degrees if not wrong.get(degree))
        reason = self._no_sequence(styles, plain, parameters, degrees)
        chosen = plain if reason else self._sequential(plain, parameters)
        if reason:
            chosen = tuple(replace(style, sequence_dim=None) for style in plain)
        self._check_sequence(reason)
        parallelism = TensorParallelism(degrees=degrees, sequence=not reason, sequence_reason=reason, styles=chosen)
        return Divided(parallelism, parameters)

    def _parameters(self, whole: Iterable[str]) -> tuple[Parameter, ...]:
        divisions = adjusted(self.analysis.divisions, whole)
        return with_roles(self.model.parameters, self.model.flow, divisions, "the exported forward does not use it")

    def _all(self, styles: Styles, counts: Counts) -> tuple[ModuleStyle, ...]:
        """The styles of all modules, with attributes."""
        by_path = dict(styles.by_path)
        for path, names in counts.items():
            by_path[path] = replace(by_path.get(path, ModuleStyle(path=path, style="shared")), attributes=names)
        return with_equals(by_path.values(), self.model.flow.like, self.model.module)

    def _with_whole_vocabulary(self, styles: Styles) -> tuple[Styles, tuple[Parameter, ...]]:
        """A head whose logits the model cannot take in parts stays whole, and so does the table it is tied to."""
        names = {name for name, division in self.analysis.divisions.items() if division.role == "vocabulary"}
        holders = [self.model.module.get_parameter(name) for name in names]
        by_path = {
            path: style
            for path, style in styles.by_path.items()
            if not any(
                own is p for own in self.model.module.get_submodule(path).parameters(recurse=False) for p in holders
            )
        }
        return replace(styles, by_path=by_path, whole=names), self._parameters(names)

    def _degrees(self) -> tuple[int, ...]:
        wanted = wanted_degrees(self.model.job)
        found = tuple(degree for degree in wanted if not self._indivisible(degree))
        named = self.model.job.strategy.tp
        if named != "auto" and 1 not in named and not found:
            self._refuse_degree(max(named))
        return found

    def _indivisible(self, degree: int) -> str:
        """The first parameter that so many processes cannot share, with what it counts; empty if there is none."""
        for group in self.analysis.groups:
            for name, division in group.divisions.items():
                few = division.role == "column" and not division.parts and degree % division.units == 0
                if division.units % degree and not few:
                    return f"{name.rpartition('.')[0]} has {division.units} heads or features"
        return ""

    def _repeats(self, degree: int) -> bool:
        """Whether several processes have the same key-value heads."""
        return any(d.units % degree for group in self.analysis.groups for d in group.divisions.values())

    def _refuse_degree(self, degree: int) -> None:
        world = self.model.job.cluster.world_size
        valid = [d for d in range(1, world + 1) if world % d == 0 and not self._indivisible(d)]
        nearest = min(valid, key=lambda d: (abs(d - degree), d))
        reason = self._indivisible(degree) or f"the cluster has {world} devices"
        message = f"{degree} processes cannot share every layer: {reason}"
        raise InputError(Diagnostic(key="strategy.tp", message=message, suggestion=f"write strategy.tp: {nearest}"))

    def _counts(self, styles: Styles, parameters: Sequence[Parameter], degree: int) -> Counts:
        """The smallest set of attributes with which the local form runs as it should. Raises Refused."""
        candidates = Candidates(self.model.module, self.exported, self.flow, styles)
        reason = ""
        for trial, keys in enumerate(candidates.sets()):
            counts = candidates.counts(keys)
            wrong = self._wrong(styles, self._all(styles, counts), parameters, degree)
            if not wrong:
                return counts
            reason = reason or wrong
            if trial >= MOST_TRIALS:
                break
        raise Refused(f"divided among {degree} processes the model does not run: {reason}")

    def _wrong(
        self,
        found: Styles,
        styles: Sequence[ModuleStyle],
        parameters: Sequence[Parameter],
        degree: int,
        *,
        sequence: bool = False,
    ) -> str:
        """Why the local form does not run as it should; empty if it does."""
        names = {node: operator_name_of(node) for node in self.flow.nodes}
        softmax = {self.flow.module(node) for node in found.divided if names.get(node) in ("softmax", "_softmax")}
        modules = {self.exported.path(path) for path in softmax}
        fused = [node for node, name in names.items() if name == "scaled_dot_product_attention"]
        with attention_calls() as calls:
            ran = self._run(styles, parameters, degree, sequence=sequence)
        whole = Attention.of(self.model.attention, self.model.whole.operators, modules)
        local = Attention.of(calls, ran.operators, modules)
        all_divided = all(node in found.divided for node in fused)
        return ran.reason or wrong_heads(whole, local, degree, all_divided=all_divided)

    def _run(
        self, styles: Sequence[ModuleStyle], parameters: Sequence[Parameter], degree: int, *, sequence: bool = False
    ) -> LocalRun:
        if not sequence:
            styles = [replace(style, sequence_dim=None) for style in styles]
        model = self.model
        return runs_locally(model.tracer, model.blocks, model.draw, parameters, styles, degree, sequence=sequence)

    def _no_sequence(
        self, styles: Styles, plain: Sequence[ModuleStyle], parameters: Sequence[Parameter], degrees: Sequence[int]
    ) -> str:
        """Why the sequence is not divided between the regions; empty if it is."""
        job = self.model.job
        if job.strategy.tensor_parallel.sequence != "auto" and True not in job.strategy.tensor_parallel.sequence:
            return "the job does not want it"
        reason = not_a_chain(self.model.flow, self.model.blocks)
        length = job.train.sequence_length
        if not reason and length % max(degrees):
            reason = f"sequences of {length} tokens are not divisible by {max(degrees)}"
        if not reason:
            outside = [node for node in self.flow.nodes if self._between(node, styles)]
            mixed = mixing(self.flow, outside, length, self.exported.path)
            reason = f"{mixed} may mix positions" if mixed else ""
        if not reason:
            reason = self._unclear(styles)
        if not reason:
            divided = self._sequential(plain, parameters)
            reason = self._wrong(styles, divided, parameters, degrees[-1], sequence=True)
        return reason

    def _unclear(self, styles: Styles) -> str:
        """A module of a block of which it is not known along which dimension a sequence enters or leaves."""
        for path, style in styles.by_path.items():
            moves = style.style in ("region", "row", "experts") or style.enters
            inside = any(path == block or path.startswith(f"{block}.") for block in self.exported.blocks.values())
            if moves and inside and style.sequence_dim is None:
                return f"what module {path} takes or returns has its positions in different dimensions"
        return ""

    def _between(self, node: object, styles: Styles) -> bool:
        stack = self.flow.stack(node)  # type: ignore[arg-type]
        return node not in styles.regions and any(path in self.exported.blocks for path in stack)

    def _sequential(self, styles: Sequence[ModuleStyle], parameters: Sequence[Parameter]) -> tuple[ModuleStyle, ...]:
        """The styles with a divided sequence: what blocks have whole sees a part of it."""
        paths = [block.path for block in self.model.blocks]
        inside = tuple(f"{path}." for path in paths)
        found = {
            style.path: style
            if style.path.startswith(inside) or style.path in paths
            else replace(style, sequence_dim=None)
            for style in styles
        }
        divided = {
            name
            for parameter in parameters
            if parameter.tensor_parallel not in ("replicated", "unknown")
            for name in (parameter.name, *parameter.also)
        }
        for block in self.model.blocks:
            for path, module in block.module.named_modules(prefix=block.path):
                own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
                if own and path not in found and not divided & set(own):
                    found[path] = ModuleStyle(path=path, style="shared")
        order = {path: at for at, (path, _) in enumerate(self.model.module.named_modules(remove_duplicate=False))}
        return tuple(sorted(found.values(), key=lambda style: order[style.path]))

    def _check_sequence(self, reason: str) -> None:
        wanted = self.model.job.strategy.tensor_parallel.sequence
        if reason and wanted != "auto" and False not in wanted:
            raise InputError(
                Diagnostic(
                    key="strategy.tensor_parallel.sequence",
                    message=f"the sequence cannot be divided between the layers: {reason}",
                    suggestion="leave the key out, or write false",
                )
            )


def not_a_chain(flow: Flow, blocks: Sequence[Block]) -> str:
    """Why the blocks are no chain in which each takes hidden states from the one before; empty if they are."""
    if len(blocks) < 1:
        return "the model has no repeated blocks"
    lists = {block.path.rpartition(".")[0] for block in blocks}
    if len(lists) > 1:
        return f"its blocks form more than one chain, {' and '.join(sorted(lists))}"
    paths = {block.path for block in blocks}
    for edge in flow.edges:
        if edge.source in paths and edge.kind == "skip":
            return f"what {edge.source} makes is used in {edge.target}, not in the next block alone"
    return ""
