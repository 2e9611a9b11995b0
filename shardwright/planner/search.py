"""Search of the whole space: the fastest point that fits.

[Note: parallels in the search]
How processes share one copy of the model (`Parallel`) is decided in an outer loop: each way has a search of its own, of
the job and the profile as one such process sees them. No point of a way takes less than all the compute of a step
shared equally by all devices, with the exchanges that go with it (`least_seconds`). In the order of that bound the
searches are asked, each for what is not slower than the fastest so far, until the bound is past that.

Many ways are within that bound where communication or bubbles weigh much. Where PATIENCE of them in a row bring nothing
faster, the rest is not asked.

[Note: stock engines first]
PyTorch's own engines have been run on many GPUs, ours has not. So `amsp` is taken where nothing else fits, or where the
prediction says that it is faster by OWN_ENGINE_GAIN at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from math import inf

from shardwright.planner.candidates import TIE, Candidate, Predicate, best_first
from shardwright.planner.compute import model_work
from shardwright.planner.engines import ENGINES
from shardwright.planner.exchanges import Wiring
from shardwright.planner.layout_search import MOST_IN_VAIN, LayoutSearch, distance
from shardwright.planner.parallel import Parallel
from shardwright.planner.parallels import parallels
from shardwright.planner.precisions import PRECISIONS, permitted_precisions
from shardwright.planner.predict import Predictor, around_of
from shardwright.planner.space import micro_batches, profiled

OWN_ENGINE_GAIN = 0.05
"""By how much faster `amsp` has to be than the best stock engine ([Note: stock engines first])."""
MOST_FURTHER = 64
"""Points in a row that are no closer to fitting, of one way to share the model, before the closest is taken."""
PATIENCE = 6
"""Ways to share the model that are asked in vain before the rest is left ([Note: parallels in the search])."""
Which = Callable[[Parallel], bool]


def anyhow(_: Parallel) -> bool:
    """Every way to share a copy of the model."""
    return True


class Search:
    """The space of one job ([Note: parallels in the search]): of every way to share the model that is asked, the
    answer is exact. Raises InputError where the job asks for a way that is impossible."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._parallels = parallels(predictor.job, predictor.profile)
        self._searches: dict[Parallel, LayoutSearch] = {}
        if len(self._parallels) == 1:
            self._of(self._parallels[0])

    @property
    def considered(self) -> int:
        """Configurations, each with its best checkpointing, and pipelines, each with its best cut too, of every way to
        share the model that was not ruled out as a whole; and those that were, each as one."""
        looked_at = sum(each.considered for each in self._searches.values())
        return looked_at + len(self._parallels) - len(self._searches)

    def families(self, parallel: Parallel) -> list[str]:
        """The methods that have points which share the model this way, those that need least memory first."""
        return self._of(parallel).families

    @property
    def parallels(self) -> tuple[Parallel, ...]:
        """Ways to share a copy of the model."""
        return self._parallels

    def has_pipelines(self, parallel: Parallel) -> bool:
        """Whether any of the points that share the model this way has pipeline stages."""
        return self._of(parallel).has_pipelines

    @property
    def measured(self) -> int:
        """Those that were predicted in full so far."""
        return sum(1 for _ in self._measured())

    @property
    def feasible(self) -> list[Candidate]:
        """Those of them that fit, best first."""
        return best_first([each for each in self._measured() if each.fits], self._predictor.device_budget)

    @property
    def infeasible(self) -> list[Candidate]:
        """Those of them that do not, closest first."""
        return sorted((each for each in self._measured() if not each.fits), key=self._distance)

    def chosen(self) -> Candidate | None:
        """The plan's point, or None where nothing fits ([Note: stock engines first])."""
        stock = self.best(lambda point: not ENGINES[point.engine].flat)
        enough = inf if stock is None else stock.seconds / (1 + OWN_ENGINE_GAIN)
        return self.best(lambda point: ENGINES[point.engine].flat, at_most=enough) or stock

    def best(self, where: Predicate, at_most: float = inf, of: Which = anyhow) -> Candidate | None:
        """The fastest configuration that fits, of those that `where` and `of` pick and that take `at_most` so many
        seconds; ties as `best_first` has them."""
        return self._first_of(of, at_most, lambda search, limit: search.best(where, limit))

    def example(self, where: Predicate, of: Which = anyhow) -> Candidate | None:
        """A configuration that `where` and `of` pick and that fits, such that none is faster by more than TIE."""
        ways = [each for each in self._parallels if of(each)]
        if len(ways) == 1:
            return self._of(ways[0]).example(where)
        return self.best(where, of=of)

    def closest(self, where: Predicate, of: Which = anyhow, vain: float = inf) -> Candidate | None:
        """Where none of those that `where` and `of` pick fits: the one that misses the budgets by least; of pipelines
        one of those that do by little. `vain` as of `LayoutSearch.closest` where there are several ways to share
        the model, MOST_FURTHER at most."""
        vain = inf if len(self._parallels) == 1 else min(vain, MOST_FURTHER)
        found = [self._of(each).closest(where, vain) for each in self._parallels if of(each)]
        return min((each for each in found if each is not None), key=self._distance, default=None)

    def _first_of(
        self, of: Which, at_most: float, ask: Callable[[LayoutSearch, float], Candidate | None]
    ) -> Candidate | None:
        found: list[Candidate] = []
        limit, vain = at_most, 0
        for bound, parallel in self._by_time:
            if bound > limit or vain > PATIENCE:
                break
            if not of(parallel):
                continue
            candidate = ask(self._of(parallel), limit)
            vain = vain + 1 if found and (candidate is None or candidate.seconds >= limit / (1 + TIE)) else 0
            if candidate is not None:
                found.append(candidate)
                limit = min(limit, candidate.seconds * (1 + TIE))
        return best_first(found, self._predictor.device_budget)[0] if found else None

    def runner_up(self, of: Which) -> Candidate | None:
        """One of the best points of the ways that `of` picks, as far as they were looked at; else of the way that takes
        least by its bound. Where none fits, the one that comes closest."""
        ways = [parallel for _, parallel in self._by_time if of(parallel)]
        looked_at = [each for each in self._measured() if of(each.point.parallel)]
        fitting = [each for each in looked_at if each.fits]
        if fitting or not ways:
            return best_first(fitting, self._predictor.device_budget)[0] if fitting else None
        only = self._of(ways[0])
        found = only.example(lambda point: True) or only.closest(lambda point: True, MOST_IN_VAIN)
        return found or min(looked_at, key=self._distance, default=None)

    @cached_property
    def _by_time(self) -> list[tuple[float, Parallel]]:
        """Ways to share the model, with the seconds that they take at least; of equal ones the simplest first."""
        if len(self._parallels) == 1:
            return [(0.0, self._parallels[0])]
        bounds = [(least_seconds(self._predictor, each), each) for each in self._parallels]
        return sorted(bounds, key=lambda each: each[0])

    def _of(self, parallel: Parallel) -> LayoutSearch:
        if parallel not in self._searches:
            self._searches[parallel] = LayoutSearch(self._predictor.of(parallel))
        return self._searches[parallel]

    def _measured(self) -> Iterator[Candidate]:
        for search in self._searches.values():
            yield from search.measured

    def _distance(self, candidate: Candidate) -> tuple[int, tuple[int, ...]]:
        return distance(self._predictor, candidate)


def least_seconds(predictor: Predictor, parallel: Parallel) -> float:
    """A lower bound of the step of every point that shares the model this way: all compute of a step and all that goes
    with it ([Note: parallels in the search]), at the micro-batch at which a sequence takes least; inf where there is no
    such point."""
    own = predictor.of(parallel)
    job, wiring = own.job, Wiring.of(own.job, around_of(predictor.job, predictor.profile, parallel))
    batch, world = job.train.global_batch_sequences, job.cluster.world_size
    least = inf
    for precision in permitted_precisions(job):
        if not profiled(own.profile, precision):
            continue
        size = max(micro_batches(job, 1), default=0)
        if size:
            work = model_work(
                own.profile, PRECISIONS[precision].compute, size, job.cluster.device, hooked=False, wiring=wiring
            )
            seconds = sum(each.count * (each.forward.seconds + each.backward.seconds) for each in work)
            least = min(least, batch * seconds / (size * world))
    return least
