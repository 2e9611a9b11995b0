"""Steps that do not wait for the norm of the gradient: equal to those that do, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.launch import results_of
from torch import Tensor, nn

from shardwright.backends.pytorch.runtime.average import update_average
from shardwright.backends.pytorch.runtime.late import Head, LateStep, LateSum, heads, kept_bytes
from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates
from shardwright.planner.schedules.lowering import Gathers, Program, Step, lower
from shardwright.planner.schedules.table import SCHEDULES, make_schedule

pytestmark = pytest.mark.usefixtures("one_thread")

UNIT = (1.0, 1.0, 1.0, 0.0)
NOWHERE = Head(0, ())
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, foreach=True),
    "sgd without momentum": lambda groups: torch.optim.SGD(groups),
    "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=0.1),
    "fused adamw": lambda groups: torch.optim.AdamW(groups, fused=True),
}


class One:
    """A model in one process, whose gradients are given."""

    def __init__(self, optimizer: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
        self.states = ShardedStates(Levels(None, parameters=1, gradients=1, optimizer_states=1), dtype)
        self.unit = self.states.take(self.model.parameters())
        self.optimizer = OPTIMIZERS[optimizer](self.states.parameter_groups([{"lr": 0.1}, {"lr": 0.2}]))

    def update(self) -> None:
        self.optimizer.step()
        update_average(self.optimizer, 0.9)

    def late(self, max_norm: float | None) -> LateStep:
        return LateStep(self.states, self.optimizer, head=NOWHERE, group=None, max_norm=max_norm, update=self.update)

    def backward(self, step: int, factor: float = 1.0) -> None:
        for group, rate in zip(self.optimizer.param_groups, (0.1, 0.2), strict=True):
            group["lr"] = rate / (step + 1)
        self.states.wait(self.unit)
        generator = torch.Generator().manual_seed(step)
        for parameter in self.model.parameters():
            given = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            torch.autograd.backward((parameter * given * factor).sum())
        self.states.reduce(self.unit, last=True)
        self.states.finish()

    def wait_and_step(self, max_norm: float) -> Tensor:
        norm = self.states.gradient_norm()
        nn.utils.clip_grads_with_norm_(self.states.parameters(), max_norm, norm)
        self.update()
        self.states.publish()
        return norm

    def everything(self) -> dict[str, Tensor]:
        """What training goes on from."""
        found = {f"model {name}": each.detach() for name, each in self.model.named_parameters()}
        for number, parameter in enumerate(self.states.parameters()):
            found[f"value {number}"] = parameter.detach()
            state = self.optimizer.state[parameter]
            found |= {f"{key} {number}": each for key, each in state.items() if isinstance(each, Tensor)}
        return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        each.dtype == other[name].dtype and torch.equal(each.nan_to_num(7.0), other[name].nan_to_num(7.0))
        for name, each in one.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("factors", "redone"), [((0.01,) * 4, 0), ((1.0,) * 4, 1), ((1.0, 0.01, 1.0, 0.01), 2)])
def test_a_step_done_again_is_the_one_that_waits(
    optimizer: str, dtype: torch.dtype, factors: tuple[float, ...], redone: int
) -> None:
    waiting, tested = One(optimizer, dtype), One(optimizer, dtype)
    late = tested.late(max_norm=1.0)
    for step, factor in enumerate(factors):
        waiting.backward(step, factor)
        norm = waiting.wait_and_step(1.0)
        tested.backward(step, factor)
        late.step()
        for group in tested.optimizer.param_groups:
            group["lr"] = 7.0  # as the next step sets it before the verdict
        late.settle()
        late.settle()
        assert torch.equal(late.norm, norm)
        assert equal(tested.everything(), waiting.everything())
        assert all(group["lr"] == 7.0 for group in tested.optimizer.param_groups)
        assert all(parameter.grad is None for parameter in tested.states.parameters())
    assert late.redone == redone


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 1.0])
def test_no_norm_is_too_odd(factor: float) -> None:
    """Not finite, and just below the bound, where torch.nn.utils scales by a little less than 1."""
    waiting, tested = One("adamw"), One("adamw")
    waiting.backward(0, factor)
    bound = min(float(waiting.states.gradient_norm()), 1e9)
    bound = 1.0 if bound != bound else bound
    waiting.wait_and_step(bound)
    tested.backward(0, factor)
    late = tested.late(bound)
    late.step()
    late.settle()
    assert late.redone == 1
    assert equal(tested.everything(), waiting.everything())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_kept_is_counted_and_let_go(optimizer: str) -> None:
    tested = One(optimizer)
    late = tested.late(max_norm=1e9)
    for step in range(3):
        tested.backward(step)
        gradients = [each.grad.data_ptr() for each in tested.states.parameters() if each.grad is not None]
        expected = kept_bytes(tested.optimizer)
        late.step()
        kept = late._kept
        assert kept is not None
        assert [each.data_ptr() for each in kept.gradients if each is not None] == gradients
        states = [each for state in kept.state.values() for each in state.values() if isinstance(each, Tensor)]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept.values + states}
        assert sum(storages.values()) == expected
        late.settle()
        assert late._kept is None
    elements = sum(each.numel() for each in tested.states.parameters())
    per_element = {"sgd": 12, "sgd without momentum": 8, "adamw": 16, "fused adamw": 16}[optimizer]  # with an average
    assert 0 <= kept_bytes(tested.optimizer) - per_element * elements <= 4 * 2  # counters of steps


def test_without_clipping_nothing_is_kept() -> None:
    tested = One("adamw")
    late = tested.late(max_norm=None)
    with pytest.raises(RuntimeError, match="no step yet"):
        _ = late.norm
    for step in range(2):
        tested.backward(step)
        norm = tested.states.gradient_norm()
        late.step()
        assert late._kept is None
        assert torch.equal(late.norm, norm)
        assert not late.failed()


def test_a_step_that_is_not_settled_is_not_followed_by_another() -> None:
    tested = One("adamw")
    late = tested.late(max_norm=1.0)
    tested.backward(0)
    late.step()
    tested.backward(1)
    with pytest.raises(RuntimeError, match="no pass has settled"):
        late.step()


def test_optimizers_that_write_into_gradients_are_refused() -> None:
    tested = One("sgd")
    late = LateStep(
        tested.states,
        torch.optim.SGD(tested.states.parameters(), momentum=0.9, nesterov=True, foreach=True),
        head=NOWHERE,
        group=None,
        max_norm=1.0,
    )
    tested.backward(0)
    with pytest.raises(RuntimeError, match="writes into the gradients"):
        late.step()


def test_a_late_sum_of_one_process_is_the_number() -> None:
    number = torch.tensor(3.0, dtype=torch.float64)
    late = LateSum(number, None)
    number.zero_()
    assert late.read() == 3.0


ALL = [(name, ranks) for name in SCHEDULES for ranks in (2, 4, 8)]


def programs_of(name: str, ranks: int) -> tuple[Program, ...]:
    layout, _, timetable = make_schedule(name, ranks, 2 * ranks, UNIT)
    return lower(timetable, layout, gathers=Gathers(1, 1))


def moved(step: Step, kind: str) -> tuple[str, int, int, int]:
    """The message of a step, one of `kind` (SEND or RECV)."""
    ends = (step.stage, step.peer) if kind == "SEND" else (step.peer, step.stage)
    return step.kind[-1], *ends, step.micro_batch


def messages(steps: Program, kind: str) -> list[tuple[str, int, int, int]]:
    return [moved(step, kind) for step in steps if step.kind.startswith(kind)]


@pytest.mark.parametrize(("name", "ranks"), ALL)
def test_heads_are_the_longest_without_backward_that_receive_only_what_heads_send(name: str, ranks: int) -> None:
    programs = programs_of(name, ranks)
    found = heads(programs)
    begun = [program[: head.steps] for program, head in zip(programs, found, strict=True)]
    sent = {message for steps in begun for message in messages(steps, "SEND")}
    for program, head, steps in zip(programs, found, begun, strict=True):
        assert {step.kind for step in steps} <= {"F", "SEND_F", "RECV_F", "GATHER", "RELEASE"}
        received = messages(steps, "RECV")
        assert set(received) <= sent
        behind = program[head.steps]
        assert behind.kind in ("I", "B") or moved(behind, "RECV") not in sent
        assert [moved(step, "RECV") for step in head.under_way if isinstance(step, Step)] == [
            message for message in messages(program[head.steps :], "RECV") if message in sent
        ]


@pytest.mark.parametrize(("name", "ranks"), ALL)
def test_what_follows_a_head_needs_a_step_of_every_rank(name: str, ranks: int) -> None:
    """So whoever waits there for all ranks to end the step before waits no longer than it would anyway."""
    programs = programs_of(name, ranks)
    sends = {
        moved(step, "SEND"): (rank, at)
        for rank, program in enumerate(programs)
        for at, step in enumerate(program)
        if step.kind.startswith("SEND")
    }
    for rank, head in enumerate(heads(programs)):
        reached = [-1] * ranks
        todo = [(rank, head.steps)]
        while todo:
            at_rank, at = todo.pop()
            for index in range(reached[at_rank] + 1, at + 1):
                step = programs[at_rank][index]
                if step.kind.startswith("RECV"):
                    todo.append(sends[moved(step, "RECV")])
            reached[at_rank] = max(reached[at_rank], at)
        assert min(reached) >= 0


def test_messages_are_under_way_where_forwards_run_ahead() -> None:
    assert [len(head.under_way) for head in heads(programs_of("zb-h2", 4))] == [0, 1, 1, 0]
    assert [len(head.under_way) for head in heads(programs_of("1f1b", 4))] == [0, 0, 0, 0]


NEVER, SOMETIMES, ALWAYS = 1e9, 0.2, 1e-4
SLOW_S = 0.8


def case(name: str, ranks: int, copies: tuple[int, ...], clip: float, optimizer: str, **changes: Any) -> dict[str, Any]:
    """A run as `late_worker.py` takes it."""
    layout, _, timetable = make_schedule(name, ranks, 2 * ranks, UNIT)
    words = [name, str((ranks, *copies)), f"clip {clip}", optimizer]
    words += [f"{key} {each}" for key, each in changes.items()]
    return {
        "name": " ".join(words),
        "sizes": [ranks, *copies],
        "chunks": layout.chunks,
        "placement": layout.placement,
        "timetable": timetable,
        "micro_batches": 2 * ranks,
        "features": (),
        "clip": clip,
        "optimizer": optimizer,
        "degrees": (1, 1, 1),
    } | changes


RIGHT = case("zb-h2", 4, (), SOMETIMES, "adamw")
FAULTY = RIGHT | {"name": "under way", "fault": "under way"}
RUNS = [
    case("zb-h2", 4, (), NEVER, "adamw", slow_s=SLOW_S),
    case("zb-h2", 4, (), ALWAYS, "sgd", features=["dropout", "skips", "tied"]),
    RIGHT,
    case("zb-v", 4, (), SOMETIMES, "sgd", features=["tied", "checkpointing", "dropout"]),
    case("1f1b", 4, (), SOMETIMES, "adamw"),
    case("hanayo", 4, (), SOMETIMES, "adamw"),
    case("zb-h2", 2, (2,), SOMETIMES, "adamw", degrees=(1, 1, 2)),
    case("zb-v", 2, (2,), ALWAYS, "adamw", degrees=(1, 2, 2), reduce_every=1, features=["tied"]),
    case("zb-v", 2, (2,), SOMETIMES, "adamw", degrees=(2, 2, 2), gathers=(1, 1)),
    case("zb-h2", 2, (2,), ALWAYS, "sgd", degrees=(2, 2, 2), gathers=(1, 1), features=["tied"]),
    case("1f1b", 2, (2,), SOMETIMES, "adamw", degrees=(2, 2, 2), gathers=(2, 0), dtype="bfloat16"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found, by the name of the run."""
    folder = tmp_path_factory.mktemp("late")
    return results_of([(4, [*RUNS, FAULTY])], folder, "pipeline_model", "late_worker")[0]


