"""The command line in a process of its own: what it imports, and what becomes of streams and exit codes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import shardwright

SOURCES = str(Path(shardwright.__file__).parents[1])
NO_TORCH = """
import sys
from shardwright.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "numpy", "networkx", "jinja2"} & set(sys.modules)
assert not heavy, heavy
"""


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return kept | {"PYTHONPATH": SOURCES, "TERM": "xterm-256color"} | changes


def shardwright_process(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardwright", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**changes), check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("check", "job.yaml"),
        ("schema", "plan"),
        ("devices",),
        ("inspect", "plan.json"),
        ("inspect", "plan.json", "--why", "micro_batch"),
    ],
)
@pytest.mark.usefixtures("plan_file")
def test_needs_no_torch(arguments: tuple[str, ...]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *arguments], capture_output=True, text=True, env=environment(), check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_exit_codes(folder: Path) -> None:
    assert shardwright_process("check", "job.yaml").returncode == 0
    assert shardwright_process("check", "nothing.yaml").returncode == 2
    assert shardwright_process("fly").returncode == 2


@pytest.mark.usefixtures("folder")
def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "shardwright", "schema", "plan"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.usefixtures("plan_file")
def test_a_stream_without_unicode() -> None:
    result = shardwright_process("inspect", "plan.json", PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert result.stdout.isascii()


def on_a_terminal(*arguments: str, **changes: str) -> str:
    """What the process writes to a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "shardwright", *arguments]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment(**changes))
    os.close(theirs)
    written = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # how Linux says that the other side has closed
            break
        if not chunk:
            break
        written += chunk
    process.wait()
    os.close(ours)
    return written.decode()


@pytest.mark.usefixtures("folder")
def test_colour_on_a_terminal_only() -> None:
    red = "\x1b[1;31m"
    assert red in on_a_terminal("check", "nothing.yaml")
    assert red not in on_a_terminal("check", "nothing.yaml", NO_COLOR="1")
    assert "\x1b[" not in shardwright_process("check", "nothing.yaml").stderr


@pytest.mark.usefixtures("plan_file")
def test_width_follows_the_terminal() -> None:
    for columns in (40, 120):
        lines = shardwright_process("inspect", "plan.json", COLUMNS=str(columns)).stdout.splitlines()
        assert max(map(len, lines)) <= columns
