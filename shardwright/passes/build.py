"""The model of a job, built on the meta device: shapes and dtypes, no memory, no weights."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from shardwright.passes.imports import UserCode
from shardwright.passes.kernels import quiet_transformers
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.hugging_face import architecture
from shardwright.schemas.job import ModelSpec


@dataclass(frozen=True, slots=True)
class Built:
    """A model on the meta device, in training mode."""

    module: nn.Module
    key: str
    """Key of the job that named it."""
    hugging_face: bool
    attention: str = "none"
    """The attention of a model that calls no fused kernel: `eager`, products and a softmax of its own, or `none`."""
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its class."""
        return type(self.module).__name__


def build_model(spec: ModelSpec, code: UserCode) -> Built:
    """Builds the model of a job. Raises InputError if it cannot be found or built, or is not a trainable module."""
    key = "model.factory" if spec.factory is not None else "model.hf"
    construct = _factory(spec, code) if spec.factory is not None else _hugging_face(spec, code)
    with code.running(key, "building the model"), torch.device("meta"), _offline():
        module = construct()
    if not isinstance(module, nn.Module):
        found = f"{spec.factory} returned {type(module).__name__}"
        raise InputError(Diagnostic(key=key, message=f"{found}; a factory returns a torch.nn.Module"))
    _check_tensors(module, key)
    return _from_transformers(spec, module.train(), key) if spec.hf is not None else Built(module.train(), key, False)


def _from_transformers(spec: ModelSpec, module: nn.Module, key: str) -> Built:
    transformers = _import_transformers()
    name, config = type(module).__name__, getattr(module, "config", None)
    _check_inputs(spec, module, name)
    attends = any("Attention" in type(part).__name__ for part in module.modules())
    eager = attends and getattr(config, "_attn_implementation", None) == "eager"
    return Built(
        module,
        key,
        hugging_face=True,
        attention="eager" if eager else "none",
        warnings=tuple(_warnings(spec, module, name, eager, transformers.__version__)),
    )


_OF_TOKENS = {"input_ids", "labels", "shift_labels", "position_ids", "attention_mask"}


def _warnings(spec: ModelSpec, module: nn.Module, name: str, eager: bool, version: str) -> Iterator[str]:
    """What is assumed of a model where the one that runs may differ."""
    config = getattr(module, "config", None)
    if eager:
        yield (
            f"{name} runs eager attention: it makes and keeps scores of sequence length squared. transformers "
            f"{version} has no fused attention for it, or the configuration asks for eager"
        )
    if getattr(module, "_is_stateful", False):
        yield (
            f"{name} is measured as transformers writes it in PyTorch; where packages with kernels of its own are "
            "installed (mamba-ssm, causal-conv1d), it runs faster and keeps less than that"
        )
    if "position_ids" in spec.inputs:
        yield (
            "position_ids are taken to count up without restarts; where they restart (packed sequences), transformers "
            "makes a mask of sequence length squared, which is not measured"
        )
    if spec.inputs.keys() <= _OF_TOKENS and (hasattr(config, "vision_config") or hasattr(config, "audio_config")):
        yield f"{name} also takes images or sound, which model.inputs does not name: it is measured on tokens alone"
    if hasattr(config, "quantization_config"):
        yield "quantization_config of the configuration is passed over: weights are built and trained unquantised"


def _check_inputs(spec: ModelSpec, module: nn.Module, name: str) -> None:
    """Refuses a model that takes more than tokens, or something else, where the job does not say what."""
    main = getattr(module, "main_input_name", "input_ids")
    both = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    if spec.inputs or (main == "input_ids" and not both):
        return
    takes = f"{main} rather than input_ids" if main != "input_ids" else "targets as well as input_ids"
    hint = f"with `loss: model`: model.inputs: {{{main}: {main}, labels: targets}}"
    if main != "input_ids":
        hint += f", and data.dataset, a function that returns samples with {main} and targets"
    raise InputError(Diagnostic(key="model.inputs", message=f"{name} takes {takes}", suggestion=hint))


