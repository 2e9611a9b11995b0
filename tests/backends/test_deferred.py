"""Weight gradients deferred at the layer: what backward would have made, later, without recomputation."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardwright.backends.pytorch.runtime.deferred import WeightQueue, compute, defer_weight_gradients

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 12


class Block(nn.Module):
    """Linear layers with and without bias, one used three times, and others that are not deferred."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH, bias=False)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        y = x
        for _ in range(3):
            y = torch.tanh(self.mix(y))
        return x + y


class Model(nn.Module):
    """Two blocks; `frozen`: some parameters of them are not trained."""

    def __init__(self, checkpointed: bool = False, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.checkpointed = checkpointed
        if frozen:
            self.blocks[0].up.weight.requires_grad_(False)  # type: ignore[union-attr]
            self.blocks[1].mix.bias.requires_grad_(False)  # type: ignore[union-attr]
            self.blocks[1].down.requires_grad_(False)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def train(model: nn.Module, queue: WeightQueue | None, shape: tuple[int, ...], *, autocast: bool = False) -> Tensor:
    """Three micro-batches; with a queue, each one's weight gradients after the next one's backward. Returns the last
    input's gradient."""
    dtype, pending = next(model.parameters()).dtype, list[Any]()
    for micro_batch in range(3):
        torch.manual_seed(micro_batch)
        x = torch.randn(*shape, WIDTH, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x).float().square().mean()
        if queue is None:
            torch.autograd.backward(loss)
        else:
            with queue.deferring() as deferred:
                torch.autograd.backward(loss)
            pending.append(deferred)
            if micro_batch:
                compute(pending.pop(0))
    for deferred in pending:
        compute(deferred)
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "some frozen"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_backward_to_the_bit(
    dtype: torch.dtype, checkpointed: bool, frozen: bool, shape: tuple[int, ...]
) -> None:
    plain, deferring, queue = Model(frozen=frozen).to(dtype), Model(checkpointed, frozen).to(dtype), WeightQueue()
    defer_weight_gradients(deferring, queue)
    expected, found = train(plain, None, shape), train(deferring, queue, shape)
    assert torch.equal(found, expected)
    for (name, one), other in zip(plain.named_parameters(), deferring.parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None, name
        else:
            assert other.grad is not None, name
            assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
def test_under_autocast_the_gradients_are_the_same(checkpointed: bool) -> None:
    """But for a layer used several times, whose gradients autocast adds up in bf16 and the queue in fp32."""
    plain, deferring, queue = Model(), Model(checkpointed), WeightQueue()
    defer_weight_gradients(deferring, queue)
    expected, found = (train(model, each, (2, 5), autocast=True) for model, each in ((plain, None), (deferring, queue)))
    assert torch.equal(found, expected)
    for (name, one), other in zip(plain.named_parameters(), deferring.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert other.grad.dtype == torch.float32
        exact = 0.0 if "mix" not in name else 2**-7 * float(one.grad.abs().max())
        assert float((one.grad - other.grad).abs().max()) <= exact, name


def test_nothing_is_deferred_unless_the_queue_defers() -> None:
    plain, deferring, queue = Model(), Model(), WeightQueue()
    defer_weight_gradients(deferring, queue)
    train(plain, None, (5,))
    train(deferring, None, (5,))
    for one, other in zip(plain.parameters(), deferring.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    with torch.no_grad():
        x = torch.randn(3, WIDTH)
        assert torch.equal(plain(x), deferring(x))


def test_weight_gradients_wait_for_compute_and_recompute_nothing() -> None:
    model, queue = Model(checkpointed=True), WeightQueue()
    defer_weight_gradients(model, queue)
    with queue.deferring() as deferred:
        model(torch.randn(4, WIDTH, requires_grad=True)).sum().backward()
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert [parameter.grad for layer in linears for parameter in layer.parameters()] == [None] * 10
    assert all(block.norm.weight.grad is not None for block in model.blocks)
    runs = [block.runs for block in model.blocks]
    assert runs == [2, 2]
    compute(deferred)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert [block.runs for block in model.blocks] == runs
    with pytest.raises(RuntimeError, match="computed already"):
        compute(deferred)


def test_compute_reads_no_weights_and_calls_the_hooks_of_parameters() -> None:
    layer, queue, called = nn.Linear(3, 4), WeightQueue(), list[str]()
    defer_weight_gradients(layer, queue)
    for name, parameter in layer.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: called.append(name) if p.grad is not None else None
        )
    x = torch.randn(2, 3, requires_grad=True)
    with queue.deferring() as deferred:
        layer(x).sum().backward()
    assert called == []
    layer.weight.data.untyped_storage().resize_(0)
    compute(deferred)
    assert sorted(called) == ["bias", "weight"]
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, x.detach().sum(0).expand(4, 3))


def test_a_layer_lets_go_of_what_it_held() -> None:
    layer, queue = nn.Linear(3, 4), WeightQueue()
    defer_weight_gradients(layer, queue)
    with queue.deferring() as deferred:
        layer(torch.randn(2, 3)).sum().backward()
    compute(deferred)
    assert [(each.input, each.output_gradient) for each in deferred] == [(None, None)]


def test_subclasses_and_other_layers_keep_their_forward() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model, queue = nn.Sequential(Own(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)), WeightQueue()
    names, before = list(model.state_dict()), repr(model)
    defer_weight_gradients(model, queue)
    assert (list(model.state_dict()), repr(model)) == (names, before)
    with queue.deferring() as deferred:
        model(torch.randn(2, 3)).sum().backward()
    assert [each.weight is model[2].weight for each in deferred] == [True]
    assert model[0].weight.grad is not None


def test_hugging_faces_conv1d_is_deferred_too() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    layer = pytorch_utils.Conv1D(4, 3)
    other = pytorch_utils.Conv1D(4, 3)
    other.load_state_dict(layer.state_dict())
    queue = WeightQueue()
    defer_weight_gradients(layer, queue)
    x, y = (torch.arange(12.0).view(2, 2, 3).requires_grad_() for _ in range(2))
    with queue.deferring() as deferred:
        functools.reduce(torch.mul, [layer(x)] * 2).sum().backward()
    assert layer.weight.grad is None
    compute(deferred)
    functools.reduce(torch.mul, [other(y)] * 2).sum().backward()
    for one, expected in ((layer.weight, other.weight), (layer.bias, other.bias), (x, y)):
        assert torch.equal(one.grad, expected.grad)


def test_what_a_layer_returns_may_be_changed_in_place() -> None:
    found = []
    for queue in (None, WeightQueue()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, 20), nn.ReLU(inplace=True), nn.Linear(20, WIDTH))
        if queue is not None:
            defer_weight_gradients(model, queue)
        model(torch.randn(2, 3, WIDTH)).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, deferred) for plain, deferred in zip(*found, strict=True))
