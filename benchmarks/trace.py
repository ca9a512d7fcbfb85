"""The cost of the transform itself: tracing a 32-layer unrolled transformer through jaxlora.

Every run traces new functions with JAX's caches cleared, as the first call in a process does. The
model is tiny: tracing does not depend on its width. jaxlora traces the model, then evaluates that
trace inside the caller's. `plain, evaluated again` is the second half alone as JAX itself does it,
with no LoRA: what is left above the plain model and that is jaxlora's own.
"""

import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import jaxpr_as_fun

import jaxlora
from benchmarks import models
from benchmarks.harness import TIME, Benchmark, Contestant, Limit

PLAIN = "plain"
EVALUATED = "plain, evaluated again"
HAND_WRITTEN = "hand-written LoRA"
JAXLORA = "jaxlora"
BARE = "jaxlora, jit=False"
OUTER = "jaxlora, under jax.jit"

AT_MOST = 1.5
LAYERS, WIDTH, HEADS, VOCAB = 32, 32, 4, 64
SETTINGS = {"layers": LAYERS, "rank": 4, "targets": "+".join(models.TARGETS)}

Fn = Callable[..., jax.Array]


class Model(NamedTuple):
    """A model: `build()` gives a new function (params, tokens) -> logits each time."""

    build: Callable[[], Fn]
    params: Any
    tokens: jax.Array

    def lora(self) -> Any:
        config = jaxlora.LoraConfig(
            rank=4, targets=list(models.TARGETS), roles=dict.fromkeys(models.TARGETS, "io")
        )
        return jaxlora.init(jax.random.key(0), self.params, config)


def linen() -> Benchmark:
    """Tracing 32 layers of Flax Linen, against `jax.make_jaxpr` of the plain model."""
    model = _linen()
    return _benchmark(model, {HAND_WRITTEN: _hand_written(model)})


def gradient() -> Benchmark:
    """Tracing the gradient of 32 layers of Flax Linen, against that of the plain model."""
    model = _linen()
    trainable, frozen = jaxlora.partition(model.lora())
    rival, _ = _hand_written(model)
    adapters, rest = models.split(models.hand_written(model.lora()))

    def ours() -> Fn:
        apply = jaxlora.lora_apply(model.build())
        return lambda trained, x: apply(jaxlora.combine(trained, frozen), x)

    def theirs() -> Fn:
        apply = rival()
        return lambda trained, x: apply(models.join(trained, rest), x)

    def of(build: Callable[[], Fn]) -> Callable[[], Fn]:
        return lambda: jax.grad(_summed(build()))

    programs = {
        PLAIN: (of(model.build), model.params),
        "plain, under jax.jit": (of(lambda: jax.jit(model.build())), model.params),
        HAND_WRITTEN: (of(theirs), adapters),
        JAXLORA: (of(ours), trainable),
    }
    return Benchmark(
        contestants={n: _traced(*p, model.tokens) for n, p in programs.items()},
        baseline=PLAIN,
        settings=SETTINGS,
        rounds=10,
    )


def flax_nnx() -> Benchmark:
    """Tracing 32 layers of Flax NNX, against `jax.make_jaxpr` of the plain model."""
    graphdef, params = nnx.split(_NnxTransformer(nnx.Rngs(0)))
    tokens = jnp.zeros((2, 16), jnp.int32)
    model = Model(lambda: lambda p, x: nnx.merge(graphdef, p)(x), params, tokens)
    return _benchmark(model, {})


def plain_jnp() -> Benchmark:
    """Tracing 32 layers of bare jax.numpy: no framework's own time to compare with."""
    return _benchmark(_jnp(), {})


