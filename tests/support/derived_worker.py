"""Runs models of Hugging Face divided as their derived tables say, and compares every gradient with the whole model's.

Each process writes, for each run, the two losses and the largest error of a gradient, relative to the largest entry of
all gradients of parameters of its kind.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from shardwright.backends.pytorch.runtime import tensor_parallel
from shardwright.backends.pytorch.runtime.divided import parts_of
from shardwright.backends.pytorch.runtime.sequence import divide_sequence
from shardwright.backends.pytorch.runtime.tensor_parallel_loss import divide_cross_entropy

TOKENS = torch.arange(64).view(2, 32) * 7 % 320


def build(config: dict[str, Any]) -> nn.Module:
    """The model, with the same values in every process, biases and norms among them."""
    values = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
    made = transformers.AutoConfig.for_model(config["model_type"], **values)
    model: nn.Module = getattr(transformers, config["architectures"][0])(made)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        mean = 0.0 if parameter.dim() > 1 else float(parameter.detach().mean())
        nn.init.normal_(parameter, mean=mean, std=0.05, generator=generator)
    return model.eval()


def loss_of(model: nn.Module, *, decoder: bool) -> Tensor:
    """The sum over next tokens."""
    more = {"decoder_input_ids": TOKENS} if decoder else {}
    logits = model(input_ids=TOKENS, use_cache=False, **more).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), TOKENS.roll(-1, 1).flatten(), reduction="sum")


def compared(run: dict[str, Any]) -> dict[str, float]:
    """One model, whole and divided."""
    model, decoder = build(run["config"]), run["decoder"]
    whole = loss_of(model, decoder=decoder)
    whole.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    table = {path: getattr(tensor_parallel, style)(**settings) for path, (style, settings) in run["table"].items()}
    model = build(run["config"])
    parallelize_module(model, mesh["tp"], tensor_parallel.matching(model, table))
    divide_cross_entropy(model, run["head"], mesh["tp"])
    if run["sequence"]:
        divide_sequence(model, run["blocks"], tensor=mesh["tp"])
    divided = loss_of(model, decoder=decoder)
    divided.backward()
    parts = parts_of(model)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values() if gradient is not None)
    worst = 0.0
    for name, parameter in model.named_parameters():
        expected = gradients[name]
        assert expected is not None
        assert parameter.grad is not None, name
        expected = parts[name].of(expected) if name in parts else expected
        scale = max(float(expected.abs().max()), 1e-3 * largest)
        worst = max(worst, float((parameter.grad - expected).abs().max()) / scale)
    return {"whole": float(whole.detach()), "divided": float(divided.detach()), "gradients": worst}


def main() -> None:
    """All runs."""
    listed = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = [compared(run) for run in json.loads(listed.read_text())]
    listed.with_name(f"{listed.stem}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
