"""One of several processes that share every layer of a model, and count what they keep and tell one another.

Started with the path of a JSON list of runs; each has a `name`, a `model` of a job, a `length` of sequences, a
`micro_batch`, the `table` of styles (path to name and arguments), the `head` whose logits are divided (or ""), and the
`blocks` between which the sequence is divided (or none). Writes LIST-RANK.json beside that file: for each run the bytes
of `saved` tensors, the `exchanges` as [phase, kind, bytes, count], and the `loss`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

sys.path.insert(0, str(Path(__file__).parents[1]))

from passes.jobs import USER, make_job

from shardwright.backends.pytorch.runtime import tensor_parallel
from shardwright.backends.pytorch.runtime.sequence import divide_sequence
from shardwright.backends.pytorch.runtime.tensor_parallel_loss import divide_cross_entropy
from shardwright.passes.build import build_model
from shardwright.passes.contract import make_contract
from shardwright.passes.imports import user_code

COLLECTIVES = {
    "all_reduce": ("all_reduce", 0),
    "all_gather_single": ("all_gather", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
}
"""Functions of torch.distributed, the kind, and which argument is the whole tensor."""


class Counted:
    """Collectives, by phase."""

    def __init__(self) -> None:
        self.phase = "forward"
        self.found: Counter[tuple[str, str, int]] = Counter()

    @contextmanager
    def counting(self) -> Iterator[None]:
        before = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
        inside = False

        def wrapped(name: str) -> Any:
            kind, at = COLLECTIVES[name]

            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal inside  # one function of torch.distributed may call another
                if inside:
                    return before[name](*args, **kwargs)
                self.found[self.phase, kind, args[at].numel() * args[at].element_size()] += 1
                inside = True
                try:
                    return before[name](*args, **kwargs)
                finally:
                    inside = False

            return call

        for name in before:
            setattr(dist, name, wrapped(name))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(dist, name, function)


def divide(model: nn.Module, run: dict[str, Any], mesh: DeviceMesh) -> None:
    styles = {
        path: getattr(tensor_parallel, name)(**{key: _tuples(value) for key, value in given.items()})
        for path, (name, given) in run["table"].items()
    }
    parallelize_module(model, mesh, tensor_parallel.matching(model, styles))
    if run["head"]:
        divide_cross_entropy(model, run["head"], mesh)
    if run["blocks"]:
        divide_sequence(model, run["blocks"], tensor=mesh, context=None, head="", method="none", causal=True)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def measure(run: dict[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    job = make_job(run["model"], kind="cpu", length=run["length"])
    with user_code(USER) as code:
        built = build_model(job.model, code)
        contract = make_contract(job, built, code)
        model = built.module.to_empty(device="cpu")
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        for buffer in model.buffers():
            nn.init.ones_(buffer)
        divide(model, run, mesh)
        batch = {name: torch.randint(0, 200, field.shape) for name, field in contract.batch(run["micro_batch"]).items()}
        held = [*model.parameters(), *model.buffers(), *batch.values()]
        known = {tensor.untyped_storage().data_ptr() for tensor in held}
        saved: dict[int, tuple[int, torch.Tensor]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes(), tensor.detach()
            return tensor

        args, kwargs = contract.arguments(batch)
        counted = Counted()
        with counted.counting():
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = contract.loss(model(*args, **kwargs), batch)
            counted.phase = "backward"
            loss.backward()
        return {
            "saved": sum(size for size, _ in saved.values()),
            "exchanges": sorted([*key, count] for key, count in counted.found.items()),
            "loss": float(loss.detach()),
        }


def main() -> None:
    listed = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    results = {run["name"]: measure(run, mesh) for run in json.loads(listed.read_text())}
    listed.with_name(f"{listed.stem}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
