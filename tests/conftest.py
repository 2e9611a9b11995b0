"""What all tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _no_kept_profiles() -> Iterator[None]:
    """Profiles are made anew, and the cache of whoever runs the tests is left alone, in processes that tests start,
    too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDWRIGHT_CACHE", "off")
        yield


@pytest.fixture(autouse=True)
def _own_attention() -> Iterator[None]:
    """What a divided model replaces for as long as its process lives is put back for the next test."""
    functional = sys.modules.get("torch.nn.functional")
    attention = getattr(functional, "scaled_dot_product_attention", None)
    yield
    if functional is not None:
        functional.scaled_dot_product_attention = attention  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that none is left alone at the end where several run at a time."""
    long = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in long)
