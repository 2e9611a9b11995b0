"""Bytes at rest and collectives of emitted scripts, counted in four running processes, are exactly the predicted ones.

One launch for every layout, and every rank is compared. The model's sizes divide by nothing: shards are uneven, the
last ones of small parameters empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from shardwright.backends.emission import Emission, write
from shardwright.backends.pytorch import emit
from shardwright.passes import profile_model
from shardwright.planner import DDP_BUCKET_CAP_MIB, at_rest_bytes, evaluate, make_plan, step_collectives
from shardwright.planner.at_rest import State
from shardwright.planner.groups import Groups
from shardwright.planner.space import point_of
from shardwright.rehearse.compare import Outcome
from shardwright.rehearse.compare_layout import Processes, compare_at_rest, compare_collectives
from shardwright.rehearse.launch import Failure, Launch, run
from shardwright.schemas.plan import Collective, Decision, Plan
from shardwright.schemas.profile import ModelProfile
from shardwright.schemas.source import load_job

pytestmark = [pytest.mark.processes, pytest.mark.slow]

WORLD = 4
STEPS = 3
MODEL = """
import torch
import torch.nn.functional as F
from torch import nn

WIDTH, INNER, VOCABULARY = 9, 22, 37


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gains = nn.Parameter(torch.ones(2))

    def reset_parameters(self):
        nn.init.ones_(self.gains)

    def forward(self, x):
        return x * self.gains.prod()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.scale = Scale()

    def forward(self, x):
        return x + self.scale(self.down(F.gelu(self.up(self.norm(x)))))


