"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _no_kept_profiles() -> Iterator[None]:
    """Profiles are made anew, and the cache of whoever runs the tests is left alone, in processes that tests start,
    too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDWRIGHT_CACHE", "off")
        yield
