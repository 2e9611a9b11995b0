"""Models on layouts, with what the planner predicts of their memory and what the tracker counts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shardwright.backends.emission import write
from shardwright.backends.pytorch import emit
from shardwright.passes import profile_model
from shardwright.planner.plans import evaluate, make_plan
from shardwright.planner.precisions import Precision, needed_dtypes
from shardwright.planner.space import decide, point_of
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import MemoryPhase, Plan
from support.oracle import Tracked, track
from support.oracle_flat import track_flat
from support.oracle_model import VOCABULARY

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "configs"
OWN_MODELS = {"frozen": False, "frozen, tied": True}
"""Models of oracle_model.py, and whether embedding and head are tied."""
ACTIVATIONS = ("saved_activations", "activation_temporaries", "head_and_loss")
"""What the tracker cannot tell apart: the planner's categories that it counts as activations or as temporary."""
MOVING = ("gradients", "communication_buffers")
"""What it cannot tell from them either where no FSDP module says so."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a layout."""

    model: str
    """Of examples/configs, or of OWN_MODELS."""
    layers: int
    checkpointed: str | int
    """`none`, `full`, or how many blocks."""
    world: int = 8
    shard: int = 0
    """Devices that a copy of the states is spread over; 0 for all."""
    sequence: int = 8192
    micro_batch: int = 1
    accumulation: int = 1
    gradients: int | None = None
    """amsp: devices that gradients are spread over while they accumulate. With it the case is one of amsp, else of
    fsdp2."""
    optimizer_states: int = 0
    """amsp: devices that optimizer states are spread over; 0 for all."""
    axes: tuple[int, ...] = ()
    """amsp: the mesh's axes, fastest first, where they are not those between the degrees."""
    int8: tuple[int, ...] = ()
    """amsp: axes, counted from the fastest, over which parameters travel as int8."""
    int4: tuple[int, ...] = ()
    """amsp: axes over which gradients travel as int4."""
    precision: Precision = "bf16_mixed"
    second: int | None = None
    """Devices that the second copy of a block's parameters is spread over."""
    kept: bool = False
    """Whether gathered parameters stay until backward."""
    whole_gradients: bool = False
    """Whether gradients wait whole for the last micro-batch."""

    @property
    def name(self) -> str:
        """Of a row."""
        degree = f"{self.shard} x {self.world // self.shard}" if self.shard else str(self.world)
        if self.gradients is not None:
            degree = (
                f"{self.shard or self.world} {self.gradients} {self.optimizer_states or self.world} of {self.world}"
            )
        details = [f"{self.layers} layers", f"checkpointed {self.checkpointed}", f"shards {degree}"]
        details += [f"axes {' '.join(map(str, self.axes))}"] * bool(self.axes) + ["fp32"] * (self.precision == "fp32")
        details += [f"int8 {self.int8}"] * bool(self.int8) + [f"int4 {self.int4}"] * bool(self.int4)
        details += [f"{self.micro_batch} x {self.sequence}"]
        details += [f"{self.accumulation} micro-batches"] * (self.accumulation > 1)
        details += [f"second copy {self.second}"] * (self.second is not None)
        details += ["kept"] * self.kept + ["whole gradients"] * self.whole_gradients
        return f"{self.model}, {', '.join(details)}"

    def job(self) -> JobSpec:
        """The job, with a strategy that leaves one plan."""
        model, vocabulary = self._model()
        degree = self.shard or self.world
        own = self.gradients is not None
        gradients = self.gradients if own else 1 if self.whole_gradients else degree
        states = {
            "parameters": degree,
            "optimizer_states": (self.optimizer_states or self.world) if own else degree,
            "gradients": gradients,
            "secondary": self.second or "none",
        }
        return JobSpec.model_validate(
            {
                "model": model,
                "data": {"synthetic": {"vocabulary": vocabulary}},
                "train": {
                    "sequence_length": self.sequence,
                    "global_batch": self.micro_batch * self.accumulation * self.world,
                    "steps": 10,
                    "optimizer": {"name": "adamw", "lr": 1e-4, "clip_grad_norm": 1.0},
                },
                "cluster": _cluster(self.world),
                "quality": "lossy" if self.int8 or self.int4 else "standard",
                "strategy": {
                    "tp": 1,
                    "cp": 1,
                    "ep": 1,
                    "engine": "amsp" if own else "fsdp2",
                    "precision": self.precision,
                    "micro_batch": self.micro_batch,
                    "checkpointing": self.checkpointed,
                    "reshard_after_forward": not self.kept,
                    "states": states,
                },
            }
        )

    def _model(self) -> tuple[dict[str, Any], int]:
        """The job's model, and its vocabulary."""
        if self.model in OWN_MODELS:
            args = {"width": 1024, "layers": self.layers, "tied": OWN_MODELS[self.model]}
            return {"factory": "oracle_model:build", "args": args, "init": "modules"}, VOCABULARY
        config: dict[str, Any] = json.loads((CONFIGS / f"{self.model}.json").read_text(encoding="utf-8"))
        config["n_layer" if "n_layer" in config else "num_hidden_layers"] = self.layers
        return {"hf": config}, config["vocab_size"]


