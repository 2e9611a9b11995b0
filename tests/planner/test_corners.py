"""Systems of which it is known what the planner should choose, and how choices change with memory and bandwidth."""

from __future__ import annotations

from functools import cache

import pytest

from planner.profiles import gpu_cluster, job, llama
from shardwright.planner.candidates import MEMORY_TIE, TIE, Candidate, measure, timed
from shardwright.planner.names import family
from shardwright.planner.predict import Predictor
from shardwright.planner.search import OWN_ENGINE_GAIN, Search
from shardwright.planner.space import Point, configurations
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ModelProfile

LENGTH = 1024
MICRO_BATCHES = 4


@cache
def model(layers: int = 4, hidden: int = 2048) -> ModelProfile:
    """A Llama with a small vocabulary, so that blocks dominate."""
    heads = hidden // 128
    sizes = {"hidden": hidden, "heads": heads, "kv_heads": heads, "ffn": hidden * 8 // 3, "vocabulary": 8192}
    return llama(layers=layers, sequence=LENGTH, dtypes=("bf16",), **sizes)  # type: ignore[arg-type]


def with_bandwidth(cluster: ClusterSpec, bandwidth: float, level: int = -1) -> ClusterSpec:
    levels = list(cluster.levels)
    levels[level] = levels[level].model_copy(update={"bandwidth": bandwidth})
    return cluster.model_copy(update={"levels": tuple(levels)})


def frontier(node: float, network: float) -> ClusterSpec:
    """Pairs of dies at 200 GB/s, four pairs a node, four nodes; bytes a second and die over the slower two levels. The
    die is that of an MI250X (AMD's datasheet)."""
    base = gpu_cluster()
    peak = {"bf16": 191.5e12, "fp32": 47.9e12}
    device = base.device.model_copy(
        update={"name": "mi250x-gcd", "peak": peak, "measured": {}, "memory_bandwidth": 1638e9}
    )
    rates = [("pair", 2, 200e9, 3.4e-6), ("node", 4, node, 3.4e-6), ("network", 4, network, 14e-6)]
    levels = tuple(
        base.levels[0].model_copy(update={"name": name, "size": size, "bandwidth": rate, "latency": latency})
        for name, size, rate, latency in rates
    )
    return base.model_copy(update={"device": device, "levels": levels})


def task(cluster: ClusterSpec, engine: str, budget: int | None = None, *, count: int = MICRO_BATCHES) -> JobSpec:
    """One sequence a micro-batch, nothing recomputed."""
    strategy = {"engine": engine, "micro_batch": 1, "checkpointing": "none", "precision": "bf16_mixed"}
    limits = {} if budget is None else {"budget": {"device_memory": f"{budget}B"}}
    return job(cluster, batch=cluster.world_size * count, sequence=LENGTH, strategy=strategy, **limits)


def choose(
    cluster: ClusterSpec, profile: ModelProfile, engine: str, budget: int | None = None, *, count: int = MICRO_BATCHES
) -> Candidate | None:
    return Search(Predictor(task(cluster, engine, budget, count=count), profile)).chosen()


def degrees(point: Point) -> tuple[int, int, int]:
    return point.shard, point.gradient_degree, point.optimizer_degree


def every_point(cluster: ClusterSpec, profile: ModelProfile, engine: str) -> list[Candidate]:
    """All of them predicted, whatever they need."""
    spec = task(cluster, engine)
    predictor = Predictor(spec, profile)
    return [timed(predictor, measure(predictor, point)) for point in configurations(spec, profile)]


def need(
    cluster: ClusterSpec, profile: ModelProfile, wanted: tuple[int, int, int], *, count: int = MICRO_BATCHES
) -> int:
    """Bytes of the fastest layout of these degrees that frees parameters after their use."""
    spec = task(cluster, "amsp", count=count)
    predictor = Predictor(spec, profile)
    points = [
        timed(predictor, measure(predictor, point))
        for point in configurations(spec, profile)
        if degrees(point) == wanted and not point.kept and point.secondary is None
    ]
    return min(points, key=lambda each: each.seconds).reserved


def ladder(points: list[Candidate], steps: int) -> list[int]:
    """Budgets from what the leanest needs to what the greediest does."""
    least, most = min(each.reserved for each in points), max(each.reserved for each in points)
    return [int(least * (most / least) ** (step / (steps - 1))) for step in range(steps)]


# --- one fast node ----------------------------------------------------------------------------------------------------


def test_a_fast_node_with_memory_to_spare_shards_only_what_that_makes_faster() -> None:
    """Parameters and gradients stay whole. The optimizer's update is shared, since it is less work for each."""
    found = choose(gpu_cluster(), model(), "amsp")
    assert found is not None
    assert degrees(found.point) == (1, 1, 8)
    whole = min(each.seconds for each in every_point(gpu_cluster(), model(), "amsp") if each.point.optimizer_degree < 8)
    assert found.seconds < whole


def test_a_fast_node_shards_no_more_than_memory_needs() -> None:
    """With less and less memory gradients are spread, then parameters. A layout that fits with less sharding is passed
    over only where it is slower, or where it ties and needs more memory by a step of what counts."""
    points = every_point(gpu_cluster(), model(), "amsp")
    chosen = []
    for budget in ladder(points, 8):
        found = choose(gpu_cluster(), model(), "amsp", budget)
        assert found is not None
        chosen.append(degrees(found.point))
        fitting = [each for each in points if each.reserved <= budget]
        fastest = min(each.seconds for each in fitting)
        steps = found.reserved * MEMORY_TIE // budget
        for other in fitting:
            narrower = all(a <= b for a, b in zip(degrees(other.point), chosen[-1], strict=True))
            if narrower and degrees(other.point) != chosen[-1]:
                slower = other.seconds > fastest * (1 + TIE)
                assert slower or other.reserved * MEMORY_TIE // budget > steps
    assert chosen == sorted(chosen, reverse=True)
    assert (chosen[0], chosen[-1]) == ((8, 8, 8), (1, 1, 8))
    assert (1, 8, 8) in chosen


# --- slow links between nodes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["amsp", "auto"])
def test_slow_networks_keep_parameters_in_the_node_and_spread_optimizer_states(engine: str) -> None:
    """1 GB/s between four nodes, and a budget at which a node alone cannot hold the optimizer states. That beats
    everything stock by more than the gain that our engine has to promise."""
    slow = with_bandwidth(gpu_cluster(4), 1e9)
    budget = need(slow, model(), (8, 8, 32))
    assert budget < need(slow, model(), (8, 8, 8))
    found = choose(slow, model(), engine, budget)
    assert found is not None
    assert found.point.engine == "amsp"
    assert found.point.shard <= 8 < found.point.optimizer_degree


def test_gradients_stay_in_the_node_too_while_they_accumulate() -> None:
    """Where memory allows it: then the slow network is used once a step."""
    slow = with_bandwidth(gpu_cluster(4), 1e9)
    often = min(
        each.seconds
        for each in every_point(slow, model(), "amsp")
        if each.point.gradient_degree == 32 and each.point.shard <= 8
    )
    found = choose(slow, model(), "amsp", need(slow, model(), (8, 8, 32)))
    assert found is not None
    assert degrees(found.point)[1:] == (8, 32)
    assert found.seconds * 1.5 < often


# --- three levels -----------------------------------------------------------------------------------------------------

FRONTIER = (2, 8, 32)
"""Parameters in a pair, gradients in a node, optimizer states over all (arXiv 2501.04266)."""


@pytest.mark.parametrize("engine", ["amsp", "auto"])
def test_three_levels_a_decade_apart_give_frontiers_point(engine: str) -> None:
    """Seven billion parameters, 200, 16 and 2 GB/s, and the memory that this point needs: gathers cost nothing in the
    pair and too much in the node, which the reductions fill already; those leave the node once a step."""
    cluster, profile = frontier(node=16e9, network=2e9), model(16, 6144)
    found = choose(cluster, profile, engine, need(cluster, profile, FRONTIER, count=8), count=8)
    assert found is not None
    assert degrees(found.point) == FRONTIER
    assert family(found.point) == "Frontier"


def test_frontiers_nominal_rates_give_its_point_only_with_a_slower_network() -> None:
    """At 50 GB/s in the node, gathers over half a node hide behind compute, and parameters are spread wider. At the
    nominal 12.5 GB/s the network carries every micro-batch's reduction beside compute, so gradients are spread over
    all; at 4 GB/s it does not, and they stay in the node."""
    profile = model(16, 6144)
    chosen = {}
    for network in (12.5e9, 4e9):
        cluster = frontier(node=50e9, network=network)
        found = choose(cluster, profile, "amsp", need(cluster, profile, (4, 8, 32), count=8), count=8)
        assert found is not None
        chosen[network] = found.point
    assert degrees(chosen[12.5e9]) == (4, 32, 32)
    assert degrees(chosen[4e9]) == (4, 8, 32)
    assert family(chosen[4e9]) == "Frontier"


# --- more memory, more bandwidth --------------------------------------------------------------------------------------

SLACK = {"amsp": 1 + TIE, "stock": 1 + TIE, "auto": (1 + TIE) ** 2 * (1 + OWN_ENGINE_GAIN)}
"""By how much a step may be slower with more of something. A tie goes to less memory. With both kinds of engine, the
stock one is taken as soon as it fits and `amsp` is not faster by its gain: that may cost up to the gain."""


@pytest.mark.parametrize("engine", SLACK)
@pytest.mark.parametrize("network", [1e9, 4e9, 50e9])
def test_more_memory_is_never_slower(engine: str, network: float) -> None:
    cluster = with_bandwidth(gpu_cluster(2, per_node=4), network)
    fastest = float("inf")
    budgets = ladder(every_point(cluster, model(), "auto"), 8)
    for budget in budgets:
        found = choose(cluster, model(), engine, budget)
        if found is not None:
            assert found.seconds <= fastest * SLACK[engine]
            fastest = min(fastest, found.seconds)
    assert fastest < float("inf")


@pytest.mark.parametrize("engine", SLACK)
@pytest.mark.parametrize("level", [0, 1], ids=["node", "rail"])
def test_more_bandwidth_never_chooses_a_slower_plan(engine: str, level: int) -> None:
    base = gpu_cluster(2, per_node=4)
    budget = need(base, model(), (4, 4, 8))
    fastest = float("inf")
    for bandwidth in (0.5e9, 2e9, 8e9, 32e9, 128e9):
        found = choose(with_bandwidth(base, bandwidth, level), model(), engine, budget)
        assert found is not None
        assert found.seconds <= fastest * SLACK[engine]
        fastest = min(fastest, found.seconds)
