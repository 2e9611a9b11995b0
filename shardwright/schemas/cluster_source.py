"""The forms in which a job names its cluster, and their resolution into a `ClusterSpec` with every number filled in.

`cluster: dgx-h100`, `cluster: 4 x dgx-h100` (machines of the catalogue), `cluster: cluster.yaml` (a file that holds one
of the next two), `cluster: {devices: 16 x h100-sxm-80gb}`, or `cluster: {device: ..., levels: [...]}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from math import prod
from operator import mul
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from shardwright.schemas import catalogue
from shardwright.schemas.base import Spec
from shardwright.schemas.cluster import RESERVED_LEVELS, ClusterSpec, DeviceSpec
from shardwright.schemas.cluster_forms import COUNTED, CountedCluster, Facilities, LevelledCluster, LinkForm
from shardwright.schemas.diagnostics import Diagnostic, InputError, shown
from shardwright.schemas.expected import join, nearest
from shardwright.schemas.explain import Form, explain
from shardwright.schemas.nodes import Entry, Key, Node, best_span, diagnostic, place, plain, with_entry
from shardwright.schemas.reading import read_tree
from shardwright.schemas.units import format_bytes, format_rate, format_seconds

KEY: Key = ("cluster",)
DEFAULT_LATENCY = "10us"
"""Of a level whose bandwidth is given without a latency: between a hop of NVLink and one of a network."""
_LATENCY_ORIGIN = "default: between a hop of NVLink and one of a network"
_FILE = re.compile(r".*(/|\.ya?ml$|\.json$)")
_FORM_KEYS = ("devices", "device", "levels")

FormT = TypeVar("FormT", CountedCluster, LevelledCluster)


def resolve_cluster(root: Node, folder: Path) -> tuple[ClusterSpec, Node]:
    """The cluster that the key `cluster` of `root` stands for; relative paths start from `folder`.

    Also returns the whole with `cluster` replaced by what describes it, which lies in another file where the job names
    one. Raises InputError.
    """
    node, _, _ = place(root, KEY)
    if isinstance(node.value, str) and not _FILE.match(node.value):
        return _machines(node.value, root), root
    if isinstance(node.value, str):
        node = _read_file(node.value, root, folder)
        root = with_entry(root, "cluster", Entry(node.span, node))
    if not isinstance(node.value, dict):
        _refuse_form(root, f"found {shown(plain(node))}")
    keys = set(node.value)
    meant = keys & set(_FORM_KEYS) or {nearest(key, _FORM_KEYS) for key in keys} - {""}
    if meant == {"devices"}:
        return _counted(_validated(root, CountedCluster), root), root
    if meant and "devices" not in meant:
        return _levelled(_validated(root, LevelledCluster), root), root
    _refuse_form(root, f"found {join([f'`{key}`' for key in sorted(meant)], 'and') or 'none of these keys'}")


def _refuse_form(root: Node, found: str) -> NoReturn:
    expected = "expected a machine, a file, `{devices: ...}`, or `{device: ..., levels: [...]}`"
    _refuse(root, (), f"{expected}; {found}", "for example cluster: {devices: 8 x h100-sxm-80gb}")


def fill(count: int, sizes: Sequence[int]) -> list[int] | None:
    """How `count` devices fill levels of these sizes, fastest first, whole groups only; None where they do not.

    The level after the last has no limit: `fill(16, [8])` is `[8, 2]`.
    """
    used: list[int] = []
    for size in sizes:
        if count <= size:
            return [*used, count]
        if count % size:
            return None
        used.append(size)
        count //= size
    return [*used, count]


@dataclass
class _Draft:
    """A cluster being put together: plain values, and the origin of those that the job did not give."""

    name: str
    device: DeviceSpec
    levels: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)

    def link(self, name: str, size: int, link: str, latency: float | None = None) -> None:
        """Adds a level made of a link of the catalogue, with a latency of the job's own where it gives one."""
        spec, origins = catalogue.level(name, size, link)
        self.levels.append(spec.model_dump(mode="json"))
        if latency is not None:
            self.levels[-1]["latency"] = format_seconds(latency)
            del origins["latency"]
        self.sources |= {f"levels.{name}.{fact}": origin for fact, origin in origins.items()}

    def level(self, name: str, size: int, bandwidth: float, latency: float | None) -> None:
        """Adds a level given in numbers."""
        self.levels.append({"name": name, "size": size, "bandwidth": format_rate(bandwidth)})
        self.levels[-1]["latency"] = DEFAULT_LATENCY if latency is None else format_seconds(latency)
        if latency is None:
            self.sources[f"levels.{name}.latency"] = _LATENCY_ORIGIN

    def finish(self, form: Facilities, machine: catalogue.Machine | None, root: Node) -> ClusterSpec:
        """The cluster. Raises InputError where the memory of the host is not known."""
        facilities = form.model_dump(mode="json", include={"host_memory", "nvme", "nvme_bandwidth"}, exclude_none=True)
        if machine is not None:
            known = {fact: value for fact, value in machine.facilities.items() if fact not in facilities}
            facilities |= known
            self.sources |= {fact: machine.origins[fact] for fact in known}
        if "host_memory" not in facilities:
            about = "host memory of one node, for example 512GB; the catalogue does not know this device's"
            _refuse(root, ("host_memory",), "the key `host_memory` is missing", about)
        values = {
            "name": self.name,
            "device": self.device.model_dump(mode="json"),
            "levels": self.levels,
            "launcher": form.launcher,
            "sources": self.sources,
        }
        return ClusterSpec.model_validate(values | facilities)


