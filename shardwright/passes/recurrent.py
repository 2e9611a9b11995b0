"""Recurrent layers (`nn.LSTM`, `nn.GRU`, `nn.RNN`) as one operator that is priced.

[Note: recurrent layers]
PyTorch runs a whole recurrent module as one operator: cuDNN's on CUDA (`_cudnn_rnn`, torch 2.13,
aten/src/ATen/native/cudnn/RNN.cpp), oneDNN's on the CPU. So does the profile, by an operator of its own, `recurrent`.

- FLOPs: two a multiply-add for every element of every weight matrix, once for each time step of each sequence. Backward
  is two operators, as cuDNN's are (`cudnnRNNBackwardData`, `cudnnRNNBackwardWeights`), each with the work of forward.
- Bytes kept for backward: input, output and initial states, and what the operator keeps in a buffer of its own. How
  large that is (cuDNN's reserve space, oneDNN's workspace) only the library knows, on the device. Assumed is what
  PyTorch's own fused cells keep (`_thnn_fused_lstm_cell`, `_thnn_fused_gru_cell`, aten/src/ATen/native/cuda/RNN.cu):
  for each step and direction, four gates and the cell state of an LSTM (and its state before a projection), five states
  of a GRU, nothing of a plain RNN; and between the layers of one module their outputs, with dropout once more after it
  and one byte an element of mask.
- Not counted: cuDNN's temporary workspace, and the copy of all weights in one buffer that cuDNN makes when they do not
  lie in one (it warns of that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import Function

from shardwright.passes.untyped import apply

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_KEPT_STATES = {"lstm": 5, "gru": 5, "rnn_tanh": 0, "rnn_relu": 0}
"""Values of the size of a hidden state that are kept for each step ([Note: recurrent layers])."""

_library = torch.library.Library("shardwright", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "recurrent(Tensor input, Tensor[] states, Tensor[] weights, str kind, int layers, float dropout, "
    "bool bidirectional, bool batch_first) -> (Tensor output, Tensor hidden, Tensor cell, Tensor kept)"
)
_library.define(  # type: ignore[no-untyped-call]
    "recurrent_backward_input(Tensor gradient, Tensor input, Tensor[] states, Tensor output, Tensor kept, "
    "Tensor[] weights) -> (Tensor, Tensor[])"
)
_library.define(  # type: ignore[no-untyped-call]
    "recurrent_backward_weight(Tensor input, Tensor[] states, Tensor output, Tensor kept, Tensor[] weights) -> Tensor[]"
)


def _recurrent(
    input: torch.Tensor,
    states: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    kind: str,
    layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    directions = 2 if bidirectional else 1
    steps, batch = (input.shape[1], input.shape[0]) if batch_first else input.shape[:2]
    wide = directions * states[0].shape[-1]
    output = input.new_empty((steps, batch, wide))
    hidden = states[-1].shape[-1]
    kept_of_a_step = layers * directions * hidden * (_KEPT_STATES[kind] + (states[0].shape[-1] != hidden))
    between = (layers - 1) * wide
    elements = steps * batch * (kept_of_a_step + between * (2 if dropout else 1))
    masks = steps * batch * between if dropout else 0
    kept = input.new_empty((elements * input.element_size() + masks,), dtype=torch.uint8)
    hidden_state, *cell = [torch.empty_like(state) for state in states]
    output = output.transpose(0, 1) if batch_first else output
    return output, hidden_state, cell[0] if cell else input.new_empty((0,)), kept


def _backward_input(
    gradient: torch.Tensor,
    input: torch.Tensor,
    states: Sequence[torch.Tensor],
    output: torch.Tensor,
    kept: torch.Tensor,
    weights: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.empty_like(input), [torch.empty_like(state) for state in states]


def _backward_weight(
    input: torch.Tensor,
    states: Sequence[torch.Tensor],
    output: torch.Tensor,
    kept: torch.Tensor,
    weights: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    return [torch.empty_like(weight) for weight in weights]


for _name, _function in (
    ("recurrent", _recurrent),
    ("recurrent_backward_input", _backward_input),
    ("recurrent_backward_weight", _backward_weight),
):
    torch.library.register_fake(f"shardwright::{_name}", _function, lib=_library)


def _flops(input: torch.Tensor, weights: Iterable[torch.Tensor]) -> int:
    steps = input.shape[0] * input.shape[1]
    return 2 * steps * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _forward_flops(input: torch.Tensor, states: object, weights: Iterable[torch.Tensor], *_: Any, **__: Any) -> int:
    return _flops(input, weights)


def _input_flops(
    gradient: object, input: torch.Tensor, states: object, output: object, kept: object, weights: Any, **_: Any
) -> int:
    return _flops(input, weights)


def _weight_flops(input: torch.Tensor, states: object, output: object, kept: object, weights: Any, **_: Any) -> int:
    return _flops(input, weights)


RECURRENT_FLOPS: Mapping[str, Callable[..., int]] = {
    "recurrent": _forward_flops,
    "recurrent_backward_input": _input_flops,
    "recurrent_backward_weight": _weight_flops,
}
"""[Note: recurrent layers]."""


class _Recurrent(Function):
    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], count: int, input: torch.Tensor, *others: torch.Tensor) -> Any:
        states, weights = list(others[:count]), list(others[count:])
        output, *last, kept = torch.ops.shardwright.recurrent(input, states, weights, *options)
        ctx.count = count
        ctx.save_for_backward(input, output, kept, *others)
        ctx.set_materialize_grads(False)
        return (output, *last[:count])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None, *_: torch.Tensor | None) -> Any:
        input, output, kept, *others = ctx.saved_tensors
        states, weights = others[: ctx.count], others[ctx.count :]
        gradient = torch.empty_like(output) if gradient is None else gradient
        operands = (input, states, output, kept, weights)
        of_input, of_states = torch.ops.shardwright.recurrent_backward_input(gradient, *operands)
        of_weights = [None] * len(weights)
        if any(_is_wanted(node) for node, _ in ctx.next_functions[3 + ctx.count :]):
            of_weights = torch.ops.shardwright.recurrent_backward_weight(*operands)
        return (None, None, of_input, *of_states, *of_weights)


def _is_wanted(node: Any) -> bool:
    """Whether the backward that runs leads to this node. (`needs_input_grad` tells only what could be asked for.)"""
    return node is not None and torch._C._will_engine_execute_node(node)


def _run(original: Callable[..., Any], kind: str, *arguments: Any) -> Any:
    """Stands for `torch._VF.lstm` and its like."""
    input, states, weights, *options = arguments
    if not isinstance(weights, list | tuple):  # a packed sequence: (data, batch sizes, states, weights, ...)
        return original(*arguments)
    _, layers, dropout, training, bidirectional, batch_first = options
    states = list(states) if kind == "lstm" else [states]
    chosen = (kind, layers, dropout if training else 0.0, bidirectional, batch_first)
    views = [weight.view_as(weight) for weight in weights]  # their nodes can be asked whether they will run
    return apply(_Recurrent, chosen, len(states), input, *states, *views)


@contextmanager
def recurrent_layers() -> Iterator[None]:
    """While open, recurrent modules run as [Note: recurrent layers] says."""
    functions: Any = vars(nn.modules.rnn)["_VF"]
    try:
        for kind in KINDS:
            setattr(functions, kind, partial(_run, getattr(functions, kind), kind))
        yield
    finally:
        for kind in KINDS:
            vars(functions).pop(kind, None)


def recurrent_warnings(operators: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """What to say of recurrent layers, from the names of all operators with the paths of their modules."""
    paths = list(dict.fromkeys(path for name, path in operators if name == "recurrent"))
    if not paths:
        return ()
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return (
        f"recurrent module {paths[0] or '(the model itself)'}{more}: only cuDNN or oneDNN knows how much it keeps for "
        "backward; counted is what PyTorch's own fused cells keep (gates and states of every step)",
    )
