from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.golden import REASONS, golden_plans
from support.hostile import HOSTILE
from support.plans import make_plan
from support.shapes import shape

from shardwright import planner
from shardwright.backends.emission import write
from shardwright.backends.pytorch import emit
from shardwright.backends.pytorch.engines import ENGINES
from shardwright.backends.pytorch.recipes import LR_SCHEDULES, OPTIMIZER_CONSTANTS, PRECISION_POLICIES
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.plan import Plan, Reason, json_fields

SUPPORT = Path(__file__).parents[1] / "support"
BACKEND = Path(emit.__code__.co_filename).parent
"""Where the templates are."""


def emitted(plan: Plan, out: Path = SUPPORT / "out") -> dict[str, str]:
    return dict(emit(plan, SUPPORT, out).files)


def test_every_entry_of_the_planners_tables_has_its_emitting_half() -> None:
    assert ENGINES.keys() == planner.ENGINES.keys()
    assert PRECISION_POLICIES.keys() == planner.PRECISIONS.keys()
    assert OPTIMIZER_CONSTANTS.keys() == planner.OPTIMIZERS.keys()
    assert set(LR_SCHEDULES) == planner.LR_SCHEDULES.keys()
    templates = BACKEND / "templates"
    assert {path.name for path in (templates / "engines").iterdir()} == planner.ENGINES.keys() | {"pipeline"}
    assert {path.name.split(".")[0] for path in (templates / "optimizers").iterdir()} == planner.OPTIMIZERS.keys()
    assert {path.name.split(".")[0] for path in (templates / "lr_schedules").iterdir()} == planner.LR_SCHEDULES.keys()


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 20])
def test_learning_rates_are_the_planners(name: str, warmup: int) -> None:
    schedule = {"name": name, "warmup": warmup, "final_ratio": 0.25} if warmup else {"name": name, "final_ratio": 0.25}
    plan = make_plan(train={"steps": 20, "schedule": schedule})
    tree = ast.parse(emitted(plan)["train.py"])
    kept = [node for node in tree.body if isinstance(node, ast.Assign | ast.FunctionDef)]
    kept = [node for node in kept if not isinstance(node, ast.FunctionDef) or node.name == "learning_rate"]
    values: dict[str, Any] = {"math": math, "__file__": "train.py", "Path": Path}
    exec(compile(ast.Module(kept, []), "train.py", "exec"), values)
    factor = planner.LR_SCHEDULES[name]  # type: ignore[index]
    for step in range(20):
        progress = (step - warmup) / max(1, 19 - warmup)
        expected = (step + 1) / warmup if step < warmup else factor(progress, 0.25)
        assert values["learning_rate"](step) == pytest.approx(1e-2 * expected)


@pytest.mark.parametrize("plan", golden_plans().values(), ids=golden_plans().keys())
def test_emission_is_deterministic_and_complete(plan: Plan) -> None:
    files = emitted(plan)
    assert files == emitted(Plan.model_validate_json(plan.model_dump_json()))
    assert Plan.model_validate_json(files["plan.json"]) == plan
    assert json.loads(files["plan.json"]) == json_fields(plan)
    assert {"train.py", "launch.sh", "train.slurm", "plan.json", *plan.model.local_sources} <= files.keys()
    assert ("model_config.json" in files) == (plan.job.model.hf is not None)
    for source in plan.model.local_sources:
        assert files[source] == (SUPPORT / source).read_text()
    for name, text in files.items():
        if name.startswith("shardwright_runtime/"):
            assert text == (BACKEND / "runtime" / name.split("/")[1]).read_text()
    assert not any(str(SUPPORT.parent) in text for text in files.values())


def test_only_the_modules_that_a_plan_needs_come_along() -> None:
    assert "shardwright_runtime/initialize.py" not in emitted(make_plan())
    assert "shardwright_runtime/initialize.py" in emitted(make_plan(init="modules"))