def shifts_labels(built: Built) -> bool:
    """Whether the model's own loss is `ForCausalLMLoss` of Hugging Face, which shifts `labels` by one
    (transformers.loss.loss_utils)."""
    if not built.hugging_face:
        return False
    from transformers.models.auto import modeling_auto as names

    mappings = (names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return any(built.name == name for mapping in mappings for name in mapping.values())


def _check_tensors(module: nn.Module, key: str) -> None:
    parameters = dict(module.named_parameters())
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise InputError(Diagnostic(key=key, message="the model has no parameter to train"))
    lazy = [name for name, parameter in parameters.items() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        message = f"parameter {lazy[0]} has no shape before the first forward (a lazy module)"
        raise InputError(Diagnostic(key=key, message=message, suggestion="give its sizes in the constructor"))
    real = [name for name, parameter in parameters.items() if not parameter.is_meta]
    if real:
        message = f"parameter {real[0]} was built on {parameters[real[0]].device}, whatever device was asked for"
        hint = "leave the device out: the emitted script decides where a model is built"
        raise InputError(Diagnostic(key=key, message=message, suggestion=hint))


def _factory(spec: ModelSpec, code: UserCode) -> Callable[[], Any]:
    assert spec.factory is not None
    function = code.load(spec.factory, "model.factory")
    try:
        signature = inspect.signature(function)
        signature.bind(**spec.args)
    except TypeError as error:
        unknown = [name for name in spec.args if name not in signature.parameters]
        close = get_close_matches(unknown[0], signature.parameters, n=1) if unknown else []
        raise InputError(
            Diagnostic(
                key=f"model.args.{unknown[0]}" if unknown else "model.args",
                message=f"{spec.factory}{signature} cannot be called with these arguments: {error}",
                suggestion=f"did you mean {close[0]!r}?" if close else "",
            )
        ) from error
    return lambda: function(**spec.args)


def _hugging_face(spec: ModelSpec, code: UserCode) -> Callable[[], Any]:
    content = _read_config(spec.hf, code.folder)
    with _offline():
        transformers = _import_transformers()
        config = _make_config(transformers, content)
    name = architecture(content)
    if name is not None:
        model_class = getattr(transformers, name, None)
        if not isinstance(model_class, type) or not issubclass(model_class, nn.Module):
            message = f"transformers {transformers.__version__} has no model {name!r} (architectures in the config)"
            raise InputError(Diagnostic(key="model.hf", message=message))
        return lambda: model_class(config)
    return lambda: transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _read_config(hf: str | dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    if isinstance(hf, dict):
        return hf
    assert hf is not None
    path = folder / hf
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        message = f"there is no file {hf!r} beside the job (nor a folder of that name with a config.json)"
        hint = "models are not fetched: save the model's config.json beside the job and name it here"
        raise InputError(Diagnostic(key="model.hf", message=message, suggestion=hint))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(Diagnostic(key="model.hf", message=f"{hf} is not JSON: {error}")) from error
    if not isinstance(content, dict):
        raise InputError(Diagnostic(key="model.hf", message=f"{hf} does not hold a JSON object"))
    return content


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        message = "Hugging Face models need the package transformers, which is not installed"
        hint = "pip install 'shardwright[hf]'"
        raise InputError(Diagnostic(key="model.hf", message=message, suggestion=hint)) from error
    return transformers


def _make_config(transformers: Any, content: dict[str, Any]) -> Any:
    """The configuration object, without a key-value cache."""
    known = transformers.CONFIG_MAPPING
    model_type = content.get("model_type")
    if model_type not in known:
        close = get_close_matches(str(model_type), list(known.keys()), n=1)
        message = f"model_type {model_type!r} is unknown to transformers {transformers.__version__}"
        if model_type is None:
            message = "the configuration names no model_type (llama, gpt2, ...)"
        hint = f"did you mean {close[0]!r}?" if close else ""
        raise InputError(Diagnostic(key="model.hf", message=message, suggestion=hint))
    try:
        return known[model_type].from_dict({**content, "use_cache": False})
    except Exception as error:
        message = f"transformers refuses the configuration: {type(error).__name__}: {error}"
        raise InputError(Diagnostic(key="model.hf", message=message)) from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keeps the Hugging Face hub out, also where a configuration names something to fetch."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        with quiet_transformers():
            yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
