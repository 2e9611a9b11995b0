"""Which parameters train with which numbers, and what a job says of them in vain."""

from __future__ import annotations

from typing import Any

import pytest

from planner.profiles import cpu_cluster, job, toy
from shardwright.planner import make_plan
from shardwright.planner.recipe import Kind, check_recipe, decays, fitting, kind_of, kinds
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.job import OptimizerSpec
from shardwright.schemas.profile import Parameter


def parameter(name: str, *shape: int, also: tuple[str, ...] = ()) -> Parameter:
    return Parameter(name=name, shape=shape, trainable=True, unit=-1, also=also)


PARAMETERS = (
    parameter("embed.weight", 9, 4, also=("head.weight",)),
    parameter("blocks.0.up.weight", 4, 4),
    parameter("blocks.0.up.bias", 4),
    parameter("blocks.1.up.weight", 4, 4),
    parameter("blocks.1.norm.weight", 4),
    parameter("scale", 4, 4),
)


def optimizer(**fields: Any) -> OptimizerSpec:
    return OptimizerSpec.model_validate({"weight_decay": 0.1, **fields})


def found(spec: OptimizerSpec) -> list[int]:
    return [kind_of(spec, each) for each in PARAMETERS]


def test_without_groups_matrices_have_weight_decay() -> None:
    assert found(optimizer()) == [0, 0, 1, 0, 1, 0]
    assert kinds(optimizer()) == (Kind(1.0, 0.1), Kind(1.0, 0.0))


def test_patterns_exempt_further_parameters() -> None:
    assert found(optimizer(no_decay=["scale", "*.1.up.*"])) == [0, 0, 1, 1, 1, 1]


def test_the_first_group_that_matches_counts() -> None:
    groups = [{"match": "blocks.1.*", "lr_scale": 0.5}, {"match": ["blocks.*", "scale"], "weight_decay": 0.3}]
    spec = optimizer(groups=groups, no_decay="scale")
    assert found(spec) == [0, 4, 5, 2, 3, 5]
    assert kinds(spec) == (
        Kind(1.0, 0.1), Kind(1.0, 0.0), Kind(0.5, 0.1), Kind(0.5, 0.0), Kind(1.0, 0.3), Kind(1.0, 0.0),
    )  # fmt: skip


def test_a_tied_parameter_goes_by_any_of_its_names() -> None:
    assert found(optimizer(groups=[{"match": "head.*"}, {"match": "embed.*"}], no_decay="head*"))[0] == 3


def test_case_matters_and_patterns_match_whole_names() -> None:
    assert found(optimizer(no_decay=["Scale", "up.weight"])) == found(optimizer())


def test_some_kind_decays() -> None:
    assert decays(optimizer())
    assert not decays(optimizer(weight_decay=0))
    assert decays(optimizer(weight_decay=0, groups=[{"match": "*", "weight_decay": 0.1}]))


def refused(spec: OptimizerSpec) -> list[tuple[str, str, str]]:
    with pytest.raises(InputError) as caught:
        check_recipe(spec, PARAMETERS)
    return [(each.key, each.message, each.suggestion) for each in caught.value.diagnostics]


def test_patterns_without_parameters_are_refused_with_the_nearest_name() -> None:
    spec = optimizer(no_decay=["scale", "embde.*"], groups=[{"match": ["blocks.*", "blocks.2.up.weights"]}])
    assert refused(spec) == [
        (
            "train.optimizer.no_decay.1",
            "the pattern `embde.*` matches no parameter of the model",
            "the nearest name is `embed.weight`",
        ),
        (
            "train.optimizer.groups.0.match.1",
            "the pattern `blocks.2.up.weights` matches no parameter of the model",
            "the nearest name is `blocks.1.up.weight`",
        ),
    ]


def test_groups_that_say_something_in_vain_are_refused() -> None:
    groups = [{"match": "blocks.*"}, {"match": "blocks.1.*"}, {"match": "scale", "weight_decay": 0.2}]
    keys = [key for key, _, _ in refused(optimizer(no_decay="scale", groups=groups))]
    assert keys == ["train.optimizer.groups.1.match", "train.optimizer.groups.2.weight_decay"]


def test_what_is_said_to_some_purpose_is_accepted() -> None:
    groups = [{"match": "blocks.1.*"}, {"match": "blocks.*", "weight_decay": 0.2}, {"match": "*.bias", "lr_scale": 2}]
    check_recipe(optimizer(groups=groups[:2], no_decay=["scale", "*norm*"]), PARAMETERS)
    check_recipe(optimizer(groups=[groups[2], *groups[:2]]), PARAMETERS)
    check_recipe(optimizer(groups=[{"match": "*.bias", "weight_decay": 0}]), PARAMETERS)


def test_a_smaller_model_needs_only_what_it_has_parameters_for() -> None:
    spec = optimizer(
        no_decay=["blocks.0.*", "blocks.7.*"],
        groups=[{"match": "blocks.9.*", "lr_scale": 2}, {"match": ["blocks.8.*", "blocks.1.*"], "lr_scale": 3}],
    )
    small = fitting(spec, PARAMETERS)
    check_recipe(small, PARAMETERS)
    assert (small.no_decay, [(group.match, group.lr_scale) for group in small.groups]) == (
        ("blocks.0.*",),
        [(("blocks.1.*",), 3.0)],
    )
    assert fitting(optimizer(no_decay="none*", groups=[{"match": "none"}]), PARAMETERS) == optimizer()


def test_planning_refuses_patterns_without_parameters() -> None:
    wrong = job(cpu_cluster(1))
    train = wrong.train.model_copy(update={"optimizer": optimizer(no_decay="embedings.*")})
    with pytest.raises(InputError, match=r"(?s)no_decay\.0.*nearest name is `embedding\.weight`"):
        make_plan(wrong.model_copy(update={"train": train}), toy(), job_file="job.yaml", defaults=())
