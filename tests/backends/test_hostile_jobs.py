"""Jobs as people write them, in YAML, with a hostile text at each place that takes one: refused, or only a value.

[Note: which places]
The places are those of `JOBS`; a test compares them with the JSON Schema, so that a key that is new there must be given
to one of the jobs.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.golden import LLAMA
from support.hostile import HOSTILE
from support.job_strings import Place, matches, places, schema_keys
from support.launch import make_job_folder
from support.plans import make_plan
from support.shapes import shape

from shardwright.backends.pytorch import emit
from shardwright.schemas import InputError, job_schema, load_job
from shardwright.schemas.plan import Plan

DEVICE = {
    "name": "card",
    "kind": "cpu",
    "memory": "40GiB",
    "peak": {"fp32": "20TFLOP/s"},
    "measured": {"fp32": "10 TFLOP/s"},
    "memory_bandwidth": "1.5TB/s",
    "pcie": "200Gb/s",
    "source": "a datasheet",
}
LEVELS = [
    {"name": "pair", "size": 2, "bandwidth": "50GB/s", "latency": "5us"},
    {"name": "node", "size": 1, "link": "pcie4", "latency": "8us"},
]
JOBS: dict[str, dict[str, Any]] = {
    "texts": {
        "model": {
            "factory": "tiny:build",
            "args": {"width": 32, "name": "a", "deep": ["b", {"inner": "c"}]},
            "loss": "next_token",
            "inputs": {"ids": "input_ids"},
            "init": "constructor",
            "rehearse": {"name": "d"},
        },
        "data": {
            "bytes": ["corpus.txt"],
            "mask": ["corpus.mask"],
            "validation": {"files": ["held-out.txt"], "mask": ["held-out.mask"]},
        },
        "train": {
            "sequence_length": 12,
            "global_batch": "12 sequences",
            "until": "4 steps",
            "optimizer": {
                "name": "adamw",
                "no_decay": ["f"],
                "groups": [{"match": "g", "lr_scale": 0.5, "weight_decay": 0.2}],
            },
            "ema": 0.9,
            "schedule": {"name": "linear", "warmup": "2 steps"},
            "save_every": "1h",
            "evaluate_every": "2 steps",
        },
        "cluster": {
            "name": "ours",
            "device": DEVICE,
            "levels": LEVELS,
            "host_memory": "512GB",
            "nvme": "2TB",
            "nvme_bandwidth": "5GB/s",
            "launcher": "slurm",
        },
        "budget": {"device_memory": "30GiB", "host_memory": "1GiB"},
        "strategy": {
            "states": {
                "parameters": "node",
                "gradients": "auto",
                "optimizer_states": ["pair", "all"],
                "secondary": "none",
            },
            "pp": "auto",
            "schedule": ["1f1b"],
            "chunks": "auto",
            "late_step": "auto",
            "int8_gathers": "none",
            "int4_reductions": ["none"],
            "reshard_after_forward": "auto",
            "micro_batch": "auto",
            "checkpointing": ["none", "full"],
            "precision": "fp32",
            "engine": ["ddp"],
        },
        "quality": "standard",
    },
    "tokens": {
        "model": {"hf": LLAMA},
        "data": {"tokens": "corpus.u16", "validation": "held-out.u16"},
        "train": {"sequence_length": 12, "global_batch": 12, "steps": 4},
        "cluster": {
            "devices": "2 x cpu",
            "network": {"bandwidth": "100Gb/s", "latency": "20us"},
            "memory": "4GiB",
            "host_memory": "16GiB",
            "launcher": "torchrun",
        },
        "strategy": {
            "tp": "auto",
            "tensor_parallel": {"sequence": "auto", "overrides": {"lm_head": "replicated"}},
            "cp": "auto",
            "context_method": ["gather"],
            "ep": "auto",
        },
    },
    "dataset": {
        "model": {"factory": "tiny:build", "loss": "custom:loss"},
        "data": {
            "dataset": "custom:samples",
            "args": {"size": 40, "name": "e"},
            "validation_dataset": "custom:held_out",
        },
        "train": {"sequence_length": 12, "global_batch": 12, "steps": 4},
        "cluster": {"devices": "2 x cpu", "network": "ib-ndr-8x400"},
    },
    "named": {
        "model": {
            "hf": "config.json",
            "weights": "stored",
            "profile": {"moves_data": ["library::reorder"], "forwards": {"layers.0": "custom:loss"}},
        },
        "data": {"bytes": "corpus.txt"},
        "train": {"sequence_length": 12, "global_batch": 12, "steps": 4},
        "cluster": {"device": "cpu", "levels": [{"name": "node", "size": 2, "link": "loopback"}]},
    },
    "elsewhere": {
        "model": {"factory": "tiny:build"},
        "data": {"bytes": "corpus.txt"},
        "train": {"sequence_length": 12, "global_batch": 12, "steps": 4},
        "cluster": "two.yaml",
    },
}
TEXTS = [text.encode("utf-8", "replace").decode() for text in HOSTILE]
KEYS = schema_keys(job_schema())
PLACES = [
    (name, place)
    for name, job in JOBS.items()
    for place in places(job)
    # A key that no mapping knows is refused whatever it is; the free ones are of interest.
    if not place.is_key or any(key.endswith("*") and matches(place.key, key) for key in KEYS)
]
FILES = ("data.", "model.hf", "cluster")
"""Keys whose texts may name files."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the jobs name."""
    folder = make_job_folder(tmp_path_factory.mktemp("jobs") / "job")
    (folder / "held-out.mask").write_bytes(bytes([1]) * 500)
    (folder / "held-out.u16").write_bytes(bytes([1, 0]) * 500)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "two.yaml").write_text("devices: 2 x cpu\n")
    (folder / "stored").mkdir()
    save_file({"w": torch.zeros(2)}, folder / "stored" / "model.safetensors")
    return folder


