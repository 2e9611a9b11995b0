"""The command `schedule`: a pipeline schedule made or checked, simulated and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardwright import report
from shardwright.cli.arguments import AsJson
from shardwright.cli.outcome import ANSWER_IS_NO, MADE
from shardwright.cli.terminal import show, show_json
from shardwright.cli.timetables import check_targets, draw_to_files
from shardwright.report.schedule import Misfit

DEFAULT_FAMILY = "zb-auto"
HELD_BY_WEIGHT = 1.0
"""Of what F keeps, the share that a pending W holds in the emitted scripts: inputs and output gradients of the linear
layers. Measured on blocks of a transformer with fused attention: 1.00 with a GELU MLP, in fp32 and in bf16; 0.77 and
0.65 with SwiGLU."""


def schedule(
    stages: Annotated[int | None, typer.Option(min=1, help="Devices that the pipeline is cut for.")] = None,
    micro_batches: Annotated[int | None, typer.Option(min=1, help="Micro-batches of one optimizer step.")] = None,
    times: Annotated[
        str, typer.Option(metavar="F,I,W,comm", help="Times on one device, or a file with lists of them.")
    ] = "1,1,1,0",
    memory_limit: Annotated[
        str | None, typer.Option(metavar="K", help="Of a device, in activations of one micro-batch; or one for each.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Which schedule; {DEFAULT_FAMILY} unless named.")
    ] = None,
    chunks: Annotated[int | None, typer.Option(min=1, help="Stages on each device.")] = None,
    held_by_weight: Annotated[
        float, typer.Option(metavar="R", min=0, max=1, help="Share of the activations that a pending W holds.")
    ] = HELD_BY_WEIGHT,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it to FILE.svg.")] = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write it for Perfetto to FILE.json.")] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Simulate the timetable in FILE instead of making one.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Simulate a pipeline schedule and draw it.

    F is the forward of a micro-batch, I the gradient of its input, W that of the weights, B both in one; comm is the
    time between two devices. A file for --times (YAML or JSON) has the keys F, I, W, comm, each a number, or a list
    with one for each device or stage; and may have activations and held_by_weight. --check takes the output of
    --json, or one line for each device: F0 F1 I0 W0 I1 W1, and 1:F0 for chunk 1.

    \b
    Examples:
      shardwright schedule --stages 8 --micro-batches 24 --memory-limit 8
      shardwright schedule --stages 4 --micro-batches 8 --family zb-v --svg v.svg
      shardwright schedule --check mine.txt --times 18.5,18.1,9.3,0.6
    """
    from shardwright.cli.schedule_input import read_times, read_timetable
    from shardwright.cli.schedule_work import Sizes, make, replay

    check_targets(svg, trace)
    given_times = read_times(times, held_by_weight)
    sizes = Sizes(stages, micro_batches, chunks)
    if check is None:
        made = make(family or DEFAULT_FAMILY, sizes, given_times, memory_limit)
    else:
        made = replay(read_timetable(check), family, sizes, given_times, memory_limit, None if as_json else show)
    if isinstance(made, Misfit):
        return _no_schedule(made, as_json)
    draw_to_files(made, svg, trace)
    if as_json:
        show_json(report.schedule_fields(made))
    else:
        show(report.draw_schedule(made))
    return MADE


def _no_schedule(misfit: Misfit, as_json: bool) -> int:
    if as_json:
        show_json({"infeasible": report.misfit_fields(misfit)})
    else:
        show(report.draw_misfit(misfit))
    return ANSWER_IS_NO
