"""What a rehearsal found: plain values, drawn by `shardwright.report`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that the rehearsal does otherwise than the plan, because this machine is small."""

    key: str
    """Dotted key of the job or of the decision, for instance `decision.mesh.dp_shard`."""
    before: str
    after: str
    because: str = ""
    """Why, where `before` and `after` do not say it themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One trial of the plan and of the one process that it is compared with."""

    name: str
    """For instance `adamw, bf16`."""
    seconds: float
    """Wall time of both launches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison. All values are text that is ready to be shown, in the units named by `name`."""

    run: str
    """`Run.name`."""
    name: str
    """For instance `loss`, `gradient norm`, `parameters`, `gradients at rest`, `all_gather over dp_shard`."""
    expected: str
    found: str
    tolerance: str
    """`exact`, or the largest difference that passes."""
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsalReport:
    """What was shrunk, what was compared, and whether it held."""

    plan: str
    """Name of the plan that was rehearsed."""
    rehearsed: str
    """Name of the shrunk plan that really ran."""
    processes: int
    steps: int
    shrunk: tuple[Change, ...]
    runs: tuple[Run, ...]
    checks: tuple[Check, ...]
    error: str = ""
    """Why a run ended early, in one sentence; empty when every run ended well."""
    log: tuple[str, ...] = field(default=())
    """The last lines of the log of the process that failed first."""
    kept: str = ""
    """Folder of the scripts, logs and checkpoints of the runs; empty when it was removed."""

    @property
    def passed(self) -> bool:
        """Whether every run ended well and every check holds."""
        return not self.error and bool(self.checks) and all(check.passed for check in self.checks)
