"""Memory of a LoRA train step on an NF4 base: jaxlora's, beside QLoRA written by hand.

Nothing is run: the step is compiled for this CPU, or for one TPU v5e (`--platform tpu`: needs
`pip install "jax[tpu]"`, and no TPU), and the compiler says what it would allocate, above what the
same step on a bfloat16 base would, in decoded layers; and how many FLOPs it takes. For a TPU also
how many cycles it expects; it counts a loop's body once.

    python -m benchmarks.quantized_memory --platform tpu --mode scan --layers 16 --width 2048
    python -m benchmarks.quantized_memory --form float custom_vjp --lookup select
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
os.environ.update({"JAX_PLATFORMS": "cpu"} | TPU)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import jaxlora  # noqa: E402
from jaxlora._codebooks import NF4  # noqa: E402

MIB = 2**20
BLOCK = 64
Use = Callable[[jax.Array, Any], jax.Array]  # (x, weight) -> x times the weight
Lookup = Callable[[jax.Array], jax.Array]


# --------------------------------------------------------------------------------------------------
# The model: a transformer, of any way to use a weight


def sizes(width: int) -> dict[str, tuple[int, int]]:
    square = dict.fromkeys("qkvo", (width, width))
    return square | {
        "gate": (width, 4 * width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }


def layer(use: Use, p: Any, x: jax.Array) -> jax.Array:
    def norm(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return (wide * lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)

    h = norm(x)
    q, k, v = (use(h, p[n]).reshape(*h.shape[:-1], -1, 128) for n in "qkv")
    x = x + use(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape), p["o"])
    h = norm(x)
    return x + use(jax.nn.silu(use(h, p["gate"])) * use(h, p["up"]), p["down"])


def model(use: Use, remat: str, params: Any, x: jax.Array) -> jax.Array:
    """`params`: of one layer, stacked; or a list of layers."""
    one: Callable[..., Any] = partial(layer, use)
    scanned = isinstance(params, dict)
    if remat != "none":
        policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
        one = jax.checkpoint(one, prevent_cse=not scanned, policy=policies[remat])
    if scanned:
        return lax.scan(lambda x, p: (one(p, x), None), x, params)[0]
    for p in params:
        x = one(p, x)
    return x


# --------------------------------------------------------------------------------------------------
# By hand


def gather(codes: jax.Array) -> jax.Array:
    """As jaxlora does."""
    return jnp.asarray(NF4).at[codes].get(mode="promise_in_bounds")


def select(codes: jax.Array) -> jax.Array:
    """15 selects on the four bits. Out of a scan's body JAX hoists the 16 entries, broadcast."""
    return _halved(list(map(jnp.float32, NF4)), codes, jnp.where)


def bits(codes: jax.Array) -> jax.Array:
    """The same in integer arithmetic on the entries' own bits, with scalars only."""

    def choose(bit: jax.Array, one: Any, zero: Any) -> Any:
        return zero ^ ((jnp.uint32(0) - bit.astype(jnp.uint32)) & (zero ^ one))

    found = _halved(list(NF4.view(np.uint32)), codes.astype(jnp.uint32), choose)
    return lax.bitcast_convert_type(found, jnp.float32)


def _halved(left: list[Any], codes: jax.Array, choose: Callable[..., Any]) -> Any:
    for bit in range(4):
        on = (codes >> bit) & 1 == 1
        left = [choose(on, one, zero) for zero, one in zip(left[::2], left[1::2], strict=True)]
    return left[0]


LOOKUPS: dict[str, Lookup] = {"gather": gather, "select": select, "bits": bits}


def decoded(lookup: Lookup, p: Any, dtype: Any) -> jax.Array:
    codes = jnp.concatenate([p["codes"] >> 4, p["codes"] & 15], axis=-2)
    return (lookup(codes) * jnp.repeat(p["absmax"], BLOCK, axis=-2)).astype(dtype)


def naive(lookup: Lookup) -> Use:
    return lambda x, p: x @ decoded(lookup, p, x.dtype)


def checkpointed(lookup: Lookup) -> Use:
    return jax.checkpoint(naive(lookup), prevent_cse=True)


def custom_vjp(lookup: Lookup) -> Use:
    """Each decode behind a barrier, with x or with its cotangent."""

    def direct(x: jax.Array, p: Any) -> jax.Array:
        return naive(lookup)(*lax.optimization_barrier((x, p)))

    def bwd(p: Any, dy: jax.Array) -> tuple[jax.Array, None]:
        dy, p = lax.optimization_barrier((dy, p))
        return dy @ decoded(lookup, p, dy.dtype).T, None

    use = jax.custom_vjp(direct)
    use.defvjp(lambda x, p: (direct(x, p), p), bwd)
    return use


