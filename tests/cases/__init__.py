"""The registry: every kind of layer and use, once. `test_properties.py` runs over all of it.

Sizes are chosen so that no activation has as many elements as an adapted weight or a layer of it:
an equation that makes so many elements from an adapter has formed W + BA.
"""

from cases import (  # noqa: F401
    contractions,
    control_flow,
    convolutions,
    equinox,
    experts,
    family,
    haiku,
    linen,
    lookups,
    nnx,
    sharded,
    structure,
)
from cases._registry import CASES, Case

family.register()

__all__ = ["CASES", "Case"]
