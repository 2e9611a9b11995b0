"""Drawing of a job as it was understood: every key with its value, and which of them are defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group

from shardwright.report.layout import Column, Footnotes, Grid, Row, facts, heading, page, plural
from shardwright.report.plan import cluster_line, device_limit
from shardwright.schemas.checks import OPTIMIZER_NUMBERS
from shardwright.schemas.job import JobSpec
from shardwright.schemas.units import human_bytes, human_count

_ORIGINS: Any = {"cluster": {"sources": True, "device": {"source"}, "levels": {"__all__": {"source"}}}}
"""Keys of a job that say where others come from."""


def job_facts(job: JobSpec) -> dict[str, int]:
    """What follows from a job before any plan is made; tokens are those of the whole run."""
    train = job.train
    tokens_per_step = train.global_batch_sequences * train.sequence_length
    return {
        "world_size": job.cluster.world_size,
        "global_batch_sequences": train.global_batch_sequences,
        "tokens_per_step": tokens_per_step,
        "total_steps": train.total_steps,
        "total_tokens": train.total_steps * tokens_per_step,
        "device_memory_limit_bytes": device_limit(job),
        "host_memory_limit_bytes": job.host_memory_limit,
    }


def draw_job(job: JobSpec, defaults: Sequence[str]) -> Group:
    """Headline numbers, then each key that has a value, with `default` beside what nobody wrote."""
    known = job_facts(job)
    summary = facts(
        (
            ("cluster", cluster_line(job.cluster)),
            ("world size", plural(known["world_size"], "process", "processes")),
            (
                "global batch",
                f"{plural(known['global_batch_sequences'], 'sequence')} of {job.train.sequence_length}"
                f" tokens = {human_count(known['tokens_per_step'])} tokens",
            ),
            ("run", f"{plural(known['total_steps'], 'step')}, {human_count(known['total_tokens'])} tokens"),
            ("device memory", f"{human_bytes(known['device_memory_limit_bytes'])} may be reserved on each"),
            ("host memory", f"{human_bytes(known['host_memory_limit_bytes'])} a node"),
        )
    )
    notes, written = Footnotes(), set(defaults)
    rows = []
    for key, value in leaves(job.model_dump(mode="json", exclude=_ORIGINS)):
        origin = _origin(key, job, written, notes)
        if not _meaningless(key, job):
            rows.append(Row((key, value, origin), "dim" if origin else ""))
    keys = Grid((Column("key"), Column("value", "prose"), Column("from")), rows)
    return page(summary, Group(heading("Understood as", "no origin: it stands in the job"), keys), notes.drawn())


def _origin(key: str, job: JobSpec, defaults: set[str], notes: Footnotes) -> str:
    """`default`, or where a number of the cluster comes from; empty for what the person wrote."""
    parts = key.split(".")
    if any(".".join(parts[:end]) in defaults for end in range(1, len(parts) + 1)):
        return "default"
    kind, _, said = job.cluster.sources.get(key.removeprefix("cluster."), "").partition(": ")
    return kind + notes.mark(said)


def _meaningless(key: str, job: JobSpec) -> bool:
    """Whether a key holds a number of another optimizer than the chosen one."""
    mine = OPTIMIZER_NUMBERS[job.train.optimizer.name]
    others = {number for numbers in OPTIMIZER_NUMBERS.values() for number in numbers if number not in mine}
    return key.removeprefix("train.optimizer.") in others


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys with their values as `--set` takes them; what has no value is left out. Named items of a list go by
    their names, as `ClusterSpec.sources` calls them, other mappings by their places.
    """
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for place, item in enumerate(value):
                below = {name: one for name, one in item.items() if name != "name"}
                yield from leaves(below, f"{key}.{item.get('name', place)}.")
        elif value not in (None, {}, []):
            yield key, value if isinstance(value, str) else json.dumps(value)
