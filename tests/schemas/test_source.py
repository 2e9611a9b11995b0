"""Loading as a whole: files that cannot be read, `locate`, excerpts, and what loading costs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwright.schemas import Diagnostic, InputError, load_job
from shardwright.schemas.nodes import EXCERPT_WIDTH, Source, Span, excerpt, plain
from shardwright.schemas.yaml_source import parse_yaml

JOB = """\
model: {factory: model:build}
data: {bytes: corpus/*.txt}
train:
  sequence_length: 64
  global_batch: 8
  steps: 20
cluster: dgx-h100
"""


def test_no_such_file(workspace: Path) -> None:
    (workspace / "train.yaml").write_text(JOB)
    with pytest.raises(InputError) as caught:
        load_job(Path("trian.yaml"))
    assert str(caught.value) == "trian.yaml: error: there is no such file\n  help: did you mean train.yaml?"


def test_a_folder(workspace: Path) -> None:
    with pytest.raises(InputError, match="corpus: error: cannot be read: Is a directory"):
        load_job(Path("corpus"))


def test_a_huge_file(workspace: Path) -> None:
    with (workspace / "job.yaml").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(InputError, match="the file is larger than"):
        load_job(Path("job.yaml"))


@pytest.mark.parametrize(
    ("key", "line", "column"),
    [
        ("train.steps", 6, 10),
        ("train", 3, 1),
        ("train.optimizer.lr", 3, 1),  # a default: where it would stand
        ("data.bytes.0", 2, 15),  # a single value stands for a list
        ("cluster.device.memory", 7, 10),  # of the catalogue: where the cluster is named
        ("strategy.states.parameters", 1, 1),
    ],
)
def test_locate(key: str, line: int, column: int, workspace: Path) -> None:
    (workspace / "job.yaml").write_text(JOB)
    error = InputError(Diagnostic(key=key, message="wrong", suggestion="do right"))
    (only,) = load_job(Path("job.yaml")).locate(error).diagnostics
    assert (only.file, only.line, only.column, only.message, only.suggestion) == (
        "job.yaml", line, column, "wrong", "do right",
    )  # fmt: skip


def test_locate_leaves_what_has_a_place_or_no_key(workspace: Path) -> None:
    (workspace / "job.yaml").write_text(JOB)
    placed = Diagnostic(file="model.py", line=3, column=1, message="wrong")
    general = Diagnostic(message="wrong")
    first, second = load_job(Path("job.yaml")).locate(InputError([placed, general])).diagnostics
    assert first == placed
    assert str(second) == "job.yaml: error: wrong"


def carets(line: str, column: int, end: int) -> str:
    """What the caret line of an excerpt marks."""
    shown, marks = excerpt(Span(Source("x", line), 1, column, end)).splitlines()
    assert len(shown) <= EXCERPT_WIDTH + 7
    return shown[marks.index("^") : marks.rindex("^") + 1]


def test_excerpts_mark_what_is_meant() -> None:
    assert carets("train: {lr: fast}", 13, 17) == "fast"
    assert carets("x" * 500 + "fast" + "y" * 500, 501, 505) == "fast"
    assert carets("lr: fast", 5, 400) == "fast"
    assert carets("\tlr:\tfast", 6, 10) == "fast"


def test_excerpts_count_columns_of_wide_and_combining_characters() -> None:
    shown, marks = excerpt(Span(Source("x", "a: 漢字 e\u0301 fast"), 1, 10, 14)).splitlines()
    assert marks.index("^") == shown.index("fast") + 2 - 1  # two wide characters, one of no width


def test_excerpts_hold_no_control_characters() -> None:
    assert excerpt(Span(Source("x", "a: \x1b[31mred"), 1, 4, 5)).isprintable() is False  # the line break
    assert all(line.isprintable() for line in excerpt(Span(Source("x", "a: \x1b[31mred"), 1, 4, 5)).splitlines())


def test_loading_is_quick_and_needs_no_torch(workspace: Path) -> None:
    (workspace / "job.yaml").write_text(JOB)
    program = (
        "import sys, time; begin = time.process_time();"
        "from pathlib import Path; from shardwright.schemas import load_job;"
        "load_job(Path('job.yaml'));"
        "print(time.process_time() - begin, 'torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(root)}
    )
    seconds, torch = done.stdout.split()
    assert torch == "False"
    assert float(seconds) < 0.5  # of the processor; 0.25 s where this was written, most of it importing pydantic


GOOD = [
    plain(parse_yaml(Source(path.name, path.read_text())))
    for path in sorted((Path(__file__).parent / "good").glob("*.yaml"))
]
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2.5, 10**50, "", "auto", "all", "x" * 300, "80GiB", "1M tokens", "a:b", "../..", "/", "*", "\0",
    "8 x cpu", "0 x cpu", "999999 x cpu", "dgx-h100", ".yaml", "a.yaml/b", [], {}, [[]], [None], {"": None}, ["auto"],
    {"name": "x"}, {"devices": "2 x cpu"}, {"a": {"b": [1]}},
)  # fmt: skip


def ways(value: Any, way: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The way to every value below `value`."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [each for key, below in parts for each in ((*way, key), *ways(below, (*way, key)))]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_odd_values_anywhere_load_or_are_explained(data: st.DataObject, workspace: Path) -> None:
    job = copy.deepcopy(data.draw(st.sampled_from(GOOD)))
    for odd in data.draw(st.lists(st.sampled_from(ODD), min_size=1, max_size=3)):
        way = data.draw(st.sampled_from(ways(job)))
        holder = job
        for key in way[:-1]:
            holder = holder[key]
        holder[way[-1]] = copy.deepcopy(odd)
    (workspace / "job.json").write_text(json.dumps(job, indent=1))
    places: list[bool] = [True]
    try:
        load_job(Path("job.json"))
    except InputError as error:
        places = [each.line > 0 and bool(each.message) for each in error.diagnostics]
    assert places
    assert all(places)
