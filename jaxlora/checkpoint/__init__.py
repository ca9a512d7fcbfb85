"""Adapters on disk, through orbax: what trains, and a description by which it finds its base again.

`save` and `restore` are for one adapter in a directory; `Save` and `Restore` for an item of an
`orbax.checkpoint.CheckpointManager`, beside the optimizer's state.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxlora._errors import CheckpointError
from jaxlora.checkpoint import _description
from jaxlora.checkpoint._item import DESCRIPTION, Handler, Restore, Save, read_description
from jaxlora.checkpoint._versions import absolute, locate, new_version, remove_others, sync, writing

__all__ = ["Restore", "Save", "describe", "restore", "save"]


def save(path: str | os.PathLike, lora: Any, *, config: Any = None) -> None:
    """Writes what trains of a `lora` tree, with a description of it and of its base.

    That is a, b and the magnitude of each adapter and the value of each leaf that trains in full,
    bit for bit; of the base nothing but a fingerprint. What else a `LoraWeight` has, roles, scale,
    dropout rate, is in the description; keys of `with_dropout` are not kept.

    An adapter that is there is replaced, and it is whole until the new one is: `path` has numbered
    versions, `v1`, `v2`, ..., and the old one goes once the new one is on the disk. One program at
    a time may write to a path. Under `jax.distributed`, all processes call this.

    Args:
      path: a directory, made if need be; local, or what `etils.epath` opens (`gs://...`).
      lora: a whole tree: of halves, `jaxlora.combine(trainable, frozen)`.
      config: the `LoraConfig`, to be kept for people in the description.

    Raises:
      CheckpointError: the directory cannot be written; what was there is untouched.
      TargetError: no `lora` tree, half of one, or one of traced arrays.

    >>> import tempfile
    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jax.numpy.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, lora)
    ...     again = restore(directory, params)
    >>> bool(jax.numpy.all(again["kernel"].a == lora["kernel"].a))
    True
    """
    root = absolute(path)
    if (root / DESCRIPTION).exists():
        raise CheckpointError(
            f"{root}: got a directory that is one version of an adapter, or an item of a "
            "checkpoint, expected another: jaxlora.checkpoint.save makes versions of its own there."
        )
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        new = new_version(root)
        with ocp.Checkpointer(Handler()) as checkpointer:
            checkpointer.save(new, args=Save(lora, config=config))
        if jax.process_index() == 0:
            sync(root, new)
    if jax.process_index() == 0:
        remove_others(root, new)


def restore(path: str | os.PathLike, params: Any, *, allow_base_mismatch: bool = False) -> Any:
    """A `lora` tree: the adapter in a directory, on these params.

    Its arrays come bit for bit as they were saved, and go where the base's are: a is sharded along
    its input dims and b along its output dims as W is, the rank is not; without a mesh they go to
    W's device. So an adapter can be restored onto another mesh than it was trained on.

    Args:
      path: what `save` wrote to, or a `Save` item in the directory of a `CheckpointManager`, for
        instance "run/1000/lora".
      params: the params that the adapter was trained on, `jaxlora.base_params(lora)`, in containers
        of any kind with the same paths.
      allow_base_mismatch: take them even if they differ: in values, in dtype or how they are
        quantized, and in leaves that have no adapter. Shapes have to fit.

    Returns:
      The params with the adapter's nodes in it.

    Raises:
      CheckpointError: no adapter is there, or not a whole one; or the base is another, with the
        paths at which it differs (all of them are in the error's `paths`).

    >>> import tempfile
    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jax.numpy.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, lora)
    ...     restore(directory, {"kernel": -params["kernel"]})  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    jaxlora._errors.CheckpointError: ...: got params that are not this adapter's base. They differ
    """
    root, args = absolute(path), Restore(params, allow_base_mismatch=allow_base_mismatch)
    while True:
        found = locate(root)
        try:
            return Handler().restore(found, args=args)
        except CheckpointError:
            # A version goes when the next one has come, be it while it is read.
            if found == root or locate(root) == found:
                raise


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """The description of a saved adapter: a JSON object.

    Of it, "adapters" has for each path the kind ("lora", "dora" or "full"), roles, rank, scale,
    dropout, and each array's dtype, place and shape; "base" for each path of the base the dtype,
    shape and a checksum of 64 elements; "config" what `save` was given; "jaxlora" and "jax" the
    versions.

    Args:
      path: as for `restore`.

    Raises:
      CheckpointError: no adapter is there, or its description is damaged.

    >>> import tempfile
    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jax.numpy.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, lora)
    ...     describe(directory)["adapters"]["kernel"]["rank"]
    2
    """
    return _description.to_json(read_description(locate(absolute(path))))
