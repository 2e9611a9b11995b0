"""The calls of a block's forward, from which every choice of what checkpointing keeps can be priced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

from shardwright.passes.fit import NotAffine, fit, fit_moments, highest
from shardwright.passes.moments import block_instants, worst_moments
from shardwright.passes.unit_run import UnitRun
from shardwright.schemas.profile import Affine, BackwardMoment, Call

_NOTHING = Affine(0, 0)


@dataclass(frozen=True, slots=True)
class Calls:
    """`UnitCost.calls` and the moments before and after them."""

    calls: tuple[Call, ...]
    moments_before: tuple[BackwardMoment, ...]
    moments_after: tuple[BackwardMoment, ...]


def fit_calls(runs: Sequence[UnitRun], operators: Sequence[int], outputs: Sequence[Mapping[int, int]]) -> Calls:
    """From the runs at each micro-batch. `operators` has the index of the operator of every event of forward,
    `outputs` the bytes of the storages that other units count, by their index. Raises NotAffine."""
    replays = [run.replay for run in runs]
    first, stop = replays[0].first, replays[0].stop
    if any((each.first, each.stop) != (first, stop) for each in replays):
        raise NotAffine("checkpointing recomputes other operators at one micro-batch than at another")
    calls: list[Call] = []
    for at, operator in enumerate(operators):
        again = first <= at < stop
        lines = fit_moments([each.again[at - first] for each in replays], "recomputation") if again else []
        alive = highest(lines) if lines else _NOTHING
        made = [each.results[at] for each in replays]
        results = _fit(one.bytes for one in made)
        left = _fit(sum(map(sizes.get, one.outputs, repeat(0))) for one, sizes in zip(made, outputs, strict=True))
        if lines and results == _NOTHING and calls and calls[-1].again:
            calls[-1] = replace(calls[-1], alive=highest([calls[-1].alive, alive]))
        elif lines or results != _NOTHING:
            calls.append(Call(operator=operator, results=results, elsewhere=left, again=again, alive=alive))
    instants = [block_instants(run, "full") for run in runs]
    before = [each[: len(run.replay.before)] for run, each in zip(runs, instants, strict=True)]
    after = [each[len(each) - len(run.replay.after) :] for run, each in zip(runs, instants, strict=True)]
    return Calls(tuple(calls), worst_moments(before, _NOTHING), worst_moments(after, _NOTHING))


def fit_results(runs: Sequence[UnitRun]) -> list[tuple[Affine, Affine]]:
    """`Operator.results` and `Operator.kept` of every event of forward."""
    if len({len(run.forward) for run in runs}) > 1:
        raise NotAffine("forward runs other operators at one micro-batch than at another")
    names = [f"{event.name} in {event.module or 'the unit itself'}" for event in runs[0].forward]
    results = zip(names, *(run.replay.results for run in runs), strict=True)
    return [
        (_fit((one.bytes for one in made), name), _fit((one.needed for one in made), name)) for name, *made in results
    ]


def _fit(sizes: Iterable[int], name: str = "the unit") -> Affine:
    return fit(list(sizes), f"the bytes of the results of {name} are")
