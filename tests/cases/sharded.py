"""Several devices: shard_map and its collectives, constraints, pmap. Needs the tests' 4 devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cases._registry import case, plain

MESH = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


DATA = P("data")
NHWC = ("NHWC", "HWIO", "NHWC")


def sharded(fn, in_specs, out_specs=DATA, **options):
    return jax.shard_map(fn, mesh=MESH, in_specs=in_specs, out_specs=out_specs, **options)


@case({"w": "io"})
def shard_map_data_parallel():
    fn = sharded(lambda p, x: jnp.tanh(x @ p["w"]), (P(), P("data")))
    return plain(fn, {"w": (11, 13)}, (6, 11))


@case({"up": "io", "down": "io"})
def shard_map_tensor_parallel():
    """Columns of one weight, rows of the next, one sum (Megatron)."""

    def layer(p, x):
        return lax.psum(jnp.tanh(x @ p["up"]) @ p["down"], "model")

    fn = sharded(layer, ({"up": P(None, "model"), "down": P("model", None)}, P("data")))
    return plain(fn, {"up": (11, 14), "down": (14, 11)}, (6, 11))


@case({"up": "io", "down": "io"})
def shard_map_unchecked():
    def layer(p, x):
        return lax.psum(jnp.tanh(x @ p["up"]) @ p["down"], "model")

    specs = ({"up": P(None, "model"), "down": P("model", None)}, P("data"))
    fn = sharded(layer, specs, check_vma=False)
    return plain(fn, {"up": (11, 14), "down": (14, 11)}, (6, 11))


@case({"w": "io"})
def shard_map_gathered():
    """Fully sharded: each device gathers the weight's rows before it uses them."""

    def layer(p, x):
        w = lax.all_gather(p["w"].astype(jnp.float32), ("data", "model"), tiled=True)
        return jnp.tanh(x @ w)

    fn = sharded(layer, (P(("data", "model"), None), P("data")), check_vma=False)
    return plain(fn, {"w": (12, 7)}, (8, 12))


@case({"w": "io"})
def shard_map_gathered_columns():
    def layer(p, x):
        return jnp.tanh(x @ lax.all_gather(p["w"], "model", axis=1, tiled=True))

    both = P(("data", "model"))
    fn = sharded(layer, ({"w": P(None, "model")}, both), both)
    return plain(fn, {"w": (7, 12)}, (8, 7))


@case({"w": "sio"})
def shard_map_experts():
    """Each device holds one expert, and gathers all into a stack."""

    def layer(p, x):
        w = lax.all_gather(p["w"][0], "model")
        return jnp.einsum("td,edf->tef", x, w).sum(1)

    fn = sharded(layer, (P("model"), P("data")), check_vma=False)
    return plain(fn, {"w": (2, 7, 13)}, (6, 7))


@case({"w": "sio"})
def shard_map_ring():
    """Weights travel around the ring while the tokens stay."""

    def layer(p, x):
        other = lax.ppermute(p["w"], "model", [(0, 1), (1, 0)])
        return jnp.tanh(x @ p["w"][0]) + jnp.sin(x @ other[0])

    fn = sharded(layer, (P("model"), P("data")), P("data", "model"))
    return plain(fn, {"w": (2, 7, 13)}, (6, 7))


@case({"w": "io"})
def shard_map_ring_of_rows():
    """Each device meets its part of the input with each part of the weight in turn."""

    def layer(p, x):
        def step(k, state):
            w, h = state
            part = lax.dynamic_slice_in_dim(x, 6 * ((lax.axis_index("model") + k) % 2), 6, 1)
            return lax.ppermute(w, "model", [(1, 0), (0, 1)]), h + part @ w

        start = lax.pcast(jnp.zeros((x.shape[0], 7)), ("data", "model"), to="varying")
        return jnp.tanh(lax.fori_loop(0, 2, step, (p["w"], start))[1])

    fn = sharded(layer, (P("model"), P("data")), P("data", "model"))
    return plain(fn, {"w": (12, 7)}, (4, 12))


