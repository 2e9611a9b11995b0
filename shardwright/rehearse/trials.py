"""How often, and with what, a plan is rehearsed, and how far it may then be from one process.

[Note: why several trials]
AdamW divides each gradient by its own size, so that a wrong scale of the loss hardly shows in the parameters; SGD
without clipping is proportional to it. And bf16 rounds so coarsely that small errors drown, so the same sharding is
rehearsed in float32 as well; fully_shard runs float32 only where it shards. Numbers that travel in fewer bits are
rounded much coarser still, so the same layout is rehearsed with exact ones, and then once as it is.

[Note: which one process]
The reference runs either the whole global batch at once, which takes nothing for granted, or the same micro-batches as
the plan's processes, one after the other. The latter computes each micro-batch bit for bit alike, and only the order in
which their gradients are added up differs; in bf16, which rounds the gradient of every micro-batch, no other reference
is near enough to compare with. A plan for one process would be compared with itself, so it gets the whole batch.

[Note: tolerances]
Adding n numbers in another order moves the sum by up to n u times the sum of their sizes, u being 2**-24 in float32
(Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, section 4.2), and about sqrt(n) u where errors
are random. n is the number of micro-batches (a dozen) where micro-batches are the same, else the number of tokens (a
thousand); gradients are sums of both signs, so that relative to their sum the error is larger than that of the loss.
The norm of a gradient is a sum of squares in float32 by torch, over shards or over the whole. AdamW turns an error of a
gradient that is itself near zero into one of the size of the learning rate. In bf16 a difference of u in a parameter
can flip its rounding to 8 bits, which is then a difference of 2**-9.
The numbers below are ten times and more what the plans of `tests/rehearse` and `examples` were measured to differ by.
What they are to catch changes a gradient by much more: a lost micro-batch of a dozen by a twelfth, and where the widest
ones apply, on one process, by a third.

[Note: the loss of other weights]
The loss of the first step is of the same weights as the reference's, whatever is rounded in gradients. Later losses are
of weights that differ from the reference's by as much as the updates so far may: by the tolerance t of the update,
times the distance |w - w0| that the reference has moved. By the mean value theorem two losses differ by no more than
that distance times the largest gradient norm between the two points. The norm at the one end is the reference's, at the
other it is within the tolerance of the norm, and between them it is taken to be no larger than that:

    |L(w') - L(w)| <= (1 + t_norm) |g(w)| t |w - w0|

This comes on top of the first step's tolerance where numbers are rounded so coarsely that no constant holds for every
model: in bf16, and with gradients in fewer bits. In float32 it would be next to nothing, and is left out. Weights that
are gathered in int8 are rounded from the first step on: the loss may then also be off by what was measured
(`_FEWER_BITS.loss`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardwright.planner.engines import ENGINES
from shardwright.rehearse.shrink import Precision
from shardwright.schemas.job import OptimizerSpec
from shardwright.schemas.plan import ContextParallel, Decision, ExpertParallel, Plan, TensorParallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Largest relative differences that rounding explains ([Note: tolerances])."""

    loss: float
    gradient_norm: float
    update: float
    of_each_tensor: bool = True
    """Whether `update` limits every single tensor, or all of them together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One way to run the plan ([Note: why several trials])."""

    name: str
    optimizer: OptimizerSpec
    precision: Precision
    same_micro_batches: bool
    """Of the reference ([Note: which one process])."""
    shares_model: bool = False
    """Whether processes share layers, sequences or experts: then no micro-batch is computed bit for bit alike."""
    routes: bool = False
    """Whether the model has routers, which choose experts for each token."""
    fewer_bits: bool = False
    """Whether what the plan sends in fewer bits is so sent."""

    @property
    def tolerance(self) -> Tolerance:
        """How far it may be from the reference."""
        if self.fewer_bits:
            return _FEWER_BITS
        bitwise = self.same_micro_batches and not self.shares_model
        exact = self.precision == "fp32"
        unclipped = self.optimizer.name == "sgd" and self.optimizer.clip_grad_norm is None
        if unclipped and self.same_micro_batches and not exact:
            return _NOTHING_AMPLIFIES if bitwise else _SHARED_LAYERS
        if exact and self.routes and not bitwise and not unclipped:
            return _ROUTED
        # In float32 the order in which parts of a layer are summed up matters as little as that of micro-batches.
        return _TOLERANCES[self.precision, bitwise or (exact and unclipped and self.same_micro_batches)]


_SGD = "unclipped sgd"

_TOLERANCES = {
    ("fp32", True): Tolerance(loss=1e-6, gradient_norm=5e-5, update=1e-4),
    ("fp32", False): Tolerance(loss=5e-6, gradient_norm=5e-5, update=3e-3),
    ("bf16_mixed", True): Tolerance(loss=5e-4, gradient_norm=2e-3, update=0.1),
    ("bf16_mixed", False): Tolerance(loss=2e-3, gradient_norm=3e-2, update=0.25, of_each_tensor=False),
}

