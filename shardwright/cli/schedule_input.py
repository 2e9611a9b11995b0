"""What `shardwright schedule` is given: times, memory limits, and timetables to check."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from shardwright.planner.schedules.execution import ScheduleError
from shardwright.planner.schedules.text import from_text
from shardwright.planner.schedules.timetable import Action, Costs, Layout, Timetable
from shardwright.schemas.diagnostics import Diagnostic, InputError, shown
from shardwright.schemas.expected import join, nearest
from shardwright.schemas.nodes import Key, Node, Source, Span, diagnostic, plain
from shardwright.schemas.reading import read_text, read_tree

Values: TypeAlias = float | tuple[float, ...]
"""The same for all devices, or a list."""

_PASSES = ("F", "I", "W", "comm")
_OTHERS = {"activations": 1.0, "held_by_weight": None}
"""What a file of times may also say: activations of a device, and the share of them that a pending W holds."""
_WAY_OUT = (
    "write F,I,W,comm as four numbers like 18.5,18.1,9.3,0.6, or name a YAML or JSON file with these keys,"
    " each a number or a list"
)


def read_times(text: str, held_by_weight: float) -> Mapping[str, Values]:
    """`F`, `I`, `W`, `comm`, `activations` and `held_by_weight`, from four numbers or from a file that says so. Raises
    InputError."""
    path = Path(text)
    if ("," in text or _number(text) is not None) and not path.exists():
        found: dict[str, Values] = dict(zip(_PASSES, _four_numbers(text), strict=True))
    else:
        found = _times_of_file(read_tree(path))
    return {"comm": 0.0, "activations": 1.0, "held_by_weight": held_by_weight, **found}


def _four_numbers(text: str) -> list[float]:
    parts = text.split(",")
    if len(parts) != len(_PASSES):
        raise wrong_option("--times", f"expected four numbers F,I,W,comm, found {len(parts)}", _WAY_OUT)
    for name, part in zip(_PASSES, parts, strict=True):
        problem = _problem(name, _number(part))
        if problem:
            raise wrong_option("--times", f"{name}: {problem}, found {shown(part.strip())}", _WAY_OUT)
    return [float(part) for part in parts]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _problem(name: str, value: object) -> str:
    """What is wrong with one number; empty if nothing is. A forward or backward that takes no time is a slip."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "expected a number"
    if name in ("F", "I") and value <= 0:
        return "expected a time above 0"
    return "" if value >= 0 else "expected a number of at least 0"


def _times_of_file(root: Node) -> dict[str, Values]:
    if not isinstance(root.value, dict):
        raise InputError(diagnostic(root.span, (), f"expected a mapping, found {shown(plain(root))}", _WAY_OUT))
    keys = (*_PASSES, *_OTHERS)
    problems = [
        diagnostic(entry.key, (name,), "there is no such key", f"did you mean `{near}`?"
                   if (near := nearest(name, keys)) else f"the keys are {join(keys, 'and')}")
        for name, entry in root.value.items() if name not in keys
    ]  # fmt: skip
    problems += [
        diagnostic(root.span, (name,), "is missing", _WAY_OUT) for name in _PASSES[:3] if name not in root.value
    ]
    found: dict[str, Values] = {}
    for name, entry in root.value.items():
        node = entry.node
        for key, item in enumerate(node.value) if isinstance(node.value, tuple) else [(None, node)]:
            problem = _problem(name, item.value)
            if problem:
                path: Key = (name,) if key is None else (name, key)
                problems.append(diagnostic(item.span, path, f"{problem}, found {shown(plain(item))}"))
        found[name] = tuple(plain(node)) if isinstance(node.value, tuple) else plain(node)
    if problems:
        raise InputError(problems)
    return found


def costs_of(times: Mapping[str, Values], layout: Layout) -> Costs:
    """Costs of every stage. A list has one value a device, which its chunks share, or one a stage; `comm` one a link:
    from each stage to the next, or from each device to the next and, where chunks go round, from the last to the first.
    Raises InputError for a list of another length."""
    forward, input_gradient, weight_gradient, activations = (
        _per_stage(name, times[name], layout) for name in ("F", "I", "W", "activations")
    )
    shares = _per_stage("held_by_weight", times["held_by_weight"], layout, shared=False)
    return Costs(
        forward=forward,
        input_gradient=input_gradient,
        weight_gradient=weight_gradient,
        send=_links(times["comm"], layout),
        activations=activations,
        held_by_weight=tuple(share * kept for share, kept in zip(shares, activations, strict=True)),
    )


def _per_stage(name: str, values: Values, layout: Layout, shared: bool = True) -> tuple[float, ...]:
    """`shared`: a device's value is divided by its chunks."""
    if isinstance(values, tuple) and len(values) == layout.stages:
        return values
    of_ranks = values if isinstance(values, tuple) else (values,) * layout.ranks
    if len(of_ranks) != layout.ranks:
        raise _wrong_length(name, of_ranks, {layout.ranks: "one a device", layout.stages: "one a stage"})
    part = 1 / layout.chunks if shared else 1.0
    return tuple(of_ranks[layout.place(stage)[0]] * part for stage in range(layout.stages))


