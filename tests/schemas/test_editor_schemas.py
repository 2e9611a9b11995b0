"""The JSON Schemas for editors: current, valid, and of one mind with the loader.

To take over a changed model, run with SHARDWRIGHT_REWRITE_EXPECTED=1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import shardwright.schemas
from shardwright.schemas import job_schema, load_job, plan_schema
from shardwright.schemas.nodes import Source, plain
from shardwright.schemas.yaml_source import parse_yaml

HERE = Path(__file__).parent
BEYOND_A_SCHEMA = ("yaml-", "check-", "file-", "one-of-")
"""Wrong files that no JSON Schema can tell: wrong YAML, rules between values, files."""


@pytest.mark.parametrize(("name", "schema"), [("job", job_schema), ("plan", plan_schema)])
def test_committed_schema_is_current(name: str, schema: Callable[[], dict[str, Any]]) -> None:
    Draft202012Validator.check_schema(schema())
    committed = Path(shardwright.schemas.__file__).with_name(f"{name}.schema.json")
    text = json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
    if os.environ.get("SHARDWRIGHT_REWRITE_EXPECTED"):
        committed.write_text(text, encoding="utf-8")
    assert committed.read_text(encoding="utf-8") == text


def valid(path: Path) -> bool:
    values = plain(parse_yaml(Source(path.name, path.read_text())))
    return not list(Draft202012Validator(job_schema()).iter_errors(values))


@pytest.mark.parametrize("path", sorted((HERE / "good").glob("*.yaml")), ids=lambda path: path.stem)
def test_accepts_what_loads(path: Path) -> None:
    assert valid(path)


def test_rejects_what_it_can() -> None:
    wrong = [path for path in (HERE / "wrong").glob("*.yaml") if not path.name.startswith(BEYOND_A_SCHEMA)]
    accepted = {path.stem for path in wrong if valid(path)}
    # Names of the catalogue, and a count that needs it, are for the loader.
    assert accepted == {
        "cluster-device-as-machine",
        "cluster-device-without-host",
        "cluster-level-names",
        "cluster-machine-as-device",
        "cluster-no-file",
        "cluster-part-of-a-node",
        "cluster-unknown-device",
        "cluster-unknown-machine",
        "unit-too-large",
        "unit-zero",
    }
    assert len(wrong) > 3 * len(accepted)


def test_every_key_of_a_job_is_described() -> None:
    definitions = {"": job_schema(), **job_schema()["$defs"]}
    bare = [
        f"{name}.{key}"
        for name, definition in definitions.items()
        for key, value in definition.get("properties", {}).items()
        if "description" not in value and "$ref" not in json.dumps(value)
    ]
    assert bare == []


def test_defaults_of_the_schema_are_those_of_the_loader(workspace: Path) -> None:
    job = "model: {factory: model:build}\ndata: {bytes: corpus/a.txt}\n"
    job += "train: {sequence_length: 8, global_batch: 8, steps: 1}\ncluster: {devices: 2 x cpu}\n"
    (workspace / "job.yaml").write_text(job)
    train = load_job(workspace / "job.yaml").job.model_dump(mode="json")["train"]
    for part in ("optimizer", "schedule"):
        properties = job_schema()["$defs"][f"{part.title()}Spec"]["properties"]
        assert {key: value["default"] for key, value in properties.items()} == train[part]
