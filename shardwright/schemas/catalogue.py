"""Named hardware: the catalogue's data as typed values, with the origin of every number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardwright.hardware import table
from shardwright.schemas.cluster import DeviceSpec, LevelSpec


@dataclass(frozen=True, slots=True)
class Machine:
    """How devices are put together: the levels inside one machine, and the network between machines."""

    name: str
    device: str
    """Empty for a generic machine, which takes any card of its kind."""
    levels: tuple[tuple[str, int, str], ...]
    """Name, full size and link of each level, fastest first."""
    network: str
    """Name of the link between machines."""
    facilities: dict[str, str]
    """`host_memory`, and where known `nvme` and `nvme_bandwidth`, of one node."""
    origins: dict[str, str]
    """Origin of each facility."""


def device_names() -> tuple[str, ...]:
    """Every device that a job may name."""
    return tuple(table("devices"))


def machine_names() -> tuple[str, ...]:
    """Every machine that a job may name: those whose device is known."""
    return tuple(name for name, row in table("machines").items() if "device" in row)


def link_names() -> tuple[str, ...]:
    """Every link that a job may name."""
    return tuple(table("links"))


def title(name: str) -> str:
    """What the name stands for, for people."""
    return next(str(table(kind)[name]["title"]) for kind in ("devices", "machines", "links") if name in table(kind))


def device(name: str) -> tuple[DeviceSpec, dict[str, str]]:
    """The device and the origin of each of its numbers (`memory`, `peak.bf16`, ...). Raises KeyError."""
    row = table("devices")[name]
    facts = {key: row[key] for key in ("memory", "memory_bandwidth", "pcie") if key in row}
    rates = {kind: {dtype: fact["value"] for dtype, fact in row[kind].items()} for kind in ("peak", "measured")}
    origins = {key: origin(fact) for key, fact in facts.items()}
    origins |= {f"{kind}.{dtype}": origin(fact) for kind in rates for dtype, fact in row[kind].items()}
    spec = DeviceSpec.model_validate(
        {"name": name, "kind": row["kind"], **_values(facts), **rates, "source": _merged(origins)}
    )
    return spec, origins


def home(name: str) -> Machine:
    """The machine that a device is assumed to stand in. Raises KeyError."""
    return machine(table("devices")[name]["machine"])


def machine(name: str) -> Machine:
    """The machine of that name. Raises KeyError."""
    row = table("machines")[name]
    facts = {key: row[key] for key in ("host_memory", "nvme", "nvme_bandwidth") if key in row}
    return Machine(
        name=name,
        device=row.get("device", ""),
        levels=tuple((entry["name"], entry["size"], entry["link"]) for entry in row["levels"]),
        network=row["network"],
        facilities=_values(facts),
        origins={key: origin(fact) for key, fact in facts.items()},
    )


def level(name: str, size: int, link: str) -> tuple[LevelSpec, dict[str, str]]:
    """A level made of a named link, and the origins of `bandwidth` and `latency`. Raises KeyError."""
    row = table("links")[link]
    facts = {key: row[key] for key in ("bandwidth", "latency")}
    origins = {key: f"{origin(fact)} ({link})" for key, fact in facts.items()}
    spec = LevelSpec.model_validate({"name": name, "size": size, **_values(facts), "source": _merged(origins)})
    return spec, origins


def origin(fact: Mapping[str, str]) -> str:
    """`default: REASON` for a number of our choice, `catalogue: SOURCE` for any other."""
    source = str(table("sources")[fact["source"]])
    return source if source.startswith("default: ") else f"catalogue: {source}"


def _values(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {key: str(fact["value"]) for key, fact in facts.items()}


def _merged(origins: Mapping[str, str]) -> str:
    """All origins as one text; the whole counts as from the catalogue as soon as one number is."""
    distinct = sorted(dict.fromkeys(origins.values()), key=lambda text: text.startswith("default: "))
    return "; ".join([*distinct[:1], *(text.removeprefix("catalogue: ") for text in distinct[1:])])
