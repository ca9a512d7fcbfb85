"""Versions of one adapter in a directory: the old one is whole until the new one is."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxlora._errors import CheckpointError, RolesError, TargetError
from jaxlora.checkpoint._item import DESCRIPTION, TEMPORARY

_VERSION = re.compile(r"v(\d+)")


def absolute(path: str | os.PathLike) -> epath.Path:
    return epath.Path(path).expanduser().resolve()


def new_version(root: epath.Path) -> epath.Path:
    """Where the next version goes; nothing is there, not even what a killed save has left."""
    numbers = [int(m[1]) for m in map(_VERSION.match, (x.name for x in root.iterdir())) if m]
    return root / f"v{max(numbers, default=0) + 1}"


def locate(root: epath.Path) -> epath.Path:
    """The item's directory: the root itself, or its newest whole version."""
    if (root / DESCRIPTION).exists() or not root.is_dir():
        return root
    whole = [child for child in root.iterdir() if _is_whole_version(child)]
    return max(whole, key=lambda child: int(child.name[1:]), default=root)


def _is_whole_version(child: epath.Path) -> bool:
    named = _VERSION.fullmatch(child.name) and (child / DESCRIPTION).exists()
    return bool(named and ocp.path.step.is_path_finalized(child))


@contextlib.contextmanager
def writing(root: epath.Path) -> Iterator[None]:
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


def sync(root: epath.Path, new: epath.Path) -> None:
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


def remove_others(root: epath.Path, new: epath.Path) -> None:
    """Takes away older versions, and what killed saves have left."""
    try:
        for child in list(root.iterdir()):
            if child.name != new.name and _is_whole_version(child):
                # Renamed first: what is left of it if this is killed is known for what it is.
                child.rename(root / f"{child.name}{TEMPORARY}")
        _remove_temporary(root)
    except OSError as error:
        raise CheckpointError(
            f"{root}: got older versions that cannot be removed ({error}), expected to be allowed "
            f"to. The adapter is saved, in {new}; remove them by hand."
        ) from error


def _remove_temporary(root: epath.Path) -> None:
    """Takes away what is of no whole version; `save` made it, to go by its name."""
    for child in list(root.iterdir()):
        name, suffix, _ = child.name.partition(TEMPORARY)
        if suffix and _VERSION.fullmatch(name):
            child.rmtree(missing_ok=True)