def _machines(text: str, root: Node) -> ClusterSpec:
    """`dgx-h100`, `4 x dgx-h100`."""
    match = re.fullmatch(COUNTED, text)
    count, name = (int(match[1]), match[2]) if match else (1, text)
    if name not in catalogue.machine_names() or count == 0:
        message = f"{shown(text)} is not a machine of the catalogue (and the name of a file ends in .yaml)"
        _refuse(root, (), message, _machine_meant(name, count))
    machine = catalogue.machine(name)
    device, origins = catalogue.device(machine.device)
    draft = _Draft(text, device, sources={f"device.{fact}": origin for fact, origin in origins.items()})
    for slot in machine.levels:
        draft.link(*slot)
    if count > 1:
        draft.link("cluster", count, machine.network)
    return draft.finish(Facilities(), machine, root)


def _machine_meant(name: str, count: int) -> str:
    if name in catalogue.device_names():
        return f"it is a device: write `cluster: {{devices: {max(count, 1)} x {name}}}`"
    near = nearest(name, catalogue.machine_names())
    return f"did you mean `{near}`?" if near else f"machines: {', '.join(catalogue.machine_names())}"


def _counted(form: CountedCluster, root: Node) -> ClusterSpec:
    match = re.fullmatch(COUNTED, form.devices)
    assert match
    count, name = int(match[1]), match[2]
    if name in catalogue.machine_names():
        _refuse(root, ("devices",), f"`{name}` is a machine, not a device", f"write `cluster: {count} x {name}`")
    device, origins = _device(name, ("devices",), root)
    machine = catalogue.home(name)
    levels = _resized(machine.levels, form.devices_per_node, root)
    sizes = [size for _, size, _ in levels]
    used = fill(count, sizes)
    if count == 0:
        _refuse(root, ("devices",), "expected at least 1 device, found 0")
    if used is None:
        message = f"{count} devices do not fill whole groups: {_groups(levels)}"
        _refuse(root, ("devices",), message, _near_counts(count, sizes))
    if form.memory is not None:
        device = DeviceSpec.model_validate(device.model_dump(mode="json") | {"memory": format_bytes(form.memory)})
        del origins["memory"]
    draft = _Draft(form.devices, device, sources={f"device.{fact}": origin for fact, origin in origins.items()})
    for (level, _, link), size in zip(levels, used, strict=False):
        draft.link(level, size, link)
    network = form.network or machine.network
    if isinstance(network, str) and network not in catalogue.link_names():
        _refuse(root, ("network",), f"`{network}` is no link of the catalogue", _link_meant(network))
    if len(used) > len(levels):
        if isinstance(network, LinkForm):
            draft.level("cluster", used[-1], network.bandwidth, network.latency)
        else:
            draft.link("cluster", used[-1], network)
    return draft.finish(form, machine, root)


