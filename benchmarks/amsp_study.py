"""AMSP's study, predicted: LLaMA-7B, 13B and 30B on 8 to 1,024 A800 under several ways to shard the model states.

    python benchmarks/amsp_study.py [--markdown] [--svg docs/amsp-study.svg]

The setting is that of AMSP (arXiv 2311.00257v2, sections 6 and 7): 8 A800-80GB a node with NVLink, four HDR adapters of
200 Gb/s a node and no in-network reduction; sequences of 4,096, micro-batch 1, 1,024 sequences (4 Mi tokens) a step;
everything recomputed for 30B, nothing for the others. The vocabulary is LLaMA's 32,000. No constant is fitted to the
published figures. docs/amsp-study.md discusses the result.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from amsp_plot import Mark, Panel, Series, draw

from shardwright.passes import profile_model
from shardwright.planner.amsp import Operation, Shards, Spread, communication_seconds, points, state_bytes
from shardwright.planner.candidates import Candidate, timed
from shardwright.planner.constants import device_constants
from shardwright.planner.names import plan_name
from shardwright.planner.network import CollectiveKind, Links, collective_seconds
from shardwright.planner.predict import Predictor
from shardwright.planner.search import Search
from shardwright.planner.space import block_count
from shardwright.schemas import load_job
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.job import StrategySpec
from shardwright.schemas.profile import ModelProfile
from shardwright.schemas.units import Amount

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
PER_NODE = 8
SEQUENCE, SEQUENCES, VOCABULARY = 4096, 1024, 32000
NETWORK = 12.5e9
"""Bytes per second of one device: four adapters of 25 GB/s for eight devices."""
LATENCY = 14e-6
"""Of one hop between nodes, as the catalogue has it for InfiniBand."""
SLOWER = (1, 2, 4, 8)
"""What the network's rate is divided by, to see from when on the way of sharding matters."""
COMPARED_AT = 64
"""Devices for the tables that vary something else."""
GIB = 2**30
BUCKET = 512 * 2**20
"""Bytes of a bucket of gradients, for AMSP's cost model: InternEvo's default."""

Degrees = tuple[int, int, int]
"""Of parameters, gradients and optimizer states."""


class Shape(NamedTuple):
    """A LLaMA, and how the paper trained it."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    checkpointing: str
    amsp: Degrees
    """AMSP's choice, the same on every number of devices."""
    mics: int
    """Shard degree of all states in the paper's MiCS."""

    @property
    def flops(self) -> int:
        """Of one step, counted as Megatron does (arXiv 2104.04473, appendix) but for recomputation: 6 a weight of a
        matrix and token, and 12 L h s a token for attention, no mask considered."""
        weights = self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.ffn) + VOCABULARY * self.hidden
        return SEQUENCES * SEQUENCE * (6 * weights + 12 * self.layers * self.hidden * SEQUENCE)


SHAPES = (
    Shape("LLaMA-7B", 32, 4096, 11008, 32, "none", (1, 1, 8), 8),
    Shape("LLaMA-13B", 40, 5120, 13824, 40, "none", (4, 4, 8), 8),
    Shape("LLaMA-30B", 60, 6656, 17920, 52, "full", (8, 8, 32), 16),
)

PUBLISHED: dict[str, dict[str, dict[int, float]]] = {
    "LLaMA-7B": {"AMSP": {8: 64, 1024: 51}, "ZeRO-1": {8: 63, 1024: 36}, "MiCS": {8: 50, 1024: 35}, "hpZ": {1024: 4}},
    "LLaMA-13B": {"AMSP": {1024: 52}, "ZeRO-3": {8: 47, 1024: 4}, "MiCS": {1024: 33}, "hpZ": {1024: 6}},
    "LLaMA-30B": {"AMSP": {1024: 42}, "MiCS": {1024: 29}, "hpZ": {1024: 5}},
}
"""MFU in %, as the paper states it; its ZeRO++ without quantisation is hpZ."""
PUBLISHED_OVERLAPPED = {
    "LLaMA-7B": {1: 57, 2: 62, 4: 65, 8: 67},
    "LLaMA-13B": {1: 53, 2: 58, 4: 61, 8: 62},
    "LLaMA-30B": {1: 48, 2: 50, 4: 50, 8: 51},
}
"""MFU in % of AMSP on 64 devices by number of micro-batches, all overlaps on."""


class System(NamedTuple):
    """A way to shard the states."""

    name: str
    says: str
    strategy: Callable[[Shape, int, int], dict[str, Any] | None]
    """What it pins, for a number of devices and of micro-batches; None where it needs more devices."""


