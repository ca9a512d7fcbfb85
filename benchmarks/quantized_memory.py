"""Temp memory of a LoRA train step on an NF4 base: ways to write `x @ decode(codes)`, side by side.

Nothing is run: the step is compiled for this CPU, or for TPU v5e (`--platform tpu`: needs
`pip install "jax[tpu]"`, and no TPU), and the compiler says what it would allocate.

    python -m benchmarks.quantized_memory --mode unrolled --remat full --form dense naive primitive
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
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
from jax.extend.core import Primitive  # noqa: E402
from jax.interpreters import ad, batching, mlir  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

Use = Callable[[jax.Array, Any], jax.Array]
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64
MIB = 2**20

# ---- decode: uint8 codes and float32 absmax of blocks along the last dim, or the first ----------


def _select(code: jax.Array) -> jax.Array:
    """15 selects on the four bits. Out of a scan's body JAX hoists its 16 constants, broadcast."""
    level = [jnp.float32(v) for v in NF4]
    for bit in range(4):
        on = (code >> bit) & 1 == 1
        level = [jnp.where(on, hi, lo) for lo, hi in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _bits(code: jax.Array) -> jax.Array:
    """The same on the values' bits, with scalars only. XLA:TPU may fail to fuse it."""
    code = code.astype(jnp.uint32)
    level: list[Any] = [np.float32(v).view(np.uint32) for v in NF4]
    for bit in range(4):
        mask = jnp.uint32(0) - ((code >> bit) & 1)
        level = [lo ^ (mask & (lo ^ hi)) for lo, hi in zip(level[::2], level[1::2], strict=True)]
    return lax.bitcast_convert_type(level[0], jnp.float32)


def _gather(code: jax.Array) -> jax.Array:
    """XLA:TPU makes compares and selects of it, XLA:CPU vector look-ups; nothing to hoist."""
    return jnp.asarray(NF4, jnp.float32).at[code.astype(jnp.int32)].get(mode="promise_in_bounds")


# `_select` as one primitive: what JAX cannot look into it cannot hoist.
_lookup = Primitive("lookup")
_lookup.def_impl(_select)
_lookup.def_abstract_eval(lambda code: jax.make_jaxpr(_select)(code).out_avals[0])
batching.primitive_batchers[_lookup] = lambda args, dims: (_lookup.bind(*args), dims[0])
mlir.register_lowering(_lookup, mlir.lower_fun(_select, multiple_results=False))

LOOKUPS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "select": _select,
    "bits": _bits,
    "gather": _gather,
    "closed": _lookup.bind,
}


@dataclasses.dataclass(frozen=True)
class Decode:
    """q, dtype -> weight.

    order: which two elements share a byte: neighbours in a row ("pairs"; codes (rows, cols / 2),
    absmax (rows, cols / 64)), halves of a row ("halves"; the same shapes), or halves of a column
    ("columns"; codes (rows / 2, cols), absmax (rows / 64, cols)).
    """

    lookup: str
    order: str

    def __call__(self, q: Any, dtype: Any) -> jax.Array:
        codes, absmax = q
        high, low = codes >> 4, codes & 15
        axis = -2 if self.order == "columns" else -1
        if self.order == "pairs":
            index = jnp.stack([high, low], -1).reshape(*codes.shape[:-1], -1)
        else:
            index = jnp.concatenate([high, low], axis)
        return (LOOKUPS[self.lookup](index) * jnp.repeat(absmax, BLOCK, axis)).astype(dtype)


# ---- forms of y = x @ w ------------------------------------------------------------------------


def dense(decode: Decode) -> Use:
    return lambda x, w: x @ w


def naive(decode: Decode) -> Use:
    return lambda x, q: x @ decode(q, x.dtype)


def checkpoint(decode: Decode) -> Use:
    return jax.checkpoint(naive(decode), prevent_cse=True)


def waiting_checkpoint(decode: Decode) -> Use:
    """As `checkpoint`; each decode waits for x."""
    return jax.checkpoint(
        lambda x, q: naive(decode)(*lax.optimization_barrier((x, q))), prevent_cse=True
    )


