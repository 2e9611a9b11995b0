"""Running the user's code: with the job's folder first on `sys.path`, its errors told with their place in it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from shardwright.schemas.diagnostics import Diagnostic, InputError

_VALUES = (
    "shardwright runs the model on tensors that have shapes but no values; decide by shapes and Python numbers, "
    "or compute on values with torch.where"
)
_INSTEAD = "; or name a function that is run in its place while it is measured: model.profile.forwards: {{{}: model:f}}"
_HINTS = {
    "DataDependentOutputException": _VALUES,
    "DynamicOutputShapeException": _VALUES,
    "UnsupportedFakeTensorException": _VALUES,
    "meta tensor": _VALUES,
    "Meta tensor": _VALUES,
    "meta device": _VALUES,
}
"""What to do about errors that contain these words."""


class NotTheUsers(Exception):
    """Raised by shardwright while the user's code runs, and not that code's failure."""


_INSTALLED = frozenset(("site-packages", "dist-packages"))
_OURS = frozenset(("torch", "shardwright"))


@dataclass(frozen=True, slots=True)
class UserCode:
    """The user's code beside the job file. Made by `user_code`."""

    folder: Path
    before: frozenset[str]

    def owns(self, file: str | None) -> bool:
        """Whether a file lies in the job's folder and is not an installed package's. The folder is on `sys.path` in
        full, so the files of modules begin with it."""
        if not file or not file.startswith(f"{self.folder}{os.sep}"):
            return False
        return not _INSTALLED.intersection(Path(file).parts)

    def modules(self) -> list[ModuleType]:
        """The user's modules imported so far."""
        loaded = [(name, module) for name, module in list(sys.modules.items()) if name not in self.before]
        return [module for _, module in loaded if self.owns(getattr(module, "__file__", None))]

    def where(self, error: BaseException) -> str:
        """The last place of a traceback that lies in the user's code, or else in another package's that is neither
        torch nor shardwright, as ` (model.py:12, in forward)`, or nothing."""
        if isinstance(error, SyntaxError) and self.owns(error.filename):
            return f" ({self.relative(str(error.filename))}:{error.lineno})"
        frames = [(at.filename, at.lineno or 0, at.name) for at in traceback.extract_tb(error.__traceback__)]
        users = [frame for frame in frames if self.owns(frame[0])]
        places = [place for frame in users or frames if (place := self.place(frame))]
        return places[-1] if places else ""

    def place(self, frame: tuple[str, int, str]) -> str:
        """File, line and function as ` (model.py:12, in forward)`; nothing for torch's files and our own."""
        file, line, function = frame
        if self.owns(file):
            return f" ({self.relative(file)}:{line}, in {function})"
        parts = Path(file).parts
        anothers = _INSTALLED.intersection(parts) and not _OURS.intersection(parts)
        return f" ({parts[-1]}:{line}, in {function})" if anothers else ""

    def relative(self, file: str) -> str:
        """A file's path from the job's folder, with forward slashes."""
        return Path(file).resolve().relative_to(self.folder).as_posix()

    @contextlib.contextmanager
    def running(self, key: str, doing: str, model: nn.Module | None = None) -> Iterator[None]:
        """Turns what the user's code raises inside into an InputError for this key of the job, which names the module
        of `model` that was running. What it prints goes to stderr."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except (InputError, NotTheUsers):
            raise
        except (Exception, SystemExit) as error:
            name = type(error).__name__
            path, inside = _module_of(error, model)
            message = f"{doing}{inside} failed: {name}: {_first_line(error)}{self.where(error)}"
            hint = next((text for sign, text in _HINTS.items() if sign in f"{name}: {error}"), "")
            hint += _INSTEAD.format(path) if path and hint else ""
            raise InputError(Diagnostic(key=key, message=message, suggestion=hint)) from error

    def load(self, import_path: str, key: str) -> Callable[..., Any]:
        """Imports `module:function`. Raises InputError with the nearest name if there is none of that name."""
        module_name, function_name = import_path.split(":")
        if importlib.util.find_spec(module_name.split(".")[0]) is None:
            files = sorted(path.stem for path in self.folder.glob("*.py"))
            raise InputError(
                Diagnostic(
                    key=key,
                    message=f"there is no module {module_name!r} beside the job file, and none is installed",
                    suggestion=_nearest(module_name, files) or f"write {module_name.split('.')[0]}.py beside the job",
                )
            )
        with self.running(key, f"importing {module_name}"):
            module = importlib.import_module(module_name)
        function = getattr(module, function_name, None)
        if not callable(function):
            names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise InputError(
                Diagnostic(
                    key=key,
                    message=f"module {module_name!r} has no function {function_name!r}",
                    suggestion=_nearest(function_name, names) or f"it has: {', '.join(sorted(names)) or 'no function'}",
                )
            )
        return function  # type: ignore[no-any-return]


def _module_of(error: BaseException, model: nn.Module | None) -> tuple[str, str]:
    """Path of the innermost module that was running when an error was raised, and what to say of it, as
    ` of module blocks.0.up (Linear)`. Both are empty if it cannot be told."""
    paths = {id(module): path for path, module in model.named_modules()} if model is not None else {}
    running = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = [module for module in running if isinstance(module, nn.Module) and id(module) in paths]
    if not inside:
        return "", ""
    path, name = paths[id(inside[-1])], type(inside[-1]).__name__
    return path, f" of module {path} ({name})" if path else f" of the model ({name})"


def _nearest(name: str, names: list[str]) -> str:
    close = get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def _first_line(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return error.msg
    lines = str(error).replace("FakeTensor", "Tensor").strip().splitlines()
    return lines[0] if lines else "(no message)"


@contextlib.contextmanager
def user_code(folder: Path) -> Iterator[UserCode]:
    """While open, modules beside the job file can be imported and come first. Afterwards `sys.path`, the modules
    (those of the same name that were hidden, too), torch's default dtype and the random states are as before."""
    folder = folder.resolve()
    path = list(sys.path)
    hidden = _hide_namesakes(folder)
    before = dict(sys.modules)
    code = UserCode(folder, frozenset(before))
    dtype, torch_state, python_state = torch.get_default_dtype(), torch.get_rng_state(), random.getstate()
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield code
    finally:
        ours = {id(module) for module in code.modules()}
        for name in [name for name, module in sys.modules.items() if id(module) in ours]:
            del sys.modules[name]
        sys.modules.update(hidden)
        sys.path[:] = path
        torch.set_default_dtype(dtype)
        torch.set_rng_state(torch_state)
        random.setstate(python_state)


def _hide_namesakes(folder: Path) -> dict[str, ModuleType]:
    """Takes modules out of `sys.modules` that come from elsewhere but are named like a file or package of the folder:
    `import model` must find the user's."""
    local = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    hidden = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        namesake = name.split(".")[0] in local - {"shardwright", "__main__"} - sys.stdlib_module_names
        if namesake and not (file and Path(file).resolve().is_relative_to(folder)):
            hidden[name] = sys.modules.pop(name)
    return hidden
