"""The family: DoRA on every kind of weight, as other files define them."""

from __future__ import annotations

import dataclasses

from cases._registry import CASES

DORA = [
    "concatenated_outputs",
    "conv_2d",
    "conv_grouped",
    "conv_gradient_inside",
    "experts_batched",
    "experts_ragged",
    "experts_ragged_gradient_inside",
    "linen_attention",
    "linen_dense",
    "linen_dense_bfloat16",
    "linen_embed",
    "linen_scan",
    "lookup_and_tied_head",
    "lookup_take_with_fill",
    "padded_along_a_new_dim",
    "padded_and_reversed",
    "scan_that_swaps_weights",
    "shard_map_tensor_parallel",
    "sliced_inputs",
    "weight_on_the_left",
]


def register() -> None:
    """Called once the other files have entered theirs."""
    for name in DORA:
        case = CASES[name]
        CASES[f"dora_{name}"] = dataclasses.replace(case, name=f"dora_{name}", dora=True, traces=[])