def _resized(levels: Sequence[tuple[str, int, str]], per_node: int | None, root: Node) -> list[tuple[str, int, str]]:
    """The machine's levels with the one named `node` made to hold `per_node` devices."""
    if per_node is None:
        return list(levels)
    end = [name for name, _, _ in levels].index("node")
    inner = prod(size for _, size, _ in levels[:end])
    if per_node % inner:
        _refuse(root, ("devices_per_node",), f"expected a multiple of {inner}, found {per_node}")
    name, _, link = levels[end]
    return [*levels[:end], (name, per_node // inner, link), *levels[end + 1 :]]


def _groups(levels: Sequence[tuple[str, int, str]]) -> str:
    sizes = accumulate((size for _, size, _ in levels), mul)
    return join([f"a `{name}` has {size}" for (name, _, _), size in zip(levels, sizes, strict=True)], "and")


def _near_counts(count: int, sizes: Sequence[int]) -> str:
    whole = prod(sizes)
    below = next((str(near) for near in range(count - 1, 0, -1) if fill(near, sizes)), "")
    above = next((str(near) for near in range(count + 1, count + whole + 1) if fill(near, sizes)), "")
    return f"the nearest counts are {below} and {above}" if below else f"the nearest count is {above}"


def _levelled(form: LevelledCluster, root: Node) -> ClusterSpec:
    machine = None
    origins: Mapping[str, str] = {}
    problems: list[Diagnostic] = []
    if isinstance(form.device, DeviceSpec):
        device = form.device
    else:
        try:
            device, origins = _device(form.device, ("device",), root)
            machine = catalogue.home(form.device)
        except InputError as error:
            problems += error.diagnostics
    for index, level in enumerate(form.levels):
        if level.link is not None and level.link not in catalogue.link_names():
            message = f"`{level.link}` is no link of the catalogue"
            problems.append(_refusal(root, ("levels", index, "link"), message, _link_meant(level.link)))
        taken = [each.name for each in form.levels[:index]]
        if level.name in (*taken, *RESERVED_LEVELS):
            why = RESERVED_LEVELS.get(level.name, "another level has that name")
            problems.append(_refusal(root, ("levels", index, "name"), f"a level cannot be named `{level.name}`: {why}"))
    if problems:
        raise InputError(problems)
    world = prod(level.size for level in form.levels)
    draft = _Draft(form.name or f"{world} x {device.name}", device)
    draft.sources = {f"device.{fact}": origin for fact, origin in origins.items()}
    for level in form.levels:
        if level.link is not None:
            draft.link(level.name, level.size, level.link, level.latency)
        elif level.bandwidth is not None:
            draft.level(level.name, level.size, level.bandwidth, level.latency)
    return draft.finish(form, machine, root)


def _device(name: str, key: Key, root: Node) -> tuple[DeviceSpec, dict[str, str]]:
    names = catalogue.device_names()
    if name in names:
        return catalogue.device(name)
    near = nearest(name, names)
    suggestion = f"did you mean `{near}`?" if near else f"devices: {', '.join(names)}"
    _refuse(root, key, f"`{name}` is no device of the catalogue", suggestion)


def _link_meant(name: str) -> str:
    near = nearest(name, catalogue.link_names())
    return f"did you mean `{near}`?" if near else f"links: {', '.join(catalogue.link_names())}"


def _read_file(name: str, root: Node, folder: Path) -> Node:
    path = folder / name
    if not path.is_file():
        _refuse(root, (), f"there is no file {shown(name)}", "the path starts from the folder of the job file")
    return read_tree(path)


@cache
def _form(model: type[Spec]) -> Form:
    return Form(model, model.model_json_schema(), KEY)


def _validated(root: Node, model: type[FormT]) -> FormT:
    try:
        return model.model_validate_json(json.dumps(plain(place(root, KEY)[0])), strict=True)
    except ValidationError as error:
        raise InputError(explain(error, root, _form(model))) from None


def _refuse(root: Node, key: Key, message: str, suggestion: str = "") -> NoReturn:
    raise InputError(_refusal(root, key, message, suggestion))


def _refusal(root: Node, key: Key, message: str, suggestion: str = "") -> Diagnostic:
    """What is wrong with the part `key` of the cluster."""
    key = (*KEY, *key)
    return diagnostic(best_span(root, key), key, message, suggestion)
