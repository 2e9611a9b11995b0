"""Why a plan is as it is: the alternatives with the reason each lost, and a reason for every key of the decision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from math import isnan

from shardwright.planner.candidates import MEMORY_TIE, TIE, Candidate, Predicate, measure, timed
from shardwright.planner.engines import ENGINES
from shardwright.planner.layout_search import MOST_IN_VAIN
from shardwright.planner.names import family, summary
from shardwright.planner.parallel import WHOLE, Parallel
from shardwright.planner.predict import Predictor
from shardwright.planner.reasons import buys, shown
from shardwright.planner.search import OWN_ENGINE_GAIN, Search
from shardwright.planner.space import Pipe, Point, block_count, decide, permitted_blocks
from shardwright.schemas.plan import Alternative, Reason, TimePart
from shardwright.schemas.units import human_bytes, human_seconds

MOST_ALTERNATIVES = 16

REASONED: dict[str, Callable[[Point], object]] = {
    "engine.name": lambda point: point.engine,
    "tensor_parallel.degree": lambda point: (point.parallel.tp, point.parallel.sequence),
    "context_parallel.degree": lambda point: (point.parallel.cp, point.parallel.method),
    "expert_parallel.degree": lambda point: point.parallel.ep,
    "pipeline.ranks": lambda point: 1 if point.pipe is None else point.pipe.ranks,
    "pipeline.schedule": lambda point: None if point.pipe is None else (point.pipe.schedule, point.pipe.chunks),
    "pipeline.cuts": lambda point: None if point.pipe is None else point.pipe.cuts,
    "pipeline.late_step": lambda point: (point.pipe is not None and point.pipe.late_step) or None,
    "mesh": lambda point: point.axes or point.shard,
    "states.parameters": lambda point: point.shard,
    "states.gradients": lambda point: (point.gradients_wait, point.gradient_degree == point.optimizer_degree),
    "states.optimizer_states": lambda point: point.optimizer_degree,
    "states.secondary": lambda point: (point.secondary or 0) if point.kept is False and point.shard > 1 else None,
    "engine.reshard_after_forward": lambda point: point.kept,
    "micro_batch": lambda point: point.micro_batch,
    "accumulation": lambda point: point.accumulation,
    "checkpointing": lambda point: point.checkpointed if point.pipe is None else point.pipe.checkpointed,
    "precision": lambda point: point.precision,
    "communication": lambda point: (point.int8_gathers, point.int4_reductions) if ENGINES[point.engine].flat else None,
}
"""Every key of the decision that the planner chooses, and what of a point it says; None where that is no choice."""


SHARED: dict[str, Callable[[Parallel], int]] = {
    "tensor_parallel.degree": lambda parallel: parallel.tp,
    "context_parallel.degree": lambda parallel: parallel.cp,
    "expert_parallel.degree": lambda parallel: parallel.ep,
}
"""Of these keys, those that say how a copy of the model is shared."""


class Explainer:
    """Compares all that was found with the point that was chosen."""

    def __init__(self, predictor: Predictor, found: Search, chosen: Candidate, planned: Candidate | None) -> None:
        """`planned`: the planner's own choice. What `chosen` decides otherwise, a person has set."""
        self._predictor, self._found, self._planned = predictor, found, planned
        self._edited = frozenset(() if planned is None else changed(planned.point, chosen.point))
        self._chosen = self._timed(chosen)
        self._blocks = block_count(predictor.profile)
        self._parts = {part.name: part for part in predictor.step(chosen.point).parts}

    def alternatives(self) -> tuple[Alternative, ...]:
        """The best of each kind and those that differ from the chosen point in one decision; best first."""
        picked: dict[Point, Candidate] = {}
        for candidate in (*self._neighbours(), *self._families(), *self._kinds()):
            if candidate.point != self._chosen.point and len(picked) < MOST_ALTERNATIVES:
                picked.setdefault(candidate.point, candidate)
        best = sorted(picked.values(), key=self._order)
        return tuple(self.alternative(candidate) for candidate in best)

    def alternative(self, candidate: Candidate) -> Alternative:
        """A candidate as the plan lists it."""
        candidate = self._timed(candidate)
        return Alternative(
            summary=summary(candidate.point, self._blocks),
            decision=decide(candidate.point, self._predictor.job.cluster, self._blocks),
            step_time_s=candidate.seconds,
            peak_reserved_bytes=candidate.reserved,
            fits=candidate.fits,
            lost_because=self.lost_because(candidate),
        )

    def lost_because(self, candidate: Candidate) -> str:
        """One sentence, with numbers."""
        if not candidate.fits:
            return misses(self._predictor, candidate)
        candidate = self._timed(candidate)
        ratio = candidate.seconds / self._chosen.seconds - 1
        times = f"{human_seconds(candidate.seconds)} against {human_seconds(self._chosen.seconds)} a step"
        if ratio > TIE:
            more = self._what_grows(candidate)
            slower = f"{_percent(ratio)} slower" if ratio < 1 else f"{1 + ratio:.3g} times as long"
            return f"{slower}: {times}{'; ' + more if more else ''}"
        if ratio < -TIE and ENGINES[candidate.point.engine].flat and not self._edited:
            gain = self._chosen.seconds / candidate.seconds - 1
            least = f"{100 * OWN_ENGINE_GAIN:g} %"
            return f"{_percent(gain)} faster ({times}), less than the {least} for which a stock engine is given up"
        if ratio < -TIE:
            return f"{_percent(-ratio)} faster ({times}), but the decision was edited by hand"
        close = f"as fast, within {100 * TIE:g} %"
        more_bytes = candidate.reserved - self._chosen.reserved
        if more_bytes * MEMORY_TIE >= self._predictor.device_budget:
            return f"{close}, and needs {human_bytes(more_bytes)} more"
        return f"{close}, and not as simple"

    def reasons(self) -> Iterator[Reason]:
        """One for each key of the decision that the planner chooses."""
        decision = decide(self._chosen.point, self._predictor.job.cluster, self._blocks)
        for key, value_of in REASONED.items():
            exact = key == "communication" and self._predictor.job.quality != "lossy"
            if exact or value_of(self._chosen.point) is None or not self._is_choice(key):
                continue
            because = f"{self._price(key)}."
            if key not in self._edited:
                price = because if key != "pipeline.cuts" else ""
                because = f"{buys(key, self._predictor, self._chosen)}. {price}".strip()
            yield Reason(key=key, value=shown(decision, key), because=because)

    def _is_choice(self, key: str) -> bool:
        """Without any possible pipeline, that there is none is no choice; the same holds of what could be shared."""
        chosen = self._chosen.point
        if key in SHARED:
            possible = any(SHARED[key](each) > 1 for each in (chosen.parallel, *self._found.parallels))
            return possible or (key == "tensor_parallel.degree" and self._refuses_tensors())
        return key != "pipeline.ranks" or chosen.pipe is not None or self._found.has_pipelines(chosen.parallel)

    def _refuses_tensors(self) -> bool:
        """Whether the model cannot be divided, for a reason worth telling."""
        return bool(self._predictor.profile.tensor_parallelism.refused) and self._chosen.point.devices > 1

    # --- what is compared -------------------------------------------------------------------------------------------

    def _families(self) -> Iterator[Candidate]:
        """The best point of every method that has a name, or the one closest to fitting, of those that share a copy of
        the model as the chosen one does; and one that does not share it."""
        own = self._chosen.point.parallel
        for name in self._found.families(own):
            other = self._best(partial(_is_of, name), own)
            if other is not None:
                yield other
        alone = self._found.runner_up(lambda parallel: parallel == WHOLE) if own != WHOLE else None
        if alone is not None:
            yield alone

    def _best(self, where: Predicate, shared: Parallel) -> Candidate | None:
        """One of the fastest that fit, of those that share the model one way; where none does, the one that comes
        closest of the first ones."""

        def of(parallel: Parallel) -> bool:
            return parallel == shared

        return self._found.example(where, of) or self._found.closest(where, of, MOST_IN_VAIN)

    def _kinds(self) -> Iterator[Candidate]:
        """The best of each kind that was predicted: feasible ones first, then those closest to fitting."""
        seen: set[object] = set()
        for candidate in (*self._found.feasible, *self._found.infeasible):
            if candidate.point.pipe is not None and self._chosen.point.pipe is None:
                continue
            key = _kind(candidate.point)
            if key not in seen:
                seen.add(key)
                yield candidate

    def _neighbours(self) -> Iterator[Candidate]:
        """For every key the best point that differs in it, and the other ways to checkpoint."""
        for key in REASONED:
            other = self._runner_up(key)
            if other is not None:
                yield other
        permitted = permitted_blocks(self._predictor.job, self._blocks)
        for blocks in sorted({0, self._blocks}.intersection(permitted)) if self._chosen.point.pipe is None else ():
            yield self._measured(blocks)

    def _runner_up(self, key: str) -> Candidate | None:
        """The best point that decides `key` otherwise and shares a copy of the model the same way, with pipeline stages
        if the chosen one has some and without if not, unless `key` is their number; where none fits, the one that comes
        closest."""
        chosen, value_of = self._chosen.point, REASONED[key]
        if key in SHARED:
            return self._shared_otherwise(key)
        if key == "checkpointing":
            return self._checkpointing_runner_up()
        if key == "pipeline.cuts":
            return None

        def differs(point: Point) -> bool:
            alike = key in ("pipeline.ranks", "engine.name") or (point.pipe is None) == (chosen.pipe is None)
            return alike and value_of(point) not in (value_of(chosen), None)

        return self._best(differs, chosen.parallel)

    def _shared_otherwise(self, key: str) -> Candidate | None:
        """The best point that differs in one of the degrees, and in no other one if there is such a point."""
        chosen = self._chosen.point.parallel
        ways = [each for each in self._found.parallels if SHARED[key](each) != SHARED[key](chosen)]
        alone = [each for each in ways if all(of(each) == of(chosen) for name, of in SHARED.items() if name != key)]
        picked = frozenset(alone or ways)
        return self._found.runner_up(lambda parallel: parallel in picked)

    def _checkpointing_runner_up(self) -> Candidate | None:
        """One block fewer where some are checkpointed, one more where none is."""
        if self._chosen.point.pipe is not None:
            return self._recomputing_otherwise(self._chosen.point.pipe)
        permitted = permitted_blocks(self._predictor.job, self._blocks)
        chosen = self._chosen.point.checkpointed
        fewer = [blocks for blocks in permitted if blocks < chosen]
        more = [blocks for blocks in permitted if blocks > chosen]
        return self._measured(fewer[-1]) if fewer else self._measured(more[0]) if more else None

    def _recomputing_otherwise(self, pipe: Pipe) -> Candidate | None:
        """One block fewer on the stage that recomputes most, or one more on the first; a schedule that is searched
        would be another one."""
        if pipe.activation_limits or self._predictor.job.strategy.checkpointing != "auto":
            return None
        counts = list(pipe.checkpointed)
        stage = counts.index(max(counts))
        counts[stage] += -1 if counts[stage] else 1
        if counts[stage] > len(pipe.blocks(stage, self._blocks)):
            return None
        other = replace(self._chosen.point, pipe=replace(pipe, checkpointed=tuple(counts)))
        return timed(self._predictor, measure(self._predictor, other))

    def _measured(self, blocks: int) -> Candidate:
        return timed(self._predictor, measure(self._predictor, replace(self._chosen.point, checkpointed=blocks)))

    def _order(self, candidate: Candidate) -> tuple[bool, float, int]:
        return not candidate.fits, candidate.seconds if candidate.fits else 0.0, candidate.reserved

    def _timed(self, candidate: Candidate) -> Candidate:
        return timed(self._predictor, candidate) if isnan(candidate.seconds) else candidate

    # --- what is said -----------------------------------------------------------------------------------------------

    def _price(self, key: str) -> str:
        if key in self._edited:
            best = self._planned
            own = f"; the planner's choice is {summary(best.point, self._blocks)}" if best else ""
            return f"Set by hand{own}"
        other = self._runner_up(key)
        if other is None:
            return "There is nothing else to choose from here"
        return f"Runner-up: {summary(other.point, self._blocks)}: {self.lost_because(other)}"

    def _what_grows(self, candidate: Candidate) -> str:
        """The part of the step that grows most."""
        nothing = TimePart(name="", seconds=0.0)
        grown = [
            (part.seconds - self._parts.get(part.name, nothing).seconds, part.name)
            for part in self._predictor.step(candidate.point).parts
        ]
        seconds, name = max(grown)
        return f"{human_seconds(seconds)} more {name}" if seconds > 0 else ""


