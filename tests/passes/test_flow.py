"""Which segments use a parameter, and where no stage can begin."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from torch.overrides import TorchFunctionMode

from passes.exports import graph_of, job
from passes.jobs import make_job
from passes.models import profile_of
from shardwright.passes.build import build_model
from shardwright.passes.contract import make_contract
from shardwright.passes.fake import fake_mode, faked
from shardwright.passes.imports import user_code
from shardwright.passes.kernels import kernels_of
from shardwright.passes.operators import tensors_in
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ModelProfile


class _Uses(TorchFunctionMode):
    """Which tensors are arguments of which calls of PyTorch, by segment."""

    def __init__(self) -> None:
        super().__init__()
        self.segment = 0
        self.seen: dict[int, set[int]] = defaultdict(set)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in (*tensors_in(args), *tensors_in(tuple((kwargs or {}).values()))):
            if getattr(func, "__name__", "") not in ("__get__", "size", "dim"):
                self.seen[id(tensor)].add(self.segment)
        return func(*args, **(kwargs or {}))


def _uses(spec: JobSpec, folder: Path, blocks: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The segments that use each parameter, of one run of the whole model in which nothing stands for anything else."""
    with user_code(folder) as code:
        built = build_model(spec.model, code)
        contract, model, uses = make_contract(spec, built, code), built.module, _Uses()
        numbers = count(1)

        def begin(*_: Any) -> None:
            uses.segment = max(uses.segment, 1)

        def end(*_: Any) -> None:
            uses.segment = 1 + next(numbers)

        for path in blocks:
            model.get_submodule(path).register_forward_pre_hook(begin)
            model.get_submodule(path).register_forward_hook(end)
        with faked(model, mode := fake_mode(), None, ()), mode, kernels_of("cuda", code.modules()):
            batch = contract.batch(2)
            args, kwargs = contract.arguments(batch)
            with uses:
                contract.loss(model(*args, **kwargs), batch)
            return {name: tuple(sorted(uses.seen[id(each)])) for name, each in model.named_parameters()}


def _segments(profile: ModelProfile) -> dict[str, tuple[int, ...]]:
    return {parameter.name: parameter.segments for parameter in profile.parameters}


@pytest.mark.parametrize(
    "model",
    ["gpt2", "t5", "bert", "mixtral", "deepseek-v3", "u-net", "transformer", "nested", "shared", "stacked-lstm"],
)
def test_segments_are_those_of_a_run_of_the_whole_model(model: str) -> None:
    flow = graph_of(model).flow
    used = _uses(*job(model), [*flow.like])
    assert {name: flow.segments.get(name, ()) for name in used} == used


SHARED = """
class Shared(Block):
    def __init__(self):
        super().__init__()
        self.reached = []
    def forward(self, x, layer, bias):
        return super().forward(self.reached[0](x) if self.reached else x) + layer(x) + bias
class build(Model):
    block = Shared
    def __init__(self):
        super().__init__()
        self.given, self.reached, self.between = (nn.Linear(16, 16) for _ in range(3))
        self.bias, self.unused = (nn.Parameter(torch.zeros(16)) for _ in range(2))
        self.head.weight = self.embed.weight
        for block in self.blocks[1:]:
            block.reached.append(self.reached)
    def forward(self, tokens):
        x = self.embed(tokens)
        for at, block in enumerate(self.blocks):
            x = block(x, self.given, self.bias if at else x)
            x = self.between(x) if at == 0 else x
        return self.head(x + self.bias)
"""


def test_what_blocks_share_is_found_in_all_of_them(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, SHARED)
    segments = _segments(profile)
    assert {name: at for name, at in segments.items() if not name.startswith("blocks.")} == {
        "bias": (2, 3, 4),
        "unused": (),
        "embed.weight": (0, 4),
        "head.bias": (4,),
        **{f"given.{name}": (1, 2, 3) for name in ("weight", "bias")},
        **{f"reached.{name}": (2, 3) for name in ("weight", "bias")},
        **{f"between.{name}": (2,) for name in ("weight", "bias")},
    }
    assert {segments[f"blocks.{at}.up.weight"] for at in range(3)} == {(1,), (2,), (3,)}
    ((spec, folder),) = [(make_job({"factory": "user:build"}, length=24), tmp_path)]
    assert segments == _uses(spec, folder, profile.block_paths)


def test_a_model_without_blocks_is_one_segment(tmp_path: Path) -> None:
    source = """
    class build(Model):
        def __init__(self):
            super().__init__(layers=1)
    """
    profile = profile_of(tmp_path, source)
    assert profile.block_paths == ()
    assert {*_segments(profile).values()} == {(0,)}
    assert all("the model has none" in cut.refused for cut in profile.cuts)


def _refused(folder: Path, forward: str, inside: str = "return super().forward(x)") -> list[str]:
    """Why the cuts of a model are refused, after embedding and three blocks. `forward` is what runs between them."""
    source = f"""
class Own(Block):
    def forward(self, x):
        {inside}
class build(Model):
    block = Own
    def forward(self, tokens):
        x = self.embed(tokens) * 2
        {forward}
    """
    return [cut.refused for cut in profile_of(folder, source).cuts]


CHAIN = "x = self.blocks[2](self.blocks[1](self.blocks[0](x)))\n        "
PLAIN = "return super().forward(x)"
CASES = {
    "a chain": (CHAIN + "return self.head(x)", PLAIN),
    "on one's own": (
        "x.mul_(2)\n        " + CHAIN + "x += 1\n        return self.head(x.relu_())",
        "x = super().forward(x)\n        x += 1\n        return x.relu_()",
    ),
    "a block's input": (CHAIN + "return self.head(x)", "x += 1\n        return super().forward(x)"),
    "a stream": ("for block in self.blocks:\n            x += block(x)\n        return self.head(x)", PLAIN),
    "a mask": (
        f"mask = torch.ones_like(tokens).unsqueeze(-1)\n        {CHAIN}mask += 1\n        return self.head(x * mask)",
        PLAIN,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_changed_in_place_may_be_cut(tmp_path: Path, case: str) -> None:
    assert _refused(tmp_path, *CASES[case]) == [""] * 4


def test_a_table_of_the_batch_that_is_filled_with_activations_may_not(tmp_path: Path) -> None:
    forward = """found = torch.zeros(3, *x.shape)
        for at, block in enumerate(self.blocks):
            found[at] = x = block(x)
        return self.head(found.sum(0))"""
    why = "blocks.1 changes in place a tensor that until then depends on the batch alone"
    assert _refused(tmp_path, forward) == [why] * 4


@pytest.mark.parametrize("passed_on", ["self.up(x).mean()", "torch.ones(())"])
def test_what_blocks_pass_on_by_other_means_cannot_be_cut(tmp_path: Path, passed_on: str) -> None:
    (tmp_path / "seen.py").write_text("seen = []")
    inside = f"from seen import seen; seen[:] = [{passed_on}]\n        return super().forward(x)"
    forward = f"from seen import seen; {CHAIN}return self.head(x) + seen[0]"
    why = "blocks.0 makes a tensor that is used after it, and does not return it"
    assert _refused(tmp_path, forward, inside) == ["", *[why] * 3]