SAME = ("parameters", "states", "losses", "norms", "evaluated")


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_late_steps_equal_those_that_wait_to_the_bit(results: list[dict[str, Any]], run: dict[str, Any]) -> None:
    for found in results:
        waiting, late = found[run["name"]]["waiting"], found[run["name"]]["late"]
        assert all(waiting[key] == late[key] for key in SAME)
        assert len(waiting["norms"]) == 5
        clipped = [run["clip"] / (norm + 1e-6) < 1.0 for norm in waiting["norms"]]
        assert clipped == {NEVER: [False] * 5, ALWAYS: [True] * 5}.get(run["clip"], [True, True, False, True, False])
        assert late["redone"] == sum(now and not before for before, now in pairwise([False, *clipped]))


@pytest.mark.processes
@pytest.mark.slow
def test_nobody_waits_for_the_last_rank_between_steps(results: list[dict[str, Any]]) -> None:
    name = RUNS[0]["name"]
    first, last = ({way: each["times"] for way, each in results[rank][name].items()} for rank in (0, 3))
    assert first["late"]["F of 1"] < last["late"]["awake"]
    assert first["waiting"]["F of 1"] > last["waiting"]["awake"]


@pytest.mark.processes
@pytest.mark.slow
def test_messages_under_way_must_be_dropped(results: list[dict[str, Any]]) -> None:
    assert any("imed out" in found[FAULTY["name"]]["error"] for found in results)
    wrong, right = results[3][FAULTY["name"]]["losses"], results[3][RIGHT["name"]]["late"]["losses"]
    assert wrong[0] == right[0]
    assert wrong[1] != right[1]
