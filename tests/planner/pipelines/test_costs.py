from dataclasses import replace

import pytest
from planner.pipeline_points import pipe, point
from planner.profiles import cpu_cluster, gpu_cluster, job, llama, toy

from shardwright.planner.compute import model_work
from shardwright.planner.groups import Groups
from shardwright.planner.pipelines.costs import PipelineCosts, is_deferred, slowest_link
from shardwright.planner.pipelines.owners import Owners, stage_segments
from shardwright.schemas.profile import Affine, Edge, ModelProfile, Parameter


def costs_of(profile: ModelProfile, processes: int = 2) -> PipelineCosts:
    return PipelineCosts(job(cpu_cluster(processes), batch=8, sequence=16), profile)


def with_units(profile: ModelProfile, kind: str, **changes: object) -> ModelProfile:
    """The profile with other costs of the units of a kind."""
    units = [
        replace(unit, costs={name: replace(cost, **changes) for name, cost in unit.costs.items()})
        if unit.kind == kind
        else unit
        for unit in profile.units
    ]
    return replace(profile, units=tuple(units))


def test_the_times_of_a_stage_are_those_of_its_units() -> None:
    # 2 MFLOP a pass of a block at micro-batch 2, at 0.7 x 0.8 of 1 GFLOP/s, and 8 us of launching each operator.
    made = costs_of(toy()).costs(point(pipe(cuts=(1,))))
    launch, block = 8e-6, 2e6 / (0.7 * 0.8 * 1e9)
    assert made.forward == pytest.approx([block + 2 * launch, 3 * block + 2 * block + 4 * launch], rel=1e-3)
    # A pass of each kind has the same FLOPs.
    assert made.input_gradient == pytest.approx(made.forward, rel=1e-3)


@pytest.mark.parametrize("cuts", [(0,), (2,), (4,)])
def test_all_stages_together_take_what_all_units_take(cuts: tuple[int, ...]) -> None:
    profile, where = toy(), point(pipe(cuts=cuts, checkpointed=(cuts[0], 0)))
    costs = costs_of(profile)
    made = costs.costs(where)
    copies = sum(costs.gradient_copies(where, stage) for stage in (0, 1))
    work = model_work(profile, "fp32", 2, cpu_cluster(2).device, hooked=False)
    units = sum(unit.count * (unit.forward.seconds + unit.backward.seconds) for unit in work)
    again = cuts[0] * next(unit.recompute for unit in work if unit.kind == "block")
    total = sum(made.forward) + sum(made.input_gradient) + sum(made.weight_gradient)
    # A CPU's launches and kernels follow each other, so that backward may be divided anywhere.
    assert total == pytest.approx(units + again + copies)


def test_only_linear_layers_wait_for_w() -> None:
    profile = llama(layers=2)
    deferred = {(unit.kind, each.name) for unit in profile.units for each in unit.costs["bf16"].operators
                if is_deferred(each)}  # fmt: skip
    assert ("head", "lm_head") in deferred
    assert ("block", "mlp.up_proj") in deferred
    assert not any(name in ("embedding", "attention", "elementwise") for _, name in deferred)
    operator = next(each for each in profile.units[1].costs["bf16"].operators if is_deferred(each))
    assert not is_deferred(replace(operator, name="convolution_backward"))


def test_a_stage_keeps_what_its_units_keep() -> None:
    costs = costs_of(with_units(toy(), "block", held_by_weight=Affine(0, 300)))
    made = costs.costs(point(pipe(cuts=(2,), schedule="zb-h1")))
    # Embedding 20, blocks 2000 each, head 1000, at micro-batch 2; embedding and head do not say what their W holds.
    assert made.activations == (4020, 5000)
    assert made.held_by_weight == (20 + 2 * 600, 2 * 600 + 1000)


def test_what_is_recomputed_is_kept_until_w_where_backward_is_cut_in_two() -> None:
    costs = costs_of(with_units(toy(), "block", held_by_weight=Affine(0, 300)))
    whole = point(pipe(checkpointed=(2, 0)))
    assert costs.costs(whole).activations == (20 + 2 * 200, 5000)
    assert all(
        held <= kept
        for held, kept in zip(costs.costs(whole).held_by_weight, costs.costs(whole).activations, strict=True)
    )
    cut = point(pipe(checkpointed=(2, 0), schedule="zb-h1"))
    assert costs.costs(cut).activations == (20 + 2 * 600, 5000)
    assert costs.exact(cut).activations == (20 + 2 * 200, 5000)
    assert costs.exact(cut).held_by_weight[0] == 20 + 2 * 600


