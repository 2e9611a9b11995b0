"""Jobs for the models of the zoo: plain PyTorch, each with its own kind of data and loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from passes.jobs import make_job
from shardwright.schemas.job import JobSpec

ZOO = Path(__file__).parent / "zoo"
"""The job's folder."""
NOISY = {"dataset": "data:noisy_images"}
PAIRS = {"dataset": "data:pairs"}

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "transformer": (
        {
            "factory": "translation:build",
            "inputs": {"src": "source", "tgt": "shifted"},
            "loss": "losses:of_tokens",
        },
        PAIRS,
    ),
    "u-net": (
        {
            "factory": "unet:build",
            "inputs": {"image": "image", "timestep": "timestep"},
            "loss": "losses:of_noise",
        },
        NOISY,
    ),
    "lstm": ({"factory": "recurrent:build", "args": {"dropout": 0.1}}, None),
    "gru": ({"factory": "recurrent:build", "args": {"kind": "gru", "bidirectional": True}}, None),
    "rnn": ({"factory": "recurrent:build", "args": {"kind": "rnn"}}, None),
    "stacked-lstm": ({"factory": "recurrent:stacked"}, None),
    "dit": (
        {
            "factory": "dit:build",
            "inputs": {"latents": "image", "timestep": "timestep", "label": "label"},
            "loss": "losses:of_noise",
        },
        NOISY,
    ),
    "resnet": (
        {"factory": "resnet:build", "inputs": {"image": "image"}, "loss": "losses:of_labels"},
        {"dataset": "data:images"},
    ),
    "nested": (
        {
            "factory": "nested:build",
            "inputs": {"image": "image", "step": "timestep", "noise": "noise"},
            "loss": "losses:of_nested",
        },
        NOISY,
    ),
    "two-stacks": (
        {
            "factory": "two_stacks:build",
            "inputs": {"source": "source", "shifted": "shifted"},
            "loss": "losses:of_tokens",
        },
        PAIRS,
    ),
    "shared": ({"factory": "shared:build", "args": {"own": 2}}, None),
    "python-depth": ({"factory": "depth:build"}, None),
    "sample-depth": ({"factory": "depth:build", "args": {"kind": "sample"}}, None),
}
"""The model and the data of a job."""


def job_of(name: str, *, kind: str = "cuda", share: bool = True, length: int = 20) -> JobSpec:
    """A job with a model of the zoo."""
    model, data = MODELS[name]
    return make_job({**model, "profile": {"share": share}}, kind=kind, length=length, data=data)
