"""What shards the model states at run time, and which points of the space each engine can run, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from shardwright.planner.precisions import Precision

EngineName = Literal["single", "ddp", "fsdp2", "amsp"]

DDP_BUCKET_CAP_MIB = 64
"""`bucket_cap_mb` of DistributedDataParallel. Given explicitly, it holds for every bucket, so that the buckets can be
predicted: without it the first one is smaller (torch 2.13, nn/parallel/distributed.py, `_BucketCapacityConfig`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTraits:
    """What an engine can run, and what is different about it."""

    summary: str
    worlds: tuple[int, int | None]
    """Smallest and largest world size; None is no limit."""
    least_degree: Mapping[Precision, int]
    """The precisions it runs, each with the smallest shard degree that it is used for."""
    shards: bool
    """Whether parameters, gradients and optimizer states can be spread over `dp_shard`."""
    dtensors: bool
    """Whether the optimizer steps on DTensors."""
    flat: bool = False
    """Whether every state has a degree of its own, in flat buckets (planner/flat.py)."""
    run_on: str
    """On which hardware it has been run."""

    def runs(self, *, world: int, degree: int, precision: Precision) -> bool:
        """Whether it can run this world size, shard degree and precision together."""
        least, most = self.worlds
        if world < least or (most is not None and world > most) or (degree > 1 and not self.shards):
            return False
        return precision in self.least_degree and degree >= self.least_degree[precision]


_STOCK = "part of PyTorch, which tests it on GPUs; the scripts have been run here on CPU with gloo"

ENGINES: Mapping[EngineName, EngineTraits] = MappingProxyType(
    {
        "single": EngineTraits(
            summary="one process, nothing sharded",
            worlds=(1, 1),
            least_degree={"fp32": 1},
            shards=False,
            dtensors=False,
            run_on=_STOCK,
        ),
        "ddp": EngineTraits(
            summary="DistributedDataParallel: everything replicated, gradients all-reduced in buckets",
            worlds=(2, None),
            least_degree={"fp32": 1},
            shards=False,
            dtensors=False,
            run_on=_STOCK,
        ),
        # fp32 with everything replicated is left to `single` and `ddp`: fully_shard would copy each parameter that it
        # "gathers" over a group of one (torch 2.13, _fsdp_param_group.py, wait_for_unshard).
        "fsdp2": EngineTraits(
            summary="fully_shard: parameters, gradients and optimizer states sharded along dimension 0",
            worlds=(1, None),
            least_degree={"bf16_mixed": 1, "fp32": 2},
            shards=True,
            dtensors=True,
            run_on=_STOCK,
        ),
        "amsp": EngineTraits(
            summary="ShardedStates: parameters, gradients and optimizer states sharded independently in flat buckets",
            worlds=(2, None),
            least_degree={"bf16_mixed": 1, "fp32": 1},
            shards=True,
            dtensors=False,
            flat=True,
            run_on="run here on CPU with gloo; not yet on a GPU",
        ),
    }
)