def test_a_runtime_module_that_a_plan_no_longer_needs_goes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(emit(make_plan(init="modules"), SUPPORT, out), out)
    assert (out / "shardwright_runtime" / "initialize.py").is_file()
    emission = emit(make_plan(), SUPPORT, out)
    assert write(emission, out) == ("train.py",)
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert left == {*emission.files, "train.py.old"}


def test_relative_paths_lead_from_the_script_to_the_job() -> None:
    assert 'DATA_ROOT = ".."' in emitted(make_plan())["train.py"]
    assert 'DATA_ROOT = "../../.."' in emitted(make_plan(), SUPPORT / "a" / "b" / "c")["train.py"]
    assert 'DATA_ROOT = "."' in emitted(make_plan(), SUPPORT)["train.py"]
    assert 'DATA_ROOT = "../support"' in emitted(make_plan(), SUPPORT.parent / "elsewhere")["train.py"]


def constant(text: str, name: str) -> Any:
    """The value of a constant of a script; None where it has none."""
    return next(
        (
            ast.literal_eval(node.value)
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
        ),
        None,
    )


@pytest.mark.parametrize(("weights", "seen"), [("w", "../../w"), ("../w", "../../../w"), ("/mnt/w", "/mnt/w")])
def test_weights_are_seen_from_the_script(weights: str, seen: str) -> None:
    files = emitted(make_plan(init="modules", model={"weights": weights}), SUPPORT / "a" / "b")
    assert constant(files["train.py"], "WEIGHTS") == seen
    assert "export.py FOLDER" in (ast.get_docstring(ast.parse(files["train.py"])) or "")
    assert constant(emitted(make_plan())["train.py"], "WEIGHTS") is None


def test_load_means_the_folder_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float16"}')
    for hf in ("llama", "llama/config.json"):
        plan = make_plan(sources=(), init="modules", model={"factory": None, "args": {}, "hf": hf, "weights": "load"})
        files = emit(plan, tmp_path, tmp_path / "out").files
        assert constant(files["train.py"], "WEIGHTS") == "../llama"
        assert constant(files["export.py"], "COMPANIONS") == "../llama"
        assert constant(files["export.py"], "DTYPE") == "float16"
    save_file(
        {"a": torch.zeros(9, dtype=torch.bfloat16), "b": torch.zeros(2)}, tmp_path / "llama" / "model.safetensors"
    )
    assert constant(emit(plan, tmp_path, tmp_path / "out").files["export.py"], "DTYPE") == "bfloat16"


def test_every_reason_stands_in_the_script() -> None:
    reasons = (*REASONS, Reason(key="decision.something.new", value="7", because="It is new."))
    text = emitted(make_plan(world=8, shard=8, engine="fsdp2", reasons=reasons))["train.py"]
    joined = " ".join(line.lstrip("# ") for line in text.splitlines())
    for reason in reasons:
        assert f"Why {reason.key.removeprefix('decision.')} = {reason.value}: {reason.because}" in joined


@pytest.mark.parametrize("name", ["train.py", "export.py", "shardwright_runtime/data.py", "shardwright_runtime.py"])
def test_sources_may_not_take_the_place_of_emitted_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would take the place"):
        emit(make_plan(sources=(name,)), tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["../tiny.py", "/tiny.py", "a/../../tiny.py"])
def test_sources_outside_the_jobs_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="outside the job's folder"):
        emit(make_plan(sources=(name,)), tmp_path, tmp_path / "out")


def test_a_missing_source_and_a_missing_configuration_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read missing\.py"):
        emit(make_plan(sources=("missing.py",)), tmp_path, tmp_path / "out")
    plan = make_plan(sources=(), init="modules", model={"factory": None, "args": {}, "hf": "missing.json"})
    with pytest.raises(InputError, match=r"cannot read the configuration missing\.json"):
        emit(plan, tmp_path, tmp_path / "out")


def test_a_hugging_face_configuration_is_read_from_file_or_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    for place in ("model", "model/config.json"):
        plan = make_plan(sources=(), init="modules", model={"factory": None, "args": {}, "hf": place})
        assert emit(plan, tmp_path, tmp_path / "out").files["model_config.json"] == '{\n  "model_type": "llama"\n}\n'


