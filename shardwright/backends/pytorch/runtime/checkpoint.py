"""Checkpoints that do not depend on the plan: what one layout saved, any other resumes. No pickle is read or written.

[Note: layout of a checkpoint]
`OUT/step_00000012/` holds one safetensors file per process with its pieces of the tensors, and `index.json`, which
says where each piece of each tensor lies. `OUT/LATEST` holds the name of the newest one. Parameters, buffers and
optimizer states go by the parameter's own name: `model.<parameter>`, `buffer.<buffer>`,
`optimizer.<state>.<parameter>`; a tied parameter by the first of its names. Parameters are the values before they are
rounded for bf16 forward and backward, frozen ones too. What several processes hold alike, one of them writes; they take
turns, tensor by tensor.

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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .held import STOCK, Held, HeldState, Holder
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
from .pieces import Box
from .tensorfile import FormatError, TensorFile, open_regular, open_tensors, write_tensors

__all__ = ["CheckpointError", "Checkpoints", "TrainState"]

LATEST = "LATEST"
_STEP = re.compile(r"step_(\d{8,})")


class CheckpointError(Exception):
    """A checkpoint could not be written or read, here or in another process. The message says why and where."""


class Checkpoints:
    """The checkpoints of one run, in one folder; see [Note: layout of a checkpoint]. `keep` newest ones are kept.

    `holder` knows where the model's and the optimizer's tensors lie: `STOCK` unless the script uses `ShardedStates`.
    """

    def __init__(self, folder: Path, keep: int, holder: Holder = STOCK) -> None:
        self.folder = folder
        self.keep = keep
        self.holder = holder
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
        tensors = model_tensors(model, self.holder) | state_tensors(model, self.holder.states(optimizer))
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
        with self.holder.filling(), together("read"):
            folder = self.folder / name
            index = read_index(folder)
            if index.train.step != step:
                raise FormatError(f"{folder}: holds step {index.train.step}")
            if index.train.seed != seed:
                raise FormatError(f"{folder}: made with seed {index.train.seed}, not {seed}: the batches would differ")
            if index.optimizer != type(optimizer).__name__:
                raise FormatError(f"{folder}: holds states of {index.optimizer}, not of {type(optimizer).__name__}")
            with self.holder.room(optimizer, _stored_states(index, model, self.holder)) as rooms:
                tensors = model_tensors(model, self.holder)
                differing = {name for name in index.tensors if not name.startswith("optimizer.")} ^ tensors.keys()
                if differing:
                    raise FormatError(
                        f"{folder}: the model differs from the one saved, for example in {min(differing)}"
                    )
                _restore(folder, index, tensors | state_tensors(model, rooms))
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


def model_tensors(model: nn.Module, holder: Holder) -> dict[str, Held]:
    """What a checkpoint holds of the model, by name, in the same order in every process."""
    persistent = model.state_dict().keys()
    tensors = {f"model.{name}": holder.held(parameter) for name, parameter in model.named_parameters()}
    tensors |= {f"buffer.{name}": holder.held(buffer) for name, buffer in model.named_buffers() if name in persistent}
    return dict(sorted(tensors.items()))


def state_tensors(model: nn.Module, states: Iterable[HeldState]) -> dict[str, Held]:
    """What a checkpoint holds of the optimizer, by name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return dict(sorted((f"optimizer.{state}.{names[parameter]}", held) for parameter, state, held in states))


def _own_pieces(tensors: Mapping[str, Held]) -> dict[str, Tensor]:
    """What this process writes: of what several hold, its turn only. Whose turn it is follows from the name, for not
    all of those who hold a tensor need hold the same other ones."""
    pieces: dict[str, Tensor] = {}
    for name, held in tensors.items():
        which, count = held.replica
        if held.written and crc32(name.encode()) % count == which:
            pieces |= {key_of(name, box): values for box, values in held.parts if box.numel}
    return pieces


def _collect(folder: Path, tensors: Mapping[str, Held]) -> dict[str, Stored]:
    """The index of the files that all processes have written, read back from their headers."""
    pieces: dict[str, list[Piece]] = {name: [] for name in tensors}
    dtypes = {name: held.dtype for name, held in tensors.items()}
    for rank in range(dist.get_world_size() if dist.is_initialized() else 1):
        with open_tensors(folder / file_of(rank)) as file:
            for key, entry in file.entries.items():
                name, box = parse_key(key)
                pieces.setdefault(name, []).append(Piece(file_of(rank), box))
                dtypes.setdefault(name, entry.dtype)
    stored = {}
    for name, found in pieces.items():
        shape: tuple[int, ...] = ()
        if name in tensors:
            shape = tensors[name].shape
        elif found[0].box.start:
            # A state that only other processes hold: as large as its parameter, or else a scalar.
            shape = tensors[f"model.{name.split('.', 2)[2]}"].shape
        stored[name] = Stored(dtypes[name], shape, tuple(sorted(found)))
        check_cover(name, shape, [piece.box for piece in found])
    return stored


def _stored_states(index: Index, model: nn.Module, holder: Holder) -> dict[nn.Parameter, dict[str, Stored]]:
    """The optimizer states of a checkpoint, by parameter: each of the parameter's shape, or a scalar."""
    parameters = dict(model.named_parameters())
    states: dict[nn.Parameter, dict[str, Stored]] = defaultdict(dict)
    for name, stored in index.tensors.items():
        if not name.startswith("optimizer."):
            continue
        state, parameter_name = name.removeprefix("optimizer.").split(".", 1)
        parameter = parameters.get(parameter_name)
        if parameter is None or stored.shape not in ((), holder.held(parameter).shape):
            raise FormatError(f"{name}: the model has no such parameter, or not of shape {stored.shape}")
        states[parameter][state] = stored
    return states


def _restore(folder: Path, index: Index, tensors: Mapping[str, Held]) -> None:
    """Fill the tensors from the checkpoint, one file at a time."""
    missing: dict[str, int] = {}
    by_file: dict[str, list[tuple[str, Box]]] = defaultdict(list)
    for name, held in tensors.items():
        stored = index.tensors[name]
        if stored.shape != held.shape or stored.dtype != held.dtype:
            raise FormatError(f"{name}: saved as {stored.dtype} {stored.shape}, needed as {held.dtype} {held.shape}")
        missing[name] = sum(box.numel for box, _ in held.parts)
        for piece in stored.pieces:
            if any(box.overlap(piece.box) for box, _ in held.parts):
                by_file[piece.file].append((name, piece.box))
    for file_name, pieces in by_file.items():
        with open_tensors(folder / file_name) as file:
            for name, piece_box in pieces:
                missing[name] -= _copy(file, name, piece_box, tensors[name])
    assert not any(missing.values())


@torch.no_grad()
def _copy(file: TensorFile, name: str, piece: Box, held: Held) -> int:
    """Copy the overlap of a stored piece with this process's parts; returns its elements."""
    key = key_of(name, piece)
    entry = file.entries.get(key)
    if entry is None or entry.shape != piece.shape or entry.dtype != held.dtype:
        raise FormatError(f"{file.path}: does not hold {key} as the index says")
    copied = 0
    for box, values in held.parts:
        common = box.overlap(piece)
        if common is not None:
            values[common.within(box)] = file.part(key, common.within(piece))
            copied += common.numel
    return copied


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
