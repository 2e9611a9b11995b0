"""Emitted scripts that start from real weights, on 1, 2 and 4 processes, and what is exported from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.launch import (
    emit_into,
    make_job_folder,
    outcomes,
    parameters_of,
    read_checkpoint,
    read_metrics,
    run_forked,
)
from support.plans import make_plan
from support.stored import emitted_module, facts, from_pretrained, make_folder, train_from
from support.tiny import build
from torch import Tensor, nn

from shardwright.schemas.plan import Plan

pytestmark = [pytest.mark.processes, pytest.mark.slow]

STEPS = 2


@dataclass(frozen=True)
class Case:
    """A plan that starts from the weights of a model, by its name in `support.stored`, or of the tiny one."""

    name: str
    model: str
    plan: Plan


def case(name: str, model: str, **plan: Any) -> Case:
    if model.startswith("tiny"):
        fields: dict[str, Any] = {"args": {"tied": model == "tiny-tied"}, "weights": model}
        return Case(name, model, make_plan(**{"init": "modules", **plan}, model=fields))
    fields = {"factory": None, "args": {}, "hf": model, "weights": "load"}
    return Case(name, model, make_plan(**facts(model), **plan, model=fields))


CASES = {
    1: [case("one, gpt2", "gpt2", accumulation=2), case("one, built whole", "tiny", init="constructor")],
    2: [
        case("ddp 2, gpt2", "gpt2", world=2, engine="ddp"),
        case("fsdp 2, llama", "llama", world=2, engine="fsdp2", shard=2, recomputed=2),
        case("fsdp 2, mixtral", "mixtral", world=2, engine="fsdp2", shard=2, train={"ema": 0.5}),
        case("fsdp 2, tiny, tied", "tiny-tied", world=2, engine="fsdp2", shard=2, reshard=False),
    ],
    4: [
        case("fsdp 4, llama", "llama", world=4, engine="fsdp2", shard=4),
        case("hsdp, gpt2", "gpt2", world=4, engine="fsdp2", shard=2, recomputed=1),
        case("ddp 4, tiny", "tiny", world=4, engine="ddp"),
        case("amsp 4, llama", "llama", world=4, engine="amsp", axes=(2, 2), shard=2, optimizer=4, recomputed=2),
        case("amsp 4, tiny, tied", "tiny-tied", world=4, engine="amsp", axes=(4,), optimizer=4, gradients=1),
    ],
}
ALL = [item for cases in CASES.values() for item in cases]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job after all launches. Each script begins, saves before its first step, and is resumed where
    the initial weights no longer are."""
    folder = make_job_folder(tmp_path_factory.mktemp("job with a space"))
    for model in {item.model for item in ALL}:
        if model.startswith("tiny"):
            (folder / model).mkdir()
            save_file(tiny_weights(model), folder / model / "weights.safetensors")
        else:
            make_folder(folder / model, model)
    launches = []
    for world, cases in CASES.items():
        listed = []
        for item in cases:
            script = str(emit_into(item.plan, folder, item.name))
            for argv in (["--steps", "0"], ["--resume", "--steps", str(STEPS), "--weights", "nowhere"]):
                listed.append({"folder": script, "argv": argv, "ends": "done"})
        launches.append((world, listed))
    unfit = str(emit_into(CASES[2][1].plan, folder, "unfit"))
    launches[1][1].append({"folder": unfit, "argv": ["--weights", str(folder / "gpt2")], "ends": "SystemExit"})
    modules = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt2", "mixtral")]
    run_forked(launches, folder, modules)
    assert all(text == "done" for item in ALL for text in outcomes(folder / item.name))
    return folder


def test_weights_of_another_model_are_refused_once(runs: Path) -> None:
    first, second = outcomes(runs / "unfit")
    assert "do not fit LlamaForCausalLM\n  30 needed by the model and not stored: model.embed_tokens.weight" in first
    assert second.endswith("another process failed; its message says why")


