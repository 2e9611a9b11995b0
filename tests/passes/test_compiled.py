"""Costs under torch.compile agree with what torch.compile really does, on small models on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import nop
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import partition_fn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._ops import OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from passes.jobs import GPT2, LLAMA, USER, make_job
from passes.models import HEADER
from shardwright.passes import profile_from_json, profile_model, profile_to_json
from shardwright.passes.build import build_model
from shardwright.passes.contract import make_contract
from shardwright.passes.imports import user_code
from shardwright.passes.operators import operation
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import (
    KEPT_BY_SELECTIVE,
    ComputeDtypeName,
    ModelProfile,
    Operator,
    Phase,
    Policy,
    Unit,
    UnitCost,
)

LENGTH = 37
BLOCKS = {
    "dropout": """
        class Block(Block):
            def forward(self, x):
                return x + F.dropout(self.down(F.dropout(F.gelu(self.up(self.norm(x))), 0.2)), 0.1)
    """,
    "dit": """
        class Block(nn.Module):
            def __init__(self, width=16):
                super().__init__()
                self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
                self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
                self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
                self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            def forward(self, x, condition):
                shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
                heads = self.qkv(self.norms[0](x) * (1 + scale) + shift).chunk(3, -1)
                q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in heads)
                x = x + gate * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
                h = self.norms[1](x) * (1 + scale2) + shift2
                return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))
        class Model(Model):
            block = Block
            def forward(self, tokens):
                x = self.embed(tokens)
                condition = x.mean(1)
                for block in self.blocks:
                    x = block(x, condition)
                return self.head(x)
        build = Model
    """,
    "convolution": """
        class Block(nn.Module):
            def __init__(self, width=16):
                super().__init__()
                self.first, self.second = (nn.Conv1d(width, width, 3, padding=1, bias=False) for _ in range(2))
                self.batch_norm, self.group_norm = nn.BatchNorm1d(width), nn.GroupNorm(4, width)
            def forward(self, x):
                h = F.relu(self.batch_norm(self.first(x.transpose(1, 2))))
                return x + F.relu(self.group_norm(self.second(h))).transpose(1, 2)
    """,
}
POLICIES: tuple[Policy, ...] = ("none", "selective", "full")
PHASES: tuple[Phase, ...] = ("forward", "input_gradient", "weight_gradient")
AOT = "aot_eager_decomp_partition"
END = """
Model.block = Block
build = Model
"""
MODELS: dict[str, tuple[dict[str, Any], str | None]] = {
    "llama": ({"hf": LLAMA}, None),
    "gpt2": ({"hf": GPT2}, None),
    "gpt2-no-dropout": ({"hf": {**GPT2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}}, None),
    **{name: ({"factory": "user:build"}, source) for name, source in BLOCKS.items()},
}


def inductor_without_kernels(graph: Any, inputs: Sequence[Any]) -> Any:
    """inductor as far as its partitioner: the graphs then run as they are."""

    def partition(*args: Any, **kwargs: Any) -> Any:
        with V.set_fake_mode(detect_fake_mode(inputs)):
            return partition_fn(*args, **kwargs)

    backend = aot_autograd(
        fw_compiler=nop, bw_compiler=nop, decompositions=select_decomp_table(), partition_fn=partition
    )
    return backend(graph, inputs)


INDUCTOR = inductor_without_kernels


def keep_products(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = isinstance(operator, OpOverload) and operation(operator).kind in KEPT_BY_SELECTIVE
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def compiled_forward(forward: Any, policy: Policy, backend: Any) -> Any:
    """A block's forward, checkpointed and then compiled, as training scripts do it."""
    options = {"context_fn": partial(create_selective_checkpoint_contexts, keep_products)}

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **(options if policy == "selective" else {}), **kwargs)

    return torch.compile(forward if policy == "none" else checkpointed, backend=backend, fullgraph=True)


