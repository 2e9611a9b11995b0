"""Stages of unmodified models, in one process, against the whole model."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from support import stages_models as models
from support.stages_models import Case
from support.stages_run import cut, gpt, in_stages, pipeline_of, whole
from torch import Tensor

from shardwright.backends.pytorch.runtime.follow import follow
from shardwright.backends.pytorch.runtime.messages import Wire

pytestmark = pytest.mark.usefixtures("one_thread")

RIGHT: dict[str, tuple[Callable[[], Case], list[list[int]]]] = {
    "gpt": (lambda: gpt(tied=False), [[1], [0, 1, 2], [1, 4], [0, 1, 2, 3, 4]]),
    "tied, with dropout": (lambda: gpt(dropout=0.1), [[2], [0, 4], [1, 2, 3]]),
    "checkpointed": (lambda: gpt(dropout=0.1, checkpointed=True), [[2], [1, 2, 3]]),
    "U-Net": (models.u_net, [[2, 3, 5], [3], [1, 2, 3, 4, 5]]),
    "conditioned": (lambda: models.of(models.Conditioned()), [[1, 3, 4], [0, 5], [2]]),
    "masked": (models.masked, [[1, 2], [0, 3]]),
    "gated": (models.gated, [[0, 3], [2]]),
    "changed in place": (lambda: models.of(models.InPlace()), [[2], [0, 1, 2]]),
}


@pytest.mark.parametrize(("name", "cuts"), [(name, cuts) for name, (_, each) in RIGHT.items() for cuts in each])
def test_stages_are_the_whole_model(name: str, cuts: list[int]) -> None:
    torch.manual_seed(1)
    case = RIGHT[name][0]()
    loss, gradients = whole(case)
    found, own = in_stages(case, cuts)
    assert found == loss
    assert own.keys() == gradients.keys()
    torch.testing.assert_close(own, gradients, atol=1e-7, rtol=1e-5)


def test_a_chain_of_stages_has_the_gradients_of_the_whole_model_to_the_bit() -> None:
    torch.manual_seed(1)
    case = gpt(dropout=0.1, tied=False, checkpointed=True)
    loss, gradients = whole(case)
    found, own = in_stages(case, [0, 1, 3])
    assert found == loss
    assert all(torch.equal(own[key], expected) for key, expected in gradients.items())


@pytest.mark.parametrize("make", [models.u_net, models.masked, lambda: gpt(tied=False)])
def test_several_micro_batches_and_an_evaluation(make: Callable[[], Case]) -> None:
    """Of which the forward is followed anew, once layers are deferred and the model is in evaluation."""
    torch.manual_seed(1)
    case = make()
    twin = copy.deepcopy(case.model)
    pipeline = pipeline_of(case, cut(case, [1, 2]), 3)
    batches = [case.batch(number) for number in range(3)]
    for model in (case.model, twin):
        for each in model.modules():
            if isinstance(each, torch.nn.BatchNorm2d):
                each.momentum = 0.0  # its statistics would depend on the order
    for _ in range(2):
        losses = [case.forward(twin, batch) for batch in batches]
        torch.autograd.backward(losses)
        found = pipeline.step(batches)
        assert found is not None
        assert float(found) == pytest.approx(float(torch.stack(losses).detach().sum()), rel=1e-6)
        case.model.eval(), twin.eval()
        evaluated = pipeline.evaluate(batches[:2])
        assert evaluated is not None
        with torch.no_grad():
            expected = sum(case.forward(twin, batch) for batch in batches[:2])
        assert float(evaluated) == pytest.approx(float(expected), rel=1e-6)
        case.model.train(), twin.train()
    for mine, other in zip(case.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-7, rtol=1e-5)


def test_parameters_are_those_that_the_segments_use() -> None:
    stages = cut(gpt(), [0, 2])
    names = [stages.parameters(stage) for stage in range(3)]
    assert names[0] == ("embed.weight", "positions.weight", "head.weight")
    assert {name.split(".")[1] for name in names[1]} == {"0", "1"}
    assert {name.split(".")[0] for name in names[2]} == {"blocks", "norm", "head", "embed"}
    shared = {name: users for name, users in stages.users.items() if len(users) > 1}
    assert shared == {"embed.weight": (0, 2), "head.weight": (0, 2)}
    assert stages.wires == {edge: (Wire((2, 8, 16), torch.float32),) for edge in [(0, 1), (1, 2)]}


def test_what_goes_past_blocks_goes_straight_to_where_it_is_used() -> None:
    stages = cut(models.u_net(), [2, 3, 5])
    shapes = {edge: {wire.shape[1:] for wire in wires} for edge, wires in stages.wires.items()}
    time = (models.WIDTH,)
    assert shapes == {
        (0, 1): {(8, 4, 4), time},
        (0, 2): {(8, 4, 4), time},
        (0, 3): {(6, 8, 8), time},
        (1, 2): {(8, 2, 2)},
        (2, 3): {(6, 4, 4)},
    }


def test_truth_values_have_no_gradient() -> None:
    wires = cut(models.gated(), [1, 3]).wires
    assert wires[0, 2] == (Wire((2, 8, 1), torch.bool),)
    assert [wire.has_gradient for edge in [(0, 1), (0, 2)] for wire in wires[edge]] == [True, False]


def test_a_stage_computes_nothing_of_others_and_needs_no_memory_for_them() -> None:
    case = models.of(models.Conditioned())
    stages = cut(case, [1, 3], own=[1])
    used = set(stages.parameters(1))
    assert all(name.startswith(("blocks.1", "blocks.2")) for name in used)
    for name, _ in list(case.model.named_parameters()):
        if name not in used:
            path, _, last = name.rpartition(".")
            module = case.model.get_submodule(path)
            setattr(module, last, torch.nn.Parameter(getattr(module, last).detach().to("meta")))
    received = [tuple(torch.randn(w.shape) for w in wires) for edge, wires in stages.wires.items() if edge[1] == 1]
    (sent,) = stages.stages[1](case.batch(1), *received)
    assert not any(tensor.is_meta or tensor.isnan().any() for tensor in sent)


def test_a_stage_keeps_nothing() -> None:
    case = models.of(models.Conditioned())
    stages = cut(case, [1, 3])
    gc.collect()
    gc.disable()
    try:
        made: list[weakref.ref[Tensor]] = []
        hook = case.model.blocks[0].mlp.register_forward_hook(lambda *given: made.append(weakref.ref(given[-1])))
        for _ in range(2):
            sent = stages.stages[0](case.batch(0))
            made.extend(weakref.ref(tensor) for message in sent for tensor in message)
            received = [sent[0]]
            del sent
            stages.stages[1](case.batch(0), *received)
            del received
        hook.remove()
        assert len(made) > 4
        assert not any(each() is not None for each in made)
    finally:
        gc.enable()
    assert not any("forward" in vars(module) for module in case.model.modules())


def test_in_bf16_inputs_of_blocks_are_cast() -> None:
    torch.manual_seed(1)
    case = gpt(tied=False)
    for parameter in case.model.parameters():
        parameter.data = parameter.data.bfloat16()
    stages = cut(case, [2], dtype=torch.bfloat16)
    assert stages.wires == {(0, 1): (Wire((2, 8, 16), torch.bfloat16),)}
    expected = case.forward(case.model, case.batch(0))  # the model has the hooks
    (sent,) = stages.stages[0](case.batch(0))
    assert torch.equal(stages.stages[1](case.batch(0), sent), expected)


@pytest.mark.parametrize(
    ("make", "cuts", "message"),
    [
        (models.View, [1], "cut after blocks.0: a tensor of the model before blocks.0 is changed in place"),
        (models.Leaking, [1], "cut after blocks.0: blocks.0 makes a tensor that is used after it"),
        (models.Leaking, [2, 3], "cut after blocks.1: blocks.0 makes a tensor that is used after it"),
        (models.Backwards, [1], "the block blocks.4 runs twice, or not in the order"),
        (models.Skipping, [1], "does not run the block blocks.4"),
        (models.Filling, [1], "changes in place a tensor that until then depends on the batch alone"),
    ],
)
def test_what_cannot_be_cut_is_refused(make: Callable[[], models.Conditioned], cuts: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        cut(models.of(make()), cuts)


def test_what_is_refused_at_one_cut_may_be_possible_at_another() -> None:
    case = models.of(models.View())
    assert in_stages(case, [2])[0] == whole(case)[0]


def test_a_forward_that_changes_is_noticed() -> None:
    case = models.of(models.Changing())
    stages = cut(case, [1])
    (sent,) = stages.stages[0](case.batch(0))
    case.model.changed = True
    with pytest.raises(RuntimeError, match="unlike when it was followed"):
        stages.stages[1](case.batch(0), sent)


def test_a_route_is_followed_anew_in_evaluation() -> None:
    case = gpt()
    route = follow(case.model, case.blocks, case.forward, case.batch(0))
    trained = route.record()
    assert route.parameters(trained, 5, 5) == ("embed.weight", "norm.weight", "norm.bias", "head.weight")
    case.model.eval()
    assert route.record() is not trained
    case.model.train()
    assert route.record() is trained


def test_a_model_that_decides_by_values_is_refused_where_it_does() -> None:
    case = models.of(models.Deciding())
    with pytest.raises(RuntimeError) as caught:
        cut(case, [1])
    assert "in the model before blocks.1, whose forward is followed without" in caught.value.__notes__[0]
