"""Every wrong job file of the corpus gives the text that stands beside it.

To take over new texts, run with SHARDWRIGHT_REWRITE_EXPECTED=1, then read every difference as a newcomer would.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from shardwright.schemas import InputError, load_job

CORPUS = sorted((Path(__file__).parent / "wrong").glob("*.yaml"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_wrong_job_is_explained(path: Path, workspace: Path) -> None:
    shutil.copy(path, workspace)
    with pytest.raises(InputError) as caught:
        load_job(Path(path.name))
    said = f"{caught.value}\n"
    expected = path.with_suffix(".expected")
    if os.environ.get("SHARDWRIGHT_REWRITE_EXPECTED"):
        expected.write_text(said, encoding="utf-8")
    assert said == expected.read_text(encoding="utf-8")