def really_saved(
    job: JobSpec,
    folder: Path,
    blocks: Sequence[str],
    dtype: ComputeDtypeName,
    micro_batch: int,
    backend: Any,
    policy: Policy = "none",
) -> int:
    """Bytes of the distinct storages that autograd and compiled functions save, but for parameters, buffers and the
    batch, with each block compiled."""
    with user_code(folder) as code:
        built = build_model(job.model, code)
        contract = make_contract(job, built, code)
        model = built.module.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.data = parameter.data.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        for buffer in model.buffers():
            torch.nn.init.ones_(buffer)
        batch = {name: torch.zeros_like(field) for name, field in contract.batch(micro_batch).items()}
        torch._dynamo.reset()
        for path in blocks:
            block = model.get_submodule(path)
            block.forward = compiled_forward(block.forward, policy, backend)
        args, kwargs = contract.arguments(batch)
        contract.loss(model(*args, **kwargs), batch)  # compiles
        held = [*model.parameters(), *model.buffers(), *batch.values()]
        known = {tensor.untyped_storage().data_ptr() for tensor in held}
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            contract.loss(model(*args, **kwargs), batch).backward()
        return sum(saved.values())


def written(folder: Path, source: str) -> Path:
    (folder / "user.py").write_text(HEADER + dedent(source) + END)
    return folder


def small(folder: Path, source: str = "", *, compiled: bool = True, layers: int = 3) -> ModelProfile:
    job = make_job({"factory": "user:build", "args": {"layers": layers}}, length=24)
    return profile_model(job, written(folder, source), ("fp32",), compiled=compiled)


def total_saved(profile: ModelProfile, dtype: ComputeDtypeName, micro_batch: int, policy: Policy = "none") -> int:
    return sum(unit.count * unit.compiled[dtype].saved[policy].at(micro_batch) for unit in profile.units)


@pytest.fixture(autouse=True)
def _untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps pytest from collecting the structured trace of every compilation, which takes longer than the tests."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "addHandler", lambda _: None)


@pytest.mark.parametrize(
    ("model", "dtype", "micro_batch", "backend"),
    [
        ("llama", "bf16", 2, INDUCTOR),
        ("gpt2", "fp32", 2, AOT),
        ("gpt2", "fp32", 3, INDUCTOR),
        ("dropout", "bf16", 4, INDUCTOR),
        ("dit", "fp32", 3, AOT),  # at others the partitioner may keep parts for the whole, [Note: one division]
        ("convolution", "fp32", 1, AOT),
    ],
)
def test_saved_bytes_are_those_that_compiled_blocks_keep(
    model: str, dtype: ComputeDtypeName, micro_batch: int, backend: Any, tmp_path: Path
) -> None:
    described, source = MODELS[model]
    folder = USER if source is None else written(tmp_path, source)
    job = make_job(described, kind="cpu", length=LENGTH)
    profile = profile_model(job, folder, (dtype,), compiled=True)
    assert profile.warnings == ()
    really = really_saved(job, folder, profile.block_paths, dtype, micro_batch, backend)
    assert total_saved(profile, dtype, micro_batch) == really


@pytest.mark.parametrize("model", ["llama", "gpt2-no-dropout"])
def test_saved_bytes_of_checkpointed_compiled_blocks(model: str) -> None:
    job = make_job(MODELS[model][0], kind="cpu", length=LENGTH)
    profile = profile_model(job, USER, ("fp32",), compiled=True)
    for policy in POLICIES:
        really = really_saved(job, USER, profile.block_paths, "fp32", 3, AOT, policy)
        # attention may draw dropout: where it runs again, the CPU's random state is kept as well
        states = len(profile.block_paths) * torch.get_rng_state().nbytes if policy == "full" else 0
        assert total_saved(profile, "fp32", 3, policy) == really - states


def test_convolutions_are_divided_by_gradient(tmp_path: Path) -> None:
    unit = block_of(small(tmp_path, BLOCKS["convolution"]))
    for phase in PHASES:
        assert unit.compiled["fp32"].flops(phase, 3) == unit.costs["fp32"].flops(phase, 3) > 0


@cache
def llama_of_cuda() -> ModelProfile:
    return profile_model(make_job({"hf": LLAMA}, kind="cuda", length=LENGTH), USER, compiled=True)


def block_of(profile: ModelProfile) -> Unit:
    return next(unit for unit in profile.units if unit.kind == "block")


def both(dtype: ComputeDtypeName) -> tuple[UnitCost, UnitCost]:
    unit = block_of(llama_of_cuda())
    return unit.costs[dtype], unit.compiled[dtype]