BY_HAND: dict[str, Callable[[Lookup], Use]] = {
    "naive": naive,
    "checkpoint": checkpointed,
    "custom_vjp": custom_vjp,
}
FORMS = ("float", "jaxlora", *BY_HAND)


# --------------------------------------------------------------------------------------------------
# The steps


def step(args: argparse.Namespace, form: str) -> tuple[Callable[..., Any], Sequence[Any]]:
    """A train step, (adapters, base, x) -> (loss, gradient), and what it takes."""
    x = jax.ShapeDtypeStruct((args.batch, args.length, args.width), jnp.dtype(args.dtype))

    def weights(make: Callable[..., Any]) -> Any:
        def one(*stack: int) -> Any:
            return {name: make(stack, *size) for name, size in sizes(args.width).items()}

        return one(args.layers) if args.mode == "scan" else [one() for _ in range(args.layers)]

    if form in BY_HAND:
        use = BY_HAND[form](LOOKUPS[args.lookup])

        def with_adapter(x: jax.Array, p: Any) -> jax.Array:
            a, b = (p[name].astype(x.dtype) for name in "ab")
            return use(x, {"codes": p["codes"], "absmax": p["absmax"]}) + (x @ a) @ b

        def adapter(stack: Any, i: int, o: int) -> Any:
            return {"a": jnp.zeros((*stack, i, args.rank)), "b": jnp.zeros((*stack, args.rank, o))}

        def base(stack: Any, i: int, o: int) -> Any:
            codes = jnp.zeros((*stack, i // 2, o), jnp.uint8)
            return {"codes": codes, "absmax": jnp.zeros((*stack, i // BLOCK, o))}

        def apply(adapters: Any, base: Any, x: jax.Array) -> jax.Array:
            both = jax.tree.map(
                lambda q, ab: q | ab, base, adapters, is_leaf=lambda x: "codes" in x
            )
            return model(with_adapter, args.remat, both, x)

        halves = jax.eval_shape(lambda: (weights(adapter), weights(base)))
    else:
        fn = partial(model, lambda x, w: x @ w, args.remat)

        def start() -> Any:
            params = weights(lambda stack, i, o: jnp.zeros((*stack, i, o), x.dtype))
            config = jaxlora.LoraConfig(rank=args.rank, targets="all-linear")
            roles = jaxlora.trace_roles(fn, params, x)
            lora = jaxlora.init(jax.random.key(0), params, config, roles=roles)
            return lora if form == "float" else jaxlora.quantize(lora)

        def apply(adapters: Any, base: Any, x: jax.Array) -> jax.Array:
            return jaxlora.lora_apply(fn)(jaxlora.combine(adapters, base), x)

        halves = jaxlora.partition(jax.eval_shape(start))

    def loss(*given: Any) -> jax.Array:
        return jnp.mean(apply(*given).astype(jnp.float32) ** 2)

    return jax.value_and_grad(loss), (*halves, x)


def device(platform: str) -> Any:
    if platform == "cpu":
        return jax.devices("cpu")[0]
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices[0]


def compiled(args: argparse.Namespace, form: str) -> Any:
    f, given = step(args, form)
    at = NamedSharding(Mesh(np.array([device(args.platform)]), ("d",)), P())
    given = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), given)
    return jax.jit(f).lower(*given).compile()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantized_memory", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--platform", choices=("cpu", "tpu"), default="cpu")
    parser.add_argument("--mode", choices=("scan", "unrolled"), default="scan")
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="none")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--lookup", choices=[*LOOKUPS], default="gather", help="of those by hand")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    for name, value in {"layers": 4, "width": 512, "batch": 1, "length": 256, "rank": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--hlo", help="a folder for the compiled programs' text")
    args = parser.parse_args()

    of_layer = sum(jnp.dtype(args.dtype).itemsize * i * o for i, o in sizes(args.width).values())
    print(f"{args.platform} {args.mode} remat={args.remat} {args.layers} x {args.width}", end=" ")
    print(f"{args.dtype} {args.batch * args.length} tokens, a layer {of_layer / MIB:.1f} MiB")
    first = None
    for form in args.form:
        program = compiled(args, form)
        temp = program.memory_analysis().temp_size_in_bytes
        first = temp if first is None else first
        cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', program.as_text())))
        print(
            f"  {form:12} temp {temp / MIB:8.1f} MiB  excess {(temp - first) / of_layer:6.2f} "
            f"layers  {program.cost_analysis()['flops'] / 1e9:8.1f} GFLOP"
            + (f"  {cycles / 1e6:7.2f} Mcycles" if cycles else ""),
            flush=True,
        )
        if args.hlo:
            os.makedirs(args.hlo, exist_ok=True)
            name = f"{args.platform}_{args.mode}_{args.remat}_{form}.txt"
            with open(os.path.join(args.hlo, name), "w") as file:
                file.write(program.as_text())


if __name__ == "__main__":
    main()