def tiny_weights(model: str) -> dict[str, Tensor]:
    torch.manual_seed(2)
    state = build(tied=model == "tiny-tied").state_dict()
    weights = {name: value + torch.randn_like(value) / 5 for name, value in state.items()}
    if model == "tiny-tied":
        del weights["embed.weight"]  # the other name of the two will do
    return weights


def initial(folder: Path, item: Case) -> nn.Module:
    """The model with its initial weights, as anyone else would load them."""
    if not item.model.startswith("tiny"):
        return from_pretrained(folder / item.model, item.model)
    model = build(tied=item.model == "tiny-tied")
    model.load_state_dict(tiny_weights(item.model), strict=item.model == "tiny")
    return model


@pytest.mark.parametrize("item", ALL, ids=lambda item: item.name)
def test_loaded_parameters_are_those_of_from_pretrained(runs: Path, item: Case) -> None:
    out = runs / item.name / "out"
    (out / "LATEST").write_text("step_00000000\n")
    stored = read_checkpoint(out)
    (out / "LATEST").write_text(f"step_{STEPS:08d}\n")
    model = initial(runs, item)
    expected = dict(model.named_parameters())
    found = parameters_of(stored)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name
    if item.model.startswith("tiny"):
        assert torch.equal(stored["buffer.scale"], model.get_buffer("scale"))


@pytest.mark.parametrize("item", ALL, ids=lambda item: item.name)
def test_training_goes_on_as_a_plain_loop_would(runs: Path, item: Case) -> None:
    expected = train_from(initial(runs, item), item.plan.job, runs, STEPS)
    losses = [line["loss"] for line in read_metrics(runs / item.name / "out")]
    assert losses[0] == pytest.approx(expected[0], rel=5e-7)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert expected[1] != pytest.approx(expected[0], rel=1e-3)


@pytest.mark.parametrize("item", ALL, ids=lambda item: item.name)
def test_the_exported_model_is_the_trained_one(runs: Path, item: Case, tmp_path: Path) -> None:
    trained = read_checkpoint(runs / item.name / "out")
    with emitted_module(runs / item.name, "export") as export:
        export.main([str(tmp_path / "exported"), "--dtype", "float32"])
        with pytest.raises(SystemExit, match="exists already"):
            export.main([str(tmp_path / "exported")])
    if item.model.startswith("tiny"):
        again: nn.Module = build(tied=item.model == "tiny-tied")
        with emitted_module(runs / item.name, "train"):
            from shardwright_runtime.weights import load_weights  # type: ignore[import-not-found]

            load_weights(again, tmp_path / "exported")
    else:
        again = from_pretrained(tmp_path / "exported", item.model)
        assert (tmp_path / "exported" / "tokenizer.json").read_bytes() == (
            runs / item.model / "tokenizer.json"
        ).read_bytes()
    parameters = dict(again.named_parameters())
    assert parameters.keys() == parameters_of(trained).keys()
    assert all(torch.equal(value, parameters[name]) for name, value in parameters_of(trained).items())
    ids = torch.arange(24).reshape(2, 12)
    expected = initial(runs, item)
    expected.load_state_dict(parameters_of(trained), strict=False)
    if not item.model.startswith("tiny"):
        expected.tie_weights()  # type: ignore[operator]
        assert torch.equal(again.eval()(ids).logits, expected.eval()(ids).logits)
    else:
        assert torch.equal(again(ids), expected(ids))


AVERAGED = [item for item in ALL if item.plan.job.train.ema is not None]


@pytest.mark.parametrize("item", AVERAGED, ids=lambda item: item.name)
def test_the_average_leaves_as_transformers_loads_it(runs: Path, item: Case, tmp_path: Path) -> None:
    trained = read_checkpoint(runs / item.name / "out")
    with emitted_module(runs / item.name, "export") as export:
        export.main([str(tmp_path / "exported"), "--dtype", "float32", "--average"])
    found = dict(from_pretrained(tmp_path / "exported", item.model).named_parameters())
    assert found.keys() == parameters_of(trained).keys()
    assert all(torch.equal(value, trained[f"optimizer.average.{name}"]) for name, value in found.items())
    assert not all(torch.equal(value, trained[f"model.{name}"]) for name, value in found.items())