def select(cost: UnitCost, wanted: Callable[[Operator], bool]) -> list[Operator]:
    return [operator for operator in cost.operators if wanted(operator)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_products_stay_and_the_rest_is_fused(dtype: ComputeDtypeName) -> None:
    eager, compiled = both(dtype)
    assert compiled.flops("forward", 5) == eager.flops("forward", 5)
    for phase in PHASES:
        assert compiled.flops(phase, 5) >= eager.flops(phase, 5)

    def elementwise(cost: UnitCost) -> tuple[int, int]:
        found = select(cost, lambda operator: operator.kind == "elementwise")
        return sum(operator.bytes.at(5) for operator in found), sum(operator.count for operator in found)

    assert elementwise(compiled)[0] < elementwise(eager)[0] / 2
    assert elementwise(compiled)[1] < elementwise(eager)[1] / 3
    assert compiled.saved["none"].at(5) < eager.saved["none"].at(5)
    assert compiled.saved["full"] == eager.saved["full"]
    assert compiled.saved["full"].at(5) < compiled.saved["selective"].at(5) < compiled.saved["none"].at(5)
    assert compiled.output == eager.output


def test_attention_is_the_kernel_of_the_device() -> None:
    forward = select(both("bf16")[1], lambda operator: operator.kind == "attention" and operator.phase == "forward")
    assert [(operator.name, operator.module) for operator in forward] == [
        ("_scaled_dot_product_flash_attention", "self_attn")
    ]


def test_products_are_told_apart_by_phase_and_module() -> None:
    products = select(both("bf16")[1], lambda operator: operator.kind == "matmul")
    modules = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    for phase in PHASES:
        assert sorted(operator.module for operator in products if operator.phase == phase) == sorted(modules)


def test_kernels_and_bytes_of_a_small_block(tmp_path: Path) -> None:
    profile = small(tmp_path)
    cost = block_of(profile).compiled["fp32"]
    rows, width, wide, of = 24, 16, 32, 4  # of: bytes of a number
    x, h = rows * width * of, rows * wide * of
    fused = {
        operator.name: operator.bytes.at(1)
        for operator in select(cost, lambda operator: operator.kind == "elementwise" and operator.phase == "forward")
    }
    assert fused == {
        "fused_add_mul_rsqrt_sub_var_mean": x + x + 2 * rows * of + 2 * width * of,  # and mean, deviation; weights
        "fused_add_erf_mul": h + h,
        "fused_add": x + x + x,
    }
    # the input, the normalised input, both statistics, gelu's input and result
    assert cost.saved["none"].at(1) == x + x + 2 * rows * of + h + h
    # alive at the end of forward beyond the input: what is kept, the second product's result, and the block's
    assert cost.forward_peak.at(1) == x + 2 * rows * of + h + h + x + x


def test_a_block_that_cannot_be_traced_has_no_compiled_cost(tmp_path: Path) -> None:
    source = """
        from torch._subclasses.functional_tensor import FunctionalTensor
        class Picky(Block):
            def forward(self, x):
                if isinstance(x, FunctionalTensor):
                    raise RuntimeError("will not be traced")
                return super().forward(self.more(x))
        class Model(Model):
            def __init__(self, layers):
                super().__init__(layers=layers)
                self.blocks[1] = Picky()
                self.blocks[1].more = nn.Linear(16, 16)
    """
    profile = small(tmp_path, source)
    (warning,) = profile.warnings
    assert warning.startswith("blocks.1 (fp32) has no compiled cost")
    assert "user.py" in warning
    assert "will not be traced" in warning
    assert [bool(unit.compiled) for unit in profile.units] == [True, True, False, True, True]


def test_only_where_asked_for(tmp_path: Path) -> None:
    assert all(unit.compiled == {} for unit in small(tmp_path, compiled=False).units)


def test_a_model_without_blocks_says_so(tmp_path: Path) -> None:
    profile = small(tmp_path, layers=1)
    assert [unit.compiled for unit in profile.units] == [{}]
    assert "no repeated blocks" in profile.warnings[0]


def test_compiled_costs_are_written_and_read() -> None:
    profile = llama_of_cuda()
    assert profile_from_json(profile_to_json(profile)) == profile
