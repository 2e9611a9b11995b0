"""The executor of pipelines in one process, whose chunks hand each other their values."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import pytest
import torch
from support.pipeline_model import WIDTH, Batch, batches, build, dropout_seed, edges_of, loss_of, parameters_of
from support.pipeline_orders import random_timetable
from support.pipeline_reference import run
from torch import Tensor

from shardwright.backends.pytorch.runtime.deferred import WeightQueue, defer_weight_gradients
from shardwright.backends.pytorch.runtime.gradients import square_over_groups
from shardwright.backends.pytorch.runtime.messages import Wire
from shardwright.backends.pytorch.runtime.pipeline import Pipeline, Step
from shardwright.backends.pytorch.runtime.replicas import Replicas
from shardwright.planner.schedules.lowering import lower
from shardwright.planner.schedules.timetable import Layout

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUT = Layout(1, 4, "wave")
FEATURES = ("skips", "dropout", "tied")
COUNT = 3


def program() -> list[Step]:
    edges = edges_of(4, FEATURES)
    return list(lower(random_timetable(LAYOUT, COUNT, edges, seed=7), LAYOUT, edges=edges)[0])


def pipeline(steps: list[Step], **changes: Any) -> Pipeline:
    modules, queue, states = build(4, FEATURES), WeightQueue(), Replicas()
    for module in modules:
        defer_weight_gradients(module, queue)
    settings: dict[str, Any] = {
        "ranks": [0] * 4,
        "wires": {edge: [Wire((2, 8, WIDTH), torch.float32)] for edge in edges_of(4, FEATURES)},
        "loss": lambda output, batch: loss_of(output, batch, 1 / COUNT),
        "queue": queue,
        "states": states,
        "units": {stage: [states.take(module.parameters())] for stage, module in enumerate(modules)},
        "device": torch.device("cpu"),
        "seed": lambda stage, number: dropout_seed(0, 0, stage, number),
    }
    return Pipeline(steps, dict(enumerate(modules)), **settings | changes)


def plain() -> tuple[dict[str, Tensor], float]:
    """Gradients and loss without a pipeline."""
    modules = build(4, FEATURES)
    losses = [run(modules, FEATURES, batch, (0, 0, number), 1 / COUNT) for number, batch in enumerate(data())]
    torch.autograd.backward(losses)
    named = parameters_of(dict(enumerate(modules)))
    return {name: each.grad for name, each in named.items() if each.grad is not None}, float(
        torch.stack(losses).detach().sum()
    )


def data() -> list[Batch]:
    return batches(0, 0, COUNT)


@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_and_loss_are_those_of_the_plain_loop(passes: int) -> None:
    tested = pipeline(program())
    losses = [tested.step(data(), last=number == passes - 1) for number in range(passes)]
    gradients, loss = plain()
    assert [float(each) for each in losses if each is not None] == pytest.approx([loss] * passes)
    parameters = parameters_of(dict(tested.stages))  # type: ignore[arg-type]
    for name, expected in gradients.items():
        found = parameters[name].grad
        assert found is not None
        torch.testing.assert_close(found, passes * expected, atol=2e-6, rtol=1e-5)
    norm = square_over_groups(set(parameters.values()), (), torch.device("cpu")).sqrt()
    whole = torch.stack([each.norm() for name, each in gradients.items() if name != "3.head.1.weight"]).norm()
    assert float(norm) == pytest.approx(passes * float(whole), rel=1e-5)


def test_an_evaluation_runs_forward_only_for_as_many_micro_batches_as_there_are() -> None:
    ran: list[Step] = []
    tested = pipeline(program(), observe=ran.append)
    found = tested.evaluate(data()[:2])
    modules = build(4, FEATURES)
    with torch.no_grad():
        losses = [run(modules, FEATURES, batch, (0, 0, at), 1 / COUNT) for at, batch in enumerate(data()[:2])]
    assert found is not None
    assert float(found) == pytest.approx(float(sum(losses)))
    assert {step[0] for step in ran} == {"F"}
    assert len(ran) == 8
    assert all(each.grad is None for each in parameters_of(dict(tested.stages)).values())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["I", "W"])
def test_what_a_program_leaves_undone_is_an_error(kind: str) -> None:
    steps = program()
    last = max(at for at, step in enumerate(steps) if step[0] == kind and step[1] == 0)
    del steps[last]
    with pytest.raises((RuntimeError, KeyError)) as caught:
        pipeline(steps).step(data())
    assert "never uses" in str(caught.value) or "in step W of stage 0" in caught.value.__notes__[0]


def test_outputs_are_not_kept_for_backward() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    tested = pipeline(program(), observe=lambda _: alive.append(sum(each() is not None for each in made)))

    def watched(module: Any, *values: Any) -> Any:
        output = module(*values)
        sent = [tensor for message in output for tensor in message] if isinstance(output, tuple) else [output]
        made.extend(map(weakref.ref, sent))
        return output

    tested.stages = {stage: partial(watched, module) for stage, module in tested.stages.items()}
    tested.step(data())
    assert len(made) == 5 * COUNT
    assert set(alive) == {0}


def test_an_error_says_in_which_step_it_came() -> None:
    def loss(output: Tensor, batch: Batch) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        pipeline(program(), loss=loss).step(data())
    assert "in step F of stage 3" in caught.value.__notes__[0]


def test_a_value_that_is_not_as_planned_is_not_sent() -> None:
    """The other side would read it as something else."""
    layout, edges = Layout(2, 2), edges_of(4, FEATURES)
    steps = lower(random_timetable(layout, 1, edges, seed=0), layout, edges=edges)[0]
    wires = {edge: [Wire((2, 8, WIDTH), torch.bfloat16)] for edge in edges}
    tested = pipeline(list(steps), ranks=[0, 1, 0, 1], wires=wires)
    with pytest.raises(ValueError, match="expects"):
        tested.step(data()[:1])


def test_a_program_is_for_so_many_micro_batches() -> None:
    tested = pipeline(program())
    with pytest.raises(ValueError, match="3 micro-batches, and 2"):
        tested.step(data()[:2])
    with pytest.raises(ValueError, match="3 micro-batches, and 6"):
        tested.evaluate(data() * 2)