_NOTHING_AMPLIFIES = Tolerance(loss=1e-4, gradient_norm=1e-3, update=0.02)
"""bf16 on the same micro-batches, where neither AdamW nor clipping turns a rounding error into a larger one."""

_SHARED_LAYERS = Tolerance(loss=5e-4, gradient_norm=1.5e-2, update=0.1, of_each_tensor=False)
"""The same where processes share layers, sequences or experts: partial sums are rounded to 8 bits before they are added
up. Measured: 2e-5 of the loss, 1.3e-3 of the norm, 7e-3 of the update."""

_ROUTED = Tolerance(loss=5e-5, gradient_norm=3e-3, update=0.15, of_each_tensor=False)
"""float32 where a router chooses experts and AdamW or clipping amplifies. A token for which two experts are a tie but
for rounding goes to the other one, which changes gradients by that token's, and AdamW passes on to the choices of the
next step. A tiny Mixtral on one process, whole batch against micro-batches, learning rate 0.01, 24 seeds: gradients of
the first step agree to 4e-7; where all choices stay the same, as in 18 of them, so do norms to 1e-5 and updates to
2e-4; in the others up to a hundred of 6000 choices differ by the fourth step, norms by up to 3e-4, updates by up to
1.5e-2 of all elements (8e-2 of a router's). With SGD no choice differed in 24, and updates by up to 4e-5."""

_FEWER_BITS = Tolerance(loss=2e-4, gradient_norm=0.15, update=0.3, of_each_tensor=False)
"""Gradients of which each element is off by up to a fourteenth of the largest of 256, once an axis. A wrong scale or
group changes them by more than that; what is smaller shows in the exact trials. `loss`: only where weights, too, are
rounded ([Note: the loss of other weights])."""


def loss_tolerances(
    of: Trial,
    decision: Decision,
    losses: Sequence[float | None],
    norms: Sequence[float | None],
    moved: Sequence[float],
) -> list[float]:
    """The largest relative difference of each step's loss. `losses`, `norms`, `moved`: of the reference, step by step;
    `moved` is how far its weights were from the initial ones after the step."""
    limits = of.tolerance
    always = limits.loss
    if of.fewer_bits:
        exact = replace(of, fewer_bits=False).tolerance.loss
        always = max(exact, limits.loss) if decision.communication.int8_gathers else exact
    elif of.precision == "fp32":
        return [always] * len(losses)
    reach = (1 + limits.gradient_norm) * limits.update
    return [
        always + (reach * norm * distance / max(abs(loss), 1e-30) if loss is not None and norm is not None else 0.0)
        for loss, norm, distance in zip(losses, norms, (0.0, *moved), strict=False)
    ]


def trials(plan: Plan, *, routes: bool = False) -> tuple[Trial, ...]:
    """The plan's own optimizer and precision; SGD without clipping; and, where it can be, that in float32; and with
    what the plan sends in fewer bits. `routes`: whether the model has routers."""
    shares = any(degree.degree > 1 for degree in _shared(plan.decision))
    exact = tuple(replace(one, shares_model=shares, routes=routes) for one in _exact_trials(plan))
    sent = plan.decision.communication
    if not (sent.int8_gathers or sent.int4_reductions):
        return exact
    sgd = next(one for one in exact if one.name.startswith(_SGD))
    return (*exact, replace(sgd, name=f"{sgd.name}, fewer bits", fewer_bits=True))


def _shared(decision: Decision) -> tuple[TensorParallel | ContextParallel | ExpertParallel, ...]:
    return decision.tensor_parallel, decision.context_parallel, decision.expert_parallel


def _exact_trials(plan: Plan) -> tuple[Trial, ...]:
    decision, own = plan.decision, plan.job.train.optimizer
    sgd = OptimizerSpec(
        name="sgd",
        lr=0.01,
        momentum=0.9,
        weight_decay=own.weight_decay,
        no_decay=own.no_decay,
        groups=own.groups,
        clip_grad_norm=None,
    )
    shared = decision.mesh.world_size > 1
    if decision.precision == "fp32":
        return (
            Trial(name=f"{own.name}, fp32", optimizer=own, precision="fp32", same_micro_batches=False),
            Trial(name=f"{_SGD}, fp32", optimizer=sgd, precision="fp32", same_micro_batches=shared),
        )
    mixed = (
        Trial(name=f"{own.name}, bf16", optimizer=own, precision="bf16_mixed", same_micro_batches=shared),
        Trial(name=f"{_SGD}, bf16", optimizer=sgd, precision="bf16_mixed", same_micro_batches=shared),
    )
    exact = Trial(name=f"{_SGD}, fp32", optimizer=sgd, precision="fp32", same_micro_batches=False)
    degree = decision.states.parameters.degree
    runs = ENGINES[decision.engine.name].runs(world=decision.mesh.world_size, degree=degree, precision="fp32")
    return (*mixed, exact) if runs else mixed