@case({"w": "iiio"})
def shard_map_convolution():
    """Each device has some of the output channels."""

    def layer(p, x):
        return jnp.tanh(lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=NHWC))

    fn = sharded(layer, ({"w": P(None, None, None, "model")}, DATA), P("data", None, None, "model"))
    return plain(fn, {"w": (3, 3, 2, 6)}, (2, 2, 3, 2))


@case({"w": "sio"})
def shard_map_ragged():
    def layer(p, x):
        return lax.ragged_dot(x, p["w"], jnp.array([1, 0, 1]))

    fn = sharded(layer, ({"w": P(None, None, "model")}, DATA), P("data", "model"))
    return plain(fn, {"w": (3, 5, 8)}, (4, 5))


@case({"w": "io"})
def shard_map_branches():
    """A device chooses how to use its block."""

    def layer(p, x):
        w = lax.cond(lax.axis_index("model") == 0, lambda w: w, lambda w: 2 * w, p["w"])
        return jnp.tanh(x @ w)

    fn = sharded(layer, (P(None, "model"), DATA), P("data", "model"))
    return plain(fn, {"w": (11, 14)}, (6, 11))


@case({"w": "sio"})
def shard_map_in_scan():
    layer = sharded(
        lambda h, w: lax.psum(jnp.tanh(h @ w), "model"), (P("data", "model"), P("model", None))
    )
    fn = lambda p, x: lax.scan(lambda h, w: (layer(h, w), None), x, p["w"])[0]
    return plain(fn, {"w": (3, 12, 12)}, (4, 12))


@case({"q": "io", "k": "io"})
def shard_map_of_joined_weights():
    """A window that the devices' blocks cut through."""

    def fn(p, x):
        w = jnp.concatenate([p["q"], p["k"]], axis=1)
        layer = sharded(jnp.matmul, (P("data"), P(None, "model")), P("data", "model"))
        return jnp.tanh(layer(x, w))

    return plain(fn, {"q": (11, 5), "k": (11, 3)}, (4, 11))


@case({"w": "io"})
def shard_map_partly_manual():
    """Manual over one axis, automatic over the other."""
    fn = sharded(lambda p, x: jnp.tanh(x @ p["w"]), (P(), P("data")), axis_names={"data"})
    return plain(jax.jit(fn), {"w": (11, 13)}, (6, 11))


@case({"w": "io"})
def sharding_constraints():
    place = lambda v, *spec: lax.with_sharding_constraint(v, NamedSharding(MESH, P(*spec)))

    def fn(p, x):
        w = place(p["w"], "model", None)
        return place(jnp.tanh(place(x, "data", "model") @ w), "data")

    return plain(fn, {"w": (12, 13)}, (6, 12))


@case({"w": "io"})
def jit_with_shardings_inside():
    put = lambda *spec: NamedSharding(MESH, P(*spec))
    fn = jax.jit(
        lambda p, x: jnp.tanh(x @ p["w"]),
        in_shardings=({"w": put(None, "model")}, put("data")),
        out_shardings=put("data", "model"),
    )
    return plain(fn, {"w": (11, 14)}, (6, 11))


@case({"w": "io"})
def pmap_inside():
    return plain(
        lambda p, x: jax.pmap(lambda p, x: jnp.tanh(x @ p["w"]), in_axes=(None, 0))(p, x),
        {"w": (11, 13)},
        (2, 3, 11),
    )


@case({"q": "io", "k": "io"})
def joined_weights_put_on_devices():
    def fn(p, x):
        w = jnp.concatenate([p["q"], p["k"]], axis=1)
        return jnp.tanh(x @ jax.device_put(w, NamedSharding(MESH, P(None, "model"))))

    return plain(fn, {"q": (11, 5), "k": (11, 3)}, (4, 11))


@case({"w": "io"})
def weight_fetched_from_host_memory():
    """Weights that are kept off the device are fetched where they are used."""
    fetch = lambda w: jax.device_put(w, jax.memory.Space.Device)
    return plain(lambda p, x: jnp.tanh(x @ fetch(p["w"])), {"w": (11, 13)}, (5, 11))
