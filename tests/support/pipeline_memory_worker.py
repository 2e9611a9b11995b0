"""One of several processes that each run one rank of a small GPT's pipelines and watch the memory that they take.

Started with the path of a JSON list of runs; each has `name`, the `programs` of all ranks, whether it `defers` weight
gradients, how many `blocks` of a stage are recomputed, `cuts`, `micro_batches` and sequences a `micro_batch`. Writes
LIST-RANK.json beside that file: for each run the most bytes of live tensors during each kind of step of a second pass.
"""

from __future__ import annotations

import json
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import bytes_gpt

from shardwright.backends.pytorch.runtime.levels import Levels
from shardwright.backends.pytorch.runtime.pipeline import Pipeline
from shardwright.backends.pytorch.runtime.stage_states import StageStates
from shardwright.backends.pytorch.runtime.stages import stages_of
from shardwright.backends.pytorch.runtime.states import ShardedStates


class Live(TorchDispatchMode):
    """Bytes of the storages that any operator has taken or made, and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.kind = ""
        self.peaks: dict[str, int] = {}

    def watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, storage._cdata, None)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, result)):
            if isinstance(each, Tensor):
                self.watch(each)
        self.peaks[self.kind] = max(self.peaks.get(self.kind, 0), sum(self.sizes.values()))
        return result


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def run(of: dict[str, Any]) -> dict[str, int]:
    rank, count = dist.get_rank(), of["micro_batches"]
    model = bytes_gpt.build()
    blocks = [f"blocks.{at}" for at in range(4)]
    for stage, first in enumerate((0, *of["cuts"])):
        for block in list(model.blocks)[first : first + of["blocks"][stage]]:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    rows = [torch.randint(0, 256, (of["micro_batch"], 129)) for _ in range(count)]
    batches = [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in rows]
    del rows
    ranks = list(range(dist.get_world_size()))
    stages = stages_of(model, blocks, of["cuts"], [rank], loss_of, batches[0])
    states = ShardedStates(Levels(None, parameters=1, gradients=1, optimizer_states=1), torch.float32)
    placed = StageStates(model, states, stages, ranks, rank)
    for path in placed.blocks[rank]:
        placed.take_block(path)
    placed.take_rest(torch.device("cpu"))
    if of["defers"]:
        placed.defer_weight_gradients()
    pipeline = Pipeline(
        [tuple(step) for step in of["programs"][rank]],
        stages.stages,
        ranks=ranks,
        wires=stages.wires,
        loss=lambda output, _: output / count,
        queue=placed.queue,
        states=states,
        units=placed.units,
        device=torch.device("cpu"),
        ties=placed.ties(1),
    )
    optimizer = torch.optim.AdamW(states.parameters(), fused=True)
    live = Live()

    def named(kind: str, *place: int) -> None:
        live.kind = kind
        actions[kind](*place)

    actions = pipeline.actions
    pipeline.actions = {kind: partial(named, kind) for kind in actions}
    with live:
        for _ in range(2):
            live.peaks = {}
            for tensor in (*states.parameters(), *(each for batch in batches for each in batch)):
                live.watch(tensor)
            pipeline.step(batches)
            live.kind = "step"
            optimizer.step()
            for tensor in tree_leaves(list(optimizer.state.values())):
                live.watch(tensor)
            states.publish()
    return live.peaks


def main() -> None:
    listed = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {each["name"]: run(each) for each in json.loads(listed.read_text())}
    listed.with_name(f"{listed.stem}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
