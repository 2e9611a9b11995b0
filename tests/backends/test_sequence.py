"""Divided sequences in one process that plays one of four: positions, shapes without values, stages, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardwright.backends.pytorch.runtime.attention_pieces import Merged, Piece, _Efficient, _Flash, attend
from shardwright.backends.pytorch.runtime.context_attention import METHODS, ContextAttention
from shardwright.backends.pytorch.runtime.positions import Peers, Positions
from shardwright.backends.pytorch.runtime.sequence import divide_sequence
from shardwright.backends.pytorch.runtime.stages import stages_of

WIDTH, HEADS, LENGTH, VOCABULARY = 16, 4, 16, 32


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Of two by two processes whose collectives do nothing, of which this is the second."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "cp"))
    dist.destroy_process_group()


class Block(nn.Module):
    """Attention alone, with tables as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.options: dict[str, Any] = {"is_causal": True}
        self.attends = True

    def forward(self, x: Tensor, table: Tensor, *, mask: Tensor | None = None) -> Tensor:
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(x * table).chunk(3, -1))
        mixed = v
        if self.attends:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.mask: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        table = torch.arange(ids.shape[1], device=ids.device).cos()[:, None].expand(-1, WIDTH)
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, table, mask=self.mask)
        logits: Tensor = self.head(x)
        return logits


BLOCKS = ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("zigzag", [False, True])
def test_parts_make_up_the_whole(zigzag: bool) -> None:
    whole = torch.randn(3, 16, 2)
    each = [Positions(size=4, rank=rank, zigzag=zigzag) for rank in range(4)]
    parts = torch.stack([one.own(whole, 1) for one in each])
    torch.testing.assert_close(each[0].whole(parts, 1), whole, rtol=0, atol=0)
    torch.testing.assert_close(each[0].by_rank(whole, 1), parts, rtol=0, atol=0)


def test_zigzag_gives_all_processes_the_same_number_of_earlier_keys() -> None:
    positions = torch.arange(24)
    sums = {int(Positions(size=4, rank=rank, zigzag=True).own(positions, 0).sum()) for rank in range(4)}
    assert len(sums) == 1
    assert Positions(size=4, rank=1, zigzag=True).own(positions, 0).tolist() == [3, 4, 5, 18, 19, 20]