class Odd(nn.Module):
    def __init__(self, tied, frozen):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        if frozen:
            self.norm.weight.requires_grad_(False)
            for block in self.blocks:
                block.up.weight.requires_grad_(False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(tied=False, frozen=False):
    return Odd(tied, frozen)
"""
JOB = """
model: {factory: odd:build}
data: {synthetic: {vocabulary: 37}}
train:
  sequence_length: 7
  global_batch: 12
  steps: 3
  optimizer: {name: adamw, lr: 1e-3, clip_grad_norm: 1.0}
cluster: {devices: 4 x cpu}
"""
SGD = "train.optimizer={name: sgd, lr: 0.01, momentum: 0.0, weight_decay: 0.01}"
MOMENTUM = "train.optimizer={name: sgd, lr: 0.01, momentum: 0.9, clip_grad_norm: 1.0}"
TIED = "model.args={tied: true}"
FROZEN = "model.args={frozen: true}"
GROUPS = "train.optimizer.groups=[{match: '*.down.*', lr_scale: 0.5, weight_decay: 0.0}]"
AVERAGE = "train.ema=0.9"
LOSSY = "quality=lossy"
MODULES = "model.init=modules"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One plan: what differs from `JOB`, then what a person edits in the decision."""

    overrides: tuple[str, ...]
    edited: dict[str, Any] | None = None
    bucket_cap_bytes: int | None = None


def ddp(*job: str, accumulation: int, blocks: int = 0, bucket_cap_bytes: int | None = None) -> Layout:
    pins = _pins(engine="ddp", precision="fp32", micro_batch=3 // accumulation, checkpointing=blocks or "none")
    return Layout(overrides=(*pins, *job), bucket_cap_bytes=bucket_cap_bytes)


def fsdp2(
    shard: int,
    precision: str,
    *job: str,
    accumulation: int,
    kept: bool = False,
    whole: bool = False,
    blocks: int = 0,
    edited: dict[str, Any] | None = None,
) -> Layout:
    """`whole`: gradients accumulate whole; `kept`: parameters stay gathered."""
    pins = _pins(
        engine="fsdp2",
        precision=precision,
        micro_batch=3 // accumulation,
        checkpointing=blocks or "none",
        reshard_after_forward=str(not kept).lower(),
    )
    states = _pins(**{"states.parameters": shard, "states.gradients": 1 if whole else shard})
    return Layout(overrides=(*pins, *states, *job), edited=edited)


def amsp(degrees: tuple[int, int, int], precision: str, *job: str, second: int | None = None, **pins: Any) -> Layout:
    """`degrees`: of parameters, gradients and optimizer states; three micro-batches a step."""
    names = ("states.parameters", "states.gradients", "states.optimizer_states", "states.secondary")
    states = dict(zip(names, (*degrees, second or "none"), strict=True))
    strategy = {"checkpointing": "none", "reshard_after_forward": "true", **states, **pins}
    return Layout(overrides=(*_pins(engine="amsp", pp=1, precision=precision, micro_batch=1, **strategy), *job))


def _pins(**strategy: Any) -> list[str]:
    return [f"strategy.{key}={value}" for key, value in strategy.items()]


BF16 = "bf16_mixed"
LAYOUTS = {
    "ddp": ddp(accumulation=1),
    "ddp, accumulation, momentum": ddp(MOMENTUM, accumulation=3),
    "ddp, checkpointed, tied, sgd": ddp(SGD, TIED, accumulation=1, blocks=2),
    "ddp, several buckets": ddp(accumulation=1, blocks=2, bucket_cap_bytes=1024),
    "ddp, several buckets, accumulation": ddp(accumulation=3, bucket_cap_bytes=512),
    "ddp, several buckets, frozen": ddp(FROZEN, accumulation=3, bucket_cap_bytes=2048),
    "freed": fsdp2(4, "fp32", accumulation=1),
    "freed, accumulation": fsdp2(4, BF16, MODULES, accumulation=3),
    "freed, whole gradients": fsdp2(4, BF16, accumulation=3, whole=True),
    "kept": fsdp2(4, "fp32", MOMENTUM, accumulation=1, kept=True),
    "kept, accumulation, momentum": fsdp2(4, BF16, MOMENTUM, accumulation=3, kept=True),
    "kept, whole gradients, fp32": fsdp2(4, "fp32", SGD, accumulation=3, kept=True, whole=True),
    "some blocks checkpointed": fsdp2(4, BF16, accumulation=3, blocks=2),
    "kept, some blocks checkpointed, tied": fsdp2(4, "fp32", TIED, accumulation=3, kept=True, blocks=1),
    "frozen, whole gradients": fsdp2(4, BF16, FROZEN, accumulation=3, whole=True),
    "hsdp": fsdp2(2, "fp32", accumulation=3),
    "hsdp, kept": fsdp2(2, "fp32", MODULES, accumulation=3, kept=True),
    "hsdp, whole gradients": fsdp2(2, "fp32", MOMENTUM, accumulation=3, whole=True),
    "hsdp, kept, whole gradients": fsdp2(2, "fp32", accumulation=3, kept=True, whole=True),
    "hsdp in bf16": fsdp2(2, BF16, accumulation=1, blocks=1),
    "hsdp in bf16, accumulation, sgd": fsdp2(2, BF16, SGD, accumulation=3),
    "replicated in bf16": fsdp2(1, BF16, accumulation=1),
    "replicated in bf16, kept, accumulation, tied": fsdp2(1, BF16, TIED, accumulation=3, kept=True),
    "second copy": Layout(overrides=(*fsdp2(4, BF16, accumulation=3).overrides, "strategy.states.secondary=2")),
    "amsp 1 4 4": amsp((1, 4, 4), "fp32", FROZEN),
    "amsp 1 1 4 in bf16, groups": amsp((1, 1, 4), BF16, GROUPS, AVERAGE),
    "amsp 2 1 4, kept, checkpointed, tied": amsp(
        (2, 1, 4), "fp32", TIED, reshard_after_forward="false", checkpointing=2
    ),
    "amsp 2 2 2 in bf16, frozen, momentum": amsp((2, 2, 2), BF16, FROZEN, MOMENTUM, MODULES),
    "amsp 4 2 4 in bf16, second copy": amsp((4, 2, 4), BF16, MODULES, second=2),
    "amsp 4 4 4 in fewer bits": amsp(
        *((4, 4, 4), "fp32", LOSSY), second=2, int8_gathers="node", int4_reductions="node"
    ),
    "edited by hand": fsdp2(
        *(4, BF16),
        accumulation=3,
        edited={"micro_batch": 3, "accumulation": 1, "checkpointing": {"policy": "full", "blocks": 3, "of": 3}},
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """A layout's plan, what it predicts for every process, and what each of them counted."""

    plan: Plan
    at_rest: list[dict[State, int]]
    collectives: tuple[Collective, ...]
    findings: list[dict[str, Any]]

    def wrong(self, collectives: Sequence[Collective]) -> list[str]:
        """Where the bytes at rest are not the predicted ones, or the calls not `collectives`."""
        who = Processes(self.plan.decision.mesh)
        at_rest = compare_at_rest("", who, self.at_rest, [rank["at_rest"] for rank in self.findings])
        calls = compare_collectives("", who, [collectives] * WORLD, self.findings)
        return [
            f"{check.name}: {check.expected}; found {check.found}" for check in (*at_rest, *calls) if not check.passed
        ]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counted]:
    """Every layout, planned, emitted, and run by four processes."""
    folder = tmp_path_factory.mktemp("counts")
    (folder / "odd.py").write_text(MODEL)
    (folder / "job.yaml").write_text(JOB)
    profiles: dict[str, ModelProfile] = {}
    plans, launches = {}, []
    for index, (name, layout) in enumerate(LAYOUTS.items()):
        loaded = load_job(folder / "job.yaml", layout.overrides)
        model = loaded.job.model.model_dump_json()
        profile = profiles.get(model) or profile_model(loaded.job, folder, ("fp32", "bf16"))
        plan = make_plan(loaded.job, profile, job_file="job.yaml", defaults=loaded.defaults)
        assert isinstance(plan, Plan), name
        if layout.edited:
            decision = Decision.model_validate(plan.decision.model_dump() | layout.edited)
            plan = evaluate(plan.model_copy(update={"decision": decision}), profile)
        profiles[model], plans[name] = profile, (plan, profile)
        out = folder / str(index)
        write(with_bucket_cap(emit(plan, folder, out), layout.bucket_cap_bytes), out)
        launches.append(Launch(folder=str(out), processes=WORLD, steps=STEPS))
    outcomes = list(run(launches, profiles[model].packages, folder))
    assert not [outcome for outcome in outcomes if isinstance(outcome, Failure)], outcomes[-1]
    return {
        name: expect(*plans[name], LAYOUTS[name].bucket_cap_bytes, Outcome(Path(launch.folder), WORLD).findings())
        for name, launch in zip(LAYOUTS, launches, strict=True)
    }


def with_bucket_cap(emission: Emission, cap_bytes: int | None) -> Emission:
    """The emitted script with smaller buckets: tens of megabytes of gradients would take long to train."""
    if cap_bytes is None:
        return emission
    constant = f"BUCKET_MIB = {DDP_BUCKET_CAP_MIB} "
    script = emission.files["train.py"]
    assert script.count(constant) == 1
    script = script.replace(constant, f"BUCKET_MIB = {cap_bytes / 2**20} ")
    return Emission(dict(emission.files) | {"train.py": script}, emission.executable)


def expect(plan: Plan, profile: ModelProfile, cap_bytes: int | None, findings: list[dict[str, Any]]) -> Counted:
    collectives = plan.prediction.collectives
    if cap_bytes is not None:
        collectives = step_collectives(point_of(plan.decision), Groups(profile), cap_bytes)
        assert len(collectives) > len(plan.prediction.collectives)
    at_rest = [at_rest_bytes(plan.decision, Groups(profile), plan.job.train, rank) for rank in range(WORLD)]
    return Counted(plan=plan, at_rest=at_rest, collectives=collectives, findings=findings)


def changed(found: Counted, index: int, **change: int) -> list[Collective]:
    """The predicted collectives with one of them changed."""
    collectives = list(found.collectives)
    collectives[index] = collectives[index].model_copy(update=change)
    return collectives


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_process_counts_what_is_predicted(counted: dict[str, Counted], name: str) -> None:
    assert counted[name].wrong(counted[name].collectives) == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_wrong_count_or_size_would_be_found(counted: dict[str, Counted], name: str) -> None:
    found = counted[name]
    for index, call in enumerate(found.collectives):
        wrong = [
            changed(found, index, count=call.count - 1),
            changed(found, index, count=call.count + 1),
            changed(found, index, bytes=call.bytes + 4),
            [*found.collectives[:index], *found.collectives[index + 1 :]],
        ]
        for collectives in wrong:
            assert found.wrong(collectives), call


@pytest.mark.parametrize("state", ["parameters", "gradients", "optimizer_states"])
@pytest.mark.parametrize("rank", range(WORLD))
def test_one_wrong_byte_on_one_process_would_be_found(counted: dict[str, Counted], state: State, rank: int) -> None:
    found = counted["freed"]
    at_rest = [dict(each) for each in found.at_rest]
    at_rest[rank][state] += 1
    (wrong,) = replace(found, at_rest=at_rest).wrong(found.collectives)
    assert wrong.startswith(f"{state.replace('_', ' ')} at rest")


def test_shards_are_uneven(counted: dict[str, Counted]) -> None:
    """Else padding would not show."""
    for name in ("freed", "hsdp"):
        assert len({rank["optimizer_states"] for rank in counted[name].at_rest}) > 1
