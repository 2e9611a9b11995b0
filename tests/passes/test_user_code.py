"""The user's code is run with care, its errors are told with their place, and nothing is left behind."""

from __future__ import annotations

import builtins
import logging
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from passes.jobs import LLAMA, make_job
from passes.models import profile_of, refusal
from shardwright.passes import profile_model
from shardwright.schemas.diagnostics import InputError


def state() -> dict[str, Any]:
    """What a profile could leave changed."""
    import transformers.masking_utils as masking

    return {
        "path": list(sys.path),
        "functions": [F.scaled_dot_product_attention, F.dropout, F.layer_norm, F.rms_norm],
        "masking": masking.find_packed_sequence_indices,
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "random": (torch.get_rng_state().tolist(), random.getstate()),
        "environment": dict(os.environ),
        "logging": logging.getLogger("transformers").level,
        "modes": torch.utils._python_dispatch._get_current_dispatch_mode(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(tmp_path: Path, fails: bool) -> None:
    source = """
    import random
    from torch.nn.functional import scaled_dot_product_attention
    torch.manual_seed(1), random.seed(1), torch.set_default_dtype(torch.float32)
    class Attending(Block):
        def forward(self, x):
            heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
            return super().forward(x) + scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
    class build(Model):
        block = Attending
    """ + ("def build(): raise ValueError('no')" if fails else "")
    before, modules = state(), set(sys.modules)
    if fails:
        refusal(tmp_path, source)
    else:
        profile_of(tmp_path, source, dtypes=("fp32", "bf16"))
    assert state() == before
    assert not [name for name in set(sys.modules) - modules if name.split(".")[0] == "user"]


def test_hugging_face_leaves_nothing_behind(tmp_path: Path) -> None:
    before = state()
    profile_model(make_job({"hf": LLAMA}), tmp_path, ("bf16",))
    assert state() == before


def test_modules_of_the_same_name_elsewhere_are_hidden_for_a_while(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "layers_of_a_test.py").write_text("width = 1")
    (tmp_path / "two" / "layers_of_a_test.py").write_text("width = 2")
    names = ("planner", "passes", "schemas", "inspect_me")
    for name in names:
        (tmp_path / "two" / f"{name}.py").write_text("import layers_of_a_test\nwidth = layers_of_a_test.width")
    source = f"import {', '.join(names)}\nassert [m.width for m in ({', '.join(names)})] == [2] * {len(names)}"
    sys.path.insert(0, str(tmp_path / "one"))
    try:
        import layers_of_a_test  # type: ignore[import-not-found]

        import passes.jobs as ours

        profile_of(tmp_path / "two", source)
        assert sys.modules["layers_of_a_test"] is layers_of_a_test
        assert sys.modules["passes.jobs"] is ours
    finally:
        sys.path.remove(str(tmp_path / "one"))
        del sys.modules["layers_of_a_test"]


def test_a_changed_model_is_read_again(tmp_path: Path) -> None:
    assert len(profile_of(tmp_path).block_paths) == 3
    assert len(profile_of(tmp_path, "build = lambda: Model(layers=4)").block_paths) == 4


def test_prints_of_the_user_do_not_reach_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile_of(tmp_path, "print('imported')\ndef build():\n    print('built')\n    return Model()")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.split() == ["imported", "built"]


@pytest.mark.parametrize(
    ("source", "model", "key", "words", "suggestion"),
    [
        ("", {"factory": "user:biuld"}, "model.factory", "no function 'biuld'", "'build'"),
        ("", {"factory": "usr:build"}, "model.factory", "no module 'usr'", "'user'"),
        ("", {"factory": "user.sub:build"}, "model.factory", "ModuleNotFoundError", ""),
        ("", {"args": {"layer": 2}}, "model.args.layer", "'layer'", "'layers'"),
        ("def build(size): pass", {}, "model.args", "'size'", ""),
        ("build = lambda: 3", {}, "model.factory", "returned int", ""),
        ("raise ValueError('in import')", {}, "model.factory", "ValueError: in import (user.py:", ""),
        ("import sys; sys.exit('bye')", {}, "model.factory", "SystemExit: bye", ""),
        ("def build(:", {}, "model.factory", "SyntaxError: invalid syntax (user.py:", ""),
        ("def build(): return 1 / 0", {}, "model.factory", "division by zero (user.py:", ""),
        ("def build(): torch.ones(1).item()", {}, "model.factory", "(user.py:", "no values"),
        ("def build(): return nn.Linear(2, 2).requires_grad_(False)", {}, "model.factory", "no parameter to train", ""),
        ("def build(): return nn.LazyLinear(2)", {}, "model.factory", "lazy", "constructor"),
        ("def build(): return nn.Linear(2, 2, device='cpu')", {}, "model.factory", "built on cpu", "device"),
    ],
)
def test_errors(tmp_path: Path, source: str, model: dict[str, Any], key: str, words: str, suggestion: str) -> None:
    said = refusal(tmp_path, source, **model)
    assert said.key == key
    assert words in said.message
    assert suggestion in said.suggestion


def test_an_error_in_forward_is_told_with_its_line(tmp_path: Path) -> None:
    source = """
    class Wrong(Block):
        def forward(self, x):
            return self.up(x).no_such_method()
    class build(Model):
        block = Wrong
    """
    said = refusal(tmp_path, source)
    line = (tmp_path / "user.py").read_text().splitlines().index("        return self.up(x).no_such_method()") + 1
    assert (
        f"AttributeError: 'Tensor' object has no attribute 'no_such_method' (user.py:{line}, in forward)"
        in said.message
    )


@pytest.mark.parametrize(
    "line",
    [
        "return x if x.sum() > 0 else -x",
        "return x * x.mean().item()",
        "return x + x[x.abs() > 1].sum()",
        "return x + torch.nonzero(x).sum()",
        "return x * float(x.detach().max())",
    ],
    ids=["branch", "item", "mask", "nonzero", "float"],
)
def test_decisions_by_value_are_refused(tmp_path: Path, line: str) -> None:
    source = f"""
    class Inner(nn.Module):
        def forward(self, x):
            {line}
    class Wrong(Block):
        def __init__(self):
            super().__init__()
            self.inner = Inner()
        def forward(self, x):
            return self.inner(super().forward(x))
    class build(Model):
        block = Wrong
    """
    said = refusal(tmp_path, source)
    number = (tmp_path / "user.py").read_text().splitlines().index(f"        {line}") + 1
    assert said.message.startswith("forward of module blocks.0.inner (Inner) failed: ")
    assert said.message.endswith(f"(user.py:{number}, in forward)")
    assert "torch.where" in said.suggestion
    assert "model.profile.forwards: {blocks.0.inner: model:f}" in said.suggestion


INSTEAD = """
class Inner(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x
class Deciding(Block):
    def __init__(self):
        super().__init__()
        self.inner = Inner(16, 16)
    def forward(self, x):
        return self.inner(super().forward(x))
class build(Model):
    block = Deciding
def computed(module, x):
    return F.linear(x, module.weight, module.bias)
"""


@pytest.mark.parametrize("name", ["Inner", "each"])
def test_the_job_may_replace_a_forward(tmp_path: Path, name: str) -> None:
    names = [f"blocks.{index}.inner" for index in range(3)] if name == "each" else [name]
    forwards = dict.fromkeys(names, "user:computed")
    profile = profile_of(tmp_path, INSTEAD, profile={"forwards": forwards})
    (block,) = [unit for unit in profile.units if unit.kind == "block"]
    assert block.count == 3
    plain = profile_of(tmp_path).units[1].costs["fp32"].flops("forward", 1)
    assert block.costs["fp32"].flops("forward", 1) == plain + 2 * 24 * 16 * 16
    assert not [warning for warning in profile.warnings if "export" in warning]


@pytest.mark.parametrize(
    ("forwards", "key", "suggestion"),
    [
        ({"Iner": "user:computed"}, "model.profile.forwards.Iner", "'Inner'"),
        ({"blocks.0.iner": "user:computed"}, "model.profile.forwards.blocks.0.iner", "'blocks.0.inner'"),
        ({"Inner": "user:compute"}, "model.profile.forwards.Inner", "'computed'"),
        ({"Router": "user:computed"}, "model.profile.forwards.Router", "its classes: Deciding, Embedding, Inner"),
    ],
)
def test_replaced_forwards_that_are_wrong(tmp_path: Path, forwards: dict[str, str], key: str, suggestion: str) -> None:
    said = refusal(tmp_path, INSTEAD, profile={"forwards": forwards})
    assert said.key == key
    assert suggestion in said.suggestion


def test_an_error_inside_torch_is_told_with_the_users_module(tmp_path: Path) -> None:
    source = """
    class Wrong(Block):
        def forward(self, x):
            return self.down(self.norm(x))
    class build(Model):
        block = Wrong
    """
    said = refusal(tmp_path, source)
    assert said.message.startswith("forward of module blocks.0.down (Linear) failed: ")
    assert "(user.py:" in said.message


def test_products_of_two_dtypes_are_refused(tmp_path: Path) -> None:
    """Real tensors refuse them, fake ones do not."""
    source = """
    class build(Model):
        def forward(self, tokens):
            return super().forward(tokens) + self.head(torch.ones(1, 1, 16))
    """
    assert profile_of(tmp_path, source).units
    said = refusal(tmp_path, source, dtypes=("bf16",))
    assert "got float32 and bfloat16" in said.message
    assert "module head (Linear)" in said.message


@pytest.mark.parametrize(
    "draw", ["random.random() < 0.5", "uniform(0, 1) < 0.5", "drawn() < 0.5", "random.gauss(0, 1) > 9"]
)
def test_random_decisions_of_python_are_taken_so_that_most_is_done(tmp_path: Path, draw: str) -> None:
    source = f"""
    import random
    from random import random as drawn, uniform
    class Maybe(Block):
        def forward(self, x):
            return x if {draw} else super().forward(x)
    class build(Model):
        block = Maybe
    """
    profile = profile_of(tmp_path, source)
    plain = profile_of(tmp_path)
    assert [unit.costs for unit in profile.units] == [unit.costs for unit in plain.units]
    (warning,) = [line for line in profile.warnings if "random" in line]
    assert "(user.py:" in warning


@pytest.mark.parametrize(
    ("hf", "words", "suggestion"),
    [
        ("no-such-folder", "no file", "config.json"),
        ("broken.json", "is not JSON", ""),
        ("list.json", "does not hold", ""),
        ({}, "names no model_type", ""),
        ({"model_type": "lama"}, "'lama' is unknown", "'llama'"),
        ({**LLAMA, "architectures": ["NoSuchModel"]}, "no model 'NoSuchModel'", ""),
        ({**LLAMA, "architectures": ["LlamaConfig"]}, "no model 'LlamaConfig'", ""),
        ({**LLAMA, "architectures": ["logging"]}, "no model 'logging'", ""),
        ({**LLAMA, "architectures": [3]}, "3 is not a model", ""),
        ({**LLAMA, "architectures": "LlamaForCausalLM"}, "lists classes", "[LlamaForCausalLM]"),
        ({**LLAMA, "hidden_size": "wide"}, "refuses the configuration", ""),
        ({**LLAMA, "num_attention_heads": 7}, "", ""),
    ],
)
def test_hugging_face_errors(tmp_path: Path, hf: Any, words: str, suggestion: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InputError) as caught:
        profile_model(make_job({"hf": hf}), tmp_path, ("fp32",))
    (said,) = caught.value.diagnostics
    assert said.key == "model.hf"
    assert words in said.message
    assert suggestion in said.suggestion


@pytest.mark.parametrize("name", ["config.json", "tiny/config.json"])
def test_hugging_face_configurations_are_read_from_files(tmp_path: Path, name: str) -> None:
    import json

    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({key: value for key, value in LLAMA.items() if key != "architectures"}))
    given = name.removesuffix("/config.json")
    read = profile_model(make_job({"hf": given}), tmp_path, ("bf16",))
    assert read == profile_model(make_job({"hf": LLAMA}), tmp_path, ("bf16",))


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"shardwright\[hf\]"):
        profile_model(make_job({"hf": LLAMA}), tmp_path, ("fp32",))
