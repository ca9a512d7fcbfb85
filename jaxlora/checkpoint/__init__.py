"""Adapters on disk, through orbax: what trains, and a description by which it finds its base again.

`save` and `restore` are for one adapter in a directory; `Save` and `Restore` for an item of an
`orbax.checkpoint.CheckpointManager`, beside the optimizer's state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxlora import _paths
from jaxlora._errors import CheckpointError, RolesError, TargetError
from jaxlora.checkpoint import _description
from jaxlora.checkpoint._description import Description
from jaxlora.checkpoint._packed import checksum
from jaxlora.checkpoint._stored import check_base, described, on_base

__all__ = ["Restore", "Save", "describe", "restore", "save"]

DESCRIPTION = "jaxlora.json.gz"
_VERSION = re.compile(r"v(\d+)")
_TEMPORARY = ".orbax-checkpoint-tmp"


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
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, lora)
    ...     again = restore(directory, params)
    >>> bool(jnp.all(again["kernel"].a == lora["kernel"].a))
    True
    """
    root = _absolute(path)
    if (root / DESCRIPTION).exists():
        raise CheckpointError(
            f"{root}: got a directory that is one version of an adapter, or an item of a "
            "checkpoint, expected another: jaxlora.checkpoint.save makes versions of its own there."
        )
    with _writing(root):
        root.mkdir(parents=True, exist_ok=True)
        numbers = [int(m[1]) for m in map(_VERSION.match, _names(root)) if m]
        new = root / f"v{max(numbers, default=0) + 1}"
        with ocp.Checkpointer(_Handler()) as checkpointer:
            checkpointer.save(new, args=Save(lora, config=config))
        if jax.process_index() == 0:
            _sync(root, new)
    if jax.process_index() == 0:
        _remove_others(root, new)


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
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, lora)
    ...     restore(directory, {"kernel": jnp.zeros((3, 4))})  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    jaxlora._errors.CheckpointError: ...: got params that are not this adapter's base. They differ
    """
    root, args = _absolute(path), Restore(params, allow_base_mismatch=allow_base_mismatch)
    while True:
        found = _locate(root)
        try:
            return _Handler().restore(found, args=args)
        except CheckpointError:
            # A version goes when the next one has come, be it while it is read.
            if found == root or _locate(root) == found:
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
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, lora)
    ...     describe(directory)["adapters"]["kernel"]["rank"]
    2
    """
    return _description.to_json(_read_description(_locate(_absolute(path))))


# --------------------------------------------------------------------------------------------------
# Orbax


class _Handler(ocp.AsyncCheckpointHandler):
    """An item of a checkpoint: orbax's arrays, and the description beside them."""

    def __init__(self) -> None:
        # Not compressed: numbers that were trained hardly shrink, and files have the arrays' size.
        self._arrays = ocp.PyTreeCheckpointHandler(use_compression=False)

    async def async_save(self, directory: epath.Path, args: Save) -> list[Any]:
        description, arrays = described(args.item, args.config)
        saving = ocp.args.PyTreeSave(arrays)
        futures = list(await self._arrays.async_save(directory, args=saving) or [])
        if jax.process_index() == 0:
            writing = _write_later(directory / DESCRIPTION, description, arrays)
            futures.append(ocp.future.CommitFutureAwaitingContractedSignals(writing))
        return futures

    def save(self, directory: epath.Path, args: Save) -> None:
        description, arrays = described(args.item, args.config)
        self._arrays.save(directory, args=ocp.args.PyTreeSave(arrays))
        if jax.process_index() == 0:
            _write(directory / DESCRIPTION, description, arrays)

    def restore(self, directory: epath.Path, args: Restore) -> Any:
        description = _read_description(directory)
        where = str(directory)
        same = check_base(where, description, args.params, args.allow_base_mismatch)
        packed = self._read(directory, description)
        return on_base(where, description, packed, args.params, same)

    def _read(self, directory: epath.Path, description: Description) -> dict[str, np.ndarray]:
        """The packed arrays, every bit of them checked, and none larger than its files."""
        expected = {name: (dtype, shape) for name, (dtype, shape, _) in description.arrays.items()}
        _check_files(directory, expected)
        try:
            stored = self._arrays.metadata(directory).tree
            found = {name: (str(jnp.dtype(x.dtype)), tuple(x.shape)) for name, x in stored.items()}
            if found != expected:
                raise ValueError(f"it has {found}, and {DESCRIPTION} says {expected}")
            as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in expected}
            arrays = self._arrays.restore(
                directory, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
            )
            for name, (_, _, known) in description.arrays.items():
                got = checksum(arrays[name])
                if got != known:
                    raise ValueError(f"{name} has checksum {got}, expected {known}")
        except Exception as error:  # whatever orbax makes of damaged files
            raise _damaged(directory, error) from error
        return arrays

    def metadata(self, directory: epath.Path) -> dict[str, Any]:
        return _description.to_json(_read_description(directory))

    def finalize(self, directory: epath.Path) -> None:
        self._arrays.finalize(directory)

    def close(self) -> None:
        self._arrays.close()