def _pinned(degrees: Degrees, world: int, accumulation: int, secondary: int | str = "none") -> dict[str, Any] | None:
    """Degrees, parameters freed after forward. With one micro-batch no gradient accumulates."""
    parameters, gradients, states = degrees
    if max(degrees) > world:
        return None
    return {
        "states": {
            "parameters": parameters,
            "gradients": gradients if accumulation > 1 else states,
            "optimizer_states": states,
            "secondary": secondary,
        },
        **({"reshard_after_forward": True} if parameters > 1 else {}),
    }


SYSTEMS = (
    System("planner", "the planner's choice, recomputing what the paper does", lambda shape, world, count: {}),
    System(
        "planner, free", "its choice, recomputing what it wants", lambda shape, world, count: {"checkpointing": "auto"}
    ),
    System("planner, amsp", "its choice among the points of `amsp`", lambda shape, world, count: {"engine": "amsp"}),
    System("AMSP", "AMSP's published degrees", lambda shape, world, count: _pinned(shape.amsp, world, count)),
    System("ZeRO-1", "1 / 1 / all", lambda shape, world, count: _pinned((1, 1, world), world, count)),
    System("ZeRO-3", "all / all / all", lambda shape, world, count: _pinned((world,) * 3, world, count)),
    System("MiCS", "the published shard degree", lambda shape, world, count: _pinned((shape.mics,) * 3, world, count)),
    System(
        "hpZ",
        "ZeRO-3 with a second copy in the node, unquantised",
        lambda shape, world, count: _pinned((world,) * 3, world, count, PER_NODE) if world > PER_NODE else None,
    ),
)
AMSP = next(system for system in SYSTEMS if system.name == "AMSP")


@dataclass(frozen=True)
class Row:
    """One prediction."""

    system: str
    plan: str
    degrees: Degrees
    seconds: float
    mfu: float
    """In %."""
    missing: float
    """GiB over the budget; 0 where it fits."""

    def __str__(self) -> str:
        return f"{self.mfu:.1f} ({self.seconds:.2f} s)" + (f" +{self.missing:.1f} GiB" if self.missing else "")


class Study:
    """Predictions for one model, which is profiled once."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        with TemporaryDirectory() as folder:
            path = Path(folder) / "job.yaml"
            path.write_text(_job_text(shape))
            loaded = load_job(path)
            self._job = loaded.job
            self.profile: ModelProfile = profile_model(loaded.job, loaded.folder, ("bf16",))

    def row(self, system: System, world: int, network: float = NETWORK, sequences: int = SEQUENCES) -> Row | None:
        """The best plan under what a system pins, whether it fits or not; None where the system is none."""
        pinned = system.strategy(self.shape, world, sequences // world)
        if pinned is None:
            return None
        predictor = self.predictor(pinned, world, network, sequences)
        candidate = _best(predictor)
        point, budget = candidate.point, predictor.device_budget
        flops = self.shape.flops * sequences / SEQUENCES
        return Row(
            system=system.name,
            plan=plan_name(point, block_count(self.profile)),
            degrees=(point.shard, point.gradient_degree, point.optimizer_degree),
            seconds=candidate.seconds,
            mfu=100 * flops / (world * self._job.cluster.device.peak["bf16"] * candidate.seconds),
            missing=0.0 if candidate.fits else (candidate.reserved - budget) / GIB,
        )

    def predictor(self, pinned: dict[str, Any], world: int, network: float, sequences: int) -> Predictor:
        """Of the job under what is pinned."""
        defaults = {"pp": 1, "precision": "bf16_mixed", "micro_batch": 1, "checkpointing": self.shape.checkpointing}
        train = self._job.train.model_copy(update={"global_batch": Amount(sequences, "sequences")})
        changes = {
            "cluster": self.cluster(world, network),
            "strategy": StrategySpec.model_validate(defaults | pinned),
            "train": train,
        }
        return Predictor(self._job.model_copy(update=changes), self.profile)

    def cluster(self, world: int, network: float = NETWORK) -> ClusterSpec:
        """That many devices, and the network between their nodes."""
        node = self._job.cluster.levels[0]
        rail = node.model_copy(
            update={"name": "network", "size": world // PER_NODE, "bandwidth": network, "latency": LATENCY}
        )
        levels = (node, rail) if world > PER_NODE else (node,)
        return self._job.cluster.model_copy(update={"levels": levels})

    @cached_property
    def activations(self) -> int:
        """Bytes at the peak that are no model states, for AMSP's cost model."""
        predictor = self.predictor({"engine": "fsdp2"}, COMPARED_AT, NETWORK, SEQUENCES)
        held = _best(predictor).peak.bytes
        names = ("saved_activations", "activation_temporaries", "head_and_loss", "inputs", "buffers")
        return sum(held.get(name, 0) for name in names)


