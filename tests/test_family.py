"""Every feature of the family on every kind of weight: where it starts; factored is merged.

DoRA also has cases of its own in the registry, with gradients and vmap (cases/family.py); the
formulas are tested in test_dora.py, test_initializers.py and test_adapters.py.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from helpers import assert_close, mostly_slow, randomized

import jaxlora
from jaxlora import LoraConfig, initializers

KINDS = {
    "dense": "linen_dense",
    "attention": "linen_attention",
    "convolution": "linen_conv",
    "embedding": "linen_embed",
    "scanned": "linen_scan",
}
KEY = jax.random.key(3)
METHODS = ("cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def trees(case, params, args):
    """Adapters that start at the base, and others, by feature."""
    targets = list(case.roles)
    roles = jaxlora.trace_roles(case.fn, params, *args)
    base = LoraConfig(rank=2, alpha=3, targets=targets)

    def init(key=KEY, **changes):
        config = dataclasses.replace(base, **changes)
        return jaxlora.init(key, params, config, roles=roles)

    def bias(path, leaf):
        return path.endswith("bias")

    fresh = {
        "rank_stabilized": init(rank_stabilized=True),
        "patterns": init(rank_pattern={targets[0]: 1}, alpha_pattern={targets[0]: 5.0}),
        "dora": init(dora=True),
        "gaussian": init(initializer=initializers.gaussian),
        "normal": init(initializer=initializers.normal(0.1)),
        "orthogonal": init(initializer=initializers.orthogonal),
        "pissa": init(initializer=initializers.pissa()),
        "fast pissa": init(initializer=initializers.pissa(niter=2)),
        "dora of pissa": init(initializer=initializers.pissa(), dora=True),
        "olora": init(initializer=initializers.olora),
    }
    if "embedding" in targets[0]:  # which has neither a bias nor inputs
        fresh["in full"] = init()
    else:
        fresh["in full"] = init(train=bias)
        stats = jaxlora.input_moments(lambda p, args: case.fn(p, *args), init(), [args])
        fresh["eva"] = init(initializer=initializers.eva(stats))
        fresh["corda"] = init(initializer=initializers.corda(stats))

    gradients = jax.grad(lambda p: jnp.sum(jnp.sin(case.fn(p, *args))))(params)
    fresh["lora_ga"] = init(initializer=initializers.lora_ga(gradients))

    one, two = (randomized(init(), seed) for seed in (1, 2))
    others = {
        "loftq": init(initializer=initializers.loftq(lambda w: jnp.round(w * 4) / 4)),
        "truncated": jaxlora.truncate(one, 1),
        "negated": jaxlora.scaled(one, -1.0),
        "rebased": jaxlora.rebase(randomized(fresh["pissa"]), fresh["pissa"], params),
    }
    for method in METHODS:
        options = {} if method in ("cat", "svd", "linear") else {"density": 0.5}
        options |= {"key": KEY} if method.startswith("dare") else {}
        others[method] = jaxlora.weighted_sum([one, two], [0.7, -0.4], method, **options)
    for name in ("patterns", "in full", "dora", "pissa", "dora of pissa", "olora"):
        others[f"trained, {name}"] = randomized(fresh[name])
    return fresh, others


@pytest.mark.parametrize("kind", mostly_slow(KINDS, ("dense", "embedding")))
def test_every_feature(kind):
    case = CASES[KINDS[kind]]
    params, args = jax.jit(case.make)(jax.random.key(0))
    fresh, others = jax.jit(lambda params, args: trees(case, params, args))(params, args)
    plain, merge = jax.jit(case.fn), jax.jit(jaxlora.merge)
    base = plain(params, *args)
    for name, lora in fresh.items():
        try:
            assert_close(case.apply(lora, *args), base)
        except AssertionError as error:
            raise AssertionError(f"{name} does not start at the base") from error
    for name, lora in others.items():
        got = case.apply(lora, *args)
        try:
            assert_close(got, plain(merge(lora), *args), 2)
        except AssertionError as error:
            raise AssertionError(f"{name}: factored is not merged") from error
        if name != "loftq":
            assert np.abs(np.asarray(got) - np.asarray(base)).max() > 0.01, name
    with_full = jaxlora.count_params(fresh["in full"]).trainable
    assert (with_full > jaxlora.count_params(fresh["normal"]).trainable) == (kind != "embedding")
    tuned = merge(others["linear"])  # of rank 2, as what is extracted
    config = LoraConfig(rank=2, targets=list(case.roles))
    roles = jaxlora.trace_roles(case.fn, params, *args)
    extracted = jaxlora.extract(params, tuned, config, roles=roles)
    assert_close(case.apply(extracted, *args), plain(tuned, *args), 2)
