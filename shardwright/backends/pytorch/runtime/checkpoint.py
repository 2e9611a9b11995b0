"""Checkpoints that do not depend on the plan: what one layout saved, any other resumes. No pickle is read or written.

[Note: layout of a checkpoint]
`OUT/step_00000012/` holds one safetensors file per process with its pieces of the tensors, and `index.json`, which
says where each piece of each tensor lies. `OUT/LATEST` holds the name of the newest one. Parameters, buffers and
optimizer states go by the parameter's own name: `model.<parameter>`, `buffer.<buffer>`,
`optimizer.<state>.<parameter>`; a tied parameter by the first of its names. What several processes hold alike, one of
them writes; they take turns, tensor by tensor.

[Note: never endanger the last checkpoint]
Everything is written into `step_N.tmp` and flushed to the disk; then the folder is renamed; then LATEST is replaced;
then older checkpoints are removed. Killed at any moment, LATEST names a whole checkpoint. All processes must see the
same folder.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .index import (
    INDEX,
    Index,
    Piece,
    Stored,
    TrainState,
    check_cover,
    file_of,
    index_to_json,
    key_of,
    parse_key,
    read_index,
)
from .pieces import Box, local_box, local_tensor, replica
from .tensorfile import FormatError, TensorFile, open_regular, open_tensors, write_tensors

__all__ = ["CheckpointError", "Checkpoints", "TrainState"]

LATEST = "LATEST"
_STEP = re.compile(r"step_(\d{8,})")


class CheckpointError(Exception):
    """A checkpoint could not be written or read, here or in another process. The message says why and where."""


class Checkpoints:
    """The checkpoints of one run, in one folder; see [Note: layout of a checkpoint]. `keep` newest ones are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.saved_step: int | None = None
        """Step of the newest checkpoint that this object wrote or read."""

    def latest(self) -> str | None:
        """Name of the newest checkpoint's folder, or None. Raises FormatError when LATEST holds anything else.

        Without LATEST it is the last folder that was put in place: each is whole by then.
        """
        path = self.folder / LATEST
        if not path.exists():
            return max((each.name for each in self.folder.glob("step_*") if _STEP.fullmatch(each.name)), default=None)
        with open_regular(path) as file:
            name = file.read(80).decode("utf-8", "replace").strip()
        if not _STEP.fullmatch(name):
            raise FormatError(f"{path}: {name!r} is not the name of a checkpoint")
        return name

    def save(self, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint, all processes together, and put it in place, unless this step is saved already.

        Raises CheckpointError in every process when any of them fails; the earlier checkpoint then stands as it was.
        """
        if self.saved_step == state.step:
            return
        rank = dist.get_rank() if dist.is_initialized() else 0
        temporary = self.folder / f"{_name_of(state.step)}.tmp"
        with together("save"):
            if self.latest() == temporary.stem:
                raise FormatError(f"{self.folder / temporary.stem} is the newest checkpoint and not to be overwritten")
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        tensors = state_tensors(model, optimizer)
        with together("save"):
            write_tensors(temporary / file_of(rank), _own_pieces(tensors))
        with together("save"):
            if rank == 0:
                index = Index(state, type(optimizer).__name__, _collect(temporary, tensors))
                self._put_in_place(temporary, index_to_json(index))
        self.saved_step = state.step

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> TrainState | None:
        """Restore the newest checkpoint into a model and an optimizer that are sharded already; None without one.

        Each process reads only what overlaps its own part. Raises CheckpointError in every process when any of them
        finds the checkpoint broken, unfit for the model or the optimizer, or made with another seed.
        """
        with together("read"):
            name = self.latest()
        step = -1 if name is None else _step_of(name)
        if -_maximum(-step) != _maximum(step):
            raise CheckpointError(
                f"the processes see different checkpoints in {self.folder}; all must share the folder"
            )
        if name is None:
            return None
        with together("read"):
            folder = self.folder / name
            index = read_index(folder)
            if index.train.step != step:
                raise FormatError(f"{folder}: holds step {index.train.step}")
            if index.train.seed != seed:
                raise FormatError(f"{folder}: made with seed {index.train.seed}, not {seed}: the batches would differ")
            if index.optimizer != type(optimizer).__name__:
                raise FormatError(f"{folder}: holds states of {index.optimizer}, not of {type(optimizer).__name__}")
            _create_states(index, model, optimizer)
            _restore(folder, index, state_tensors(model, optimizer))
        self.saved_step = step
        return index.train

    def _put_in_place(self, temporary: Path, index: str) -> None:
        _write_text(temporary / INDEX, index)
        place = temporary.with_suffix("")
        if place.exists():
            # Left by a run that was ended between the rename and LATEST, or that LATEST was set back from.
            _remove(place)
        os.rename(temporary, place)
        _flush_folder(self.folder)
        _write_text(self.folder / f"{LATEST}.tmp", place.name + "\n")
        os.replace(self.folder / f"{LATEST}.tmp", self.folder / LATEST)
        _flush_folder(self.folder)
        self._prune(place.name)

    def _prune(self, newest: str) -> None:
        """Remove the older checkpoints beyond `keep`; later ones, which LATEST was set back from, stay."""
        steps = sorted(_step_of(path.name) for path in self.folder.glob("step_*") if _STEP.fullmatch(path.name))
        older = steps[: steps.index(_step_of(newest))]
        for step in older[: max(0, len(older) - self.keep + 1)]:
            _remove(self.folder / _name_of(step))
        for path in self.folder.glob("step_*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def together(what: str, of: str = "the checkpoint") -> Iterator[None]:
    """Run the body in every process; when it fails in one, all raise CheckpointError, so none waits for ever."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if _maximum(0 if failure is None else 1):
        reason = "another process failed; its message says why" if failure is None else str(failure)
        raise CheckpointError(f"could not {what} {of}: {reason}") from failure


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a checkpoint holds, by name, in the same order in every process."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    persistent = model.state_dict().keys()
    tensors = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    tensors |= {f"buffer.{name}": buffer for name, buffer in model.named_buffers() if name in persistent}
    for parameter, states in optimizer.state.items():
        for state, value in states.items():
            if value is not None:
                tensors[f"optimizer.{state}.{names[parameter]}"] = value
    return dict(sorted(tensors.items()))


def _own_pieces(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process writes: of what several hold, its turn only."""
    pieces = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        which, count = replica(tensor)
        box = local_box(tensor)
        if number % count == which and box.numel:
            pieces[key_of(name, box)] = local_tensor(tensor)
    return pieces


def _collect(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """The index of the files that all processes have written, read back from their headers."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for rank in range(dist.get_world_size() if dist.is_initialized() else 1):
        with open_tensors(folder / file_of(rank)) as file:
            for key in file.entries:
                name, box = parse_key(key)
                pieces[name].append(Piece(file_of(rank), box))
    stored = {name: Stored(t.dtype, tuple(t.shape), tuple(sorted(pieces[name]))) for name, t in tensors.items()}
    for name, tensor in stored.items():
        check_cover(name, tensor.shape, [piece.box for piece in tensor.pieces])
    return stored


def _create_states(index: Index, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make room for the optimizer states that the checkpoint holds: sharded as their parameter, or scalars."""
    parameters = dict(model.named_parameters())
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for name, stored in index.tensors.items():
        if not name.startswith("optimizer."):
            continue
        state, parameter_name = name.removeprefix("optimizer.").split(".", 1)
        parameter = parameters.get(parameter_name)
        if parameter is None or stored.shape not in ((), tuple(parameter.shape)):
            raise FormatError(f"{name}: the model has no such parameter, or not of shape {stored.shape}")
        if stored.shape == tuple(parameter.shape):
            value = torch.zeros_like(parameter, dtype=stored.dtype, requires_grad=False)
        else:
            # As torch.optim places its step counters.
            value = torch.zeros((), dtype=stored.dtype, device=parameter.device if on_device else "cpu")
        optimizer.state[parameter][state] = value


def _restore(folder: Path, index: Index, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors from the checkpoint, one file at a time."""
    if index.tensors.keys() != tensors.keys():
        differing = sorted(index.tensors.keys() ^ tensors.keys())
        raise FormatError(f"{folder}: the model differs from the one saved, for example in {differing[0]}")
    missing: dict[str, int] = {}
    by_file: dict[str, list[tuple[str, Box]]] = defaultdict(list)
    for name, tensor in tensors.items():
        stored, box = index.tensors[name], local_box(tensor)
        if stored.shape != tuple(tensor.shape) or stored.dtype != tensor.dtype:
            raise FormatError(
                f"{name}: saved as {stored.dtype} {stored.shape}, needed as {tensor.dtype} {tuple(tensor.shape)}"
            )
        missing[name] = box.numel
        for piece in stored.pieces:
            if box.overlap(piece.box):
                by_file[piece.file].append((name, piece.box))
    for file_name, pieces in by_file.items():
        with open_tensors(folder / file_name) as file:
            for name, piece_box in pieces:
                missing[name] -= _copy(file, name, piece_box, tensors[name])
    assert not any(missing.values())


@torch.no_grad()
def _copy(file: TensorFile, name: str, piece: Box, tensor: Tensor) -> int:
    """Copy the overlap of a stored piece with this process's part; returns its elements."""
    key, box = key_of(name, piece), local_box(tensor)
    entry = file.entries.get(key)
    if entry is None or entry.shape != piece.shape or entry.dtype != tensor.dtype:
        raise FormatError(f"{file.path}: does not hold {key} as the index says")
    common = box.overlap(piece)
    assert common is not None
    target, source = common.within(box), common.within(piece)
    local_tensor(tensor)[target] = file.part(key, source)
    return common.numel


def _maximum(value: int) -> int:
    """The largest of all processes' values."""
    if not dist.is_initialized():
        return value
    on_gpu = dist.get_backend() == "nccl"
    tensor = torch.tensor(value, device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu")
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def _name_of(step: int) -> str:
    return f"step_{step:08d}"


def _step_of(name: str) -> int:
    return int(name.removeprefix("step_"))


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _remove(folder: Path) -> None:
    """Remove a checkpoint; from the first moment on it no longer has the name of one."""
    doomed = folder.with_name(folder.name + ".old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