def _links(values: Values, layout: Layout) -> tuple[float, ...]:
    ranks = [layout.place(stage)[0] for stage in range(layout.stages)]
    pairs = list(pairwise(ranks))
    if not isinstance(values, tuple):
        links = [values] * len(pairs)
    elif len(values) == len(pairs):
        links = list(values)
    else:
        round_trip = layout.placement == "loop" and layout.chunks > 1
        allowed = {len(pairs): "one between each two stages", layout.ranks: "one from each device to the next"}
        allowed |= {} if round_trip else {layout.ranks - 1: "one between each two devices"}
        if len(values) not in allowed:
            raise _wrong_length("comm", values, allowed)
        links = [values[here if round_trip else min(here, there)] if here != there else 0.0 for here, there in pairs]
    return tuple(0.0 if here == there else link for link, (here, there) in zip(links, pairs, strict=True))


def _wrong_length(name: str, values: Sequence[float], allowed: Mapping[int, str]) -> InputError:
    expected = join([f"{count} ({says})" for count, says in allowed.items()], "or")
    return wrong_option("--times", f"{name}: a list of {len(values)}", f"expected {expected}")


def read_limits(text: str | None, ranks: int) -> tuple[float, ...] | None:
    """Per rank, from one number or one for each rank with commas between them; None: no limit. Raises InputError."""
    if text is None:
        return None
    parts = text.split(",")
    limits = [_number(part) for part in parts]
    if any(limit is None or not math.isfinite(limit) or limit <= 0 for limit in limits):
        message = f"expected a number above 0, found {shown(text)}"
        way_out = "the unit is what one micro-batch keeps on a whole device; 1F1B needs as many as there are stages"
        raise wrong_option("--memory-limit", message, way_out)
    if len(parts) not in (1, ranks):
        raise wrong_option("--memory-limit", f"{len(parts)} numbers for {ranks} devices", "give one, or one a device")
    found = tuple(limit for limit in limits if limit is not None)
    return found * ranks if len(found) == 1 else found


@dataclass(frozen=True, slots=True)
class Given:
    """A timetable from a file, and where each of its actions stands there."""

    timetable: Timetable
    family: str
    """As the file says; empty if it does not."""
    places: tuple[tuple[Span, ...], ...]
    """Of each rank: its actions, and the end of its line."""

    @property
    def chunks(self) -> int:
        """Stages on each rank."""
        return 1 + max(action.chunk for lane in self.timetable for action in lane)

    def wrong(self, error: ScheduleError) -> InputError:
        """The error with its place in the file."""
        span = self.places[error.rank][error.index]
        return InputError(diagnostic(span, (), str(error)))


def read_timetable(path: Path) -> Given:
    """A timetable in the text form, or the JSON of `--json` if its name ends in `.json`. Raises InputError."""
    given = _of_json(read_tree(path)) if path.suffix == ".json" else _of_text(Source(str(path), read_text(path)))
    actions = [(rank, index, each) for rank, lane in enumerate(given.timetable) for index, each in enumerate(lane)]
    if not actions:
        raise InputError(Diagnostic(file=str(path), message="holds no actions", suggestion=_FORM))
    for rank, index, action in actions:
        for name, number in (("micro-batch", action.micro_batch), ("chunk", action.chunk)):
            if number >= len(actions):
                message = f"{name} {number} in a timetable of {len(actions)} actions"
                way_out = "they are numbered from 0, without gaps"
                raise InputError(diagnostic(given.places[rank][index], (), message, way_out))
    return given


_FORM = "write one line for each rank, for instance `F0 F1 I0 W0 I1 W1`, or name the output of --json"


def _of_text(source: Source) -> Given:
    places = []
    for number, line in enumerate(source.text.splitlines(), 1):
        words = list(re.finditer(r"\S+", line.partition("#")[0]))
        if words:
            spans = [Span(source, number, word.start() + 1, word.end() + 1) for word in words]
            end = Span(source, number, spans[-1].end, spans[-1].end + 1)
            places.append((end,) if [word[0] for word in words] == ["-"] else (*spans, end))
    try:
        return Given(from_text(source.text), "", tuple(places))
    except ScheduleError as error:
        span = places[error.rank][error.index]
        raise InputError(diagnostic(span, (), error.message, _FORM)) from None


def _of_json(root: Node) -> Given:
    entries = root.value if isinstance(root.value, dict) else {}
    if "timetable" not in entries:
        raise InputError(diagnostic(root.span, ("timetable",), "is missing", _FORM))
    family = plain(entries["family"].node) if "family" in entries else ""
    node = entries["timetable"].node
    lanes = [_lane(lane, ("timetable", rank)) for rank, lane in enumerate(_list(node, ("timetable",)))]
    places = [(*(each.span for each in _list(lane, ())), lane.span) for lane in _list(node, ())]
    return Given(tuple(lanes), family if isinstance(family, str) else "", tuple(places))


def _list(node: Node, key: Key) -> tuple[Node, ...]:
    if not isinstance(node.value, tuple):
        raise InputError(diagnostic(node.span, key, f"expected a list, found {shown(plain(node))}"))
    return node.value


def _lane(node: Node, key: Key) -> tuple[Action, ...]:
    return tuple(_action(item, (*key, index)) for index, item in enumerate(_list(node, key)))


def _action(node: Node, key: Key) -> Action:
    value = plain(node)
    fields = [value.get(name) for name in Action._fields] if isinstance(value, dict) else [None] * 3
    if fields[0] not in ("F", "I", "W", "B") or not all(type(each) is int and each >= 0 for each in fields[1:]):
        expected = "expected a mapping with `kind` F, I, W or B, and `chunk` and `micro_batch` from 0"
        raise InputError(diagnostic(node.span, key, expected))
    return Action(*fields)


def wrong_option(option: str, message: str, suggestion: str) -> InputError:
    """What is wrong with the value of an option, and the way out."""
    return InputError(Diagnostic(key=option, message=message, suggestion=suggestion))
