"""One of two processes that save and restore together: `python processes.py DIRECTORY PORT INDEX`.

Each has two of the four devices, and neither all of a sharded array.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlora
from jaxlora import LoraConfig, checkpoint

SPECS = {"query": P("data", "model"), "out": P("model", None), "layers": P(None, "model"), "n": P()}
ROLES = {"query": "io", "out": "io", "layers": "sio"}
CONFIG = LoraConfig(rank=2, targets=list(ROLES), train=["n"], dora=True, roles=ROLES)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def base() -> dict[str, np.ndarray]:
    kernels = {"query": (8, 12), "out": (12, 8), "layers": (3, 8, 4), "n": (5,)}
    return {name: normal(i, *shape) for i, (name, shape) in enumerate(kernels.items())}


def adapter(params: Any) -> Any:
    """A tree whose numbers every process knows."""
    lora = jaxlora.init(jax.random.key(0), params, CONFIG)
    trainable, frozen = jaxlora.partition(lora)
    leaves, treedef = jax.tree.flatten(trainable)
    numbers = [jnp.asarray(normal(100 + i, *x.shape), x.dtype) for i, x in enumerate(leaves)]
    return jaxlora.combine(jax.tree.unflatten(treedef, numbers), frozen)


def on_mesh(params: Any, shape: tuple[int, int]) -> Any:
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    put = lambda x, spec: jax.make_array_from_callback(
        x.shape, NamedSharding(mesh, spec), lambda index: x[index]
    )
    return {name: put(x, SPECS[name]) for name, x in params.items()}


def spread(x: jax.Array) -> jax.Array:
    """Over all devices, along the last axis that can be; else as it was, on each of them."""
    axes = [d for d, n in enumerate(x.shape) if n % 4 == 0]
    if not axes:
        return x
    spec = P(*(("data", "model") if d == axes[-1] else None for d in range(x.ndim)))
    return jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, spec))(x)


def assert_same(got: Any, expected: Any) -> None:
    """The blocks that are here are those of an array that every process has."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(y)[shard.index])


def main(directory: pathlib.Path, port: str, index: int) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    assert jax.device_count() == 4
    expected = jaxlora.partition(adapter(base()))[0]
    params = on_mesh(base(), (2, 2))
    trainable, frozen = jaxlora.partition(jax.jit(adapter)(params))
    trainable = jax.tree.map(spread, trainable)
    assert {x.is_fully_replicated for x in jax.tree.leaves(trainable)} == {False, True}
    lora = jaxlora.combine(trainable, frozen)

    checkpoint.save(directory / "adapter", lora)
    checkpoint.save(directory / "adapter", lora)
    with ocp.CheckpointManager(directory / "run") as manager:
        for step in range(2):
            manager.save(step, args=ocp.args.Composite(lora=checkpoint.Save(lora)))
        manager.wait_until_finished()
        again = manager.restore(1, args=ocp.args.Composite(lora=checkpoint.Restore(params))).lora
    assert_same(jaxlora.partition(again)[0], expected)
    for shape in ((2, 2), (4, 1), (1, 4)):
        other = on_mesh(base(), shape)
        again = checkpoint.restore(directory / "adapter", other)
        assert_same(jaxlora.partition(again)[0], expected)
        assert again["out"].w is other["out"]
        wanted = NamedSharding(other["out"].sharding.mesh, P("model", None))
        assert again["out"].a.sharding.is_equivalent_to(wanted, 2)
    wrong = on_mesh({**base(), "out": normal(9, 12, 8)}, (2, 2))
    refused: tuple[str, ...] = ()
    try:
        checkpoint.restore(directory / "adapter", wrong)
    except checkpoint.CheckpointError as error:
        refused = error.paths
    assert refused == ("out",)
    print("done")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
