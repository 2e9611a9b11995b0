"""What several tests of the planner look at."""

from __future__ import annotations

import pytest

from planner.profiles import cpu_cluster, job, toy
from shardwright.planner.predict import Predictor
from shardwright.planner.search import Candidate, Search
from shardwright.planner.space import decide
from shardwright.schemas.plan import Decision


@pytest.fixture
def toy_choice() -> tuple[Predictor, Candidate, Decision]:
    """The best sharded point of the toy on two CPU processes."""
    shards = job(cpu_cluster(2), batch=8, sequence=16, strategy={"engine": "fsdp2"})
    predictor = Predictor(shards, toy())
    best = Search(predictor).chosen()
    assert best is not None
    return predictor, best, decide(best.point, shards.cluster, 4)
