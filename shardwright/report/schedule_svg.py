"""A pipeline schedule as one SVG file: a lane for each rank with its actions, and under it what memory it holds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from shardwright.planner.schedules.timetable import Action
from shardwright.report.schedule import Schedule, schedule_facts, schedule_title
from shardwright.report.svg import MARK, shown, text_element
from shardwright.report.time_grid import KINDS

_STYLE = """\
svg.shardwright { --paper: #ffffff; --ink: #1b1f24; --dim: #57606a; --line: #d0d7de; --on: #1b1f24;
  --F0: #80ccff; --F1: #54aeff; --I0: #7ee2a0; --I1: #4ac26b; --W0: #f5d565; --W1: #d4a72c; --B0: #ffaeda;
  --B1: #e583be; --memory: #8c959f; }
@media (prefers-color-scheme: dark) {
  svg.shardwright { --paper: #0d1117; --ink: #e6edf3; --dim: #9198a1; --line: #30363d; --on: #0d1117;
    --F0: #79c0ff; --F1: #388bfd; --I0: #7ee787; --I1: #3fb950; --W0: #f2cc60; --W1: #bb8009; --B0: #ff9bce;
    --B1: #db61a2; --memory: #8b949e; }
}
svg.shardwright .paper { fill: var(--paper); }
svg.shardwright text { font: 12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: var(--ink); }
svg.shardwright .title { font-weight: bold; }
svg.shardwright .dim { fill: var(--dim); }
svg.shardwright .on { font-size: 10px; fill: var(--on); text-anchor: middle; }
svg.shardwright .end { text-anchor: end; }
svg.shardwright .middle { text-anchor: middle; }
svg.shardwright .line { stroke: var(--line); }
svg.shardwright .action { stroke: var(--paper); stroke-width: 0.5; }
svg.shardwright .memory { fill: var(--memory); fill-opacity: 0.45; }
"""
_MARGIN, _LINE = 20, 18
_LANE, _MEMORY, _SPACE = 22, 14, 8
"""Heights: of a rank's actions, of its memory, and between ranks."""
_NARROWEST, _WIDEST = 700, 8000
"""Pixels that the whole time takes."""
_EACH = 22
"""Pixels of an action of middling length, where there is room."""
_CHARACTER = 6.1
"""Pixels that a character in an action takes."""
_SINGLY = 20_000
"""Most actions that are drawn one by one, with a tooltip each; more become one path a kind, so that the file stays
small enough to open."""
_TICKS = 10


def schedule_svg(schedule: Schedule) -> str:
    """The whole file."""
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<!-- {MARK} -->\n' + "\n".join(_Gantt(schedule).element()) + "\n"


class _Gantt:
    """Coordinates for one schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.simulation = schedule, schedule.simulation
        lanes = self.simulation.ranks
        lengths = sorted(end - start for lane in lanes for _, start, end in lane if end > start)
        self.makespan = self.simulation.makespan or 1.0
        middle = lengths[len(lengths) // 2] if lengths else self.makespan
        self.time_width = min(_WIDEST, max(_NARROWEST, self.makespan / middle * _EACH))
        self.left = _MARGIN + 60.0
        self.right = 90.0
        self.facts = [f"{name}: {value}" for name, value in schedule_facts(schedule)]
        self.top = _MARGIN + _LINE * (len(self.facts) + 4.0)
        self.pitch = _LANE + _MEMORY + _SPACE
        self.bottom = self.top + self.pitch * len(lanes)
        self.most = max(schedule.peak_memory) or 1.0
        self.width, self.height = self.left + self.time_width + self.right, self.bottom + 2 * _LINE + _MARGIN / 2

    def x(self, time: float) -> float:
        """Of a time, to a tenth of a pixel."""
        return round(self.left + time / self.makespan * self.time_width, 1)

    def element(self) -> Iterator[str]:
        """Everything."""
        size = f'width="{self.width:.0f}" height="{self.height:.0f}" viewBox="0 0 {self.width:.0f} {self.height:.0f}"'
        title = schedule_title(self.schedule)
        yield f'<svg xmlns="http://www.w3.org/2000/svg" class="shardwright" role="img" {size}>'
        yield f"<title>{shown(title)}</title>"
        yield f"<style>\n{_STYLE}</style>"
        yield f'<rect class="paper" width="{self.width:.0f}" height="{self.height:.0f}"/>'
        yield text_element(_MARGIN, _MARGIN + _LINE / 2, title, "title")
        for index, line in enumerate(self.facts, 1):
            yield text_element(_MARGIN, _MARGIN + _LINE * (index + 0.5), line, "dim")
        yield from self._legend(_MARGIN + _LINE * (len(self.facts) + 2))
        yield from self._axis()
        for rank in range(len(self.simulation.ranks)):
            yield from self._rank(rank, self.top + self.pitch * rank)
        yield "</svg>"

    def _legend(self, y: float) -> Iterator[str]:
        actions = {(action.kind, action.chunk % 2) for lane in self.simulation.timetable for action in lane}
        x = float(_MARGIN)
        for kind, name in KINDS.items():
            shades = [odd for odd in range(2) if (kind, odd) in actions]
            for odd in shades:
                yield f'<rect x="{x:g}" y="{y - 11:g}" width="14" height="14" rx="2" fill="var(--{kind}{odd})"/>'
                x += 16
            if shades:
                yield text_element(x + 4, y, f"{kind} {name}", "dim")
                x += 7.5 * len(name) + 44
        yield f'<rect class="memory" x="{x:g}" y="{y - 11:g}" width="14" height="14"/>'
        darker = " (odd chunks: darker)" if any(odd for _, odd in actions) else ""
        yield text_element(x + 20, y, f"memory held{darker}", "dim")

    def _axis(self) -> Iterator[str]:
        """Vertical lines at round times."""
        step, unit = _round_step(self.makespan / _TICKS), self.schedule.measures.time
        for index in range(int(self.makespan / step * (1 + 1e-9)) + 1):
            x = self.x(index * step)
            yield f'<path class="line" d="M {x:g} {self.top - 6:g} V {self.bottom:g}"/>'
            yield text_element(x, self.bottom + _LINE, f"{index * step:g}{unit}", "dim middle")
        yield text_element(self.left + self.time_width + 10, self.top - _LINE / 2, "peak", "dim")

    def _rank(self, rank: int, y: float) -> Iterator[str]:
        yield text_element(self.left - 10, y + _LANE / 2 + 4, f"rank {rank}", "end")
        singly = sum(map(len, self.simulation.timetable)) <= _SINGLY
        yield from self._actions(rank, y) if singly else self._paths(rank, y)
        yield self._memory(rank, y + _LANE)
        peak = self.schedule.peak_memory[rank]
        yield text_element(self.left + self.time_width + 10, y + _LANE + _MEMORY - 2, f"{peak:.2f}", "dim")

    def _actions(self, rank: int, y: float) -> Iterator[str]:
        for action, start, end in self.simulation.ranks[rank]:
            x, width = self.x(start), self.x(end) - self.x(start)
            box = (
                f'<rect class="action" x="{x:g}" y="{y:g}" width="{width:.4g}" height="{_LANE}" fill="{_fill(action)}">'
            )
            yield f"{box}<title>{shown(self._says(rank, action, start, end))}</title></rect>"
            label = f"{action.kind}{action.micro_batch}"
            label = label if width >= _CHARACTER * len(label) + 2 else str(action.micro_batch)
            if width >= _CHARACTER * len(label) + 2:
                yield text_element(x + width / 2, y + _LANE / 2 + 4, label, "on")

    def _says(self, rank: int, action: Action, start: float, end: float) -> str:
        stage = self.simulation.layout.stage(rank, action.chunk)
        at = f"{start:.6g} to {end:.6g}{self.schedule.measures.time}"
        has = f": {self.schedule.contents[stage]}" if self.schedule.contents else ""
        what = f"{KINDS[action.kind]} of stage {stage} (chunk {action.chunk}{has})"
        return f"{action.kind}{action.micro_batch}: {what}, {at}"

    def _paths(self, rank: int, y: float) -> Iterator[str]:
        boxes: dict[str, list[str]] = {}
        for action, start, end in self.simulation.ranks[rank]:
            path = f"M{self.x(start):g} {y:g}h{self.x(end) - self.x(start):.4g}v{_LANE}H{self.x(start):g}z"
            boxes.setdefault(_fill(action), []).append(path)
        for fill, paths in boxes.items():
            yield f'<path class="action" fill="{fill}" d="{"".join(paths)}"/>'

    def _memory(self, rank: int, y: float) -> str:
        """A staircase; the rank that holds most fills the height."""
        steps = self.simulation.memory[rank]
        base = y + _MEMORY
        points = [*steps, (self.makespan, steps[-1][1] if steps else 0.0)]
        path = "".join(
            f"V{base - _MEMORY * held / self.most:.5g}H{self.x(until):g}" for (_, held), (until, _) in pairwise(points)
        )
        return f'<path class="memory" d="M{self.x(points[0][0]):g} {base:g}{path}V{base:g}z"/>'


def _fill(action: Action) -> str:
    return f"var(--{action.kind}{action.chunk % 2})"


def _round_step(least: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** (len(f"{int(least)}") - 1) if least >= 1 else 1.0
    while power > least:
        power /= 10
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