def test_a_message_takes_latency_and_bandwidth() -> None:
    costs = costs_of(toy())
    where = point(pipe())
    assert costs.messages(where) == {(0, 1): 200}
    efficiency = 0.8
    assert costs.send_seconds(where, (0, 1)) == pytest.approx(100e-6 + 200 / (efficiency * 1e9), rel=1e-6)
    turned = point(pipe(chunks=2, placement="wave", cuts=(1, 2, 3), checkpointed=(0,) * 4))
    assert costs.send_seconds(turned, (1, 2)) == 0.0
    assert costs.costs(turned).send[1] == 0.0 < costs.costs(turned).send[0]


def test_stages_on_one_node_do_not_pay_for_the_slow_link() -> None:
    cluster = gpu_cluster(2)
    names = [getattr(slowest_link(cluster, 2, rank, rank + 1), "name", None) for rank in range(7)]
    # Four ranks of two copies fill a node of eight.
    assert names == ["node"] * 3 + ["rail"] + ["node"] * 3
    assert slowest_link(cluster, 2, 3, 3) is None
    assert getattr(slowest_link(cluster, 8, 0, 1), "name", None) == "rail"


def test_a_value_for_several_units_of_a_stage_is_sent_once_and_kept_there() -> None:
    chain = [("embedding", "blocks.0"), *((f"blocks.{k}", f"blocks.{k + 1}") for k in range(3)), ("blocks.3", "head")]
    edges = [Edge(source=a, target=b, kind="chain", tensors=1, bytes=100) for a, b in chain]
    edges += [Edge(source="embedding", target=f"blocks.{k}", kind="skip", tensors=1, bytes=7) for k in (1, 2, 3)]
    plain = costs_of(toy()).costs(point(pipe(ranks=3, cuts=(1, 2), checkpointed=(0,) * 3)))
    costs = costs_of(replace(toy(), edges=tuple(edges)))
    where = point(pipe(ranks=3, cuts=(1, 2), checkpointed=(0,) * 3))
    assert costs.messages(where) == {(0, 1): 200 + 14, (0, 2): 14, (1, 2): 200}
    assert costs.edges(where) == ((0, 1), (0, 2), (1, 2))
    received = [a - b for a, b in zip(costs.costs(where).activations, plain.activations, strict=True)]
    assert received == [0, 14, 14]
    # The first block counts what it takes of an embedding that is a stage alone.
    alone = point(pipe(ranks=3, cuts=(0, 1), checkpointed=(0,) * 3))
    received = costs.costs(alone).activations[1] - costs_of(toy()).costs(alone).activations[1]
    assert received == 0


def test_activations_travel_in_the_compute_dtype() -> None:
    edges = [Edge(source="embedding", target="blocks.0", kind="chain", tensors=1, bytes=100)]
    costs = costs_of(replace(toy(), edges=tuple(edges)))
    assert costs.messages(point(pipe(cuts=(0,)), precision="bf16_mixed")) == {(0, 1): 100}


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        costs_of(toy(blocks=0))


def test_the_stages_share_out_the_segments() -> None:
    for cuts in ((0, 2, 4), (1, 2, 3), (0, 1, 4)):
        of = pipe(ranks=4, cuts=cuts, checkpointed=(0,) * 4)
        assert [segment for stage in range(4) for segment in stage_segments(of, stage, 4)] == list(range(6))


def test_a_tied_parameter_is_on_every_rank_that_uses_it() -> None:
    profile = llama(layers=4, tied=True)
    owners = Owners(Groups(profile))
    first, last = owners.units(pipe(), 0), owners.units(pipe(), 1)
    assert [(unit.block, unit.ranks) for unit in first] == [(0, (0,)), (1, (0,)), (-1, (0, 1))]
    assert [unit.block for unit in last] == [2, 3, -1, -1]
    assert first[-1].parameters == last[-1].parameters
    turned = pipe(chunks=2, placement="wave", cuts=(1, 2, 3), checkpointed=(0,) * 4)
    alone = [unit for unit in owners.units(turned, 0) if unit.block < 0]
    assert [(unit.stages, [each.name for each in unit.parameters]) for unit in alone] == [
        ((0, 3), ["model.embed_tokens.weight"]),
        ((3,), ["model.norm.weight"]),
    ]


def test_every_parameter_belongs_to_a_rank_also_one_that_nobody_uses() -> None:
    def used(parameter: Parameter) -> Parameter:
        block = parameter.name.split(".")[1]
        segments = (int(block) + 1,) if parameter.name.startswith("blocks") else (0,) if block == "weight" else ()
        return replace(parameter, segments=() if parameter.name == "blocks.3.weight" else segments)

    profile = toy()
    owners = Owners(Groups(replace(profile, parameters=tuple(map(used, profile.parameters)))))
    names = [[each.name for unit in owners.units(pipe(), rank) for each in unit.parameters] for rank in (0, 1)]
    assert "blocks.3.weight" in names[1]
    assert sorted([*names[0], *names[1]]) == sorted(each.name for each in profile.parameters)
