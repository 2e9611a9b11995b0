"""The planner: which point of the space trains a profiled model fastest within the budget, and why.

It needs no torch: everything that it knows of a model stands in the profile.
"""

from shardwright.planner.at_rest import at_rest_bytes
from shardwright.planner.collectives import ddp_buckets, step_collectives
from shardwright.planner.engines import DDP_BUCKET_CAP_MIB, ENGINES, EngineName, EngineTraits
from shardwright.planner.lr_schedules import LR_SCHEDULES
from shardwright.planner.optimizers import OPTIMIZERS, OptimizerTraits
from shardwright.planner.plans import evaluate, make_plan
from shardwright.planner.precisions import PRECISIONS, PrecisionTraits, needed_dtypes

__all__ = [
    "DDP_BUCKET_CAP_MIB",
    "ENGINES",
    "LR_SCHEDULES",
    "OPTIMIZERS",
    "PRECISIONS",
    "EngineName",
    "EngineTraits",
    "OptimizerTraits",
    "PrecisionTraits",
    "at_rest_bytes",
    "ddp_buckets",
    "evaluate",
    "make_plan",
    "needed_dtypes",
    "step_collectives",
]