@ocp.args.register_with_handler(_Handler, for_save=True)
@dataclasses.dataclass(eq=False)
class Save(ocp.args.CheckpointArgs):
    """What to save of a `lora` tree, as an item of a `CheckpointManager`; see `save`.

    Attributes:
      item: a whole `lora` tree.
      config: the `LoraConfig`, to be kept for people in the description.

    >>> import orbax.checkpoint as ocp, tempfile
    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))
    >>> with tempfile.TemporaryDirectory() as run, ocp.CheckpointManager(run) as manager:
    ...     saved = manager.save(7, args=ocp.args.Composite(lora=Save(lora)))
    ...     manager.wait_until_finished()
    ...     found = manager.restore(7, args=ocp.args.Composite(lora=Restore(params)))
    >>> found.lora["kernel"].rank
    2
    """

    item: Any
    config: Any = None


@ocp.args.register_with_handler(_Handler, for_restore=True)
@dataclasses.dataclass(eq=False)
class Restore(ocp.args.CheckpointArgs):
    """On which params to restore an adapter, an item of a `CheckpointManager`; see `restore`.

    Attributes:
      params: those that the adapter was trained on.
      allow_base_mismatch: take them even if they differ in more than shapes.
    """

    params: Any
    allow_base_mismatch: bool = False


# --------------------------------------------------------------------------------------------------
# The files of an item


async def _write_later(*args: Any) -> None:
    _write(*args)


def _write(file: epath.Path, description: Description, arrays: Mapping[str, Any]) -> None:
    found = {
        name: (dtype, shape, done or checksum(arrays[name]))
        for name, (dtype, shape, done) in description.arrays.items()
    }
    file.write_bytes(_description.encode(dataclasses.replace(description, arrays=found)))


def _read_description(directory: epath.Path) -> Description:
    file = directory / DESCRIPTION
    try:
        # Nor a pipe or a device, of which reading might not end; epath takes those for files.
        if not (os.path.isfile(file) if os.path.exists(file) else file.exists()):
            raise FileNotFoundError("no such file")
        if file.stat().length > _description.LIMIT:
            raise OSError(f"it has more than {_description.LIMIT:,} bytes")
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file}: got no file that can be read ({error}), expected the description that "
            f"jaxlora.checkpoint.save writes.{_nearby(directory)}"
        ) from None
    return _description.decode(data, str(file))


