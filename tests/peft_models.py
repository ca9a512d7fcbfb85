"""The models of tests/references/peft, in plain JAX: params, the map to PEFT's names, a forward.

python tests/peft_models.py DIRECTORY     # what jaxlora saves of each, for the oracle
python tests/oracle/peft_adapters.py --check DIRECTORY
"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent / "references" / "peft"


class Model(NamedTuple):
    """A base in JAX, its map, and its forward pass, (params, tokens) -> what PEFT's model gives."""

    params: Any
    names: dict[str, Any]
    forward: Callable[[Any, Any], Any]
    tokens: np.ndarray
    expected: np.ndarray


def load_base(name: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / name / "base.npz") as saved:
        return dict(saved)


# --------------------------------------------------------------------------------------------------
# Llama: layers scanned over, heads split


def _rms(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def _rotate(x):  # (B, T, H, Dh), by halves
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _attend(q, k, v, causal=True):
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    if causal:
        scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -1e30)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


def llama_forward(params, tokens):
    table = params["embed"]["embedding"]

    def layer(h, p):
        x = _rms(h, p["norm1"]["scale"])
        q, k, v = (
            jnp.einsum("btd,dhk->bthk", x, p[n]["kernel"]) for n in ("query", "key", "value")
        )
        y = _attend(_rotate(q), _rotate(k), v)
        h = h + jnp.einsum("bthk,hkd->btd", y, p["out"]["kernel"])
        x = _rms(h, p["norm2"]["scale"])
        y = jax.nn.silu(x @ p["gate"]["kernel"]) * (x @ p["up"]["kernel"])
        return h + y @ p["down"]["kernel"], None

    h, _ = jax.lax.scan(layer, table[tokens], params["layers"])
    h = _rms(h, params["norm"]["scale"])
    return h @ (params["head"]["kernel"] if "head" in params else table.T)


def llama(base):
    count = 1 + max(int(k.split(".")[2]) for k in base if k.startswith("model.layers."))

    def stack(name, shape=None):
        each = [base[f"model.layers.{i}.{name}.weight"].T for i in range(count)]
        return jnp.stack([x if shape is None else x.reshape(shape) for x in each])

    attention = {"query": ("q", 4), "key": ("k", 2), "value": ("v", 2)}
    layers = {
        **{
            n: {"kernel": stack(f"self_attn.{m}_proj", (16, h, 4))}
            for n, (m, h) in attention.items()
        },
        "out": {"kernel": stack("self_attn.o_proj", (4, 4, 16))},
        **{n: {"kernel": stack(f"mlp.{n}_proj")} for n in ("gate", "up", "down")},
        "norm1": {"scale": stack("input_layernorm")},
        "norm2": {"scale": stack("post_attention_layernorm")},
    }
    params = {
        "embed": {"embedding": jnp.asarray(base["model.embed_tokens.weight"])},
        "layers": layers,
        "norm": {"scale": jnp.asarray(base["model.norm.weight"])},
    }
    embed = {"module": "model.embed_tokens", "kind": "embedding"}
    names = {
        "embed/embedding": embed,
        **{
            f"layers/{n}/kernel": {
                "module": f"model.layers.{{}}.self_attn.{m}_proj",
                "roles": "sioo",
            }
            for n, (m, _) in attention.items()
        },
        "layers/out/kernel": {"module": "model.layers.{}.self_attn.o_proj", "roles": "siio"},
        **{
            f"layers/{n}/kernel": {"module": f"model.layers.{{}}.mlp.{n}_proj", "roles": "sio"}
            for n in ("gate", "up", "down")
        },
    }
    if "lm_head.weight" in base:
        params["head"] = {"kernel": jnp.asarray(base["lm_head.weight"].T)}
        names["head/kernel"] = "lm_head"
    else:
        embed["tied"] = "lm_head"
    return params, names, llama_forward


# --------------------------------------------------------------------------------------------------
# GPT-2: theirs fused and transposed, ours split


def _norm(x, p, eps):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(jnp.var(x, axis=-1, keepdims=True) + eps)
    return x * p["scale"] + p["bias"]


def gpt2_forward(params, tokens):
    h = params["wte"]["embedding"][tokens] + params["wpe"]["embedding"][: tokens.shape[1]]
    for i in range(2):
        p = params[f"h_{i}"]
        x = _norm(h, p["ln_1"], 1e-5)
        q, k, v = (
            jnp.einsum("btd,dhk->bthk", x, p[n]["kernel"]) + p[n]["bias"] for n in ("q", "k", "v")
        )
        y = _attend(q, k, v).reshape(*tokens.shape, -1)
        h = h + y @ p["proj"]["kernel"] + p["proj"]["bias"]
        x = _norm(h, p["ln_2"], 1e-5)
        x = jax.nn.gelu(x @ p["up"]["kernel"] + p["up"]["bias"], approximate=True)
        h = h + x @ p["down"]["kernel"] + p["down"]["bias"]
    return _norm(h, params["ln_f"], 1e-5) @ params["wte"]["embedding"].T