def test_without_a_named_architecture_transformers_chooses() -> None:
    def script(**fields: Any) -> str:
        config = {"model_type": "llama", **fields}
        return emitted(make_plan(sources=(), init="modules", model={"factory": None, "args": {}, "hf": config}))[
            "train.py"
        ]

    assert "= AutoModelForCausalLM.from_config(config, dtype=torch.float32)" in script()
    assert "= LlamaForCausalLM(config)" in script(architectures=["LlamaForCausalLM"])
    for name in ("os.abort(); Llama", "Path", "train", "L\nlama", "", 3):
        with pytest.raises(InputError, match="is not a model of transformers"):
            script(architectures=[name])


@pytest.mark.parametrize("path", ["class:build", "model:import", "a.None:build"])
def test_keywords_are_no_names_of_functions(path: str) -> None:
    with pytest.raises(InputError, match="not a name in Python"):
        emitted(make_plan(model={"factory": path}, sources=()))


@pytest.mark.parametrize("value", [{1: "one"}, object(), {"nested": [b"bytes"]}])
def test_arguments_must_be_plain_values(value: object) -> None:
    plan = make_plan(model={"args": {"value": value}})
    with pytest.raises(InputError, match=r"model\.args"):
        emitted(plan)


def worded(text: str) -> Plan:
    """A plan with a text in every field of a job, a plan and a reason that takes free text."""
    plan = make_plan(
        world=2,
        engine="fsdp2",
        shard=2,
        model={"args": {"text": text, "nested": {"key": [text, {"inner": text}]}, "keyed": {text: 1}}},
        data={"bytes": [text], "mask": [text], "validation": {"files": [text], "mask": [text]}},
        reasons=tuple(Reason(key=key, value=text, because=text) for key in ("mesh", "checkpointing", text)),
    )
    cluster = plan.job.cluster
    device = cluster.device.model_copy(update={"name": text, "source": text})
    job = plan.job.model_copy(update={"cluster": cluster.model_copy(update={"name": text, "device": device})})
    facts = plan.model.model_copy(update={"name": text, "attention": text, "packages": (text,)})
    parts = tuple(part.model_copy(update={"name": text, "note": text}) for part in plan.prediction.time)
    prediction = plan.prediction.model_copy(update={"time": parts, "mfu_formula": text})
    changes = {"job": job, "model": facts, "name": text, "job_file": text, "prediction": prediction}
    return plan.model_copy(update=changes)


def as_typed(text: str) -> str:
    """Text as a YAML file can hold it: JSON has no lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")


@pytest.mark.parametrize("text", [as_typed(text) for text in HOSTILE], ids=range(len(HOSTILE)))
def test_free_text_reaches_no_code(text: str) -> None:
    files = emitted(worded(text))
    tree, harmless = ast.parse(files["train.py"]), ast.parse(emitted(worded("harmless"))["train.py"])
    assert list(shape(tree)) == list(shape(harmless))
    assert files["train.py"].isascii()
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert text in strings
    for script in ("launch.sh", "train.slurm"):
        differing = {
            line
            for line in set(files[script].splitlines()) ^ set(emitted(worded("harmless"))[script].splitlines())
            if not line.startswith("#SBATCH --job-name=")
        }
        assert not differing
    name = next(line for line in files["train.slurm"].splitlines() if "--job-name=" in line).split("=", 1)[1]
    assert name.replace("-", "").replace("_", "").replace(".", "").isalnum() or set(name) <= set("-._")


@pytest.mark.parametrize("block", ["a'b.0", 'x"].append(1)#', "blocks.{index}", "blocks\n.0"])
def test_block_paths_are_values(block: str) -> None:
    files = emitted(make_plan(world=2, engine="fsdp2", shard=2, blocks=(block, "blocks.1", "blocks.2")))
    assigned = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(files["train.py"]).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "BLOCKS"
    }
    assert assigned["BLOCKS"] == [block, "blocks.1", "blocks.2"]