def _check_files(directory: epath.Path, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raises if files are not of the size that is described, before anything is allocated."""
    if not os.path.isdir(directory):  # a store in the network, which has no quick way to know
        return
    files = [os.path.join(at, name) for at, _, names in os.walk(directory) for name in names]
    for file in files:
        if not os.path.isfile(file):
            raise _damaged(directory, f"{file} is no regular file")
    expected = sum(jnp.dtype(d).itemsize * math.prod(shape) for d, shape in arrays.values())
    got = sum(map(os.path.getsize, files))
    if not expected <= got <= 2 * expected + _description.LIMIT:
        raise _damaged(directory, f"{got:,} bytes of files, {expected:,} of arrays")


def _damaged(directory: epath.Path, why: Any) -> CheckpointError:
    text = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else why
    return CheckpointError(
        f"{directory}: got files that are damaged or incomplete, expected those that "
        f"jaxlora.checkpoint.save wrote. Restore another step, or save the adapter again. "
        f"({text[:1000]})"
    )


# --------------------------------------------------------------------------------------------------
# Versions of one adapter in a directory


def _absolute(path: str | os.PathLike) -> epath.Path:
    return epath.Path(path).expanduser().resolve()


def _names(directory: epath.Path) -> list[str]:
    return [child.name for child in directory.iterdir()]


def _locate(root: epath.Path) -> epath.Path:
    """The item's directory: the root itself, or its newest whole version."""
    if (root / DESCRIPTION).exists() or not root.is_dir():
        return root
    whole = [child for child in root.iterdir() if _is_whole_version(child)]
    return max(whole, key=lambda child: int(child.name[1:]), default=root)


def _is_whole_version(child: epath.Path) -> bool:
    named = _VERSION.fullmatch(child.name) and (child / DESCRIPTION).exists()
    return bool(named and ocp.path.step.is_path_finalized(child))


@contextlib.contextmanager
def _writing(root: epath.Path) -> Iterator[None]:
    """Errors of files and of orbax as `CheckpointError`s; nothing half-written is left."""
    try:
        yield
    except Exception as error:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                _remove_temporary(root)
        if isinstance(error, TargetError | RolesError):
            raise
        raise CheckpointError(
            f"{root}: got a directory that cannot be written ({type(error).__name__}: "
            f"{str(error)[:1000]}), expected one with room for an adapter. What was there before "
            "is untouched; free some space, or give another path."
        ) from error


def _sync(root: epath.Path, new: epath.Path) -> None:
    """Has the system write a version to the disk, be it that the machine stops next."""
    if os.name != "posix" or not os.path.isdir(new):
        return
    directories = [at for at, _, _ in os.walk(new)]
    files = [os.path.join(at, name) for at, _, names in os.walk(new) for name in names]
    for path in [*files, *directories, root]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_others(root: epath.Path, new: epath.Path) -> None:
    """Takes away older versions, and what killed saves have left."""
    try:
        for child in list(root.iterdir()):
            if child.name != new.name and _is_whole_version(child):
                # Renamed first: what is left of it if this is killed is known for what it is.
                child.rename(root / f"{child.name}{_TEMPORARY}")
        _remove_temporary(root)
    except OSError as error:
        raise CheckpointError(
            f"{root}: got older versions that cannot be removed ({error}), expected to be allowed "
            f"to. The adapter is saved, in {new}; remove them by hand."
        ) from error


def _remove_temporary(root: epath.Path) -> None:
    """Takes away what is of no whole version; `save` made it, to go by its name."""
    for child in list(root.iterdir()):
        name, suffix, _ = child.name.partition(_TEMPORARY)
        if suffix and _VERSION.fullmatch(name):
            child.rmtree(missing_ok=True)


def _nearby(directory: epath.Path) -> str:
    """Where adapters are below a directory that has none itself."""
    if not directory.is_dir():
        return " There is no such directory."
    found = [
        str(file.parent)
        for pattern in (f"*/{DESCRIPTION}", f"*/*/{DESCRIPTION}")
        for file in directory.glob(pattern)
        if _TEMPORARY not in str(file)
    ]
    return f" These have one; give one of them:{_paths.listing(sorted(found))}" if found else ""
