"""What waits for weight gradients, counted in bytes in a real backward whose linear layers defer."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from passes.jobs import GPT2, LLAMA, USER, make_job
from passes.models import profile_of
from passes.reference import DTYPES, changed_forwards
from shardwright.backends.pytorch.runtime.deferred import WeightQueue, defer_weight_gradients
from shardwright.passes import profile_model
from shardwright.passes.build import build_model
from shardwright.passes.contract import make_contract
from shardwright.passes.imports import user_code
from shardwright.passes.unit_run import cast_floating
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ModelProfile


def _real(spec: JobSpec, folder: Path, dtype: torch.dtype | None) -> tuple[torch.nn.Module, Any]:
    """The model in memory, and what runs a micro-batch of two."""
    with user_code(folder) as code:
        built = build_model(spec.model, code)
        contract = make_contract(spec, built, code)
    model = built.module.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.full_like(tensor, 0.02, dtype=dtype if isinstance(tensor, torch.nn.Parameter) else None)
    batch = {name: torch.zeros_like(field, device="cpu") for name, field in contract.batch(2).items()}
    args, kwargs = cast_floating(dtype, contract.arguments(batch))
    return model, lambda: contract.loss(model(*args, **kwargs), batch)


def _queued(spec: JobSpec, folder: Path, profile: ModelProfile, dtype: str, recomputed: int = 0) -> dict[str, int]:
    """Bytes of the distinct storages that wait, by block and outside of them by layer."""
    model, run = _real(spec, folder, DTYPES[dtype])
    queue = WeightQueue()
    defer_weight_gradients(model, queue)
    known = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    owner = {id(each): name for name, each in model.named_parameters()}
    blocks = [model.get_submodule(path) for path in profile.block_paths]
    with changed_forwards(blocks, [_again] * recomputed, DTYPES[dtype]), queue.deferring() as deferred:
        run().backward()
    storages: dict[str, dict[int, int]] = defaultdict(dict)
    for use in deferred:
        name = owner[id(use.weight)]
        unit = next((path for path in profile.block_paths if name.startswith(f"{path}.")), name)
        for tensor in (use.input, use.output_gradient):
            assert tensor is not None
            place = tensor.untyped_storage()
            if place.data_ptr() not in known:
                storages[unit][place.data_ptr()] = place.nbytes()
    return {unit: sum(sizes.values()) for unit, sizes in storages.items()}


def _again(forward: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return call


def _held(profile: ModelProfile, dtype: Any) -> dict[str, int]:
    """What the profile says of the same."""
    units = [(unit.paths or (unit.kind,), unit.costs[dtype].held_by_weight.at(2)) for unit in profile.units]
    return {path: size for paths, size in units for path in paths if size}


MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"factory": "gpt:build", "args": {"tie": True}},
    "llama": {"hf": LLAMA},
    "gpt2": {"hf": {**GPT2, "attn_pdrop": 0.0}},
}
HEADS = {"gpt": "head.weight", "llama": "lm_head.weight", "gpt2": "lm_head.weight"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_layers_of_published_models(model: str, dtype: Any) -> None:
    spec = make_job(MODELS[model], kind="cpu")
    profile = profile_model(spec, USER, (dtype,))
    held = _held(profile, dtype)
    held[HEADS[model]] = held.pop("head")
    assert held == _queued(spec, USER, profile, dtype)
    assert held == _queued(spec, USER, profile, dtype, recomputed=len(profile.block_paths))


ODD = {
    "twice": "return x + self.down(F.gelu(self.up(x + self.down(F.gelu(self.up(x))))))",
    "one input of two": "return x + self.down(self.up(x).sigmoid() * self.more(x))",
    "after a norm": "return x + self.down(F.relu(self.up(self.norm(x))))",
    "a view": "return x + self.square(self.up(x)[..., :16])",
    "transposed": "return x + self.down(self.up(x).transpose(0, 1).tanh()).transpose(0, 1)",
    "unused": "self.more(x); return x + self.down(self.up(x))",
    "by a function": "return x + F.linear(self.up(x), self.down.weight)",
    "summed": "return x + self.up(x).sum(-1, keepdim=True)",
    "a learned input": "return x + self.square(self.learned)",
    "frozen weight": "self.up.weight.requires_grad_(False); return x + self.down(self.up(x))",
    "frozen layer": "self.up.requires_grad_(False); return x + self.down(self.up(x))",
    "a subclass": "return x + self.own(x)",
    "another's layer": "return x + self.down(self.others[0](x))",
}


ODD_MODEL = """
class Own(nn.Linear):
    pass
class Odd(Block):
    def __init__(self):
        super().__init__()
        self.more, self.square, self.own, self.others = nn.Linear(16, 32), nn.Linear(16, 16), Own(16, 16), []
        self.learned = nn.Parameter(torch.zeros(24, 16))
    def forward(self, x):
        {}
class build(Model):
    block = Odd
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(16, 32)
        for block in self.blocks:
            block.others.append(self.shared)
"""


@pytest.mark.parametrize("case", ODD)
def test_unusual_uses_of_a_layer(tmp_path: Path, case: str) -> None:
    profile = profile_of(tmp_path, ODD_MODEL.format(ODD[case]), kind="cpu")
    queued = _queued(make_job({"factory": "user:build"}, kind="cpu", length=24), tmp_path, profile, "fp32")
    held = _held(profile, "fp32")
    held["head.weight"] = held.pop("head")
    if case == "another's layer":
        layer = 2 * 24 * (16 + 32) * 4
        queued |= {path: queued[path] + layer for path in profile.block_paths}
        del queued["shared.weight"]
    assert held == queued


def test_a_result_may_be_changed_in_place(tmp_path: Path) -> None:
    """The bytes are those of the same without: a layer's result is what the next one takes."""
    plain, changed = ODD["after a norm"], "return x + self.down(F.relu(self.up(self.norm(x)), inplace=True))"
    held = [_held(profile_of(tmp_path, ODD_MODEL.format(forward)), "fp32") for forward in (plain, changed)]
    assert held[0] == held[1]