def gpt2(base):
    def norm(name):
        return {
            "scale": jnp.asarray(base[f"{name}.weight"]),
            "bias": jnp.asarray(base[f"{name}.bias"]),
        }

    def conv1d(name):
        return {
            "kernel": jnp.asarray(base[f"{name}.weight"]),
            "bias": jnp.asarray(base[f"{name}.bias"]),
        }

    params = {
        "wte": {"embedding": jnp.asarray(base["transformer.wte.weight"])},
        "wpe": {"embedding": jnp.asarray(base["transformer.wpe.weight"])},
        "ln_f": norm("transformer.ln_f"),
    }
    for i in range(2):
        stem = f"transformer.h.{i}"
        fused = conv1d(f"{stem}.attn.c_attn")
        split = {
            n: {
                "kernel": fused["kernel"][:, 12 * k : 12 * k + 12].reshape(12, 2, 6),
                "bias": fused["bias"][12 * k : 12 * k + 12].reshape(2, 6),
            }
            for k, n in enumerate("qkv")
        }
        params[f"h_{i}"] = {
            **split,
            "proj": conv1d(f"{stem}.attn.c_proj"),
            "up": conv1d(f"{stem}.mlp.c_fc"),
            "down": conv1d(f"{stem}.mlp.c_proj"),
            "ln_1": norm(f"{stem}.ln_1"),
            "ln_2": norm(f"{stem}.ln_2"),
        }
    names: dict[str, Any] = {
        f"h_(\\d+)/{n}/kernel": {
            "module": "transformer.h.{1}.attn.c_attn",
            "kind": "conv1d",
            "part": k,
            "roles": "ioo",
        }
        for k, n in enumerate("qkv")
    }
    for n, m in {"proj": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}.items():
        names[f"h_(\\d+)/{n}/kernel"] = {"module": f"transformer.h.{{1}}.{m}", "kind": "conv1d"}
    return params, names, gpt2_forward


# --------------------------------------------------------------------------------------------------
# BERT: ours fused, theirs split; a classifier and biases that train in full


def bert_forward(params, tokens):
    e = params["embeddings"]
    h = e["word"]["embedding"][tokens] + e["position"]["embedding"][: tokens.shape[1]]
    h = _norm(h + e["type"]["embedding"][0], e["norm"], 1e-12)

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    q, k, v = jnp.split(dense(params["qkv"], h), 3, axis=-1)
    q, k, v = (x.reshape(*tokens.shape, 2, 6) for x in (q, k, v))
    y = _attend(q, k, v, causal=False).reshape(*tokens.shape, -1)
    h = _norm(h + dense(params["out"], y), params["norm1"], 1e-12)
    y = dense(params["down"], jax.nn.gelu(dense(params["up"], h), approximate=False))
    h = _norm(h + y, params["norm2"], 1e-12)
    return dense(params["classifier"], jnp.tanh(dense(params["pooler"], h[:, 0])))


def bert(base):
    def dense(name):
        return {
            "kernel": jnp.asarray(base[f"{name}.weight"].T),
            "bias": jnp.asarray(base[f"{name}.bias"]),
        }

    def norm(name):
        return {
            "scale": jnp.asarray(base[f"{name}.weight"]),
            "bias": jnp.asarray(base[f"{name}.bias"]),
        }

    layer = "bert.encoder.layer.0"
    inner = [f"{layer}.attention.self.{n}" for n in ("query", "key", "value")]
    denses = {
        "out": f"{layer}.attention.output.dense",
        "up": f"{layer}.intermediate.dense",
        "down": f"{layer}.output.dense",
        "pooler": "bert.pooler.dense",
        "classifier": "classifier",
    }
    norms = {
        "embeddings/norm": "bert.embeddings.LayerNorm",
        "norm1": f"{layer}.attention.output.LayerNorm",
        "norm2": f"{layer}.output.LayerNorm",
    }
    each = [dense(n) for n in inner]
    params = {
        "qkv": {
            "kernel": jnp.concatenate([d["kernel"] for d in each], axis=1),
            "bias": jnp.concatenate([d["bias"] for d in each]),
        },
        **{n: dense(m) for n, m in denses.items()},
        "norm1": norm(norms["norm1"]),
        "norm2": norm(norms["norm2"]),
        "embeddings": {
            "norm": norm(norms["embeddings/norm"]),
            **{
                n: {"embedding": jnp.asarray(base[f"bert.embeddings.{m}_embeddings.weight"])}
                for n, m in {"word": "word", "position": "position", "type": "token_type"}.items()
            },
        },
    }
    names: dict[str, Any] = {
        "qkv/kernel": {"module": inner},
        "qkv/bias": {"module": inner, "kind": "bias"},
    }
    for n, m in denses.items():
        names |= {f"{n}/kernel": m, f"{n}/bias": {"module": m, "kind": "bias"}}
    for n, m in norms.items():
        names[f"{n}/bias"] = {"module": m, "kind": "bias"}
    return params, names, bert_forward


