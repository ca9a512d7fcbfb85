"""AdamW whose two moments take one byte each: block-wise dynamic quantization."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from jaxlora import _compat
from jaxlora._codebooks import dynamic_code, middles
from jaxlora._errors import TargetError

BLOCK_SIZE = 256
"""Elements that share one absmax: consecutive ones of the flattened leaf."""


class Moment8bit(NamedTuple):
    """A moment in 8 bits: code[codes] * absmax, block by block.

    Attributes:
      codes: uint8, the shape of the parameter, so that it can be sharded as the parameter is.
      absmax: float32, (blocks,), the largest absolute value of each block.
    """

    codes: Any
    absmax: Any


class ScaleByAdam8bitState(NamedTuple):
    """What `adamw_8bit` keeps: arrays only.

    Attributes:
      count: int32, the number of steps taken.
      mu: the first moments: for each leaf a `Moment8bit`, or a float32 array if it is small.
      nu: the second moments, likewise.
    """

    count: Any
    mu: Any
    nu: Any


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    min_8bit_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    r"""`optax.adamw` with a quarter of its state: both moments as 8-bit codes.

    From the moments as they were stored, m' = b1 m + (1 - b1) g and v' = b2 v + (1 - b2) g^2 are
    computed in float32, and from them the update
    -lr (m' / (1 - b1^t) / (sqrt(v' / (1 - b2^t)) + eps) + weight_decay p), rounded once, to the
    gradient's dtype. To store m' and v', each block of 256 consecutive elements is divided by its
    absmax and rounded to the nearest entry of `dynamic_code`, signed for m', unsigned for v'; a tie
    goes to the lower entry.

    This is bitsandbytes' `AdamW8bit` (code books, block size, smallest leaf, arithmetic) but for
    one thing: a positive v' does not become zero, it is stored as the smallest positive entry at
    least. Rounded to the nearest it would, below 1.6e-7 of the absmax, that is for gradients of
    4e-4 of the block's largest, and if the next gradient is zero, m is divided by eps: with ReLUs
    or an embedding losses explode. (bitsandbytes' own kernels differ near zero: the CUDA one keeps
    a negative m' from becoming zero, the CPU one is only exact to 3e-5 of the absmax.)

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the denominator.
      weight_decay: decoupled, times the learning rate. The default is that of `optax.adamw`;
        bitsandbytes and PyTorch have 1e-2.
      mask: which leaves decay, as in `optax.adamw`: a tree of bools, or a function that makes it.
      min_8bit_size: leaves of fewer elements keep float32 moments.

    Returns:
      An optax transformation. Its state is `ScaleByAdam8bitState` in an `optax.chain`.

    Raises:
      TargetError: a decay outside of [0, 1), or a negative eps, weight_decay or min_8bit_size.

    >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
    >>> moments = adamw_8bit(1e-3).init(params)[0].mu
    >>> moments["kernel"].codes.dtype, moments["kernel"].absmax.shape, moments["bias"].dtype
    (dtype('uint8'), (16,), dtype('float32'))

    References:
      Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861,
      sections 2.1 and 2.2. Loshchilov and Hutter 2017, Decoupled Weight Decay Regularization,
      arXiv 1711.05101, algorithm 2.
    """
    for name, value, below in (
        ("b1", b1, 1.0),
        ("b2", b2, 1.0),
        ("eps", eps, math.inf),
        ("weight_decay", weight_decay, math.inf),
        ("min_8bit_size", min_8bit_size, math.inf),
    ):
        # Arrays are those of `optax.inject_hyperparams`, and may be traced.
        if isinstance(value, numbers.Real) and not 0 <= value < below:
            raise TargetError(
                f"adamw_8bit: got {name}={value}, expected 0 <= {name}"
                f"{' < 1' if below == 1 else ''}. For instance adamw_8bit(1e-3, b1=0.9, b2=0.999)."
            )
    tx = optax.chain(
        _scale_by_adam_8bit(b1, b2, eps, min_8bit_size),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )

    def update(
        updates: Any, state: optax.OptState, params: Any = None, **extra: Any
    ) -> tuple[Any, optax.OptState]:
        new, state = tx.update(_float32(updates), state, _float32(params), **extra)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _scale_by_adam_8bit(
    b1: float, b2: float, eps: float, min_8bit_size: int
) -> optax.GradientTransformation:
    """Float32 gradients to m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)."""

    def zeros(p: Any) -> Any:
        if p.size < min_8bit_size:
            return jnp.zeros_like(p, jnp.float32)
        blocks = -(-p.size // BLOCK_SIZE)
        return Moment8bit(jnp.zeros_like(p, jnp.uint8), jnp.zeros(blocks, jnp.float32))

    def init(params: Any) -> ScaleByAdam8bitState:
        mu, nu = (jax.tree.map(zeros, params) for _ in range(2))
        return ScaleByAdam8bitState(jnp.zeros((), jnp.int32), mu, nu)

    @jax.jit  # traced once for all leaves of one shape
    def step(g: Any, mu: Any, nu: Any, count: Any, books: Any) -> tuple[Any, Any, Any]:
        signed, unsigned = books
        m = b1 * _load(mu, signed) + (1 - b1) * g
        v = b2 * _load(nu, unsigned) + (1 - b2) * (g * g)
        u = (m / _correction(b1, count)) / (jnp.sqrt(v / _correction(b2, count)) + eps)
        return u, _store(m, mu, signed), _store(v, nu, unsigned)

    def update(
        updates: Any, state: ScaleByAdam8bitState, params: Any = None
    ) -> tuple[Any, ScaleByAdam8bitState]:
        count = optax.safe_increment(state.count)
        books = jax.tree.map(jnp.asarray, (_code_book(signed=True), _code_book(signed=False)))
        treedef: Any = jax.tree.structure(updates)
        gradients = jax.tree.leaves(updates)
        mus, nus = treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu)
        new = [
            _in_any_layout(step, g, mu)(g, mu, nu, count, books)
            for g, mu, nu in zip(gradients, mus, nus, strict=True)
        ]
        updates, mu, nu = (jax.tree.unflatten(treedef, [n[k] for n in new]) for k in range(3))
        return updates, ScaleByAdam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _in_any_layout(step: Callable[..., Any], g: Any, mu: Any) -> Callable[..., Any]:
    """`step`, also where types say how g is sharded: there a reshape into blocks would be refused.

    Codes stay sharded as g is; the absmaxes, a 256th of the elements, are replicated.
    """
    if not isinstance(mu, Moment8bit) or not any(_compat.explicit_spec(g)):
        return step
    sharded = jax.typeof(g).sharding
    moment = Moment8bit(sharded, jax.sharding.NamedSharding(sharded.mesh, PartitionSpec()))
    return jax.sharding.auto_axes(step, out_sharding=(sharded, moment, moment))


def _correction(b: float, count: Any) -> Any:
    """1 - b^t. In float32 as it is written, 1 - 0.999 would be wrong by 1e-5 of itself."""
    if not isinstance(b, numbers.Real):
        return 1 - b**count
    return -jnp.expm1(count * jnp.float32(math.log(b) if b else -math.inf))


# --------------------------------------------------------------------------------------------------
# Eight bits


class _CodeBook(NamedTuple):
    """How to read and to find an entry.

    Attributes:
      values: the 256 entries, ascending.
      thresholds: the 255 midpoints between them, rounded down: above one, the upper entry is
        nearer. Then infinity. Unsigned, the first is 0 instead.
      first: for all 2^16 leading halves of a float32, the code of the lowest number that has it. No
        two thresholds share a leading half: the code of any other number is that or the next one.
    """

    values: Any
    thresholds: Any
    first: Any


@functools.cache
def _code_book(signed: bool) -> _CodeBook:
    values = dynamic_code(signed)
    exact = middles(values.astype(np.float64))
    rounded = exact.astype(np.float32)
    below = np.nextafter(rounded, np.float32(-2))
    thresholds = np.where(rounded > exact, below, rounded)
    if not signed:
        thresholds[0] = 0  # what is positive does not become zero
    halves = np.arange(2**16, dtype=np.uint32)
    lowest = (halves << 16) | np.where(halves < 2**15, 0, 2**16 - 1).astype(np.uint32)
    first = np.searchsorted(thresholds, lowest.view(np.float32))
    return _CodeBook(values, np.append(thresholds, np.float32(np.inf)), first.astype(np.uint8))


def _nearest(x: jax.Array, book: _CodeBook) -> jax.Array:
    """The codes of the nearest values, for x from -1 to 1: two lookups."""
    half = jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16
    code = _lookup(book.first, half)
    return code + (x > _lookup(book.thresholds, code)).astype(jnp.uint8)


def _load(moment: Any, book: _CodeBook) -> jax.Array:
    """The moment in float32."""
    if not isinstance(moment, Moment8bit):
        return moment
    return _lookup(book.values, moment.codes) * _spread(moment.absmax, moment.codes)


def _store(x: jax.Array, like: Any, book: _CodeBook) -> Any:
    """x as `like` is stored: in 8 bits, or as it is."""
    if not isinstance(like, Moment8bit):
        return x
    blocks = jnp.pad(x.reshape(-1), (0, -x.size % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    divisor = jnp.where(absmax == 0, 1, absmax)
    return Moment8bit(_nearest(x / _spread(divisor, x), book), absmax)


def _spread(absmax: jax.Array, like: jax.Array) -> jax.Array:
    """Each element's absmax, in the shape of `like`.

    All else is elementwise in that shape, so that codes come out sharded as the parameter is.
    """
    return jnp.repeat(absmax, BLOCK_SIZE)[: like.size].reshape(like.shape)


def _lookup(table: jax.Array, indices: jax.Array) -> jax.Array:
    return table.at[indices].get(mode="promise_in_bounds")
