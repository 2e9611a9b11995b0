"""`shardwright rehearse`: proves a plan on this machine's CPU.

The plan is shrunk until a few CPU processes can run it, compiled like any other, run for a few steps, and compared with
one process on the same global batches: losses, gradient norms, parameters, bytes at rest and collectives.
"""

from shardwright.rehearse.rehearsal import rehearse
from shardwright.rehearse.report_types import Change, Check, RehearsalReport, Run

__all__ = ["Change", "Check", "RehearsalReport", "Run", "rehearse"]
