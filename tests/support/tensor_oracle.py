"""A block divided by our styles and by torch's, and cross-entropy of divided logits and of whole ones."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from shardwright.backends.pytorch.runtime.tensor_parallel import Column, Region, Row, Shared, matching
from shardwright.backends.pytorch.runtime.tensor_parallel_loss import DividedLogits, divide_cross_entropy

WIDTH, HEADS, LENGTH, CLASSES = 16, 4, 8, 13


class Attention(nn.Module):
    """Not causal."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        result: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return result


class Mlp(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.gelu(self.up(x)))
        return result


class Block(nn.Module):
    """Pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


def ours(sequence: bool) -> dict[str, ParallelStyle]:
    """Our table."""
    dim = 1 if sequence else None
    table: dict[str, ParallelStyle] = {
        "attention": Region(sequence_dim=dim, attributes=("heads",)),
        "attention.[qkv]": Column(units=HEADS),
        "attention.o": Row(sequence_dim=dim),
        "mlp": Region(sequence_dim=dim),
        "mlp.up": Column(),
        "mlp.down": Row(sequence_dim=dim),
    }
    return table | ({"norm[12]": Shared()} if sequence else {})


def theirs(sequence: bool) -> dict[str, ParallelStyle]:
    """The same in torch's styles."""
    row = RowwiseParallel(output_layouts=Shard(1)) if sequence else RowwiseParallel()
    table: dict[str, ParallelStyle] = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
    table |= {"attention.o": row, "mlp.up": ColwiseParallel(), "mlp.down": row}
    if sequence:
        whole = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
        table |= {"attention": whole, "mlp": whole, "norm1": SequenceParallel(), "norm2": SequenceParallel()}
    return table


def compare_block(mesh: DeviceMesh, sequence: bool) -> float:
    """The largest difference of outputs, input gradients and local gradients."""
    torch.manual_seed(3)
    mine, other = Block(), Block()
    other.load_state_dict(mine.state_dict())
    x = torch.randn(2, LENGTH, WIDTH)
    x = x.chunk(mesh.size(), 1)[mesh.get_local_rank()].contiguous() if sequence else x
    parallelize_module(mine, mesh, matching(mine, ours(sequence)))
    parallelize_module(other, mesh, theirs(sequence))
    other.attention.heads //= mesh.size()
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [model(each) for model, each in zip((mine, other), inputs, strict=True)]
    for output in outputs:
        output.square().sum().backward()
    pairs = [outputs, [each.grad for each in inputs]]
    theirs_by_name = dict(other.named_parameters())
    for name, parameter in mine.named_parameters():
        gradient = theirs_by_name[name].grad
        if isinstance(gradient, DTensor):
            placed = gradient.redistribute(placements=theirs_by_name[name].placements)
            gradient = placed.to_local()
        pairs.append([parameter.grad, gradient])
    assert all(a is not None and b is not None and a.shape == b.shape for a, b in pairs)
    return max(float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1)) for a, b in pairs)


class Head(nn.Module):
    """Logits of hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.lm_head(x)
        return result


def compare_loss(mesh: DeviceMesh) -> float:
    """The largest difference of losses and gradients of inputs and weights, over reductions and ignored targets."""
    torch.manual_seed(4)
    one = Head()
    several = deepcopy(one)
    parallelize_module(several, mesh, {"lm_head": Column(enters=True)})
    divide_cross_entropy(several, "lm_head", mesh)
    x, targets = torch.randn(3, LENGTH, WIDTH), torch.randint(0, CLASSES, (3, LENGTH))
    targets[0, 1], targets[2, 2], targets[1] = -100, 7, 7
    worst = 0.0
    for reduction in ("mean", "sum", "none"):
        for ignored in (-100, 7):
            found = []
            for model in (one, several):
                model.zero_grad()
                states = x.clone().requires_grad_()
                logits = model(states)
                logits = (torch.tanh(logits / 3) * 3).view(-1, CLASSES).float()
                valid = targets.flatten().clamp(min=0) if ignored == 7 else targets.flatten()
                loss = F.cross_entropy(logits, valid, ignore_index=ignored, reduction=reduction)
                (loss * torch.arange(1, loss.numel() + 1).view(loss.shape)).sum().backward()
                assert not isinstance(loss, DividedLogits)
                weight = model.lm_head.weight.grad
                assert weight is not None
                assert states.grad is not None
                found.append((loss.detach(), states.grad, weight))
            (loss, grad, weight), (its_loss, its_grad, its_weight) = found
            own = weight.chunk(mesh.size())[mesh.get_local_rank()]
            for a, b in ((loss, its_loss), (grad, its_grad), (own, its_weight)):
                worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1)))
    return worst


def refusals(mesh: DeviceMesh) -> list[str]:
    """What divided logits refuse."""
    model = Head()
    parallelize_module(model, mesh, {"lm_head": Column(enters=True)})
    divide_cross_entropy(model, "lm_head", mesh)
    logits = model(torch.randn(5, WIDTH))
    targets = torch.randint(0, CLASSES, (5,))
    calls = [
        lambda: logits.argmax(-1),
        lambda: F.softmax(logits, -1),
        lambda: logits[..., :2],
        lambda: logits.sum(),
        lambda: F.cross_entropy(logits, targets, label_smoothing=0.1),
        lambda: F.cross_entropy(logits, targets + CLASSES),
        lambda: F.cross_entropy(logits.view(1, 5, CLASSES), targets[None]),
    ]
    messages = []
    for call in calls:
        try:
            call()
            messages.append("")
        except (TypeError, IndexError) as error:
            messages.append(str(error))
    return messages