@dataclass(frozen=True)
class Compared:
    """One phase: bytes by category, activations summed up."""

    predicted: Counter[str]
    tracked: Counter[str]

    @property
    def difference(self) -> float:
        """Of the totals, relative to the tracked one."""
        return self.predicted.total() / self.tracked.total() - 1

    def differences(self) -> dict[str, int]:
        """Predicted less tracked bytes of every category that either has."""
        return {name: self.predicted[name] - self.tracked[name] for name in self.predicted | self.tracked}


@dataclass(frozen=True)
class Comparison:
    """One case: the phases that are both predicted and tracked, by name, in the order of a step."""

    plan: Plan
    phases: dict[str, Compared]
    unpredicted: dict[str, int]
    """Tracked bytes of the phases that the planner leaves out."""

    @property
    def peak(self) -> str:
        """The phase in which the tracker sees the most."""
        return max(self.phases, key=lambda name: self.phases[name].tracked.total())

    @property
    def predicted_peak(self) -> str:
        """The phase in which the planner expects the most."""
        return max(self.phases, key=lambda name: self.phases[name].predicted.total())

    @property
    def difference(self) -> float:
        """Of the peaks, relative to the tracked one."""
        predicted, tracked = self.phases[self.predicted_peak].predicted, self.phases[self.peak].tracked
        return predicted.total() / tracked.total() - 1


def compare(case: Case) -> Comparison:
    """Plans and emits the case and runs a step of the script under the tracker."""
    job, files = case.job(), Path(__file__).parent if case.model in OWN_MODELS else CONFIGS
    profile = profile_model(job, files, needed_dtypes(job))
    plan = make_plan(job, profile, job_file="job.yaml", defaults=())
    assert isinstance(plan, Plan)
    if case.gradients is not None:
        point = replace(point_of(plan.decision), int8_gathers=case.int8, int4_reductions=case.int4)
        point = replace(point, axes=case.axes or point.axes)
        decision = decide(point, job.cluster, plan.decision.checkpointing.of)
        plan = evaluate(plan.model_copy(update={"decision": decision}), profile)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        write(emit(plan, files, out), out)
        tracked = (track if case.gradients is None else track_flat)(plan, out)
    predicted = {phase.name: phase for phase in plan.prediction.memory.stages[0].phases}
    both = [name for name in predicted if name in tracked]
    merged = ACTIVATIONS if case.gradients is None else (*ACTIVATIONS, *MOVING)
    phases = {name: Compared(_of_plan(predicted[name], merged), _of_tracker(tracked[name])) for name in both}
    return Comparison(plan, phases, {name: each.total for name, each in tracked.items() if name not in predicted})


def _of_plan(phase: MemoryPhase, merged: tuple[str, ...]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, size in phase.bytes.items():
        found["activations" if name in merged else name] += size
    return found


def _of_tracker(phase: Tracked) -> Counter[str]:
    return +Counter(phase.bytes)


def _cluster(world: int) -> ClusterSpec:
    """Nodes of eight devices so large that everything fits."""
    node = min(8, world)
    levels = [{"name": "node", "size": node, "bandwidth": "450GB/s", "latency": "3us"}]
    levels += [{"name": "rail", "size": world // node, "bandwidth": "50GB/s", "latency": "14us"}] * (world > node)
    device = {
        "name": "boundless",
        "kind": "cuda",
        "memory": "4TiB",
        "peak": {"bf16": "989TFLOP/s", "fp32": "67TFLOP/s"},
        "memory_bandwidth": "3350GB/s",
    }
    return ClusterSpec.model_validate({"name": "boundless", "device": device, "levels": levels, "host_memory": "64TiB"})
