"""The plot of benchmarks/amsp_study.py as one SVG file, for light and dark surroundings alike."""

from collections.abc import Iterator, Sequence
from html import escape
from math import log2
from typing import NamedTuple


class Series(NamedTuple):
    """A line: number of devices, MFU in %, and whether it fits."""

    name: str
    values: Sequence[tuple[int, float, bool]]


class Mark(NamedTuple):
    """A published figure."""

    name: str
    world: int
    mfu: float


class Panel(NamedTuple):
    """One diagram."""

    title: str
    series: Sequence[Series]
    marks: Sequence[Mark]


COLOURS = {
    "planner": ("#1b1f24", "#e6edf3"),
    "planner, free": ("#8c959f", "#8b949e"),
    "AMSP": ("#0969da", "#58a6ff"),
    "ZeRO-1": ("#1a7f37", "#3fb950"),
    "ZeRO-3": ("#cf222e", "#ff7b72"),
    "MiCS": ("#9a6700", "#d29922"),
    "hpZ": ("#8250df", "#bc8cff"),
}
"""Of each system, on light and on dark paper."""
WIDTH, HEIGHT = 260, 230
"""Of the inside of a panel, in pixels."""
LEFT, TOP, GAP, BELOW = 52, 64, 34, 66
HIGHEST = 70
"""Of the axis, in %."""


def draw(rows: Sequence[Sequence[Panel]], worlds: Sequence[int]) -> str:
    """The whole file; every row has as many panels."""
    width = LEFT + len(rows[0]) * (WIDTH + GAP)
    height = TOP + len(rows) * (HEIGHT + BELOW)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="amsp-study" role="img" {size}>',
        "<title>Model FLOPs utilisation by number of devices, predicted and published</title>",
        f"<style>\n{_style()}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        *_legend(),
    ]
    for row, panels in enumerate(rows):
        for column, panel in enumerate(panels):
            x, y = LEFT + column * (WIDTH + GAP), TOP + 20 + row * (HEIGHT + BELOW)
            parts += [f'<g transform="translate({x} {y})">', *_panel(panel, worlds, first=column == 0), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _style() -> str:
    light = " ".join(f"--c{index}: {light};" for index, (light, _) in enumerate(COLOURS.values()))
    dark = " ".join(f"--c{index}: {dark};" for index, (_, dark) in enumerate(COLOURS.values()))
    lines = [
        f"svg.amsp-study {{ --paper: #ffffff; --ink: #1b1f24; --dim: #57606a; --grid: #d8dee4; {light} }}",
        "@media (prefers-color-scheme: dark) {",
        f"  svg.amsp-study {{ --paper: #0d1117; --ink: #e6edf3; --dim: #9198a1; --grid: #30363d; {dark} }}",
        "}",
        "svg.amsp-study .paper { fill: var(--paper); }",
        "svg.amsp-study text { font: 11px ui-sans-serif, system-ui, 'DejaVu Sans', sans-serif; fill: var(--dim); }",
        "svg.amsp-study .title { font-weight: bold; fill: var(--ink); }",
        "svg.amsp-study .grid { stroke: var(--grid); }",
        "svg.amsp-study .line { fill: none; stroke-width: 1.5; }",
        "svg.amsp-study .lacks { fill: var(--paper); stroke-width: 1.5; }",
    ]
    for index in range(len(COLOURS)):
        lines.append(f"svg.amsp-study .s{index} {{ stroke: var(--c{index}); }}")
        lines.append(f"svg.amsp-study .f{index} {{ fill: var(--c{index}); stroke: none; }}")
    return "\n".join(lines) + "\n"


def _legend() -> Iterator[str]:
    for index, name in enumerate(COLOURS):
        x = LEFT + 108 * index
        yield f'<path class="line s{index}" d="M {x} 22 h 22"/>' + _dot(index, x + 11, 22, True)
        yield _text(x + 28, 26, name)
    x = LEFT
    yield _dot(0, x + 4, 44, True) + _text(x + 14, 48, "predicted, fits")
    yield _dot(0, x + 112, 44, False) + _text(x + 122, 48, "predicted, does not fit")
    yield _diamond(0, x + 262, 44) + _text(x + 272, 48, "published")


def _panel(panel: Panel, worlds: Sequence[int], *, first: bool) -> Iterator[str]:
    yield _text(0, -10, panel.title, "title")
    for mfu in range(0, HIGHEST + 1, 10):
        yield f'<path class="grid" d="M 0 {_y(mfu):g} h {WIDTH}"/>'
        if first:
            yield _text(-8, _y(mfu) + 4, f"{mfu}", anchor="end")
    if first:
        yield f'<text transform="translate(-34 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">MFU, %</text>'
    for world in worlds:
        x = _x(world, worlds)
        yield f'<path class="grid" d="M {x:g} {HEIGHT} v 4"/>' + _text(x, HEIGHT + 17, str(world), anchor="middle")
    yield _text(WIDTH / 2, HEIGHT + 33, "devices", anchor="middle")
    for series in panel.series:
        index = list(COLOURS).index(series.name)
        places = [(_x(world, worlds), _y(mfu), fits) for world, mfu, fits in series.values]
        path = " L ".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
        yield f'<g><title>{escape(series.name)}</title><path class="line s{index}" d="M {path}"/>'
        yield from (_dot(index, x, y, fits) for x, y, fits in places)
        yield "</g>"
    for mark in panel.marks:
        says = f"{mark.name}, published: {mark.mfu:g} % on {mark.world}"
        index = list(COLOURS).index(mark.name)
        yield f"<g><title>{escape(says)}</title>{_diamond(index, _x(mark.world, worlds), _y(mark.mfu))}</g>"


def _x(world: int, worlds: Sequence[int]) -> float:
    first, last = log2(worlds[0]), log2(worlds[-1])
    return 8 + (WIDTH - 16) * (log2(world) - first) / (last - first)


def _y(mfu: float) -> float:
    return HEIGHT * (1 - mfu / HIGHEST)


def _dot(index: int, x: float, y: float, fits: bool) -> str:
    style = f"f{index}" if fits else f"lacks s{index}"
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{2.5 if fits else 3}"/>'


def _diamond(index: int, x: float, y: float) -> str:
    return f'<path class="f{index}" d="M {x:.1f} {y - 6:.1f} l 6 6 l -6 6 l -6 -6 Z"/>'


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'