# --------------------------------------------------------------------------------------------------
# Small modules


def layers_forward(params, tokens):
    h = (
        jnp.tanh(params["emb"]["embedding"][tokens]) @ params["lin"]["kernel"]
        + params["lin"]["bias"]
    )
    h = jnp.tanh(h)
    one = jax.lax.conv_general_dilated(
        h, params["conv1"]["kernel"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    one = jnp.swapaxes(one + params["conv1"]["bias"], 1, 2)
    image = jnp.moveaxis(h.reshape(2, 2, 5, 3), 1, -1)
    two = jax.lax.conv_general_dilated(
        image,
        params["conv2"]["kernel"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    two = jnp.moveaxis(two + params["conv2"]["bias"], -1, 1)
    return jnp.concatenate([one.ravel(), two.ravel()])


def layers(base):
    params = {
        "emb": {"embedding": base["emb.weight"]},
        "lin": {"kernel": base["lin.weight"].T, "bias": base["lin.bias"]},
        "conv1": {"kernel": base["conv1.weight"].transpose(2, 1, 0), "bias": base["conv1.bias"]},
        "conv2": {"kernel": base["conv2.weight"].transpose(2, 3, 1, 0), "bias": base["conv2.bias"]},
    }
    names = {
        "emb/embedding": {"module": "emb", "kind": "embedding", "tied": []},
        "lin/kernel": "lin",
        "conv1/kernel": {"module": "conv1", "kind": "conv", "roles": "iio"},
        "conv2/kernel": {"module": "conv2", "kind": "conv", "roles": "iiio", "order": "HWIO"},
        **{f"{n}/bias": {"module": n, "kind": "bias"} for n in ("lin", "conv1", "conv2")},
    }
    return jax.tree.map(jnp.asarray, params), names, layers_forward


def linears_forward(params, tokens):
    h = params["emb"]["embedding"][tokens] @ params["up"]["kernel"] + params["up"]["bias"]
    return jnp.tanh(h) @ params["down"]["kernel"]


def linears(base):
    params = {
        "emb": {"embedding": base["emb.weight"]},
        "up": {"kernel": base["up.weight"].T, "bias": base["up.bias"]},
        "down": {"kernel": base["down.weight"].T},
    }
    names = {
        "emb/embedding": {"module": "emb", "kind": "embedding", "tokens": [5, 1]},
        "(up|down)/kernel": "{1}",
    }
    return jax.tree.map(jnp.asarray, params), names, linears_forward


def experts_forward(params, tokens):
    h = jnp.tanh(jnp.einsum("bti,eih->bteh", params["emb"]["embedding"][tokens], params["up"]))
    return jnp.einsum("bteh,eho->bto", h, params["down"])


def experts(base):
    params = {
        "emb": {"embedding": base["emb.weight"]},
        "up": base["experts.up"].swapaxes(1, 2),
        "down": base["experts.down"].swapaxes(1, 2),
    }
    names = {
        n: {"module": f"experts.{n}", "kind": "parameter", "roles": "sio"} for n in ("up", "down")
    }
    return jax.tree.map(jnp.asarray, params), names, experts_forward


MODELS = {
    "llama": llama,
    "llama_layers": llama,
    "llama_tied": llama,
    "gpt2": gpt2,
    "bert": bert,
    "layers": layers,
    "dora": layers,
    "lora_bias": layers,
    "tokens": linears,
    "pissa": linears,
    "olora": linears,
    "experts": experts,
}


@functools.cache
def model(name: str) -> Model:
    base = load_base(name)
    tokens, expected = base.pop("=tokens"), base.pop("=expected")
    return Model(*MODELS[name](base), tokens, expected)


def initial(name: str, m: Model) -> Any:
    """What training of a reference with a moved base began from."""
    import jaxlora
    from jaxlora import initializers

    moves = {"pissa": initializers.pissa(), "olora": initializers.olora}
    config = jaxlora.LoraConfig(rank=2, alpha=3, targets=["up", "down"], initializer=moves[name])
    return jaxlora.init(jax.random.key(0), m.params, config)


def main(directory: pathlib.Path) -> None:
    import jaxlora
    from jaxlora import peft

    for name in MODELS:
        m = model(name)
        lora = peft.load(ROOT / name, m.params, m.names)
        if name in ("pissa", "olora"):
            lora = jaxlora.rebase(lora, initial(name, m), m.params)
        peft.save(directory / name, lora, m.names, base_model_name="me/base")
        if name in ("llama", "llama_layers", "gpt2", "layers", "pissa"):
            served = name
            if name == "layers":
                continue
            peft.save(directory / f"{served}-served", lora, m.names, for_serving=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
