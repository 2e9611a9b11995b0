"""The values that cross files, and how they are read: jobs, clusters, plans, and what is said of errors."""

from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.editor_schema import job_schema, plan_schema
from shardwright.schemas.source import LoadedJob, LoadedPlan, load_job, load_plan

__all__ = ["Diagnostic", "InputError", "LoadedJob", "LoadedPlan", "job_schema", "load_job", "load_plan", "plan_schema"]
