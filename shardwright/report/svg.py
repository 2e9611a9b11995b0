"""A graph of a model as one SVG file: nothing but text, lines and boxes, for light and dark surroundings alike.

All text is set in a font of fixed width, so that its length is known here and nothing overlaps; what is too long is cut
off, and whole in the tooltip.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap

from rich.cells import cell_len, set_cell_size

from shardwright.report.graph import Box, Frame, Graph, Link, model_graph
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile

MARK = "drawn by shardwright"
"""Stands in every file, so that a drawing of ours is known from a file of the user's."""
_STYLE = """\
svg.shardwright { --paper: #ffffff; --ink: #1b1f24; --dim: #57606a; --line: #8c959f; --cut: #bf3989; --skip: #0969da;
  --shared: #9a6700; --embedding: #ddf4ff; --block: #dafbe1; --head: #fff8c5; }
@media (prefers-color-scheme: dark) {
  svg.shardwright { --paper: #0d1117; --ink: #e6edf3; --dim: #9198a1; --line: #6e7681; --cut: #f778ba; --skip: #58a6ff;
    --shared: #d29922; --embedding: #12304d; --block: #12341f; --head: #3a2f0b; }
}
svg.shardwright .paper { fill: var(--paper); }
svg.shardwright text { font: 12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: var(--ink); }
svg.shardwright .title { font-weight: bold; }
svg.shardwright .dim { fill: var(--dim); }
svg.shardwright .box { stroke: var(--line); }
svg.shardwright .embedding { fill: var(--embedding); }
svg.shardwright .block { fill: var(--block); }
svg.shardwright .head { fill: var(--head); }
svg.shardwright .frame { fill: none; stroke: var(--line); stroke-dasharray: 2 3; }
svg.shardwright .line { fill: none; stroke: var(--line); }
svg.shardwright .tip { fill: var(--line); }
svg.shardwright .cut { stroke: var(--cut); stroke-dasharray: 6 4; }
svg.shardwright text.cut { stroke: none; fill: var(--cut); }
svg.shardwright .skip { fill: none; stroke: var(--skip); }
svg.shardwright text.skip { stroke: none; fill: var(--skip); }
svg.shardwright .shared { fill: none; stroke: var(--shared); stroke-dasharray: 3 3; }
svg.shardwright text.shared { stroke: none; fill: var(--shared); }
"""
_CHARACTER, _LINE = 7.5, 17
"""Pixels that a character takes (a little more than 0.6 of 12 pixels, the widest of these fonts), and a line."""
_MARGIN, _PADDING, _GAP, _LANE = 20, 10, 60, 30
_INNER, _OUTER = 46, 8
"""Most characters in a line of a box; pixels from a frame to its boxes."""
_ROWS = 12
"""Most boxes above one another; a longer model goes on in another column."""
_MARKS = 16
"""Most characters of marks beside a box."""
_WIDEST = 110
"""Most characters in a line of the title and the legend."""


def profile_svg(profile: ModelProfile, micro_batch: int, dtype: ComputeDtypeName) -> str:
    """The whole file. Raises KeyError for a dtype that was not profiled."""
    element = svg_element(model_graph(profile, micro_batch, dtype))
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<!-- {MARK} -->\n{element}\n'


def svg_element(graph: Graph) -> str:
    """The `svg` element, for a page of HTML."""
    return _Drawing(graph).element()


