"""The model contract: how a batch enters the model, who computes the loss, and what is checked of both.

[Note: model contract]
A batch is a dictionary of tensors, `input_ids` and `targets` of shape (micro-batch, sequence) and dtype int64 unless
the user's dataset says otherwise; `targets[:, i]` is the token that follows `input_ids[:, i]`, -100 where nothing is to
be learnt. `model.inputs` maps arguments of `forward` to fields of the batch; without it `input_ids` is the only one.

- `loss: next_token`: forward returns logits of shape (micro-batch, sequence, vocabulary), as a tensor or as `.logits`.
  The loss is their cross-entropy in fp32, summed over the targets that are not -100.
- `loss: model`: forward returns the mean loss over its unmasked targets, as a scalar or as `.loss`; so `model.inputs`
  names the argument that takes them. Causal language models of Hugging Face shift `labels` by one themselves, which
  is once too often for `targets`: they take `shift_labels: targets` beside `labels: targets`. The others (masked
  language models, encoder-decoders, classifiers) take `labels: targets`.
- `loss: module:function`: called as f(output, batch), returns the sum over the unmasked targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F

from shardwright.passes.build import Built, shifts_labels
from shardwright.passes.imports import UserCode
from shardwright.passes.untyped import DispatchMode
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.job import JobSpec

Batch = dict[str, torch.Tensor]
Loss = Callable[[Any, Batch], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a sample."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one sample."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Contract:
    """[Note: model contract] of one job."""

    fields: Mapping[str, Field]
    inputs: Mapping[str, str]
    """Argument of forward to field of the batch; a single positional argument is named by the empty string."""
    loss: Loss
    """Sum over a batch (or the mean, for the model's own)."""
    vocabulary: int | None
    """Token ids that the data may hold lie below this; None if the data does not say."""
    vocabulary_key: str
    divided_loss: Loss | None = None
    """The same loss, of logits that may be those of a part of the vocabulary; None where `loss` does not ask."""

    def batch(self, micro_batch: int) -> Batch:
        """A batch of empty tensors."""
        return {name: torch.empty((micro_batch, *at.shape), dtype=at.dtype) for name, at in self.fields.items()}

    def arguments(self, batch: Batch) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        """What forward is called with."""
        if tuple(self.inputs) == ("",):
            return (batch[self.inputs[""]],), {}
        return (), {argument: batch[name] for argument, name in self.inputs.items()}


def make_contract(job: JobSpec, built: Built, code: UserCode) -> Contract:
    """The contract of a job. Raises InputError where the job contradicts itself."""
    fields = _fields(job, code)
    inputs = dict(job.model.inputs) or {"input_ids" if built.hugging_face else "": "input_ids"}
    for argument, name in inputs.items():
        if name not in fields:
            close = get_close_matches(name, fields, n=1)
            raise InputError(
                Diagnostic(
                    key=f"model.inputs.{argument}" if argument else "model.inputs",
                    message=f"the batch has no field {name!r}; it has {', '.join(fields)}",
                    suggestion=f"did you mean {close[0]!r}?" if close else "map the arguments of forward to fields",
                )
            )
    shifted_twice = inputs.get("labels") == "targets" and inputs.get("shift_labels") != "targets"
    if shifted_twice and job.model.loss == "model" and shifts_labels(built):
        message = f"{built.name} shifts `labels` by one, and `targets` are shifted already"
        hint = "use `loss: next_token`, or add `shift_labels: targets`"
        raise InputError(Diagnostic(key="model.inputs.labels", message=message, suggestion=hint))
    if job.data.validation_dataset is not None:
        code.load(job.data.validation_dataset, "data.validation_dataset")
    vocabulary, key = None, ""
    if job.data.bytes is not None:
        vocabulary, key = 256, "data.bytes"
    elif job.data.synthetic is not None:
        vocabulary, key = job.data.synthetic.vocabulary, "data.synthetic.vocabulary"
    loss, divided = (_loss(job, built, code, least, key) for least in (vocabulary, None))
    return Contract(fields, inputs, loss, vocabulary, key, divided)


def _fields(job: JobSpec, code: UserCode) -> dict[str, Field]:
    length = job.train.sequence_length
    if job.data.dataset is None:
        return {name: Field((length,), torch.int64) for name in ("input_ids", "targets")}
    function = code.load(job.data.dataset, "data.dataset")
    with code.running("data.dataset", "reading the first sample of the dataset"):
        sample = function(**job.data.args)[0]
    if not isinstance(sample, dict) or not all(isinstance(value, torch.Tensor) for value in sample.values()):
        message = f"the first sample is {_describe(sample)}; a sample is a dictionary of tensors"
        raise InputError(Diagnostic(key="data.dataset", message=message))
    fields = {str(name): Field(tuple(value.shape), value.dtype) for name, value in sample.items()}
    needed = [*job.model.inputs.values()] or ["input_ids"]
    needed += [] if job.model.loss == "model" else ["targets"]
    missing = [name for name in needed if name not in fields]
    if missing and not (missing == ["targets"] and job.model.loss != "next_token"):
        message = f"the first sample has no field {missing[0]!r}; it has {', '.join(fields) or 'none'}"
        raise InputError(Diagnostic(key="data.dataset", message=message))
    tokens = fields.get("input_ids")
    if tokens is not None and tokens.shape != (length,):
        message = f"input_ids of the first sample have shape {tokens.shape}, train.sequence_length is {length}"
        hint = f"write train.sequence_length: {tokens.shape[0]}" if len(tokens.shape) == 1 else ""
        raise InputError(Diagnostic(key="data.dataset", message=message, suggestion=hint))
    return fields


def _loss(job: JobSpec, built: Built, code: UserCode, vocabulary: int | None, key: str) -> Loss:
    if job.model.loss == "next_token":
        return lambda output, batch: _next_token(output, batch, vocabulary, key)
    if job.model.loss == "model":
        return lambda output, batch: _models_own(output)
    function = code.load(job.model.loss, "model.loss")

    def users(output: Any, batch: Batch) -> torch.Tensor:
        with code.running("model.loss", "the loss"):
            value = function(output, batch)
        return _scalar(value, f"{job.model.loss} returned", "the sum of the loss over the unmasked targets")

    return users


def _next_token(output: Any, batch: Batch, vocabulary: int | None, key: str) -> torch.Tensor:
    logits = getattr(output, "logits", output)
    targets = batch["targets"]
    wanted = f"logits of shape {(*targets.shape, 'vocabulary')}".replace("'", "")
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != targets.shape or not logits.is_floating_point():
        raise InputError(
            Diagnostic(
                key="model.loss",
                message=f"with `loss: next_token` forward returns {wanted}, as a tensor or as `.logits`; "
                f"for (micro-batch, sequence) {tuple(targets.shape)} it returned {_describe(logits)}",
                suggestion="name another loss: `model` if forward computes it, or module:function",
            )
        )
    if vocabulary is not None and logits.shape[-1] < vocabulary:
        message = f"token ids reach {vocabulary - 1}, but the model has {logits.shape[-1]} logits"
        raise InputError(Diagnostic(key=key, message=message, suggestion=f"a vocabulary of at least {vocabulary}"))
    flat = logits.flatten(0, 1).float()
    return F.cross_entropy(flat, targets.flatten(), ignore_index=-100, reduction="sum")


def _models_own(output: Any) -> torch.Tensor:
    value = getattr(output, "loss", output)
    return _scalar(value, "with `loss: model` forward returned", "the mean loss over its targets, or an object with it")


def _scalar(value: Any, what: str, wanted: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.requires_grad:
        return value
    found = _describe(value)
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        found += " that depends on no parameter"
    message = f"{what} {found}; it is {wanted}, a scalar tensor"
    raise InputError(Diagnostic(key="model.loss", message=message))


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    return "None" if value is None else f"a {type(value).__name__}"


class TableLimits(DispatchMode):
    """Refuses look-ups beyond the end of a table, which fake tensors do not notice: token ids that the data may hold,
    and positions counted up to the sequence length."""

    def __init__(self, contract: Contract, batch: Batch, built: Built) -> None:
        super().__init__()
        self.contract, self.key = contract, built.key
        self.tokens = batch["input_ids"].untyped_storage()._cdata if "input_ids" in batch else None
        self.ends: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "aten::arange" and all(isinstance(arg, int) for arg in args) and result.numel():
            self._remember(result, max(args[:2]))
        elif name == "aten::add" and isinstance(args[1], int) and (known := self._end(args[0])) is not None:
            self._remember(result, known + args[1])
        elif name == "aten::embedding":
            self._check(args[0].shape[0], args[1])
        return result

    def _remember(self, positions: torch.Tensor, end: int) -> None:
        storage = positions.untyped_storage()
        self.ends[storage._cdata] = (storage, end)

    def _end(self, tensor: torch.Tensor) -> int | None:
        known = self.ends.get(tensor.untyped_storage()._cdata)
        return known[1] if known else None

    def _check(self, rows: int, indices: torch.Tensor) -> None:
        end = self._end(indices)
        if end is not None and end > rows:
            message = f"the model counts positions to {end - 1}, but its table of positions has {rows} entries"
            hint = f"a sequence_length of at most {rows}, or a larger table"
            raise InputError(Diagnostic(key="train.sequence_length", message=message, suggestion=hint))
        vocabulary = self.contract.vocabulary
        if vocabulary and indices.untyped_storage()._cdata == self.tokens and rows < vocabulary:
            message = f"token ids reach {vocabulary - 1}, but the model's embedding has {rows} entries"
            hint = f"a vocabulary of at least {vocabulary}"
            raise InputError(Diagnostic(key=self.contract.vocabulary_key, message=message, suggestion=hint))
