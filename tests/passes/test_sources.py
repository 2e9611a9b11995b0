"""What a script must bring along."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from passes.jobs import LLAMA, USER, make_job
from passes.models import profile_of
from shardwright.passes import profile_model
from shardwright.passes.sources import packages
from shardwright.schemas.diagnostics import InputError


def test_files_of_the_model(tmp_path: Path) -> None:
    profile = profile_model(make_job({"factory": "gpt:build"}), USER, ("fp32",))
    assert profile.local_sources == ("gpt.py", "layers.py")
    assert profile.packages == ()


def test_everything_that_is_imported_is_found(tmp_path: Path) -> None:
    files = {
        "parts/__init__.py": "from .norms import Norm",
        "parts/norms.py": "from torch import nn\nNorm = nn.LayerNorm",
        "parts/unused.py": "",
        "late.py": "import deeper.down",
        "deeper/down.py": "x = 1",
        "dynamic.py": "",
        "losses.py": "import helpers\nfrom user import F\n"
        "def loss(o, b): return F.cross_entropy(o.flatten(0, 1), b['targets'].flatten(), reduction='sum')",
        "helpers.py": "import numpy, yaml.nodes\ntry:\n    import no_such_package\nexcept ImportError: pass",
        "unrelated.py": "raise SystemExit",
        ".venv/lib/site-packages/inside.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    source = """
    import importlib, sys
    from parts import Norm
    importlib.import_module("dynamic")
    sys.path.append(__file__.replace("user.py", ".venv/lib/site-packages"))
    import inside
    def lately():
        import late
    """
    profile = profile_of(tmp_path, source, loss="losses:loss")
    assert profile.local_sources == (
        "deeper/down.py",
        "dynamic.py",
        "helpers.py",
        "late.py",
        "losses.py",
        "parts/__init__.py",
        "parts/norms.py",
        "user.py",
    )
    assert profile.packages == ("PyYAML", "numpy")


def test_hugging_face_needs_its_package_only(tmp_path: Path) -> None:
    profile = profile_model(make_job({"hf": LLAMA}), tmp_path, ("bf16",))
    assert (profile.local_sources, profile.packages) == ((), ("transformers",))


def test_a_module_that_a_script_would_not_find_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `src` folder that is on the path here, and would not be where the script runs."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "hidden.py").write_text((USER / "gpt.py").read_text())
    (tmp_path / "src" / "layers.py").write_text((USER / "layers.py").read_text())
    monkeypatch.syspath_prepend(tmp_path / "src")
    monkeypatch.delitem(sys.modules, "layers", raising=False)
    with pytest.raises(InputError, match=r"was imported from src/\w+\.py, where a script would not find it"):
        profile_model(make_job({"factory": "hidden:build"}), tmp_path, ("fp32",))


def test_a_factory_of_an_installed_package_needs_that_package(tmp_path: Path) -> None:
    job = make_job({"factory": "gpt:build", "loss": "jsonschema.validators:validate"})
    assert packages(job, ("gpt.py",), USER) == ("jsonschema",)


def test_a_module_from_elsewhere_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "job").mkdir()
    text = "from torch.nn import functional as F\ndef loss(o, b): return F.cross_entropy(o.flatten(0, 1), "
    (tmp_path / "elsewhere" / "far_losses.py").write_text(text + "b['targets'].flatten(), reduction='sum')")
    for name in ("gpt.py", "layers.py"):
        (tmp_path / "job" / name).write_text((USER / name).read_text())
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    job = make_job({"factory": "gpt:build", "loss": "far_losses:loss"})
    profile = profile_model(job, tmp_path / "job", ("fp32",))
    assert [warning.split(" lies")[0] for warning in profile.warnings] == ["far_losses"]
    assert profile.local_sources == ("gpt.py", "layers.py")
