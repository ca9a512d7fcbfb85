"""From the tensors of an adapter's directory to a `lora` tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlora._errors import AdapterFileError, TargetError
from jaxlora.peft._adapters import TYING, adapters
from jaxlora.peft._config import Config, is_saved
from jaxlora.peft._full import full_weights
from jaxlora.peft._names import Map
from jaxlora.peft._reading import Reading, Tensors


def load_tree(
    config: Config,
    file: str,
    tensors: dict[str, np.ndarray],
    pairs: Sequence[tuple[str, Any]],
    names: Map,
    allow: frozenset[str],
) -> list[Any]:
    """The leaves of the tree, in the order of `pairs`."""
    r = Reading(config, Tensors(file, tensors), dict(pairs), names, allow)
    if not (r.targets or r.tied_targets) and not config.saved and config.tokens is None:
        raise AdapterFileError(
            f"{config.file}: got neither target_modules nor anything else that trains, expected "
            "an adapter."
        )
    adapted, full = adapters(r), full_weights(r)
    both = [path for path in adapted if path in full]
    if both:
        raise AdapterFileError(
            f"{config.file}: {both[0]} has an adapter and trains in full too (modules_to_save, "
            "trainable_token_indices), expected one of them. Both cannot be represented here."
        )
    r.tensors.done(names)
    for path in {**adapted, **full}:  # but for trainable tokens, which PEFT ties by itself
        table = str(next(iter(names.slots[path].modules.flat)))
        if path in adapted or any(is_saved(table, name) for name in config.saved):
            names.check_tied(path)
    nodes = {**adapted, **full}
    return [nodes.get(path, leaf) for path, leaf in pairs]


def check_allow(allow: Any) -> frozenset[str]:
    """What `load` is told to take otherwise than the file says."""
    given = frozenset([allow] if isinstance(allow, str) else allow)
    if given - {TYING}:
        raise TargetError(
            f"allow: got {sorted(given)}, expected names among [{TYING!r}]: "
            f"peft.load(..., allow=[{TYING!r}])."
        )
    return given
