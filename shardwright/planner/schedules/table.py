"""The table of pipeline schedules, and the one function that makes any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from shardwright.planner.schedules.families import (
    dualpipe_v,
    looped,
    straight,
    units,
    v_blocks,
    waves,
    zb_v,
    zero_bubble,
)
from shardwright.planner.schedules.families.family import DoesNotFitError, Family
from shardwright.planner.schedules.simulator import Simulation, simulate
from shardwright.planner.schedules.timetable import Costs, Layout, Timetable, even_costs
from shardwright.schemas.diagnostics import Diagnostic, InputError


def _search(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """`auto.search`."""
    # Imported here, for the search may draw on the families of this table.
    from shardwright.planner.schedules.auto import search

    return search(layout, costs, micro_batches, limits).timetable


V_PASSES = 4096
"""Ranks times micro-batches up to which the search tries a V unasked: it takes ten times as long as one chunk."""


def _one_or_a_v(ranks: int, micro_batches: int) -> tuple[int, ...]:
    return (1, 2) if ranks * micro_batches <= V_PASSES else (1,)


def _two(chunks: int) -> bool:
    return chunks == 2


_FAMILIES = (
    Family(
        name="gpipe",
        summary="all forwards, then all backwards",
        source="arXiv 1811.06965",
        make=straight.gpipe,
    ),
    Family(
        name="1f1b",
        summary="one forward, one backward in turn, with the memory of p micro-batches",
        source="arXiv 1806.03377, 2006.09503",
        make=straight.one_f_one_b,
        memory=lambda layout: layout.ranks,
    ),
    Family(
        name="interleaved-1f1b",
        summary="1F1B over several chunks a rank: smaller bubble, more sends, more memory",
        source="arXiv 2104.04473",
        make=looped.interleaved,
        chunks=2,
        allowed_chunks=lambda chunks: chunks >= 2,
        chunks_in_words="2 or more",
        refuses=looped.interleaved_refuses,
        memory=lambda layout: layout.ranks + (layout.ranks - 1) / layout.chunks,
    ),
    Family(
        name="breadth-first",
        summary="all micro-batches through a chunk before the next, so that its parameters are needed twice a step",
        source="arXiv 2211.05953",
        make=looped.breadth_first,
        chunks=2,
        allowed_chunks=lambda chunks: chunks >= 1,
        chunks_in_words="1 or more",
    ),
    Family(
        name="zb-h1",
        summary="weight gradients late, a third of the bubble of 1F1B at its memory",
        source="arXiv 2401.10241",
        make=straight.zb_h1,
        memory=lambda layout: layout.ranks,
    ),
    Family(
        name="zb-h2",
        summary="weight gradients late and a warm-up twice as long: no bubble at equal times, twice the memory",
        source="arXiv 2401.10241",
        make=straight.zb_h2,
        memory=lambda layout: 2 * layout.ranks - 1,
    ),
    Family(
        name="zb-1p",
        summary="the zero-bubble authors' search with the memory of p micro-batches",
        source="arXiv 2401.10241",
        make=zero_bubble.zb_1p,
        memory=lambda layout: layout.ranks,
        searches=True,
    ),
    Family(
        name="zb-2p",
        summary="the zero-bubble authors' search with the memory of 2p micro-batches",
        source="arXiv 2401.10241",
        make=zero_bubble.zb_2p,
        memory=lambda layout: 2 * layout.ranks,
        searches=True,
    ),
    Family(
        name="zb-v",
        summary="two chunks on a V: no bubble at equal times with the memory of p micro-batches",
        source="arXiv 2401.10241",
        make=zb_v.zb_v,
        placement="wave",
        chunks=2,
        allowed_chunks=_two,
        chunks_in_words="2",
        memory=lambda layout: layout.ranks,
        searches=True,
    ),
    Family(
        name="v-half",
        summary="two chunks on a V: about half the memory of 1F1B and half its bubble",
        source="arXiv 2405.15362",
        make=v_blocks.v_half,
        placement="wave",
        chunks=2,
        allowed_chunks=_two,
        chunks_in_words="2",
        memory=lambda layout: layout.ranks // 2 + 1,
    ),
    Family(
        name="v-min",
        summary="two chunks on a V: about a third of the memory of 1F1B, for equal times",
        source="arXiv 2405.15362",
        make=v_blocks.v_min,
        placement="wave",
        chunks=2,
        allowed_chunks=_two,
        chunks_in_words="2",
        memory=lambda layout: (layout.ranks + 4) // 3,
    ),
    Family(
        name="dualpipe-v",
        summary="two chunks on a V, the backward cut in two only at the ramps",
        source="arXiv 2412.19437",
        make=dualpipe_v.dualpipe_v,
        placement="wave",
        chunks=2,
        allowed_chunks=_two,
        chunks_in_words="2",
        refuses=dualpipe_v.dualpipe_v_refuses,
        memory=lambda layout: layout.ranks + 0.5,
    ),
    Family(
        name="hanayo",
        summary="2W chunks placed back and forth in W waves, backwards first",
        source="arXiv 2308.15762",
        make=waves.hanayo,
        placement="wave",
        chunks=2,
        allowed_chunks=lambda chunks: chunks >= 2 and chunks % 2 == 0,
        chunks_in_words="2, 4, 6 and so on: twice the waves",
        memory=lambda layout: 2 * layout.ranks,
        searches=True,
    ),
    Family(
        name="zeropp",
        summary="units of micro-batches that share one gather of a chunk's parameters, weight gradients late",
        source="arXiv 2402.03791",
        make=units.zeropp,
        chunks=2,
        allowed_chunks=lambda chunks: chunks >= 1,
        chunks_in_words="1 or more",
        searches=True,
    ),
    Family(
        name="zb-auto",
        summary="the shortest schedule found under a memory limit with the real times of every stage",
        source="this project",
        make=_search,
        placement="wave",
        tries=_one_or_a_v,
        allowed_chunks=lambda chunks: chunks in (1, 2),
        chunks_in_words="1, or 2 on a V",
        searches=True,
    ),
)

SCHEDULES: Mapping[str, Family] = MappingProxyType({family.name: family for family in _FAMILIES})
"""By slug."""


def make_schedule(
    name: str,
    ranks: int,
    micro_batches: int,
    times: tuple[float, float, float, float] | Costs,
    *,
    held_by_weight: float = 1.0,
    memory_limit: float | Sequence[float] | None = None,
    chunks: int | None = None,
) -> tuple[Layout, Costs, Timetable]:
    """A family's timetable, its layout and costs.

    `times`: of F, I and W of a micro-batch on a device and of sending (`even_costs`, with `held_by_weight`), or the
    costs of every stage. `memory_limit`: of every rank, or per rank, in units of `Costs.activations`, which are a
    device's activations of one micro-batch where `times` are four numbers.

    Raises InputError where the family has no such schedule.
    """
    family = _family(name)
    numbers: tuple[int, ...] = (family.chunks if chunks is None else chunks,)
    if chunks is None and family.tries is not None:
        numbers = (times.stages // ranks,) if isinstance(times, Costs) else family.tries(ranks, micro_batches)
    made = [
        simulated_schedule(
            family, ranks, each, micro_batches, times, held_by_weight=held_by_weight, memory_limit=memory_limit
        )
        for each in numbers
    ]
    best = min(made, key=lambda each: each.span)
    return best.layout, best.costs, best.timetable


def simulated_schedule(
    family: Family,
    ranks: int,
    chunks: int,
    micro_batches: int,
    times: tuple[float, float, float, float] | Costs,
    *,
    held_by_weight: float = 1.0,
    memory_limit: float | Sequence[float] | None = None,
) -> Simulation:
    """What `make_schedule` makes of a number of chunks, in time."""
    name = family.name
    if not family.allowed_chunks(chunks):
        raise _wrong(
            f"{name} has no schedule of {chunks} chunks a rank", f"Chunks of {name}: {family.chunks_in_words}."
        )
    if ranks < 1 or micro_batches < 1:
        raise _wrong(f"{ranks} stages with {micro_batches} micro-batches", "Both must be 1 or more.")
    layout = Layout(ranks, chunks, family.placement)
    reason = family.refuses(layout, micro_batches)
    if reason:
        raise _wrong(f"{name} has no schedule of {micro_batches} micro-batches on {ranks} ranks: {reason}", _INSTEAD)
    costs = times if isinstance(times, Costs) else even_costs(layout, times, held_by_weight)
    limits = _limits(memory_limit, ranks)
    try:
        timetable = family.make(layout, micro_batches, costs, limits)
    except DoesNotFitError as error:
        raise _wrong(f"{name}: {error}", _MORE_MEMORY) from error
    simulation = simulate(timetable, layout, costs)
    over = simulation.beyond(limits)
    if limits is not None and over:
        held, limit = simulation.peak_memory[over[0]], limits[over[0]]
        raise _wrong(f"{name} holds {held:.4g} on rank {over[0]}, over the limit of {limit:.4g}", _MORE_MEMORY)
    return simulation


_INSTEAD = "Choose another number of micro-batches, or another schedule."
_MORE_MEMORY = "Raise the memory limit, or choose zb-auto, which searches under it, or v-min, which holds least."


def _family(name: str) -> Family:
    if name not in SCHEDULES:
        raise _wrong(f"there is no schedule {name}", f"One of {', '.join(SCHEDULES)}.")
    return SCHEDULES[name]


def _limits(memory_limit: float | Sequence[float] | None, ranks: int) -> list[float] | None:
    if memory_limit is None:
        return None
    limits = list(memory_limit) if isinstance(memory_limit, Sequence) else [memory_limit] * ranks
    if len(limits) != ranks:
        raise _wrong(f"{len(limits)} memory limits for {ranks} ranks", "Give one limit, or one a rank.")
    return limits


def _wrong(message: str, suggestion: str) -> InputError:
    return InputError([Diagnostic(message=message + ".", key="strategy.schedule", suggestion=suggestion)])