def test_an_own_part_keeps_no_memory_of_the_whole() -> None:
    whole = torch.randn(1, 16, 2)
    own = Positions(size=4, rank=0).own(whole, 1)
    assert own.untyped_storage().nbytes() == whole.untyped_storage().nbytes() // 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_shapes_without_values_are_those_of_own_positions(mesh: DeviceMesh, method: str, fake: bool) -> None:
    mode = FakeTensorMode() if fake else torch.device("meta")
    with mode:
        model = Model()
        sequences = divide_sequence(model, BLOCKS, context=mesh["cp"], head="head", method=method)
        ids = torch.zeros(2, LENGTH, dtype=torch.long)
        seen: list[tuple[int, ...]] = []
        for block in model.blocks:
            block.qkv.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
        logits = model(ids)
        assert logits.shape == (2, LENGTH // 2, VOCABULARY)
        assert sequences.local(ids).shape == (2, LENGTH // 2)
        assert seen == [(2, LENGTH // 2, WIDTH)] * 2
        logits.sum().backward()
        assert all(each.grad is not None and each.grad.shape == each.shape for each in model.parameters())


def test_without_a_head_positions_stay_divided_after_the_blocks(mesh: DeviceMesh) -> None:
    with torch.device("meta"):
        model = Model()
        seen: list[int] = []
        model.head.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
        divide_sequence(model, BLOCKS, context=mesh["cp"], method="ring")
        assert model(torch.zeros(2, LENGTH, dtype=torch.long)).shape[1] == LENGTH // 2
    assert seen == [LENGTH // 2]


def test_tensor_parallelism_divides_blocks_alone(mesh: DeviceMesh) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH))
        seen: list[int] = []
        for block in model:
            block.register_forward_hook(lambda _, __, made: seen.append(made.shape[1]))
        sequences = divide_sequence(model, ["1", "2"], tensor=mesh["tp"])
        ids = torch.zeros(2, LENGTH, dtype=torch.long)
        model(ids).sum().backward()
        assert sequences.local(ids) is ids
    assert seen == [LENGTH, LENGTH // 2, LENGTH]


def test_stages_hand_on_own_positions(mesh: DeviceMesh) -> None:
    model = Model()
    sequences = divide_sequence(model, BLOCKS, context=mesh["cp"], head="head", method="ring")

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), sequences.local(ids).flatten())

    stages = stages_of(model, BLOCKS, [1], [0, 1], loss, torch.zeros(2, LENGTH, dtype=torch.long))
    assert [wire.shape for wire in stages.wires[0, 1]] == [(2, LENGTH // 2, WIDTH)]


def test_blocks_share_the_own_part_of_a_table(mesh: DeviceMesh) -> None:
    model = Model().to("meta")
    divide_sequence(model, BLOCKS, context=mesh["cp"], head="head", method="ring")
    seen: list[Tensor] = []
    inner: list[Any] = [block.forward.inner for block in model.blocks]
    for number, block in enumerate(model.blocks):

        def look(x: Tensor, table: Tensor, number: int = number, **others: Any) -> Any:
            seen.append(table)
            return inner[number](x, table, **others)

        block.forward.inner = look
    _call(model)
    assert seen[0].shape == (LENGTH // 2, WIDTH)
    assert seen[0] is seen[1]


def _divided(mesh: DeviceMesh, method: str = "ring", **changes: Any) -> Model:
    with torch.device("meta"):
        model = Model()
        divide_sequence(model, BLOCKS, context=mesh["cp"], head="head", method=method, **changes)
    return model


def _call(model: nn.Module, length: int = LENGTH) -> Any:
    return model(torch.zeros(2, length, dtype=torch.long, device="meta"))


def test_a_block_without_fused_attention_is_refused(mesh: DeviceMesh) -> None:
    model = _divided(mesh)
    model.blocks[1].attends = False
    with pytest.raises(RuntimeError, match=r"blocks\.1 never called torch\.nn\.functional\.scaled_dot"):
        _call(model)


def test_masks_dropout_and_the_wrong_causality_are_refused(mesh: DeviceMesh) -> None:
    model = _divided(mesh)
    model.mask = torch.ones(LENGTH // 2, LENGTH // 2, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="with a mask"):
        _call(model)
    model.mask = None
    model.blocks[0].options["dropout_p"] = 0.1
    with pytest.raises(ValueError, match=r"dropout \(0\.1\)"):
        _call(model)
    with pytest.raises(ValueError, match="causal attention in a model whose sequences are divided as if"):
        _call(_divided(mesh, causal=False))


def test_lengths_that_do_not_divide_are_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(ValueError, match="sequences of 18 positions cannot be cut into 4 equal chunks"):
        _call(_divided(mesh), 18)
    with pytest.raises(ValueError, match="sequences of 2 positions are too short for 2 processes"):
        _call(_divided(mesh, "ulysses"), 2)
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH))
        divide_sequence(model, ["1"], tensor=mesh["tp"])
        with pytest.raises(ValueError, match="sequences of 15 positions"):
            _call(model, 15)


def test_methods_and_heads_that_do_not_fit_are_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(ValueError, match="no method of context parallelism is called 'none'"):
        divide_sequence(Model(), BLOCKS, context=mesh["cp"], head="head")
    peers = Peers(mesh["cp"])
    q = torch.empty(1, 3, 4, 8, device="meta")
    with pytest.raises(ValueError, match="3 heads of queries on a process cannot go to 2 processes"):
        ContextAttention(peers, "ulysses")(q, q, q)
    with pytest.raises(ValueError, match="3 heads of queries, 1 of keys, and not enable_gqa"):
        ContextAttention(peers, "ring")(q, q[:, :1], q[:, :1])


def test_attention_outside_of_blocks_is_that_of_torch(mesh: DeviceMesh) -> None:
    _call(_divided(mesh))
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    expected = (q @ k.mT / 2).softmax(-1) @ v
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), expected)


def test_autocast_and_mixed_dtypes_are_as_with_attention_of_torch(mesh: DeviceMesh) -> None:
    attention = ContextAttention(Peers(mesh["cp"], zigzag=True), "ring")
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v, is_causal=True).dtype == torch.bfloat16
        assert attention(q.double(), k.double(), v.double(), is_causal=True).dtype == torch.float64
    assert attention(q, k, v, is_causal=True).dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"are of torch\.float32, torch\.bfloat16 and torch\.float32, not of one dtype"
    ):
        attention(q, k.bfloat16(), v)


@pytest.mark.parametrize("kernel", [_Flash, _Efficient], ids=["flash", "efficient"])
def test_operators_of_other_devices_take_what_they_are_given(kernel: type[_Flash | _Efficient]) -> None:
    dtype = torch.bfloat16 if kernel is _Flash else torch.float32
    q, k, v = (torch.empty(2, heads, 40, 16, dtype=dtype, device="meta") for heads in (4, 2, 2))
    for rows, columns, causal in ((40, 40, True), (20, 40, False), (40, 20, False)):
        operands = q[:, :, :rows], k[:, :, :columns], v[:, :, :columns]
        piece = kernel.forward(*operands, causal, 0.25)
        assert (piece.output.shape, piece.normaliser.shape) == ((2, 4, rows, 16), (2, 4, rows))
        assert piece.normaliser.dtype == torch.float32
        found = kernel.backward(operands[0], *operands, piece, causal, 0.25)
        assert [each.shape for each in found] == [each.shape for each in operands]


def test_pieces_add_up_however_large_their_scores_are() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64)
    k[:, :, 3:] *= 500  # sums of exponentials of these overflow
    whole = attend(q, k, v, causal=False, scale=1.0)
    merged = Merged(attend(q, k[:, :, :3], v[:, :, :3], causal=False, scale=1.0))
    merged.add(attend(q, k[:, :, 3:], v[:, :, 3:], causal=False, scale=1.0), slice(0, 6))
    torch.testing.assert_close(merged.piece(q.dtype), Piece(whole.output, whole.normaliser, ()))
