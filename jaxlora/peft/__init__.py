"""Adapters in Hugging Face PEFT's directories: from them, and to them. Strict both ways.

Needs safetensors, the extra `peft`: pip install 'jaxlora[peft]'. See docs/peft.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxlora import _paths
from jaxlora._errors import TargetError
from jaxlora._init import check_shared
from jaxlora._tree import base_params
from jaxlora._weight import is_node
from jaxlora.peft import _config, _files
from jaxlora.peft._entries import Names
from jaxlora.peft._load import check_allow, load_tree
from jaxlora.peft._names import Map, plain_leaves
from jaxlora.peft._save import save_tree, whole_config

__all__ = ["Names", "load", "save"]

_files.safetensors_module()  # says at once which extra is missing


def load(
    directory: str | os.PathLike,
    params: Any,
    names: Names,
    *,
    adapter: str | None = None,
    roles: Mapping[str, str] | None = None,
    allow: Iterable[str] = (),
) -> Any:
    r"""A `lora` tree on `params`, from a directory that PEFT wrote.

    PEFT adds scale * B A to a weight that is (out, in): here, scale * a b with a = A^T, b = B^T,
    reshaped to the dims of the leaf. Biases, modules_to_save and trainable tokens become
    `FullWeight`s, in the dtype of the base's leaf; a and b keep the file's.

    Every key of the file is used, every target of the configuration has its keys and an entry of
    `names`, and every field of the configuration is known, or it raises. PiSSA's and OLoRA's
    adapters fit a moved base: it is moved as PEFT does it, from `params` as they were given.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      params: the base, any pytree of arrays.
      names: {regex of a leaf's path: module, or a mapping}, as docs/peft.md has it. `{}` in a
        module is the next index of a stacked dim, `{1}` a group of the regex.
      adapter: the subfolder of one of several adapters.
      roles: {path: roles}, or `trace_roles(...)`, for weights other than two-dimensional `kernel`s
        and `embedding`s. An entry's own `roles` come first.
      allow: what to take otherwise than the file says. "ensure_weight_tying": an adapter of a tied
        embedding that was made for its lookup alone becomes one of lookup and head.

    Returns:
      The tree, as of `init`: give it to `lora_apply(fn)`.

    Raises:
      AdapterFileError: a file that is damaged or unsafe, an adapter that is not plain LoRA or DoRA,
        that does not fit, or is not fully described by the map; with file, key, got, expected.
      TargetError: a map that is malformed or does not fit the params.
      RolesError: a leaf whose roles are not known.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from jaxlora import LoraConfig, init, peft
    >>> params = {"query": {"kernel": jnp.ones((3, 4))}}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["query"]))
    >>> names = {"query/kernel": "model.q_proj"}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     peft.save(directory, lora, names, base_model_name="me/model")
    ...     again = peft.load(directory, params, names)
    >>> bool((again["query"]["kernel"].a == lora["query"]["kernel"].a).all())
    True

    References:
      Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1.
      Kalajdzievski 2023, rsLoRA, arXiv 2312.03732.
      Liu et al. 2024, DoRA, arXiv 2402.09353.
    """
    where = _files.adapter_directory(directory, adapter)
    permitted = check_allow(allow)
    pairs, treedef = plain_leaves(params, "peft.load")
    config = _config.parse(_files.read_config(where), str(where / _files.CONFIG))
    leaves = {path: leaf for path, leaf in pairs if hasattr(leaf, "shape")}
    known = Map(names, leaves, roles)
    tensors = _files.read_tensors(where)
    file = str(where / _files.WEIGHTS)
    loaded = load_tree(config, file, tensors, pairs, known, permitted)
    check_shared(params, {path for (path, _), x in zip(pairs, loaded, strict=True) if is_node(x)})
    return jax.tree.unflatten(treedef, loaded)


def save(
    directory: str | os.PathLike,
    lora: Any,
    names: Names,
    *,
    base_model_name: str | None = None,
    adapter: str | None = None,
    roles: Mapping[str, str] | None = None,
    for_serving: bool = False,
    task_type: str | None = None,
) -> None:
    r"""Writes `lora` as a directory that PEFT loads; with `for_serving`, vLLM too.

    Ranks and alphas that differ become patterns of exact names; of a stack, layers and ranks that
    are all zeros are left out. An adapter of a moved base (PiSSA) fits no other base: make it a
    plain one first, `jaxlora.rebase(lora, initial, params)`.

    What was there before stays whole until the new files are on disk.

    Args:
      directory: made if it is not there; other files in it stay.
      lora: the tree, whole: `combine(trainable, frozen)`.
      names: as in `load`. Every leaf that trains needs an entry.
      base_model_name: of the base on the Hub, for those who load it.
      adapter: the subfolder to write to, for several adapters in a directory.
      roles: as in `load`; adapters know theirs.
      for_serving: only what vLLM reads: plain LoRA, one rank (others are padded with zeros), one
        alpha (what differs is folded into B). Refuses DoRA, FullWeights, convolutions and
        parameters of experts.
      task_type: PEFT's, for instance "CAUSAL_LM".

    Raises:
      TargetError: a leaf that trains and has no entry; what PEFT cannot hold: DoRA beside LoRA,
        dropout rates that differ, some of the biases alone.
      AdapterFileError: NaN or infinity; a directory that cannot be written.
      RolesError: a leaf whose roles are not known.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from jaxlora import LoraConfig, init, peft
    >>> params = {"layers": {"kernel": jnp.ones((2, 3, 4))}}  # scanned over
    >>> config = LoraConfig(rank=2, targets=["layers"], roles={"layers": "sio"})
    >>> lora = init(jax.random.key(0), params, config)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     names = {"layers/kernel": "model.layers.{}.q_proj"}
    ...     peft.save(directory, lora, names, for_serving=True)
    ...     sorted(os.listdir(directory))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    where = _files.adapter_directory(directory, adapter)
    if task_type is not None and not isinstance(task_type, str):
        raise TargetError(f"task_type: got {task_type!r}, expected a str such as 'CAUSAL_LM'.")
    base = base_params(lora)
    leaves = {p: x for p, x in _paths.flatten_with_paths(base)[0] if hasattr(x, "shape")}
    pairs, _ = _paths.flatten_with_paths(lora, is_leaf=is_node)
    declared = {path: leaf.roles for path, leaf in pairs if hasattr(leaf, "roles")}
    known = Map(names, leaves, {**(dict(roles) if roles else {}), **declared})
    fields, tensors = save_tree(pairs, known, for_serving)
    config = whole_config(fields, base_model_name, task_type)
    _files.write_adapter(where, config, tensors)