def misses(predictor: Predictor, candidate: Candidate) -> str:
    """Why a candidate does not fit."""
    blocks = block_count(predictor.profile)
    even = f", even with all {blocks} blocks checkpointed" if blocks and candidate.point.recomputed == blocks else ""
    if candidate.reserved > predictor.device_budget:
        over = human_bytes(candidate.reserved - predictor.device_budget)
        needs = f"needs {human_bytes(candidate.reserved)}, {over} over the {human_bytes(predictor.device_budget)}"
        return f"{needs} that a device may reserve{even}"
    limit = predictor.job.host_memory_limit
    over = human_bytes(candidate.host - limit)
    return (
        f"needs {human_bytes(candidate.host)} of host memory on a node, {over} over the {human_bytes(limit)} there are"
    )


def _kind(point: Point) -> object:
    """Equal for points of which one is enough to show: of pipelines, one of each schedule."""
    if point.pipe is not None:
        return point.parallel, point.pipe.schedule
    kind = replace(point, micro_batch=0, accumulation=0, checkpointed=0, gradient_degree=0)
    return kind, point.gradients_wait


def _is_of(name: str, point: Point) -> bool:
    return family(point) == name


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.0f} %" if ratio >= 0.1 else f"{100 * ratio:.1f} %"


def changed(one: Point, other: Point) -> Iterable[str]:
    """Reasoned keys in which two points differ."""
    return (key for key, value_of in REASONED.items() if value_of(one) != value_of(other))
