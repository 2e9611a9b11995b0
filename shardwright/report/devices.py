"""Drawing of the catalogue's devices."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.report.layout import Column, Grid, Row, human_flops
from shardwright.schemas.cluster import DeviceSpec
from shardwright.schemas.units import human_bytes

_COLUMNS = (
    Column("device"),
    Column("memory", "number"),
    Column("bf16\nFLOP/s", "number"),
    Column("fp32\nFLOP/s", "number"),
    Column("bandwidth\nof memory", "number"),
    Column("which is", "prose", "dim"),
)


def draw_devices(devices: Sequence[tuple[DeviceSpec, str]]) -> Grid:
    """Each device with its title: usable memory, dense peak rates, memory bandwidth. `-`: not supported."""
    return Grid(_COLUMNS, [_row(device, title) for device, title in devices])


def _row(device: DeviceSpec, title: str) -> Row:
    rates = [human_flops(device.peak[dtype]) if dtype in device.peak else "-" for dtype in ("bf16", "fp32")]
    bandwidth = f"{device.memory_bandwidth / 1e9:.0f} GB/s"
    return Row((device.name, human_bytes(device.memory), *rates, bandwidth, title))
