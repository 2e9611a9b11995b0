"""Drawings of what the search saw: the alternatives, why one decision was taken, and a search that found nothing."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from shardwright.planner.reasons import shown
from shardwright.report.layout import Cell, Column, Grid, Row, facts, heading, page, paragraph, plural
from shardwright.report.memory import against_limit, draw_categories
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.plan import Alternative, Decision, Infeasible, Plan, Reason
from shardwright.schemas.units import human_bytes, human_seconds

_SHOWN = 6
"""Alternatives listed under one decision."""

_COLUMNS = (Column("step", "number"), Column("reserved", "number"), Column("plan, and why it lost", "prose"))


def draw_alternatives(plan: Plan, most: int | None = None) -> Group:
    """The best of each other kind, with the reason it lost. The chosen plan comes first, to compare with."""
    search = plan.search
    points = plural(search.considered, "point")
    found = f"{points} considered, {search.measured} predicted in full, {search.feasible} fit"
    prediction = plan.prediction
    chosen = (human_seconds(prediction.step_time_s), human_bytes(prediction.memory.peak_reserved_bytes))
    listed = search.alternatives[:most]
    rows = [Row((*chosen, f"{plan.name}\nchosen"), "bold green"), *(Row(_cells(one)) for one in listed)]
    return Group(heading("Alternatives", found), Grid(_COLUMNS, rows), *_more(plan, listed))


def _more(plan: Plan, listed: tuple[Alternative, ...]) -> list[RenderableType]:
    left = len(plan.search.alternatives) - len(listed)
    return [Text(f"and {plural(left, 'other')}, which `inspect` shows", style="dim")] if left else []


def _cells(one: Alternative) -> tuple[Cell, ...]:
    because = Text.assemble((one.summary, "" if one.fits else "dim"), ("\n" + one.lost_because, "dim italic"))
    return human_seconds(one.step_time_s), human_bytes(one.peak_reserved_bytes), because


def value_at(decision: Decision, key: str) -> str | None:
    """The value of one dotted key of a decision, for people; None if there is no such key."""
    try:
        return shown(decision, key)
    except AttributeError:
        return None


def find_reasons(plan: Plan, key: str) -> tuple[Reason, ...]:
    """The reasons of one key of the decision and of the keys below it; `decision.` may be left out.

    Raises InputError with the nearest key when the plan gives no reason for it.
    """
    wanted = key.removeprefix("decision.")
    known = {reason.key.removeprefix("decision."): reason for reason in plan.reasons}
    found = tuple(reason for name, reason in known.items() if name == wanted or name.startswith(f"{wanted}."))
    if found:
        return found
    near = get_close_matches(wanted, known, n=1, cutoff=0.5)
    keys = ", ".join(known)
    way_out = f"did you mean `{near[0]}`? The keys are {keys}" if near else f"the keys are {keys}"
    raise InputError(Diagnostic(key="--why", message=f"the plan has no reason for `{key}`", suggestion=way_out))


def draw_why(plan: Plan, key: str = "") -> Group:
    """Why a decision has its value, and what became of the plans that took another; without a key, all reasons."""
    if key:
        return page(*(_draw_reason(plan, reason) for reason in find_reasons(plan, key)))
    return Group(heading("Why"), *(_draw_because(reason) for reason in plan.reasons))


def others(plan: Plan, key: str) -> tuple[tuple[str, Alternative], ...]:
    """The alternatives that differ in that key, with their value of it."""
    name = key.removeprefix("decision.")
    mine = value_at(plan.decision, name)
    valued = ((value_at(one.decision, name), one) for one in plan.search.alternatives)
    return tuple((value, one) for value, one in valued if value is not None and value != mine)


def why_fields(plan: Plan, key: str) -> list[dict[str, Any]]:
    """The reasons of a key as plain JSON values, each with the alternatives that chose otherwise."""
    return [
        reason.model_dump(mode="json")
        | {
            "others": [
                {"value": value, **one.model_dump(mode="json", exclude={"decision"})}
                for value, one in others(plan, reason.key)
            ]
        }
        for reason in find_reasons(plan, key)
    ]


def _draw_because(reason: Reason) -> Group:
    title = Text.assemble((reason.key.removeprefix("decision."), "bold"), " = ", (reason.value, "green"))
    return Group(title, paragraph(reason.because, indent=2))


def _draw_reason(plan: Plan, reason: Reason) -> Group:
    different = others(plan, reason.key)
    rows = [Row((value, *_cells(one))) for value, one in different[:_SHOWN]]
    name = reason.key.split(".")[-1].replace("_", "\n")
    table: list[RenderableType] = [Text(), Grid((Column(name), *_COLUMNS), rows)] if rows else []
    if len(different) > _SHOWN:
        table.append(Text(f"and {plural(len(different) - _SHOWN, 'other')}, which `inspect` shows", style="dim"))
    return Group(_draw_because(reason), *table)


def draw_infeasible(result: Infeasible) -> Group:
    """Needed against available, what takes it, and what would help."""
    on_device = result.needed_bytes == result.nearest.peak_reserved_bytes
    where = "device memory" if on_device else "host memory"
    verdict = Text.assemble(
        ("No plan fits. ", "bold red"),
        f"The nearest needs {human_bytes(result.needed_bytes)} of {where};"
        f" {human_bytes(result.available_bytes)} may be used.",
    )
    nearest = facts(
        (
            ("plan", result.nearest.summary),
            ("step", human_seconds(result.nearest.step_time_s)),
            (where, against_limit(result.needed_bytes, result.available_bytes)),
        )
    )
    table: list[RenderableType] = []
    if on_device:
        table = [Text(), draw_categories(result.by_category, result.needed_bytes, result.available_bytes)]
    title = heading("Nearest miss", f"of {plural(result.considered, 'point')} considered")
    return page(verdict, Group(title, nearest, *table), *_draw_changes(result.changes))


def _draw_changes(changes: tuple[str, ...]) -> list[Group]:
    if not changes:
        return []
    rows = [Row((f"{number}.", change)) for number, change in enumerate(changes, 1)]
    return [Group(heading("What would fit", "cheapest change first"), Grid((Column(""), Column("", "prose")), rows))]
