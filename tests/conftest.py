"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import jax
import pytest

collect_ignore = ["oracle"]  # scripts for another environment

if jax.__version_info__ < (0, 11):
    # Newer ones do not know this flag. It takes a third of the time that compiling takes with
    # fusion emitters, each of which builds a pipeline of its own.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"

jax.config.update("jax_num_cpu_devices", 4)  # before anything runs: for meshes


@pytest.fixture(autouse=True)
def _quick_compiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hundreds of tiny programs: compiling them is nearly all of the time.

    Not where the compiled program itself is looked at, nor where each bit counts: optimizations
    fuse and reorder arithmetic.
    """
    looked_at = {"test_cost", "test_quantized_array", "test_quantized_memory"}
    quick = getattr(request.module, "__name__", "") not in looked_at
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
