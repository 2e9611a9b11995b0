"""One of several processes that train a pipeline twice over, with steps that wait for the norm and with late ones.

Started with the path of a JSON list of runs as those of `pipeline_worker.py`, of which each has `degrees`, and besides
`optimizer`, `clip`, and optionally `slow_s`, for which the last rank sleeps before its last action of the first step.
Writes LIST-RANK.json beside that file: of each run what was found when `waiting` and when `late`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pipeline_model import BATCH, LENGTH, WIDTH, batches, dropout_seed, loss_of, parameters_of
from pipeline_worker import CPU, At, Setting, mesh_of
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright.backends.pytorch.runtime.deferred import WeightQueue, defer_weight_gradients
from shardwright.backends.pytorch.runtime.late import Head, LateStep, heads
from shardwright.backends.pytorch.runtime.messages import Wire
from shardwright.backends.pytorch.runtime.pipeline import Pipeline, Step, Tie
from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates
from shardwright.planner.schedules.lowering import Gathers, Program, lower
from shardwright.planner.schedules.timetable import Action

LONGEST_S, IMPATIENT_S = 90, 4
SHARES = (1.0, 1.0, 0.01, 1.0, 0.01)
"""What the loss of each step is multiplied with, so that some gradients are small."""
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9, foreach=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
}


class Training:
    """One run in this process, under one way to step."""

    def __init__(
        self, run: dict[str, Any], mesh: DeviceMesh, group: dist.ProcessGroup, pairs: dist.ProcessGroup | None
    ) -> None:
        self.run, self.mesh, self.at, self.times = run, mesh, At(), dict[str, float]()
        self.setting = setting = Setting(run, mesh)
        self.programs, queue = self._programs(), WeightQueue()
        for module in setting.stages.values():
            defer_weight_gradients(module, queue)
        self.states, units = self._states()
        self.optimizer = OPTIMIZERS[run["optimizer"]](self.states.parameter_groups([{}]))
        tied = setting.tied is not None and setting.apart
        assert pairs is not None or not tied
        self.pipeline = Pipeline(
            self.programs[setting.rank],
            setting.stages,
            ranks=[setting.layout.place(stage)[0] for stage in range(setting.layout.stages)],
            wires={edge: [Wire((BATCH, LENGTH, WIDTH), self.states.dtype)] for edge in setting.edges},
            loss=lambda output, batch: loss_of(output, batch, self.at.share),
            queue=queue,
            states=self.states,
            units=units,
            group=group,
            device=CPU,
            ties=[Tie(self.states.parameters(0), pairs)] if tied and pairs is not None else [],
            seed=lambda stage, number: dropout_seed(self.at.step, setting.copy, stage, number),
            observe=self._observe,
        )
        self.losses: list[float] = []
        self.norms: list[float] = []

    def _programs(self) -> tuple[Program, ...]:
        run, setting = self.run, self.setting
        timetable = tuple(tuple(Action(*action) for action in actions) for actions in run["timetable"])
        gathers = Gathers(*run["gathers"]) if "gathers" in run else None
        return lower(
            timetable, setting.layout, edges=setting.edges, reduce_every=run.get("reduce_every"), gathers=gathers
        )

    def _states(self) -> tuple[ShardedStates, dict[int, list[int]]]:
        """The states, and the units of each stage."""
        setting, (p, g, o) = self.setting, self.run["degrees"]
        levels = Levels(
            self.mesh[setting.axes] if setting.axes else None, parameters=p, gradients=g, optimizer_states=o
        )
        states = ShardedStates(levels, getattr(torch, self.run.get("dtype", "float32")), kind_of=lambda _: 0)
        tied = setting.tied
        alone = [] if tied is None else [states.take([tied], copy=tied is setting.copied)]
        units = {}
        for stage, module in setting.stages.items():
            has = any(each is tied for each in module.parameters())
            units[stage] = [states.take(module.parameters()), *(alone if has else [])]
        return states, units

    def _observe(self, step: Step) -> None:
        self.times.setdefault(f"{step[0]} of {self.at.step}", time.monotonic())
        # What follows on the last rank is a W and its reduction.
        is_last = self.setting.rank == self.setting.layout.ranks - 1
        if is_last and self.at.step == 0 and "slow_s" in self.run and step == self.programs[-1][-3]:
            time.sleep(self.run["slow_s"])
            self.times["awake"] = time.monotonic()

    def waiting(self) -> dict[str, Any]:
        """The norm is there before the optimizer's step."""
        for _ in self._steps():
            norm = self.states.gradient_norm(self.mesh.get_group("pp"))
            self.norms.append(float(norm))
            nn.utils.clip_grads_with_norm_(self.states.parameters(), self.run["clip"], norm)
            self.optimizer.step()
            self.states.publish()
        return self._found()

    def late(self, group: dist.ProcessGroup) -> dict[str, Any]:
        """It comes later."""
        head = heads(self.programs)[self.setting.rank]
        if self.run.get("fault") == "under way":
            head = Head(head.steps, ())
        late = LateStep(self.states, self.optimizer, head=head, group=group, max_norm=self.run["clip"])
        self.pipeline.late = late
        for _ in self._steps():
            if self.at.step:
                self.norms.append(float(late.norm))
            late.step()
        self.norms.append(float(late.norm))
        return self._found() | {"redone": late.redone, "under_way": len(head.under_way)}

    def _steps(self) -> Iterator[None]:
        """Each when its passes are done."""
        run = self.run
        for self.at.step, share in enumerate(SHARES):
            for group in self.optimizer.param_groups:
                group["lr"] = 0.02 / (self.at.step + 1)
            self.at.share = share / (run["micro_batches"] * self.setting.copies)
            loss = self.pipeline.step(batches(self.at.step, self.setting.copy, run["micro_batches"]))
            self.losses.append(0.0 if loss is None else float(loss))
            yield

    def _found(self) -> dict[str, Any]:
        evaluated = self.pipeline.evaluate(batches(99, 0, 2))
        with self.states.gathered():
            values = {name: each.flatten().tolist() for name, each in parameters_of(self.setting.stages).items()}
        states = [state for _, state in sorted(self.optimizer.state_dict()["state"].items())]
        return {
            "parameters": values,
            "states": [{key: each.tolist() for key, each in state.items()} for state in states],
            "losses": self.losses,
            "norms": self.norms,
            "evaluated": None if evaluated is None else float(evaluated),
            "times": self.times,
        }


def faulty(training: Training, group: dist.ProcessGroup) -> dict[str, Any]:
    """How far it comes."""
    error = ""
    try:
        training.late(group)
    except RuntimeError as caught:
        error = str(caught)
    return {"error": error, "losses": training.losses}


def main() -> None:
    listed = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results, apart = dict[str, Any](), dist.new_group()
    impatient = [dist.new_group(timeout=timedelta(seconds=IMPATIENT_S)) for _ in range(2)]
    for run in json.loads(listed.read_text()):
        mesh, pairs = mesh_of(tuple(run["sizes"]))
        if "fault" in run:
            results[run["name"]] = faulty(Training(run, mesh, impatient[0], pairs), impatient[1])
            continue
        waiting = Training(run, mesh, mesh.get_group("pp"), pairs).waiting()
        late = Training(run, mesh, mesh.get_group("pp"), pairs).late(apart)
        results[run["name"]] = {"waiting": waiting, "late": late}
    listed.with_name(f"{listed.stem}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