def count_equations(jaxpr: Any) -> int:
    """How many equations a jaxpr has, those within its equations too."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(1 + sum(map(count_equations, _within(eqn.params))) for eqn in inner.eqns)


def _within(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for v in value if isinstance(value, tuple) else (value,):
            if hasattr(v, "eqns"):
                yield v


def _benchmark(model: Model, others: Mapping[str, tuple[Callable[[], Fn], Any]]) -> Benchmark:
    lora = model.lora()
    closed = jax.make_jaxpr(model.build())(model.params, model.tokens)

    def again() -> Fn:
        run = jaxpr_as_fun(closed)
        return lambda params, x: run(*jax.tree.leaves(params), x)[0]

    programs: dict[str, tuple[Callable[[], Fn], Any]] = {
        PLAIN: (model.build, model.params),
        EVALUATED: (again, model.params),
        **others,
        JAXLORA: (lambda: jaxlora.lora_apply(model.build()), lora),
        BARE: (lambda: jaxlora.lora_apply(model.build(), jit=False), lora),
        OUTER: (lambda: jax.jit(jaxlora.lora_apply(model.build())), lora),
    }
    return Benchmark(
        contestants={n: _traced(*p, model.tokens) for n, p in programs.items()},
        baseline=PLAIN,
        limits=[
            Limit(figure=TIME, contestant=name, baseline=PLAIN, at_most=AT_MOST)
            for name in (JAXLORA, BARE, OUTER)
        ],
        settings=SETTINGS,
        rounds=15,
    )


def _traced(build: Callable[[], Fn], params: Any, tokens: jax.Array) -> Contestant:
    """A contestant whose every run traces a new function."""

    def run() -> Any:
        return jax.make_jaxpr(build())(params, tokens)

    return Contestant(run=run, prepare=_forget, figures={"equations": count_equations(run())})


def _forget() -> None:
    jax.clear_caches()
    gc.collect()  # or what one run leaves behind is another's to collect


def _summed(fn: Fn) -> Fn:
    return lambda *args: fn(*args).sum()


# --------------------------------------------------------------------------------------------------
# The model, three times: Linen's is `models.Transformer`.


def _linen() -> Model:
    model = models.Transformer(LAYERS, WIDTH, HEADS, VOCAB, scan=False)
    tokens = jnp.zeros((2, 16), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return Model(lambda: _of_params(model.clone()), _zeros(shapes), tokens)


def _hand_written(model: Model) -> tuple[Callable[[], Fn], Any]:
    dense = functools.partial(models.LoraDense, rank=4, scale=2.0)
    rival = models.Transformer(LAYERS, WIDTH, HEADS, VOCAB, scan=False, dense=dense)
    return lambda: _of_params(rival.clone()), models.hand_written(model.lora())


def _of_params(model: models.Transformer) -> Fn:
    return lambda params, x: model.apply({"params": params}, x)  # type: ignore[return-value]


class _NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm, self.mlp_norm = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.query, self.key, self.value, self.out = (
            nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4)
        )
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.attention_norm(x)
        query, key, value = (
            dense(h).reshape(*x.shape[:-1], HEADS, -1)
            for dense in (self.query, self.key, self.value)
        )
        h = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(h.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class _NnxTransformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([_NnxBlock(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _jnp() -> Model:
    def norm(p: Any, x: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + 1e-6) * p["scale"] + p["bias"]

    def dense(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["kernel"] + p["bias"]

    def block(p: Any, x: jax.Array) -> jax.Array:
        h = norm(p["attention_norm"], x)
        query, key, value = (
            dense(p[name], h).reshape(*x.shape[:-1], HEADS, -1)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bthd,bshd->bhts", query, key) / (WIDTH // HEADS) ** 0.5
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), -1)
        h = jnp.einsum("bhts,bshd->bthd", weights, value)
        x = x + dense(p["out"], h.reshape(x.shape))
        return x + dense(p["down"], jax.nn.gelu(dense(p["up"], norm(p["mlp_norm"], x))))

    def fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        for p in params["layers"]:
            x = block(p, x)
        return x @ params["head"]

    def kernel(*shape: int) -> dict[str, jax.Array]:
        return {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1])}

    def layer() -> dict[str, Any]:
        sizes: Sequence[tuple[int, int]] = [(WIDTH, WIDTH)] * 4
        sizes = [*sizes, (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
        norms = {
            name: {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}
            for name in ("attention_norm", "mlp_norm")
        }
        return norms | {n: kernel(*s) for n, s in zip(models.TARGETS, sizes, strict=True)}

    params = {
        "embed": jnp.zeros((VOCAB, WIDTH)),
        "layers": [layer() for _ in range(LAYERS)],
        "head": jnp.zeros((WIDTH, VOCAB)),
    }
    return Model(lambda: lambda p, x: fn(p, x), params, jnp.zeros((2, 16), jnp.int32))


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