def shown(text: str) -> str:
    """Text as it may stand in XML and HTML: escaped, and without the characters that XML 1.0 does not allow."""
    return escape(re.sub(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]", "\ufffd", text))


def text_element(x: float, y: float, text: str, style: str = "", most: int = _WIDEST) -> str:
    """A line of text; cut off with a tooltip where it is too long."""
    text = text.translate({ord(blank): " " for blank in "\t\n\r"})
    kind = f' class="{style}"' if style else ""
    if cell_len(text) <= most:
        return f'<text x="{x:g}" y="{y:g}"{kind}>{shown(text)}</text>'
    short = set_cell_size(text, most - 1).rstrip() + "…"
    return f'<text x="{x:g}" y="{y:g}"{kind}><title>{shown(text)}</title>{shown(short)}</text>'


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a box stands."""

    column: int
    x: float
    y: float
    height: float

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


class _Drawing:
    """Coordinates for one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        beside = max((_length(text) for joint in graph.joints for text in (joint.passes, joint.cut)), default=0)
        inside = max(_length(line) for box in graph.boxes for line in _lines(box))
        self.width = max(_CHARACTER * inside + 2 * _PADDING, 2 * (_CHARACTER * beside + 2 * _PADDING))
        self.left, self.right = _Side.of(graph.shared, "shared"), _Side.of(graph.skips, "skip")
        self.top = _MARGIN + _LINE * (len(self._heading()) + 1)
        self.places = self._places()
        self.bottom = max(place.y + place.height for place in self.places) + (_GAP if self.places[-1].column else _LINE)
        legend = len(self._legend())
        self.height = self.bottom + (_LINE * (legend + 1) if legend else 0) + _MARGIN / 2

    def _heading(self) -> list[str]:
        return [self.graph.title, *wrap(self.graph.note, _WIDEST)]

    def _legend(self) -> list[tuple[str, str]]:
        lines = [("skip", f"skip {link.mark}: {link.says}") for link in self.graph.skips]
        return lines + [("shared", f"shared {link.mark}: {link.says}") for link in self.graph.shared]

    @property
    def column_width(self) -> float:
        """A column with its lanes."""
        return self.left.room + self.width + self.right.room + 2 * _OUTER

    def _places(self) -> list[_Place]:
        places: list[_Place] = []
        y = self.top
        for index, box in enumerate(self.graph.boxes):
            column, row = divmod(index, _ROWS)
            y = self.top if row == 0 else y
            x = _MARGIN + _OUTER + column * (self.column_width + _GAP) + self.left.room
            height = _LINE * len(_lines(box)) + 2 * _PADDING
            places.append(_Place(column, x, y, height))
            y += height + _GAP
        return places

    def element(self) -> str:
        """Everything."""
        columns = self.places[-1].column + 1
        longest = max(map(cell_len, (*self._heading(), *(text for _, text in self._legend()))))
        width = max(
            2 * _MARGIN + columns * self.column_width + (columns - 1) * _GAP,
            2 * _MARGIN + _CHARACTER * min(longest, _WIDEST),
        )
        size = f'width="{width:.0f}" height="{self.height:.0f}" viewBox="0 0 {width:.0f} {self.height:.0f}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" class="shardwright" role="img" {size}>',
                f"<title>{shown(self.graph.title)}</title>",
                f"<style>\n{_STYLE}</style>",
                f'<rect class="paper" width="{width:.0f}" height="{self.height:.0f}"/>',
                *self._parts(),
                "</svg>",
            ]
        )

    def _parts(self) -> Iterator[str]:
        for index, line in enumerate(self._heading()):
            yield text_element(_MARGIN, _MARGIN + _LINE * (index + 0.5), line, "dim" if index else "title")
        if self.graph.frame:
            yield from self._frame(self.graph.frame)
        for index in range(len(self.graph.joints)):
            yield from self._joint(index)
        drawn = [*self._links(self.left, -1), *self._links(self.right, 1)]
        yield from (line for line, _ in drawn)
        yield from (tag for _, tag in drawn)
        for box, place in zip(self.graph.boxes, self.places, strict=True):
            yield from self._box(box, place)
        for index, (style, text) in enumerate(self._legend()):
            yield text_element(_MARGIN, self.bottom + _LINE * (index + 1), text, style)

    def _box(self, box: Box, place: _Place) -> Iterator[str]:
        yield f"<g><title>{shown(_tooltip(box))}</title>"
        yield (
            f'<rect class="box {box.kind}" x="{place.x:g}" y="{place.y:g}" width="{self.width:g}" '
            f'height="{place.height:g}" rx="4"/>'
        )
        for row, line in enumerate(_lines(box)):
            y = place.y + _PADDING + _LINE * (row + 0.75)
            yield text_element(place.x + _PADDING, y, line, "title" if row == 0 else "", _INNER)
        yield "</g>"

    def _joint(self, index: int) -> Iterator[str]:
        """The arrow to the next box, and the line along which the model can be cut."""
        joint, here, there = self.graph.joints[index], self.places[index], self.places[index + 1]
        x, y = here.x + self.width / 2, here.y + here.height
        if here.column == there.column:
            yield _arrow(f"M {x:g} {y:g} V {there.y - 6:g}", x, there.y)
        else:
            over = there.x - _OUTER - self.left.room - _GAP / 2
            above, end = self.top - _LINE / 2, there.x + self.width / 2
            path = f"M {x:g} {y:g} V {y + _GAP - 7:g} H {over:g} V {above - 4:g} H {end:g} V {there.y - 6:g}"
            yield _arrow(path, end, there.y)
        if joint.passes:
            yield text_element(x + 10, y + 21, joint.passes, "dim", _INNER)
        if joint.cut:
            yield f'<path class="cut" d="M {here.x:g} {y + 28:g} H {here.x + self.width:g}"/>'
            yield text_element(x + 10, y + 43, joint.cut, "cut", _INNER)

    def _frame(self, frame: Frame) -> Iterator[str]:
        """A frame around what repeats, in each column that it reaches."""
        inside = self.places[frame.first : frame.last + 1]
        for column in sorted({place.column for place in inside}):
            here = [place for place in inside if place.column == column]
            top, bottom = here[0].y - _OUTER, here[-1].y + here[-1].height + _OUTER
            yield (
                f'<rect class="frame" x="{here[0].x - _OUTER:g}" y="{top:g}" width="{self.width + 2 * _OUTER:g}" '
                f'height="{bottom - top:g}" rx="8"/>'
            )
        last = inside[-1]
        label = f"{frame.times} times"
        yield text_element(last.x, last.y + last.height + 21, label, "dim", int(self.width / 2 / _CHARACTER))

    def _links(self, side: _Side, sign: int) -> Iterator[tuple[str, str]]:
        """Lines beside the boxes with their marks, on the left (sign -1) or the right (1)."""

        def edge(place: _Place) -> float:
            return place.x + (self.width if sign > 0 else 0)

        for box, marks in side.stubs.items():
            place = self.places[box]
            x, y = edge(place) + sign * (_OUTER + _LANE / 4 + side.stub_room / 2), place.middle
            yield _path(side.style, f"M {edge(place):g} {y:g} H {x:g}"), _tag(x, y, marks, side.style)
        for lane, held in enumerate(side.lanes):
            shift = 6 + 3 * (lane % 3)  # lines that leave the same box from different lanes are told apart
            for link in held:
                here, there = self.places[link.source], self.places[link.target]
                x = edge(here) + sign * (_OUTER + side.stub_room + _LANE * (lane + 0.4))
                above, below = here.middle + shift, there.middle - shift
                path = f"M {edge(here):g} {above:g} H {x:g} V {below:g} H {edge(there):g}"
                yield _path(side.style, path), _tag(x, (above + below) / 2, link.mark, side.style)


