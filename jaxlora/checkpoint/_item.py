"""One adapter as an item of a checkpoint: orbax's arrays, and the description beside them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxlora import _paths
from jaxlora._errors import CheckpointError, TargetError
from jaxlora.checkpoint import _description
from jaxlora.checkpoint._description import Description
from jaxlora.checkpoint._packed import checksum
from jaxlora.checkpoint._stored import check_base, described, on_base

DESCRIPTION = "jaxlora.json.gz"
TEMPORARY = ".orbax-checkpoint-tmp"


class Handler(ocp.AsyncCheckpointHandler):
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
        if args.params is None:  # as orbax makes it, where it was given none
            raise TargetError(
                f"{directory}: got no params, expected those that the adapter was trained on: "
                "manager.restore(step, args=ocp.args.Composite(lora=jaxlora.checkpoint.Restore("
                "params), ...))."
            )
        description = read_description(directory)
        where = str(directory)
        same = check_base(where, description, args.params, args.allow_base_mismatch)
        packed = self.read(directory, description)
        return on_base(where, description, packed, args.params, same)

    def read(self, directory: epath.Path, description: Description) -> dict[str, np.ndarray]:
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
        return _description.to_json(read_description(directory))

    def finalize(self, directory: epath.Path) -> None:
        self._arrays.finalize(directory)

    def close(self) -> None:
        self._arrays.close()


@ocp.args.register_with_handler(Handler, for_save=True)
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


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclasses.dataclass(eq=False)
class Restore(ocp.args.CheckpointArgs):
    """On which params to restore an adapter, an item of a `CheckpointManager`; see `restore`.

    Attributes:
      params: those that the adapter was trained on.
      allow_base_mismatch: take them even if they differ in more than shapes.
    """

    params: Any = None
    allow_base_mismatch: bool = False


# --------------------------------------------------------------------------------------------------
# Its files


async def _write_later(*args: Any) -> None:
    _write(*args)


def _write(file: epath.Path, description: Description, arrays: Mapping[str, Any]) -> None:
    found = {
        name: (dtype, shape, done or checksum(arrays[name]))
        for name, (dtype, shape, done) in description.arrays.items()
    }
    file.write_bytes(_description.encode(dataclasses.replace(description, arrays=found)))


def read_description(directory: epath.Path) -> Description:
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


def _nearby(directory: epath.Path) -> str:
    """Where adapters are below a directory that has none itself."""
    if (directory / "adapter_config.json").exists():
        return " It is PEFT's: jaxlora.peft.load(path, params, names)."
    if not directory.is_dir():
        return " There is no such directory."
    found = [
        str(file.parent)
        for pattern in (f"*/{DESCRIPTION}", f"*/*/{DESCRIPTION}")
        for file in directory.glob(pattern)
        if TEMPORARY not in str(file)
    ]
    return f" These have one; give one of them:{_paths.listing(sorted(found))}" if found else ""
