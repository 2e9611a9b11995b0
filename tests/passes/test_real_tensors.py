"""Fake tensors agree with real ones on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from passes.jobs import GPT2, LLAMA, USER, make_job
from passes.tiny import MIXTRAL
from shardwright.passes import profile_model
from shardwright.passes.build import build_model
from shardwright.passes.contract import make_contract
from shardwright.passes.imports import user_code
from shardwright.schemas.job import JobSpec


def really_saved(job: JobSpec, micro_batch: int) -> int:
    """Bytes of the distinct storages that autograd saves, but for parameters, buffers and the batch."""
    with user_code(USER) as code:
        built = build_model(job.model, code)
        contract = make_contract(job, built, code)
        model = built.module.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for buffer in model.buffers():
            torch.nn.init.ones_(buffer)
        batch = {name: torch.zeros_like(field) for name, field in contract.batch(micro_batch).items()}
        held = [*model.parameters(), *model.buffers(), *batch.values()]
        known = {tensor.untyped_storage().data_ptr() for tensor in held}
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        args, kwargs = contract.arguments(batch)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = contract.loss(model(*args, **kwargs), batch)
        assert loss.isfinite()
        return sum(saved.values())


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize(
    "model",
    [
        {"factory": "gpt:build"},
        {"factory": "gpt:build", "args": {"dropout": 0.1, "tie": True}},
        {"hf": LLAMA},
        {"hf": {**GPT2, "attn_pdrop": 0.0}},
        {"hf": MIXTRAL},
    ],
    ids=["gpt", "gpt-dropout-tied", "llama", "gpt2", "mixtral"],
)
def test_saved_bytes(model: dict[str, Any], micro_batch: int) -> None:
    job = make_job(model, kind="cpu")
    profile = profile_model(job, USER, ("fp32",))
    predicted = sum(unit.count * unit.costs["fp32"].saved["none"].at(micro_batch) for unit in profile.units)
    assert predicted == really_saved(job, micro_batch)
