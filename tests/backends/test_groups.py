"""Groups of parameters by name and the moving average of parameters, in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import build
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shardwright.backends.pytorch.recipes import recipe_context
from shardwright.backends.pytorch.runtime.average import update_average
from shardwright.backends.pytorch.runtime.groups import ParameterGroup, kind_of, kind_options, parameter_groups
from shardwright.planner import recipe
from shardwright.schemas.job import OptimizerSpec, TrainSpec
from shardwright.schemas.profile import Parameter

MODELS = {tied: build(width=8, layers=2, tied=tied) for tied in (False, True)}
PATTERNS = st.sampled_from(
    ["*", "*.bias", "embed*", "head.*", "blocks.*", "blocks.0.*", "blocks.?.norm.*", "*.w[ei]ight", "norm.weight", "no"]
)
LISTS = st.lists(PATTERNS, min_size=1, max_size=3)
GROUPS = st.lists(
    st.fixed_dictionaries({"match": LISTS}, optional={"lr_scale": st.floats(0.1, 9), "weight_decay": st.floats(0, 1)}),
    max_size=3,
)


def described(model: nn.Module) -> list[tuple[nn.Parameter, Parameter]]:
    """Each parameter, and as a profile has it."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [
        (each, Parameter(name=first, shape=tuple(each.shape), trainable=True, unit=-1, also=tuple(others)))
        for each, (first, *others) in names.items()
    ]


@given(tied=st.booleans(), no_decay=st.just([]) | LISTS, groups=GROUPS, weight_decay=st.floats(0, 1))
def test_scripts_and_planner_have_the_same_kinds(
    tied: bool, no_decay: list[str], groups: list[ParameterGroup], weight_decay: float
) -> None:
    fields = {"no_decay": no_decay or "auto", "groups": groups, "weight_decay": weight_decay}
    spec = OptimizerSpec.model_validate(fields)
    kind = kind_of(MODELS[tied], no_decay=no_decay, groups=groups)
    assert [kind(each) for each, _ in described(MODELS[tied])] == [
        recipe.kind_of(spec, known) for _, known in described(MODELS[tied])
    ]
    options = [{"lr_scale": each.lr_scale, "weight_decay": each.weight_decay} for each in recipe.kinds(spec)]
    assert kind_options(weight_decay, groups) == options


def test_groups_hold_every_trainable_parameter_once() -> None:
    model = build(width=8, layers=2, tied=True)
    model.blocks[1].requires_grad_(False)
    groups = parameter_groups(
        model, 0.1, no_decay="positions.*", groups=[{"match": ["head.*", "*.0.up.*"], "lr_scale": 3.0}]
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = [[names[parameter] for parameter in group.pop("params")] for group in groups]
    assert groups == [
        {"lr_scale": 1.0, "weight_decay": 0.1},
        {"lr_scale": 1.0, "weight_decay": 0.0},
        {"lr_scale": 3.0, "weight_decay": 0.1},
        {"lr_scale": 3.0, "weight_decay": 0.0},
    ]
    assert trained[2:] == [["embed.weight", "blocks.0.up.weight"], ["blocks.0.up.bias"]]
    assert "positions.weight" in trained[1]
    found = sorted(name for group in trained for name in group)
    assert found == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_kinds_are_known_while_parameters_are_replaced() -> None:
    model = build(width=8, layers=2)
    kind = kind_of(model, groups=[{"match": "head.*"}])
    assert kind(model.head.weight) == 2
    model.head.weight = nn.Parameter(torch.zeros(257, 8))
    assert (kind(model.head.weight), kind(model.norm.weight)) == (2, 1)


@pytest.mark.parametrize(
    ("optimizer", "arguments", "scales"),
    [
        ({}, "", False),
        ({"no_decay": "*.bias"}, "no_decay=NO_DECAY", False),
        ({"groups": [{"match": "*", "weight_decay": 0.2}]}, "groups=PARAMETER_GROUPS", False),
        (
            {"no_decay": ["a", "b"], "groups": [{"match": "a"}, {"match": "*", "lr_scale": 0.2}]},
            "no_decay=NO_DECAY, groups=PARAMETER_GROUPS",
            True,
        ),
    ],
)
def test_scripts_hold_what_the_job_needs(optimizer: dict[str, Any], arguments: str, scales: bool) -> None:
    train = TrainSpec.model_validate({"global_batch": 8, "steps": 1, "optimizer": optimizer})
    assert recipe_context(train) == {"own_groups": arguments, "scales_lr": scales, "averages": False}


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
    "sgd with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True),
}


class Three(nn.Module):
    """One parameter that is always trained, one that is from the third step on, one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Parameter(torch.linspace(-1, 1, 7))
        self.later = nn.Parameter(torch.ones(3, 2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, step: int) -> Tensor:
        loss = (self.always * self.frozen[0]).square().sum()
        return loss + self.later.square().sum() if step >= 2 else loss


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_averages_are_those_of_torch(name: str) -> None:
    model = Three()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    optimizer = OPTIMIZERS[name](model.parameters())
    for step in range(5):
        model(step).backward()
        optimizer.step()
        update_average(optimizer, 0.7)
        optimizer.zero_grad()
        theirs.update_parameters(model)
        assert torch.equal(optimizer.state[model.always]["average"], theirs.module.always)
        if step == 2:
            assert torch.equal(optimizer.state[model.later]["average"], model.later)
    assert not torch.equal(theirs.module.always, model.always)
    assert not torch.equal(optimizer.state[model.later]["average"], model.later)
    assert not optimizer.state[model.frozen]