def planned(job_file: Path, **checks: bool) -> Plan:
    """A plan made by hand for the job that a file holds, with the words that a planner takes from it. InputError."""
    loaded = load_job(job_file, **checks)
    model = loaded.job.model
    name = model.factory or (model.hf if isinstance(model.hf, str) else str((model.hf or {}).get("model_type")))
    sources = ("tiny.py", "custom.py") if model.factory else ()
    plan = make_plan(world=2, engine="ddp", init="modules" if model.hf else "constructor", sources=sources)
    facts = plan.model.model_copy(update={"name": name})
    return plan.model_copy(update={"job": loaded.job, "defaults": loaded.defaults, "model": facts})


def emitted(folder: Path, job: dict[str, Any], **checks: bool) -> dict[str, str]:
    """Every JSON text is a YAML text, and the loader reads it as such."""
    (folder / "job.yaml").write_text(json.dumps(job, ensure_ascii=False), encoding="utf-8")
    return dict(emit(planned(folder / "job.yaml", **checks), folder, folder / "out").files)


def accepted(folder: Path, job: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The emission of a job, unless it is refused; without its files being looked for if it is refused with that."""
    try:
        yield emitted(folder, job)
    except InputError:
        with suppress(InputError):
            yield emitted(folder, job, check_model=False, check_data=False)


def provide(folder: Path, place: Place, text: str) -> None:
    """A file of this name with what the place's usual file holds, where the file system allows the name."""
    if not place.is_key and place.key.startswith(FILES):
        usual = Path(folder, "corpus.txt" if "bytes" in place.key else "corpus.u16")
        for other in ("validation", "mask", "hf", "cluster"):
            if other in place.key:
                usual = Path(folder, {"hf": "config.json", "cluster": "two.yaml"}.get(other, f"held-out.{other}"))
        content = usual.read_bytes() if usual.exists() else (folder / "held-out.txt").read_bytes()
        with suppress(OSError, ValueError):
            (folder / text).write_bytes(content)


@cache
def harmless(name: str, folder: Path) -> dict[str, str]:
    return emitted(folder, JOBS[name])


def without_words(script: str) -> list[str]:
    """Lines of a shell script without comments; the job's name is a word of its own letters."""
    lines = [line for line in script.splitlines() if not line.startswith("# ")]
    return [re.sub(r"^#SBATCH --job-name=[A-Za-z0-9_.-]+$", "#SBATCH --job-name=", line) for line in lines]


def test_the_jobs_are_right_as_they_stand(folder: Path) -> None:
    for name in JOBS:
        ast.parse(harmless(name, folder)["train.py"])


def test_every_text_of_the_schema_is_in_one_of_the_jobs() -> None:
    exercised = {place.key for _, place in PLACES}
    assert len(KEYS) > 50
    assert {key for key in KEYS if not any(matches(found, key) for found in exercised)} == set()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place"), PLACES, ids=[f"{n}-{p.key}{' key' * p.is_key}" for n, p in PLACES])
def test_hostile_text_is_refused_or_only_a_value(folder: Path, name: str, place: Place) -> None:
    # A plain word where it is accepted: a key that is called something else may be another recipe.
    expected = next(accepted(folder, place.replaced(JOBS[name], "plain")), None) or harmless(name, folder)
    for text in TEXTS:
        provide(folder, place, text)
        for files in accepted(folder, place.replaced(JOBS[name], text)):
            assert list(shape(ast.parse(files["train.py"]))) == list(shape(ast.parse(expected["train.py"]))), text
            assert files["train.py"].isascii()
            for script in ("launch.sh", "train.slurm"):
                assert without_words(files[script]) == without_words(expected[script]), text
            Plan.model_validate_json(files["plan.json"])
