"""Seconds of everything that `ShardedStates` sends and copies: the lanes of a point of engine `amsp`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache

from shardwright.planner.compute import memory_rate
from shardwright.planner.constants import device_constants
from shardwright.planner.flat import Bucket, Chain, Send, copy_sends, gather_sends, reduce_sends, trained_elements
from shardwright.planner.flat_lanes import Communication, FlatStep, FlatUnit, Hops
from shardwright.planner.groups import Groups
from shardwright.planner.network import CollectiveKind, Links, collective_seconds
from shardwright.planner.parts import Part, parts_of
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS
from shardwright.planner.space import Point, axis_links
from shardwright.schemas.cluster import ClusterSpec


class FlatTime:
    """What the buckets of a model send under every layout of one job."""

    def __init__(self, cluster: ClusterSpec, groups: Groups) -> None:
        self._cluster, self._groups = cluster, groups
        self._counts = Counter(groups.kinds)
        self._rate = memory_rate(cluster.device)
        self._efficiency = device_constants(cluster.device).links.value
        self._wire_of = {level.name: index for index, level in enumerate(cluster.levels)}
        self._sends: Callable[..., Communication] = lru_cache(maxsize=100_000)(self._communication)
        self._links: Callable[[tuple[int, ...]], tuple[Links, ...]] = lru_cache(maxsize=None)(
            lambda axes: axis_links(cluster, axes)
        )
        self._seconds: Callable[[CollectiveKind, Links, int], float] = lru_cache(maxsize=100_000)(
            lambda kind, links, size: collective_seconds(kind, links, size, self._efficiency)
        )

    def step(
        self,
        point: Point,
        blocks: Sequence[tuple[float, float]],
        embedding: tuple[float, float],
        head: tuple[float, float],
    ) -> FlatStep:
        """The lanes of one step; `blocks` are seconds of forward and backward of each block."""
        sends, layout = self._sent(point), point.chain
        made = [sends[kind] for kind in self._groups.kinds]
        return FlatStep(
            blocks=[FlatUnit(*passes, each) for passes, each in zip(blocks, made[:-1], strict=True)],
            root=made[-1],
            embedding=embedding,
            head=head,
            micro_batches=point.accumulation,
            kept=bool(point.kept),
            wires=len(self._cluster.levels),
            gather_hops=layout.parameters,
            again_hops=layout.secondary,
            publish_hops=layout.optimizer_states - layout.parameters,
        )

    def least(self, point: Point, passes: float) -> float:
        """What `run_flat` is never below: the root is gathered before all compute, `passes` seconds a micro-batch, and
        reduced after it, and every wire carries what is sent over it."""
        busy = [0.0] * len(self._cluster.levels)
        copies = 0.0
        kinds, all_sends = self._groups.kinds, self._sent(point)
        gathers = 1 if point.kept else point.accumulation
        for kind, sends in all_sends.items():
            count = self._counts[kind]
            blocks = count - (kind == kinds[-1])
            sent = (
                (count, sends.publications),
                (count * gathers, sends.gathers),
                (0 if point.kept else blocks * gathers, sends.again),
                (count * (point.accumulation - 1), sends.reductions),
                (count, sends.last_reductions),
            )
            for times, chains in sent:
                for hops in chains:
                    for wire, seconds in hops:
                        busy[wire] += times * seconds
            copies += count * (point.accumulation * sends.hand_over + (point.accumulation - 1) * sends.add_whole)
        root = all_sends[kinds[-1]]
        alone = _longest(root.publications) + gathers * _longest(root.gathers) + _longest(root.last_reductions)
        return max(alone + point.accumulation * passes + copies, *busy)

    def _sent(self, point: Point) -> dict[int, Communication]:
        """What a group of each kind sends."""
        parts = [(part, part.groups(self._groups).flat(part.point.chain)) for part in parts_of(point)]
        return {
            kind: joined([self.communication(part, units[kind], point.axes) for part, units in parts])
            for kind in self._counts
        }

    def communication(self, part: Part, unit: tuple[Bucket, ...], axes: tuple[int, ...]) -> Communication:
        """What any unit sends under the layout of a part of the parameters, on a mesh of these axes."""
        point = part.point
        element = PRECISIONS[point.precision].compute_bytes
        links = self._links(axes)[part.first_axis :]
        return self._sends(unit, point.chain, element, point.int8_gathers, point.int4_reductions, links)

    def own(self, point: Point) -> int:
        """Elements that the optimizer of one device works on, padding included."""
        return sum(self._own(part) for part in parts_of(point))

    def _own(self, part: Part) -> int:
        units = part.groups(self._groups).flat(part.point.chain)
        trained = (count * trained_elements(units[kind]) for kind, count in self._counts.items())
        return sum(trained) // part.point.optimizer_degree

    def norm(self, point: Point) -> float:
        """Adding the squared norms up: one number over each axis that optimizer states are spread over."""
        axes = self._links(point.axes)[: point.chain.optimizer_states]
        return sum(self._seconds("all_reduce", links, MASTER_BYTES) for links in axes)

    def _communication(
        self,
        group: tuple[Bucket, ...],
        layout: Chain,
        element: int,
        int8_gathers: tuple[int, ...],
        int4_reductions: tuple[int, ...],
        links: tuple[Links, ...],
    ) -> Communication:

        def chain(bucket: Bucket, sends: Iterable[Send], packed: Collection[int] = (), packing: int = 0) -> Hops:
            """`packing`: bytes of memory traffic an element over the axes on which fewer bits travel."""
            made = []
            for send in sends:
                over = links[send.axis]
                # An exchange sends as many bytes over as many links as a reduce-scatter.
                kind = "reduce_scatter" if send.kind == "all_to_all" else send.kind
                elements = bucket.padded // layout.degree(send.axis) if send.axis in packed else 0
                seconds = packing * elements / self._rate + self._seconds(kind, over, send.bytes)
                made.append((self._wire_of[over[-1][0].name], seconds))
            return tuple(made)

        def gather(bucket: Bucket, level: int) -> Hops:
            sends = gather_sends(bucket, layout, level, 0, element, int8_gathers)
            return chain(bucket, sends, int8_gathers, 1 + element)

        def reduce(bucket: Bucket, to: int, *after: Send) -> Hops:
            sends = (*reduce_sends(bucket, layout, 0, to, int4_reductions), *after)
            return chain(bucket, sends, int4_reductions, 2 * MASTER_BYTES + 1)

        trainable = [bucket for bucket in group if bucket.trainable]
        padded, numel = sum(bucket.padded for bucket in trainable), sum(bucket.numel for bucket in trainable)
        second = layout.secondary < layout.parameters
        copied = 2 * element * sum(bucket.padded for bucket in group) // layout.degree(layout.secondary)
        return Communication(
            gathers=tuple(gather(bucket, layout.parameters) for bucket in group),
            again=tuple(gather(bucket, layout.secondary) for bucket in group),
            reductions=tuple(reduce(bucket, layout.gradients) for bucket in trainable),
            last_reductions=tuple(
                reduce(bucket, layout.optimizer_states, *copy_sends(bucket, layout)) for bucket in trainable
            ),
            publications=tuple(
                chain(bucket, gather_sends(bucket, layout, layout.optimizer_states, layout.parameters, element))
                for bucket in trainable
            ),
            keep=copied / self._rate if second else 0.0,
            hand_over=(element + MASTER_BYTES) * numel / self._rate,
            add_whole=0.0 if layout.gradients else MASTER_BYTES * numel / self._rate,
            add=3 * MASTER_BYTES * padded / layout.degree(layout.gradients) / self._rate if layout.gradients else 0.0,
        )


def joined(parts: Sequence[Communication]) -> Communication:
    """What a unit sends whose buckets lie on several chains. Each chain adds the same share of `add`."""
    if len(parts) == 1:
        return parts[0]
    adding = sum(bool(hops) for part in parts for hops in part.reductions)
    return Communication(
        gathers=tuple(hops for part in parts for hops in part.gathers),
        again=tuple(hops for part in parts for hops in part.again),
        reductions=tuple(hops for part in parts for hops in part.reductions),
        last_reductions=tuple(hops for part in parts for hops in part.last_reductions),
        publications=tuple(hops for part in parts for hops in part.publications),
        keep=sum(part.keep for part in parts),
        hand_over=sum(part.hand_over for part in parts),
        add_whole=sum(part.add_whole for part in parts),
        add=sum(part.add for part in parts) / max(1, adding),
    )


def _longest(chains: Sequence[Hops]) -> float:
    return max((sum(seconds for _, seconds in hops) for hops in chains), default=0.0)