@dataclass(frozen=True, slots=True)
class _Side:
    """What is drawn on one side of the boxes: lanes with a line for each link; and next to the boxes stubs, marks of
    links that stay in one box or lead to another column."""

    style: str
    lanes: list[list[Link]]
    stubs: dict[int, str]
    """Marks beside a box."""

    @classmethod
    def of(cls, links: Sequence[Link], style: str) -> _Side:
        """Divides the links."""
        stubs: dict[int, str] = {}
        for link in filter(_is_stub, links):
            for box in {link.source, link.target}:
                stubs[box] = f"{stubs[box]} {link.mark}" if box in stubs else link.mark
        short = {
            box: set_cell_size(marks, _MARKS - 1) + "…" if len(marks) > _MARKS else marks
            for box, marks in stubs.items()
        }
        return cls(style, _lanes([link for link in links if not _is_stub(link)]), short)

    @property
    def stub_room(self) -> float:
        """Pixels for the stubs, those of the longest."""
        return max((_CHARACTER * len(marks) + _LANE / 2 for marks in self.stubs.values()), default=0)

    @property
    def room(self) -> float:
        """Pixels for everything."""
        return self.stub_room + len(self.lanes) * _LANE


def _is_stub(link: Link) -> bool:
    return link.source == link.target or link.source // _ROWS != link.target // _ROWS


def _path(style: str, path: str) -> str:
    return f'<path class="{style}" d="{path}"/>'


def _lines(box: Box) -> list[str]:
    return [box.title, *box.lines, *([box.inner_cuts] if box.inner_cuts else [])]


def _length(line: str) -> int:
    return min(cell_len(line), _INNER)


def _tooltip(box: Box) -> str:
    return "\n".join([*_lines(box), *box.paths])


def _arrow(path: str, x: float, y: float) -> str:
    tip = f"M {x - 4:g} {y - 7:g} L {x:g} {y:g} L {x + 4:g} {y - 7:g} Z"
    return f'<path class="line" d="{path}"/><path class="tip" d="{tip}"/>'


def _tag(x: float, y: float, mark: str, style: str) -> str:
    """A mark on its line, which it interrupts."""
    width = _CHARACTER * len(mark) + 4
    room = f'<rect class="paper" x="{x - width / 2:g}" y="{y - 8:g}" width="{width:g}" height="16"/>'
    return room + text_element(x - width / 2 + 2, y + 4, mark, style)


def _lanes(links: Sequence[Link]) -> list[list[Link]]:
    """Links side by side: those that overlap in height get lanes of their own."""
    lanes: list[list[Link]] = []
    for link in sorted(links, key=lambda at: (at.target - at.source, at.source)):
        free = next((lane for lane in lanes if all(_apart(link, other) for other in lane)), None)
        if free is None:
            lanes.append([link])
        else:
            free.append(link)
    return lanes


def _apart(one: Link, other: Link) -> bool:
    return one.target < other.source or other.target < one.source
