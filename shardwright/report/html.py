"""A profile as one page of HTML: the drawing of its graph and the numbers of its units, with nothing to load."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.report.graph import model_graph
from shardwright.report.layout import grouped, human_flops
from shardwright.report.profile import PHASES, POLICIES, View
from shardwright.report.svg import MARK, shown, svg_element
from shardwright.report.units import UnitKind, path_ranges, unit_kinds
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile
from shardwright.schemas.units import human_bytes, human_count

_STYLE = """\
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --dim: #57606a; --rule: #d0d7de; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --dim: #9198a1; --rule: #30363d; } }
body { margin: 1.5rem; font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--dim); font-weight: 600; vertical-align: bottom; }
th.text, td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 11rem; max-width: 24rem; }
"""
_TITLES = {
    "unit": "what repeats is one row",
    "module": "class of the blocks",
    "where": "module paths",
    "count": "how many times the model runs it",
    "parameters": "of all repetitions",
    "forward": "FLOPs of all repetitions",
    "input gradient": "FLOPs of all repetitions",
    "weight gradient": "FLOPs of all repetitions",
    "kept: none": "bytes kept from forward to backward by all repetitions, nothing checkpointed",
    "kept: selective": "the same, matrix products and attention kept and the rest recomputed",
    "kept: full": "the same, inputs kept and the rest recomputed",
    "output": "bytes that leave one of them",
}
_TEXT = ("unit", "module", "where")


def profile_html(profile: ModelProfile, micro_batch: int, dtype: ComputeDtypeName) -> str:
    """The whole page. Raises KeyError for a dtype that was not profiled."""
    graph = model_graph(profile, micro_batch, dtype)
    view = View(profile, unit_kinds(profile), micro_batch, dtype)
    heads = "".join(
        f'<th{_kind(name)} title="{shown(explained)}">{shown(name)}</th>' for name, explained in _TITLES.items()
    )
    rows = "\n".join(f"<tr>{''.join(_cells(view, kind))}</tr>" for kind in view.kinds)
    warnings = "".join(f"<p>warning: {shown(warning)}</p>\n" for warning in profile.warnings)
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{MARK}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{shown(graph.title)}</title>
<style>
{_STYLE}</style>
</head>
<body>
<div class="wide">
{svg_element(graph)}
</div>
<div class="wide">
<table>
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
{warnings}</body>
</html>
"""


def _kind(name: str) -> str:
    return ' class="text"' if name in _TEXT else ""


def _cells(view: View, kind: UnitKind) -> Iterator[str]:
    """Numbers for people, with the exact ones as tooltips."""
    own = sum(parameter.numel for parameter in kind.parameters(view.profile))
    flops = [view.flops(kind, phase) for phase in PHASES]
    kept = [view.saved(kind, policy) for policy in POLICIES]
    output = kind.unit.costs[view.dtype].output.at(view.micro_batch)
    for text, whole in ((kind.name, ""), (kind.unit.module, ""), (path_ranges(kind.paths), "\n".join(kind.paths))):
        tooltip = f' title="{shown(whole)}"' if whole else ""
        yield f'<td class="text"{tooltip}>{shown(text)}</td>'
    yield f"<td>{kind.count}</td>"
    yield _number(human_count(own), own) if own else "<td></td>"
    yield from (_number(human_flops(value), value) for value in flops)
    yield from (_number(human_bytes(value), value) for value in (*kept, output))


def _number(text: str, exact: int) -> str:
    return f'<td title="{grouped(exact)}">{shown(text)}</td>'
