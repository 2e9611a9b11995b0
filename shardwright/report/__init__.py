"""Draws jobs, profiles, plans and errors as rich renderables. Pure: nothing here prints."""

from shardwright.report.devices import draw_devices
from shardwright.report.diagnostics import diagnostic_fields, draw_diagnostic, draw_input_error
from shardwright.report.emission import draw_emission
from shardwright.report.html import profile_html
from shardwright.report.job import draw_job, job_facts
from shardwright.report.operators import draw_operators
from shardwright.report.plan import draw_inspection, draw_plan, draw_summary
from shardwright.report.profile import draw_profile
from shardwright.report.rehearsal import draw_rehearsal, rehearsal_fields
from shardwright.report.schedule import draw_misfit, draw_schedule, draw_stop, misfit_fields, schedule_fields
from shardwright.report.schedule_svg import schedule_svg
from shardwright.report.schedule_trace import schedule_trace
from shardwright.report.search import draw_infeasible, draw_why, why_fields
from shardwright.report.stages import schedule_of
from shardwright.report.svg import profile_svg

__all__ = [
    "diagnostic_fields",
    "draw_devices",
    "draw_diagnostic",
    "draw_emission",
    "draw_infeasible",
    "draw_input_error",
    "draw_inspection",
    "draw_job",
    "draw_misfit",
    "draw_operators",
    "draw_plan",
    "draw_profile",
    "draw_rehearsal",
    "draw_schedule",
    "draw_stop",
    "draw_summary",
    "draw_why",
    "job_facts",
    "misfit_fields",
    "profile_html",
    "profile_svg",
    "rehearsal_fields",
    "schedule_fields",
    "schedule_of",
    "schedule_svg",
    "schedule_trace",
    "why_fields",
]
