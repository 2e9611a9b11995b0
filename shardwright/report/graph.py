"""The model as boxes and what runs between them, ready to be drawn: what repeats is folded into one box."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardwright.report.layout import human_flops, plural
from shardwright.report.profile import PHASES, POLICIES
from shardwright.report.units import UnitKind, path_ranges, period, run_title, unit_kinds
from shardwright.schemas.profile import ComputeDtypeName, Cut, Edge, ModelProfile, Unit
from shardwright.schemas.units import human_bytes, human_count


@dataclass(frozen=True, slots=True)
class Box:
    """Equal units in a row, or those in the same place of a pattern that repeats."""

    kind: str
    """`embedding`, `block`, `head`: decides the colour."""
    title: str
    lines: tuple[str, ...]
    paths: tuple[str, ...]
    inner_cuts: str = ""
    """The cuts between the units of the box."""


@dataclass(frozen=True, slots=True)
class Joint:
    """What stands between a box and the next."""

    passes: str
    """What the one hands to the other."""
    cut: str
    """Empty where the model cannot be cut."""


@dataclass(frozen=True, slots=True)
class Link:
    """A line between two boxes that are no neighbours, with what it means. Both ends are one box if it stays inside."""

    source: int
    target: int
    mark: str
    says: str


@dataclass(frozen=True, slots=True)
class Frame:
    """Boxes `first` to `last` repeat together."""

    first: int
    last: int
    times: int


@dataclass(frozen=True, slots=True)
class Graph:
    """A drawing without coordinates."""

    title: str
    note: str
    boxes: tuple[Box, ...]
    joints: tuple[Joint, ...]
    """One fewer than boxes."""
    frame: Frame | None
    skips: tuple[Link, ...]
    shared: tuple[Link, ...]


@dataclass(slots=True)
class _Run:
    """A box in the making."""

    kind: UnitKind
    units: list[Unit] = field(default_factory=list)
    times: int = 1
    """How often the model comes back to it."""

    @property
    def count(self) -> int:
        return sum(unit.count for unit in self.units)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for unit in self.units for path in unit.paths)

    @property
    def inner_paths(self) -> tuple[str, ...]:
        """Without the last of each time."""
        return tuple(path for at, path in enumerate(self.paths, start=1) if at % (self.count // self.times))


def model_graph(profile: ModelProfile, micro_batch: int, dtype: ComputeDtypeName) -> Graph:
    """The graph of a profile. Raises KeyError for a dtype that was not profiled."""
    runs, frame = _folded(_runs(profile, unit_kinds(profile)))
    place = {path: index for index, run in enumerate(runs) for path in run.paths}
    place |= {run.kind.name: index for index, run in enumerate(runs) if not run.paths}
    cuts = {cut.after: cut for cut in profile.cuts}
    return Graph(
        title=run_title(profile, micro_batch, dtype),
        note=(
            f"{human_count(profile.numel)} parameters, attention: {profile.attention[dtype]}. Kept: from forward to "
            "backward, with none, selective and full checkpointing. What passes and is cut: of one sequence, in the "
            "dtypes that the model declares."
        ),
        boxes=tuple(_box(profile, run, cuts, micro_batch, dtype) for run in runs),
        joints=tuple(_joints(profile, runs, place, cuts)),
        frame=frame,
        skips=tuple(_skips(profile.edges, place)),
        shared=tuple(_shared(profile, place)),
    )


def _runs(profile: ModelProfile, kinds: Sequence[UnitKind]) -> list[_Run]:
    """Equal neighbours together."""
    kind_of = {index: kind for kind in kinds for index, _ in kind.units}
    runs: list[_Run] = []
    for index, unit in enumerate(profile.units):
        if not runs or runs[-1].kind is not kind_of[index]:
            runs.append(_Run(kind_of[index]))
        runs[-1].units.append(unit)
    return runs


def _folded(runs: list[_Run]) -> tuple[list[_Run], Frame | None]:
    """Blocks that alternate in a pattern, once instead of many times."""
    blocks = [run for run in runs if run.kind.unit.kind == "block"]
    first = runs.index(blocks[0]) if blocks else 0
    length = period([f"{run.kind.name} {run.count}" for run in blocks]) if blocks else 1
    times = len(blocks) // length
    if times < 2:
        return runs, None
    folded = []
    for at in range(length):
        same = blocks[at : length * times : length]
        folded.append(_Run(same[0].kind, [unit for run in same for unit in run.units], times))
    rest = runs[first + length * times :]
    return [*runs[:first], *folded, *rest], Frame(first, first + length - 1, times)


def _box(profile: ModelProfile, run: _Run, cuts: Mapping[str, Cut], micro_batch: int, dtype: ComputeDtypeName) -> Box:
    cost, total = run.kind.unit.costs[dtype], _flops(profile, micro_batch, dtype) or 1
    flops = run.count * sum(cost.flops(phase, micro_batch) for phase in PHASES)
    members = {id(unit) for unit in run.units}
    owners = {index for index, unit in enumerate(profile.units) if id(unit) in members}
    numel = sum(parameter.numel for parameter in profile.parameters if parameter.unit in owners)
    kept = [human_bytes(run.count * cost.saved[policy].at(micro_batch)) for policy in POLICIES if policy in cost.saved]
    unit = run.kind.unit
    title = f"{run.kind.name} x {run.count}" if unit.kind == "block" else run.kind.name
    lines = [
        *([unit.module] if unit.module else []),
        *([path_ranges(run.paths)] if run.paths else []),
        *([f"{human_count(numel)} parameters"] if numel else []),
        f"{human_flops(flops)}{'' if flops >= 1000 else ' '}FLOP, {100 * flops / total:.0f} %",
        f"kept {' / '.join(kept)}",
    ]
    inner = [cuts[path] for path in run.inner_paths if path in cuts]
    size = "" if not inner else f"{plural(len(inner), 'cut')} inside, {human_bytes(max(cut.bytes for cut in inner))}"
    return Box(unit.kind, title, tuple(lines), run.paths, size)


def _flops(profile: ModelProfile, micro_batch: int, dtype: ComputeDtypeName) -> int:
    return sum(unit.count * unit.costs[dtype].flops(phase, micro_batch) for unit in profile.units for phase in PHASES)


def _says(tensors: int, size: int) -> str:
    return f"{plural(tensors, 'tensor')}, {human_bytes(size)}"


def _joints(
    profile: ModelProfile, runs: Sequence[_Run], place: Mapping[str, int], cuts: Mapping[str, Cut]
) -> list[Joint]:
    chains: dict[tuple[int, int], Edge] = {}
    for edge in profile.edges:
        if edge.kind == "chain" and edge.source in place and edge.target in place:
            chains[place[edge.source], place[edge.target]] = edge
    joints = []
    for index, run in enumerate(runs[:-1]):
        chain = chains.get((index, index + 1))
        cut = cuts.get(run.paths[-1] if run.paths else run.kind.name)
        joints.append(
            Joint(
                passes=_says(chain.tensors, chain.bytes) if chain else "",
                cut=f"cut: {_says(cut.tensors, cut.bytes)}" if cut else "",
            )
        )
    return joints


def _skips(edges: Sequence[Edge], place: Mapping[str, int]) -> list[Link]:
    """Skips between the same two boxes are one line."""
    found: dict[tuple[int, int], list[Edge]] = defaultdict(list)
    for edge in edges:
        if edge.kind == "skip" and edge.source in place and edge.target in place:
            found[place[edge.source], place[edge.target]].append(edge)
    links = []
    for number, ((source, target), group) in enumerate(sorted(found.items()), start=1):
        sources, targets = (dict.fromkeys(ends) for ends in zip(*((e.source, e.target) for e in group), strict=True))
        ends = f"{path_ranges(list(sources))} to {path_ranges(list(targets))}"
        size = _says(sum(edge.tensors for edge in group), sum(edge.bytes for edge in group))
        links.append(Link(source, target, str(number), f"{ends}: {size}"))
    return links


def _shared(profile: ModelProfile, place: Mapping[str, int]) -> list[Link]:
    """Weights that are reachable from two boxes, or twice from one."""
    modules = {
        unit.kind: Counter(operator.module for cost in unit.costs.values() for operator in cost.operators)
        for unit in profile.units
        if not unit.paths
    }

    def box_of(name: str) -> int | None:
        parts = name.split(".")
        prefixes = [".".join(parts[:end]) for end in range(1, len(parts))]
        inside = next((place[prefix] for prefix in prefixes if prefix in place and prefix not in modules), None)
        outside = (place[kind] for kind, calls in modules.items() if prefixes and calls[prefixes[-1]])
        return inside if inside is not None else next(outside, None)

    links: list[Link] = []
    for parameter in profile.parameters:
        boxes = sorted({box for name in (parameter.name, *parameter.also) if (box := box_of(name)) is not None})
        if parameter.also and boxes:
            names = " = ".join((parameter.name, *parameter.also))
            links.append(Link(boxes[0], boxes[-1], f"w{len(links) + 1}", f"{names}: {human_count(parameter.numel)}"))
    return links