def custom_vjp(decode: Decode, forward: bool, backward: str) -> Use:
    """Barriers: before the forward decode (codes and x), and the backward one (codes, or all)."""

    def direct(x: jax.Array, q: Any) -> jax.Array:
        return naive(decode)(*(lax.optimization_barrier((x, q)) if forward else (x, q)))

    def bwd(q: Any, dy: jax.Array) -> tuple[jax.Array, None]:
        if backward == "codes":
            q = lax.optimization_barrier(q)
        elif backward == "all":
            dy, q = lax.optimization_barrier((dy, q))
        return dy @ decode(q, dy.dtype).T, None

    use = jax.custom_vjp(direct)
    use.defvjp(lambda x, q: (direct(x, q), q), bwd)
    return use


# `primitive`: f(x, *q), linear in x, and its transpose are one primitive that waits for its x.

_after = Primitive("after")
_after.multiple_results = True
_after.def_impl(lambda *args: [*args])
_after.def_abstract_eval(lambda *args: [*args])
batching.primitive_batchers[_after] = lambda args, dims: (_after.bind(*args), dims)
ad.primitive_jvps[_after] = lambda primals, tangents: (_after.bind(*primals), [*tangents])


def _barrier(*args: jax.Array) -> Any:
    return lax.optimization_barrier(args)


def _zero(x: jax.Array, codes: jax.Array, *rest: jax.Array) -> Any:
    """XLA:CPU of JAX 0.10 takes barriers out before it merges equal expressions."""
    if x.size:
        first = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()).astype(jnp.float32)
        zero = lax.clz(lax.bitcast_convert_type(first, jnp.uint32)) >> 6  # at most 32 >> 6
        codes = codes ^ zero.astype(codes.dtype)
    return x, codes, *rest


mlir.register_lowering(_after, mlir.lower_fun(_barrier, multiple_results=True))
mlir.register_lowering(_after, mlir.lower_fun(_zero, multiple_results=True), platform="cpu")

_use = Primitive("use")


def _direct(x: jax.Array, *q: jax.Array, f: Any) -> Any:
    return f(*_after.bind(x, *q))


@dataclasses.dataclass(frozen=True)
class _Transposed:
    f: Callable[..., Any]
    aval: Any

    def __call__(self, dy: jax.Array, *q: jax.Array) -> Any:
        return jax.linear_transpose(lambda x: self.f(x, *q), self.aval)(dy)[0]


@dataclasses.dataclass(frozen=True)
class _Batched:
    f: Callable[..., Any]
    dims: tuple[Any, ...]

    def __call__(self, *args: jax.Array) -> Any:
        return jax.vmap(self.f, self.dims)(*args)


def _jvp(primals: Any, tangents: Any, *, f: Any) -> Any:
    # The primal is open, so that a policy of `jax.checkpoint` sees the contraction in it.
    return _direct(*primals, f=f), _use.bind(tangents[0], *primals[1:], f=f)


def _transpose(dy: Any, x: Any, *q: Any, f: Any) -> list[Any]:
    if isinstance(dy, ad.Zero):
        return [None] * (1 + len(q))
    return [_use.bind(dy, *q, f=_Transposed(f, x.aval)), *[None] * len(q)]


def _batch(args: Any, dims: Any, *, f: Any) -> Any:
    return _use.bind(*args, f=_Batched(f, tuple(dims))), 0


_use.def_impl(lambda *args, f: f(*args))
_use.def_abstract_eval(lambda *avals, f: jax.make_jaxpr(f)(*avals).out_avals[0])
mlir.register_lowering(_use, mlir.lower_fun(_direct, multiple_results=False))
batching.primitive_batchers[_use] = _batch
ad.primitive_jvps[_use] = _jvp
ad.primitive_transposes[_use] = _transpose


def primitive(decode: Decode) -> Use:
    def f(x: jax.Array, *q: jax.Array) -> jax.Array:
        return x @ decode(q, x.dtype)

    return lambda x, q: _use.bind(x, *q, f=f)


FORMS: dict[str, Callable[[Decode], Use]] = {
    "dense": dense,
    "naive": naive,
    "checkpoint": checkpoint,
    "waiting_checkpoint": waiting_checkpoint,
    "vjp": partial(custom_vjp, forward=False, backward="none"),
    "vjp_codes": partial(custom_vjp, forward=False, backward="codes"),
    "vjp_dy": partial(custom_vjp, forward=False, backward="all"),
    "vjp_both": partial(custom_vjp, forward=True, backward="all"),
    "primitive": primitive,
}