def _job_text(shape: Shape) -> str:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": SEQUENCE,
    }
    return f"""
model: {{hf: {config}}}
data: {{synthetic: {{vocabulary: {VOCABULARY}}}}}
train: {{sequence_length: {SEQUENCE}, global_batch: {SEQUENCES}, steps: 1}}
cluster: {{devices: {PER_NODE} x a800-sxm-80gb}}
"""


def _best(predictor: Predictor) -> Candidate:
    """What the planner chooses; where nothing fits, what misses by least, timed."""
    search = Search(predictor)
    chosen = search.chosen()
    if chosen is not None:
        return chosen
    nearest = search.closest(lambda point: True)
    assert nearest is not None
    return timed(predictor, nearest)


# --- the cost model of the paper --------------------------------------------------------------------------------------


def published_model(study: Study, world: int) -> tuple[Degrees, float]:
    """What AMSP's own cost model chooses where its measured table is replaced by our ring, and how many times as long
    the published choice communicates by it (1.0 where the two are one, 0.0 where the published does not fit)."""
    shape, cluster = study.shape, study.cluster(world)
    mesh = Spread(nodes=world // PER_NODE, per_node=PER_NODE)
    modules = [each.numel for each in study.profile.parameters]
    room = cluster.device.memory - study.activations

    def cost(shards: Shards) -> float:
        return communication_seconds(
            modules, shards, mesh, micro_batches=SEQUENCES // world, bucket=BUCKET, seconds=_ring(cluster)
        )

    fitting = [each for each in points(mesh) if state_bytes(study.profile.numel, each) <= room]
    costs = {_degrees(each): cost(each) for each in fitting}
    best = min(costs, key=lambda each: costs[each])
    return best, costs[shape.amsp] / costs[best] if shape.amsp in costs else 0.0


def _degrees(shards: Shards) -> Degrees:
    return shards.parameters.size, shards.gradients.size, shards.optimizer_states.size


def _ring(cluster: ClusterSpec) -> Callable[[Operation, float, Spread], float]:
    """The time of a collective as planner/network.py has it, in place of the measured table. A broadcast in a ring
    sends as much as an all-gather."""
    efficiency = device_constants(cluster.device).links.value

    def seconds(operation: Operation, size: float, spread: Spread) -> float:
        sizes = (spread.per_node, spread.nodes)
        links: Links = [(level, size) for level, size in zip(cluster.levels, sizes, strict=False) if size > 1]
        kind: CollectiveKind = "all_gather" if operation == "broadcast" else operation
        return collective_seconds(kind, links, int(size), efficiency)

    return seconds


# --- tables -----------------------------------------------------------------------------------------------------------

Table = list[list[str]]
"""The first row is the head."""
Found = dict[tuple[str, int], Row]
"""By system and number of devices."""


def predictions(study: Study, network: float = NETWORK) -> Found:
    """Every system on every number of devices."""
    rows = (study.row(system, world, network) for world in WORLDS for system in SYSTEMS)
    worlds = (world for world in WORLDS for _ in SYSTEMS)
    return {(row.system, world): row for row, world in zip(rows, worlds, strict=True) if row is not None}


def mfu_table(found: Found) -> Table:
    """MFU and step time by system and number of devices."""
    table = [["system", *map(str, WORLDS)]]
    for system in SYSTEMS:
        cells = [found.get((system.name, world)) for world in WORLDS]
        table.append([system.name, *("" if cell is None else str(cell) for cell in cells)])
    return table


def choice_table(found: Found) -> Table:
    """What the planner chooses."""
    names = [system.name for system in SYSTEMS if system.name.startswith("planner")]
    return [["devices", *names]] + [[str(world), *(found[name, world].plan for name in names)] for world in WORLDS]


def published_table(studies: Sequence[Study], found: Sequence[Found]) -> Table:
    """Where the paper states a figure."""
    table = [["model", "system", "devices", "published MFU", "predicted MFU", "predicted / published"]]
    for study, rows in zip(studies, found, strict=True):
        for system, figures in PUBLISHED[study.shape.name].items():
            for world, figure in figures.items():
                mfu = rows[system, world].mfu
                cells = [study.shape.name, system, str(world), f"{figure:g}", f"{mfu:.1f}", f"{mfu / figure:.2f}"]
                table.append(cells)
    return table


def slower_table(study: Study) -> Table:
    """MFU on a slower network, and the degrees that the planner takes there."""
    table = [["network", *(system.name for system in SYSTEMS), "choice", "choice, amsp"]]
    for factor in SLOWER:
        rows = [study.row(system, COMPARED_AT, NETWORK / factor) for system in SYSTEMS]
        cells = ["" if row is None else f"{row.mfu:.1f}" + ("*" if row.missing else "") for row in rows]
        plans = [row.plan for row in rows if row is not None and row.system in ("planner", "planner, amsp")]
        table.append([f"{NETWORK / factor / 1e9:.3g} GB/s", *cells, *plans])
    return table


def overlap_table(studies: Sequence[Study]) -> Table:
    """AMSP's degrees by number of micro-batches a step."""
    table = [["micro-batches", *(study.shape.name for study in studies)]]
    for count in PUBLISHED_OVERLAPPED[SHAPES[0].name]:
        cells = []
        for study in studies:
            row = study.row(AMSP, COMPARED_AT, sequences=COMPARED_AT * count)
            assert row is not None
            cells.append(f"{row.mfu:.1f} / {PUBLISHED_OVERLAPPED[study.shape.name][count]}")
        table.append([str(count), *cells])
    return table


def model_table(studies: Sequence[Study]) -> Table:
    """The paper's cost model on our ring."""
    table = [["devices", *(study.shape.name for study in studies)]]
    for world in WORLDS:
        cells = []
        for study in studies:
            needed = max(study.shape.amsp)
            if needed > world:
                cells.append("")
                continue
            best, ratio = published_model(study, world)
            beside = "the published does not fit" if not ratio else f"the published takes {ratio:.2f} times as long"
            cells.append(f"{'/'.join(map(str, best))}; {beside}")
        table.append([str(world), *cells])
    return table


def tables(studies: Sequence[Study], found: Sequence[Found]) -> Iterator[tuple[str, Table]]:
    """All of them, with their titles."""
    for study, rows in zip(studies, found, strict=True):
        yield f"{study.shape.name}: MFU in % (step time) by devices", mfu_table(rows)
    yield "Published and predicted", published_table(studies, found)
    for study, rows in zip(studies, found, strict=True):
        yield f"{study.shape.name}: what the planner chooses", choice_table(rows)
    for study in studies:
        yield f"{study.shape.name} on {COMPARED_AT} devices: MFU in % on a slower network", slower_table(study)
    yield f"AMSP's degrees on {COMPARED_AT} devices: MFU in %, predicted / published", overlap_table(studies)
    yield "AMSP's own cost model on our ring: its choice", model_table(studies)


def as_text(table: Table) -> str:
    """Aligned columns."""
    widths = [max(len(row[index]) for row in table) for index in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)


def as_markdown(table: Table) -> str:
    """A table of GitHub's Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def panels(study: Study, found: Found, network: float) -> Panel:
    """One panel of the plot."""
    series = []
    for system in SYSTEMS:
        rows = {world: found[system.name, world] for world in WORLDS if (system.name, world) in found}
        if system.name != "planner, amsp" and (system.name != "planner, free" or study.shape.checkpointing != "none"):
            values = [(world, row.mfu, not row.missing) for world, row in rows.items()]
            series.append(Series(system.name, values))
    marks = [
        Mark(system, world, figure)
        for system, figures in PUBLISHED[study.shape.name].items()
        for world, figure in figures.items()
    ]
    return Panel(f"{study.shape.name}, network {network / 1e9:.3g} GB/s a device", series, marks)


def main() -> None:
    """Print the tables, draw the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="tables as in docs/amsp-study.md")
    parser.add_argument("--svg", type=Path, help="where to write the plot")
    options = parser.parse_args()
    studies = [Study(shape) for shape in SHAPES]
    found = [predictions(study) for study in studies]
    for title, table in tables(studies, found):
        print(f"### {title}\n\n{as_markdown(table)}\n" if options.markdown else f"{title}\n\n{as_text(table)}\n")
    if options.svg is not None:
        slow = NETWORK / SLOWER[-2]
        rows = [
            [panels(study, each, NETWORK) for study, each in zip(studies, found, strict=True)],
            [panels(study, predictions(study, slow), slow) for study in studies],
        ]
        options.svg.write_text(draw(rows, WORLDS), encoding="utf-8")


if __name__ == "__main__":
    main()
