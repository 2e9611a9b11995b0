"""Who owns which parameter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from passes.models import profile_of, refusal


def test_blocks_own_their_parameters_and_the_root_the_rest(tmp_path: Path) -> None:
    source = """
    class build(Model):
        def __init__(self):
            super().__init__(layers=4)
            self.blocks[3].down = nn.Linear(32, 16, bias=False)
            self.head.weight = self.embed.weight
            self.blocks[0].norm.requires_grad_(False)
            self.register_buffer("table", torch.zeros(5, dtype=torch.float64))
            self.register_buffer("again", self.table)
    """
    profile = profile_of(tmp_path, source)
    by_name = {parameter.name: parameter for parameter in profile.parameters}
    assert next(iter(by_name)) == "embed.weight"
    assert by_name["embed.weight"].also == ("head.weight",)
    assert {name: p.unit for name, p in by_name.items() if "down.weight" in name} == {
        "blocks.0.down.weight": 1,
        "blocks.1.down.weight": 2,
        "blocks.2.down.weight": 2,
        "blocks.3.down.weight": 3,
    }
    assert {p.unit for name, p in by_name.items() if not name.startswith("blocks")} == {-1}
    assert not by_name["blocks.0.norm.weight"].trainable
    assert by_name["blocks.1.norm.weight"].trainable
    assert profile.buffer_bytes == 40


@pytest.mark.parametrize(
    ("tie", "words"),
    [
        ("self.blocks[1].up.weight = self.blocks[0].up.weight", "block blocks.0 and block blocks.1"),
        ("self.blocks[2].norm.weight = self.norm.weight", "the rest of the model and block blocks.2"),
    ],
)
def test_parameters_shared_by_groups_are_refused(tmp_path: Path, tie: str, words: str) -> None:
    source = f"""
    class build(Model):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(16)
            {tie}
    """
    assert words in refusal(tmp_path, source).message


def test_parameters_shared_within_a_block_are_the_blocks(tmp_path: Path) -> None:
    source = """
    class Tied(Block):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(16, 32)
            self.more.weight = self.up.weight
    class build(Model):
        block = Tied
    """
    (first, *_) = [p for p in profile_of(tmp_path, source).parameters if p.name == "blocks.0.up.weight"]
    assert (first.unit, first.also) == (1, ("blocks.0.more.weight",))


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _tied(where: str) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    model.first, model.last = nn.Linear(4, 4), nn.Linear(4, 4)
    left, right = {
        "within a block": (model.blocks[0][0], model.blocks[0][1]),
        "outside": (model.first, model.last),
        "between blocks": (model.blocks[0][0], model.blocks[1][0]),
        "with the rest": (model.blocks[0][0], model.last),
    }[where]
    right.weight = left.weight
    model.forward = lambda x: model.last(model.blocks[1](model.blocks[0](model.first(x))))
    return model


@pytest.mark.parametrize("where", ["within a block", "outside", "between blocks", "with the rest"])
def test_fsdp_shares_and_refuses_as_we_do(where: str, one_process: None) -> None:
    model = _tied(where)
    distinct = len(list(model.parameters()))
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    if where in ("within a block", "outside"):
        model(torch.ones(2, 4)).sum().backward()
        assert len(list(model.parameters())) == distinct
    else:
        with pytest.raises(ValueError, match="already managed by another FSDP group"):
            model(torch.ones(2, 4))
