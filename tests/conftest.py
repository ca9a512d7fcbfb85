"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)  # before anything runs: for meshes


@pytest.fixture(autouse=True)
def _quick_compiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hundreds of tiny programs: compiling them is nearly all of the time.

    Not where the compiled program itself is looked at.
    """
    quick = getattr(request.module, "__name__", "") != "test_cost"
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
