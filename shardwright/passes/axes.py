"""The dimensions of tensors as products and concatenations of axes, and which of them are the same.

[Note: axes]
Every dimension of every tensor is a list of axes, the major one first; its size is their product, and axes of size 1
are left out. Operators tell that axes of different tensors are the same (elementwise work, the contraction of a matrix
product), that an axis has factors (`view` of 4096 features as 32 heads of 128), or that it is a concatenation of parts
(`split` of a fused projection into query, key and value). An axis whose entries never meet, because every operator
works on each entry alone or sums over them in a product with a parameter, can be divided among processes; one that some
operator needs whole (a normalisation, a softmax, a product of two activations) cannot. GSPMD propagates shardings in
the same way (Xu et al., arXiv 2105.04663, section 3.5); here it is the identity of axes that is propagated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

Axes = list["Axis"]
"""A dimension: the product of these, the major one first."""
Dims = list[Axes]
"""A tensor's dimensions."""


@dataclass(eq=False, slots=True)
class Axis:
    """A range of indices. At most one of `same`, `factors` and `parts` says what it really is."""

    size: int
    same: Axis | None = None
    """The axis that stands for this one since the two were found to be the same."""
    factors: tuple[Axis, ...] = ()
    parts: tuple[Axis, ...] = ()
    """Of a concatenation; each may have factors."""
    whole: bool = False
    """Some operator needs all entries in one place."""
    picked: bool = False
    """Some operator takes single entries out of it."""
    vocabulary: bool = False
    """The classes of the loss, or the rows of the table of tokens."""
    unknown: str = ""
    """The operator on it that is not understood."""

    def like(self, size: int) -> Axis:
        """A new axis of which the same is known."""
        return Axis(size, None, (), (), self.whole, self.picked, self.vocabulary, self.unknown)


def representative(axis: Axis) -> Axis:
    """The axis that stands for this one."""
    while axis.same is not None:
        axis = axis.same
    return axis


def leaves(axes: Iterable[Axis]) -> Iterator[Axis]:
    """The axes in order, with factors in the place of their product; each is its own representative."""
    for axis in map(representative, axes):
        if axis.factors:
            yield from leaves(axis.factors)
        elif axis.size != 1:
            yield axis


def innermost(axes: Iterable[Axis]) -> Iterator[Axis]:
    """The leaves, with parts in the place of their concatenation."""
    for leaf in leaves(axes):
        if leaf.parts:
            yield from innermost(leaf.parts)
        else:
            yield leaf


def size_of(axes: Iterable[Axis]) -> int:
    """The size of a dimension."""
    return prod(axis.size for axis in axes)


def new(size: int) -> Axes:
    """A dimension of which nothing is known."""
    return [Axis(size)] if size != 1 else []


def need_whole(axes: Iterable[Axis]) -> None:
    """Some operator needs all entries of this dimension in one place."""
    for leaf in leaves(axes):
        leaf.whole = True
        need_whole(leaf.parts)


def pick(axes: Iterable[Axis]) -> None:
    """Some operator takes single entries out of this dimension."""
    for leaf in leaves(axes):
        leaf.picked = True


def name_vocabulary(axes: Iterable[Axis]) -> None:
    """This dimension counts tokens."""
    for leaf in leaves(axes):
        leaf.vocabulary = True


def taint(axes: Iterable[Axis], operator: str) -> None:
    """What an operator does with this dimension is not known."""
    for leaf in innermost(axes):
        leaf.unknown = leaf.unknown or operator


def unify(left: Iterable[Axis], right: Iterable[Axis]) -> None:
    """Two dimensions are the same. Where their factors do not match, both are needed whole."""
    a, b = deque(leaves(left)), deque(leaves(right))
    while a and b:
        x, y = _next(a), _next(b)
        if x is None or y is None:
            break
        if x is y:
            continue
        if x.size == y.size:
            _merge(x, y)
            continue
        (small, large), rest = ((x, y), b) if x.size < y.size else ((y, x), a)
        if large.size % small.size or large.parts:
            need_whole([x, y, *a, *b])
            return
        major, minor = _split(large, small.size)
        _merge(small, major)
        rest.appendleft(minor)


def _next(queue: deque[Axis]) -> Axis | None:
    """The next leaf; what was a leaf may have been split meanwhile."""
    while queue:
        found = list(leaves([queue.popleft()]))
        queue.extendleft(reversed(found[1:]))
        if found:
            return found[0]
    return None


def _merge(x: Axis, y: Axis) -> None:
    """Two leaves of one size are the same."""
    if y.parts:
        x, y = y, x
    y.same = x
    if y.parts:
        if [part.size for part in x.parts] == [part.size for part in y.parts]:
            for one, other in zip(x.parts, y.parts, strict=True):
                unify([one], [other])
        else:
            need_whole([x])
            need_whole(y.parts)
    if y.whole:
        need_whole([x])
    if y.unknown:
        taint([x], y.unknown)
    x.picked |= y.picked
    x.vocabulary |= y.vocabulary


def _split(axis: Axis, major: int) -> tuple[Axis, Axis]:
    axis.factors = (axis.like(major), axis.like(axis.size // major))
    return axis.factors[0], axis.factors[1]


def reshape(dims: Iterable[Axes], shape: Sequence[int]) -> Dims:
    """The dimensions of a tensor that was viewed in another shape of as many elements."""
    everything = [axis for axes in dims for axis in axes]
    queue = deque(leaves(everything))
    result: Dims = []
    for size in shape:
        axes: Axes = []
        while size > 1:
            leaf = _next(queue)
            if leaf is not None and size % leaf.size == 0:
                axes.append(leaf)
                size //= leaf.size
            elif leaf is not None and leaf.size % size == 0 and not leaf.parts:
                major, minor = _split(leaf, size)
                axes.append(major)
                queue.appendleft(minor)
                size = 1
            else:
                need_whole(everything)
                return [[Axis(size, whole=True)] if size != 1 else [] for size in shape]
        result.append(axes)
    return result


def cut(axes: Axes, start: int, stop: int) -> Axes:
    """The entries from `start` to `stop` of a dimension."""
    if (start, stop) == (0, size_of(axes)):
        return axes
    first, *rest = leaves(axes)
    stride = size_of(rest)
    if start % stride or stop % stride:
        need_whole(axes)
        return [Axis(stop - start, whole=True)] if stop - start != 1 else []
    return [*_piece(first, start // stride, stop // stride), *rest]


def _piece(axis: Axis, start: int, stop: int) -> Axes:
    if not axis.parts:
        sizes = (start, stop - start, axis.size - stop)
        axis.parts = tuple(axis.like(size) for size in sizes if size)
    pieces: list[Axes] = []
    offset = 0
    for part in axis.parts:
        first, last = max(start - offset, 0), min(stop - offset, part.size)
        if first < last:
            pieces.append(cut([part], first, last))
        offset += part.size
    return pieces[0] if len(pieces) == 1 else concatenation(pieces)


def concatenation(pieces: Sequence[Axes]) -> Axes:
    """A dimension of these parts."""
    parts = []
    for axes in pieces:
        part = axes[0] if len(axes) == 1 else Axis(size_of(axes), factors=tuple(axes))
        parts.append(part)
    size = sum(part.size for part in parts)
    return [Axis(size, parts=tuple(parts))] if size != 1 else []
