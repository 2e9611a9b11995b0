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


def test_the_corpus_is_large_and_has_no_leftovers() -> None:
    assert len(CORPUS) >= 40
    assert {path.stem for path in CORPUS[0].parent.glob("*.expected")} <= {path.stem for path in CORPUS}


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