# ---- the step ----------------------------------------------------------------------------------


def sizes(width: int) -> dict[str, tuple[int, int]]:
    up = 11 * width // 4
    square = dict.fromkeys("qkvo", (width, width))
    return square | {"gate": (width, up), "up": (width, up), "down": (up, width)}


def layer(use: Use, x: jax.Array, base: Any, lora: Any) -> jax.Array:
    def linear(name: str, x: jax.Array) -> jax.Array:
        a, b = lora[name]
        return use(x, base[name]) + (x @ a.astype(x.dtype)) @ b.astype(x.dtype)

    def norm(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return (wide * lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)

    h = norm(x)
    q, k, v = (linear(n, h).reshape(*h.shape[:-1], -1, 128) for n in "qkv")
    x = x + linear("o", jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
    h = norm(x)
    return x + linear("down", jax.nn.silu(linear("gate", h)) * linear("up", h))


def step(use: Use, args: argparse.Namespace) -> Callable[..., Any]:
    one: Callable[..., Any] = partial(layer, use)
    if args.remat != "none":
        policy = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
        one = jax.checkpoint(one, prevent_cse=args.mode != "scan", policy=policy[args.remat])

    def loss(lora: Any, base: Any, x: jax.Array) -> jax.Array:
        if args.mode == "scan":
            x, _ = lax.scan(lambda x, p: (one(x, *p), None), x, (base, lora))
        else:
            for i in range(args.layers):
                x = one(x, base[i], lora[i])
        return jnp.mean(x.astype(jnp.float32) ** 2)

    return jax.value_and_grad(loss)


def arguments(args: argparse.Namespace, form: str) -> Any:
    n, rank = args.layers, args.rank

    def shape(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, *dims) if args.mode == "scan" else dims, dtype)

    def weight(i: int, o: int) -> Any:
        if form == "dense":
            return shape(args.dtype, i, o)
        if args.order == "columns":
            return shape(jnp.uint8, i // 2, o), shape(jnp.float32, i // BLOCK, o)
        return shape(jnp.uint8, i, o // 2), shape(jnp.float32, i, o // BLOCK)

    base = {k: weight(i, o) for k, (i, o) in sizes(args.width).items()}
    lora = {
        k: (shape(jnp.float32, i, rank), shape(jnp.float32, rank, o))
        for k, (i, o) in sizes(args.width).items()
    }
    x = jax.ShapeDtypeStruct((args.batch, args.length, args.width), args.dtype)
    return (lora, base, x) if args.mode == "scan" else ([lora] * n, [base] * n, x)


def device(platform: str) -> Any:
    if platform == "cpu":
        return jax.devices("cpu")[0]
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices[0]


def compiled(args: argparse.Namespace, form: str) -> Any:
    at = NamedSharding(Mesh(np.array([device(args.platform)]), ("d",)), P())
    given = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), arguments(args, form)
    )
    use = FORMS[form](Decode(args.lookup, args.order))
    return jax.jit(step(use, args)).lower(*given).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--platform", choices=("cpu", "tpu"), default="cpu")
    parser.add_argument("--mode", choices=("scan", "unrolled"), default="scan")
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="none")
    parser.add_argument("--form", nargs="+", choices=[*FORMS], default=[*FORMS])
    parser.add_argument("--lookup", choices=[*LOOKUPS], default="gather")
    parser.add_argument("--order", choices=("pairs", "halves", "columns"), default="columns")
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
        print(
            f"  {form:18} temp {temp / MIB:8.1f} MiB  excess {(temp - first) / of_layer:6.2f} "
            f"layers  {program.cost_analysis()['flops'] / 1e9:8.1f} GFLOP",
            flush=True,
        )
        if args.hlo:
            os.makedirs(args.hlo, exist_ok=True)
            name = f"{args.platform}_{args.mode}_{args.remat}_{form}.txt"
            with open(os.path.join(args.hlo, name), "w") as file:
                file.write(program.as_text())


if __name__ == "__main__":
    main()
