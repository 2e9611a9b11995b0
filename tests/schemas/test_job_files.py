"""The files of a job are judged as the emitted script reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.backends.pytorch.runtime.data import DataError, byte_files, matching
from shardwright.schemas import InputError, load_job
from shardwright.schemas.job_files import expand

FILES = ("b.txt", "a.txt", "a-b.txt", "a/b.txt", "a/deep/c.txt", "B.txt", "10.txt", "9.txt", "[ab].txt", ".hidden.txt")
PATTERNS = (
    "*.txt", "**/*.txt", "**/**/*.txt", "*", "a*", "a*/*", "[ab].txt", "[!a]*.txt", "?.txt", "./*.txt", "a/../*.txt",
    ".*.txt", "b.txt", "a/b.txt", "none.txt", "none-*",
)  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("[odd] name")
    for number, name in enumerate(FILES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(10 * (number + 1)))
    return folder


def read_by_the_script(patterns: list[str], folder: Path) -> list[Path]:
    """What `matching` gives, and nothing where it refuses a pattern that matches nothing."""
    try:
        return matching(folder, patterns)
    except DataError:
        return []


@given(patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3), absolute=st.booleans())
def test_expand_gives_the_files_of_the_script(tree: Path, patterns: list[str], absolute: bool) -> None:
    if absolute:
        # The folder's own name holds characters of patterns, so it is escaped as a person would have to.
        patterns = [str(tree).replace("[", "[[]") + "/" + pattern for pattern in patterns]
    missing = [pattern for pattern in patterns if not expand([pattern], tree)]
    found = [] if missing else [tree / name for name in expand(patterns, tree)]
    assert found == read_by_the_script(patterns, tree)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["b.txt", "?.txt"], ["b.txt", "9.txt", "B.txt", "a.txt", "b.txt"]),
        (["a.txt", "a.txt"], ["a.txt", "a.txt"]),
        (["a*/*.txt", "a-*"], ["a/b.txt", "a-b.txt"]),
        (["[ab].txt"], ["[ab].txt"]),
        (["**/[bc].txt"], ["a/b.txt", "a/deep/c.txt", "b.txt"]),
    ],
)
def test_expand(tree: Path, patterns: list[str], names: list[str]) -> None:
    assert list(expand(patterns, tree)) == names


@given(length=st.integers(1, 120), patterns=st.lists(st.sampled_from(("a.txt", "b.txt", "*.txt", "a/*")), min_size=1))
def test_a_job_loads_if_the_script_can_read_its_files(tree: Path, length: int, patterns: list[str]) -> None:
    job = tree / "job.yaml"
    job.write_text(
        f"model: {{hf: {{model_type: gpt2}}}}\ndata: {{bytes: {patterns}}}\ncluster: {{devices: 1 x cpu}}\n"
        f"train: {{sequence_length: {length}, global_batch: 1, steps: 1}}\n"
    )
    try:
        byte_files(tree, patterns, length)
    except DataError:
        with pytest.raises(InputError, match="too few for one sample"):
            load_job(job)
    else:
        load_job(job)
