"""What several tests of the backends need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("support.compare")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As the processes compute: with more threads, products of bf16 numbers are summed in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
