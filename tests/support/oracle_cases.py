"""Models on layouts, with what the planner predicts of their memory and what the tracker counts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shardwright.backends.emission import write
from shardwright.backends.pytorch import emit
from shardwright.passes import profile_model
from shardwright.planner.plans import make_plan
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import MemoryPhase, Plan
from support.oracle import Tracked, track

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "configs"
ACTIVATIONS = ("saved_activations", "activation_temporaries", "head_and_loss")
"""What the tracker cannot tell apart: the planner's categories that it counts as activations or as temporary."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of examples/configs on a layout."""

    model: str
    layers: int
    checkpointed: str | int
    """`none`, `full`, or how many blocks."""
    world: int = 8
    shard: int = 0
    """Devices that a copy of the states is spread over; 0 for all."""
    sequence: int = 8192
    micro_batch: int = 1
    accumulation: int = 1
    kept: bool = False
    """Whether gathered parameters stay until backward."""
    whole_gradients: bool = False
    """Whether gradients wait whole for the last micro-batch."""

    @property
    def name(self) -> str:
        """Of a row."""
        degree = f"{self.shard} x {self.world // self.shard}" if self.shard else str(self.world)
        details = [f"{self.layers} layers", f"checkpointed {self.checkpointed}", f"shards {degree}"]
        details += [f"{self.micro_batch} x {self.sequence}"]
        details += [f"{self.accumulation} micro-batches"] * (self.accumulation > 1)
        details += ["kept"] * self.kept + ["whole gradients"] * self.whole_gradients
        return f"{self.model}, {', '.join(details)}"

    def job(self) -> JobSpec:
        """The job, with a strategy that leaves one plan."""
        config: dict[str, Any] = json.loads((CONFIGS / f"{self.model}.json").read_text(encoding="utf-8"))
        config["n_layer" if "n_layer" in config else "num_hidden_layers"] = self.layers
        degree = self.shard or self.world
        states = {"parameters": degree, "optimizer_states": degree, "gradients": 1 if self.whole_gradients else degree}
        return JobSpec.model_validate(
            {
                "model": {"hf": config},
                "data": {"synthetic": {"vocabulary": config["vocab_size"]}},
                "train": {
                    "sequence_length": self.sequence,
                    "global_batch": self.micro_batch * self.accumulation * self.world,
                    "steps": 10,
                    "optimizer": {"name": "adamw", "lr": 1e-4, "clip_grad_norm": 1.0},
                },
                "cluster": _cluster(self.world),
                "strategy": {
                    "engine": "fsdp2",
                    "precision": "bf16_mixed",
                    "micro_batch": self.micro_batch,
                    "checkpointing": self.checkpointed,
                    "reshard_after_forward": not self.kept,
                    "states": states,
                },
            }
        )


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
    job = case.job()
    plan = make_plan(job, profile_model(job, CONFIGS, ("bf16",)), job_file="job.yaml", defaults=())
    assert isinstance(plan, Plan)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        write(emit(plan, CONFIGS, out), out)
        tracked = track(plan, out)
    predicted = {phase.name: phase for phase in plan.prediction.memory.stages[0].phases}
    both = [name for name in predicted if name in tracked]
    return Comparison(plan, {name: Compared(_of_plan(predicted[name]), _of_tracker(tracked[name])) for name in both})


def _of_plan(phase: MemoryPhase) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, size in phase.bytes.items():
        found["activations" if name in ACTIVATIONS else name] += size
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
