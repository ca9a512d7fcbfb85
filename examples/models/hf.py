"""Hugging Face's directories and hub names -> (config, params), and back.

    config, params = hf.load("Qwen/Qwen2.5-0.5B-Instruct", dtype=jnp.bfloat16)
    logits = Llama(config, dtype=jnp.bfloat16).apply({"params": params}, tokens)
    hf.save("out/model", config, params)             # a directory that Transformers opens

Leaf by leaf, straight from the shards of safetensors files to the devices: beside the params, one
leaf at most is in memory, and of a sharded one each device's part. What does not fit is an error:
an architecture or a setting that `llama.py` has not, tensors that miss, are too many, or have other
shapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Sharding

from models.llama import Config, Llama, RopeScaling, names

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")  # what `load` fetches
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
Part: TypeAlias = tuple[slice, ...]
Shardings: TypeAlias = Sharding | Callable[[str, tuple[int, ...]], Sharding] | None


class ModelError(ValueError):
    """A directory that is no model of `llama.py`, and why."""


# --------------------------------------------------------------------------------------------------
# config.json

# What Transformers takes where config.json says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Fields that change the arithmetic, and the only values of them that `llama.py` computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def read_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> Config:
    """The architecture that a config.json, or a directory with one, describes.

    Raises:
      ModelError: a `model_type`, or a value of a field, that `llama.py` does not compute; fields
        that miss or have no sense.
    """
    raw: Any = source
    where = CONFIG
    if not isinstance(source, Mapping):
        path = Path(source) / CONFIG if Path(source).is_dir() else Path(source)
        raw, where = _json(path), str(path)

    def wrong(field: str, expected: str) -> ModelError:
        return ModelError(f"{where}: {field}: got {raw.get(field)!r}, expected {expected}.")

    kind = raw.get("model_type")
    if kind not in _DEFAULTS:
        raise wrong("model_type", f"one of {', '.join(_DEFAULTS)}")
    fields = {**_DEFAULTS[kind], **raw}
    for field, allowed in _ONLY.items():
        if field in raw and raw[field] not in allowed:
            raise wrong(field, f"{allowed[0]!r}, which is all that models/llama.py computes")
    for field in (*_REQUIRED, "num_key_value_heads", "head_dim"):
        value = fields.get(field)
        if field not in _REQUIRED and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise wrong(field, "a positive integer")
    heads = fields["num_attention_heads"]
    groups = fields.get("num_key_value_heads") or heads
    if heads % groups:
        raise wrong("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    if head_dim % 2:
        raise wrong("head_dim", "an even size, whose halves are rotated")
    longest = fields.get("max_position_embeddings") or 2048
    theta, scaling = _rope(fields, longest, where)
    window, slides = _windows(kind, fields, where)
    bias = bool(fields.get("attention_bias"))
    if kind in ("mistral", "qwen2") and bias:
        expected = {"mistral": "no bias", "qwen2": "the biases of q, k and v alone"}[kind]
        raise wrong("attention_bias", f"False or nothing: Transformers gives {kind} {expected}")
    if fields.get("mlp_bias") and kind != "llama":
        raise wrong("mlp_bias", f"False or nothing: Transformers gives {kind} no such bias")
    eos = fields.get("eos_token_id")
    return Config(
        model_type=kind,
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=longest,
        rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias,
        mlp_bias=bool(fields.get("mlp_bias")),
        qk_norm=kind == "qwen3",
        sliding_window=window,
        sliding_layers=slides,
        bos_token_id=fields.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list | tuple) else eos,
        pad_token_id=fields.get("pad_token_id"),
    )


def _rope(fields: Mapping[str, Any], longest: int, where: str) -> tuple[float, RopeScaling | None]:
    """theta and the scaling, from `rope_parameters` (Transformers 5) or `rope_scaling`."""
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    given = fields.get(name) or {}
    theta = float(given.get("rope_theta") or fields.get("rope_theta") or 10000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{where}: {name}: got {given!r}, expected no partial_rotary_factor.")
    if kind == "default":
        return theta, None
    keys = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if kind not in keys:
        raise ModelError(
            f"{where}: {name}: got type {kind!r}, expected one of default, {', '.join(keys)}."
        )
    missing = [key for key in keys[kind] if not _is_positive(given.get(key))]
    if missing:
        missing = [f"a positive {key}" for key in missing]
        raise ModelError(f"{where}: {name}: got {given!r}, expected {', '.join(missing)}.")
    if kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        raise ModelError(
            f"{where}: {name}: got {given!r}, expected low_freq_factor below high_freq_factor."
        )
    if kind == "linear":
        return theta, RopeScaling(kind=kind, factor=float(given["factor"]))
    original = given.get("original_max_position_embeddings") or longest
    return theta, RopeScaling(
        kind=kind,
        original_max_position_embeddings=int(original),
        **{key: float(given[key]) for key in keys[kind]},
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _windows(
    kind: str, fields: Mapping[str, Any], where: str
) -> tuple[int | None, tuple[bool, ...] | None]:
    """The sliding window, and which layers have it (None: all)."""
    window = fields.get("sliding_window")
    if kind == "llama" or (kind != "mistral" and not fields.get("use_sliding_window")):
        return None, None
    if window is None:
        return None, None
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ModelError(
            f"{where}: sliding_window: got {window!r}, expected a positive integer or null."
        )
    if kind == "mistral":
        return window, None
    layers = fields["num_hidden_layers"]
    types = fields.get("layer_types")
    if types is None:
        types = [
            "sliding_attention" if i >= fields["max_window_layers"] else "full_attention"
            for i in range(layers)
        ]
    odd = [t for t in types if t not in ("sliding_attention", "full_attention")]
    if odd or len(types) != layers:
        raise ModelError(
            f"{where}: layer_types: got {types!r}, expected {layers} of sliding_attention and "
            "full_attention."
        )
    slides = tuple(t == "sliding_attention" for t in types)
    if not any(slides):
        return None, None
    return window, None if all(slides) else slides


def config_json(config: Config, dtype: Any = np.float32) -> dict[str, Any]:
    """The fields of config.json, as all of Transformers' versions read them."""
    same = (
        "model_type",
        *_REQUIRED,
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    found: dict[str, Any] = {"architectures": [_ARCHITECTURES[config.model_type]]}
    found |= {"hidden_act": "silu"} | {field: getattr(config, field) for field in same}
    scaling = config.rope_scaling
    if scaling is not None:
        found["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rest = dataclasses.asdict(scaling)
            found["rope_scaling"] |= {k: v for k, v in rest.items() if k not in ("kind", "factor")}
    if config.model_type in ("llama", "qwen3"):
        found["attention_bias"] = config.o_bias
    if config.model_type == "llama":
        found["mlp_bias"] = config.mlp_bias
    if config.model_type == "mistral":
        found["sliding_window"] = config.sliding_window
    elif config.model_type != "llama":
        found["use_sliding_window"] = config.sliding_window is not None
        if config.sliding_window is not None:
            kinds = ("full_attention", "sliding_attention")
            found["sliding_window"] = config.sliding_window
            found["layer_types"] = [kinds[w is not None] for w in config.windows]
    return found | {"torch_dtype": np.dtype(dtype).name}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ModelError(f"{path}: expected JSON, got something else: {error}.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: got a {type(found).__name__}, expected an object.")
    return found


# --------------------------------------------------------------------------------------------------
# Leaves and tensors


class Leaf(NamedTuple):
    """A leaf of the params, and the PyTorch tensors that it is a stack of.

    Attributes:
      path: its keys joined by '/'.
      shape: with the layers first, if it is stacked.
      tensors: their names; a single one if it is not stacked.
      stacked: whether the first dim is that of the layers.
      transposed: whether theirs are (out, in) where ours are (in, out).
    """

    path: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    stacked: bool
    transposed: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        shape = self.shape[self.stacked :]
        return shape[::-1] if self.transposed else shape


def leaves(config: Config) -> list[Leaf]:
    """All leaves of `Llama(config)`, with the names that `llama.names` gives their tensors."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]
    found = []
    for keys, leaf in flax.traverse_util.flatten_dict(shapes).items():
        path = "/".join(keys)
        (one,) = (pair for p in names(config).items() if (pair := _match(*p, path)))
        module, kind = one
        stacked = "{}" in module
        parameter = "bias" if kind == "bias" else "weight"
        filled = [module.replace("{}", str(i)) for i in range(leaf.shape[0] if stacked else 1)]
        tensors = tuple(f"{name}.{parameter}" for name in filled)
        found.append(Leaf(path, tuple(leaf.shape), tensors, stacked, kind == "linear"))
    return found


def _match(pattern: str, value: str | Mapping[str, Any], path: str) -> tuple[str, str] | None:
    """(module with {} for the layer, kind), if the pattern is the path's."""
    match = re.fullmatch(pattern, path)
    if match is None:
        return None
    entry: Mapping[str, Any] = {"module": value} if isinstance(value, str) else value
    module = re.sub(r"\{(\d)\}", lambda group: match[int(group[1])], entry["module"])
    return module, entry.get("kind", "linear")


class Tensors(Protocol):
    """Where tensors come from: safetensors files, a GGUF file."""

    where: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def dtype(self, name: str) -> Any: ...

    def read(self, name: str, part: Part) -> np.ndarray: ...


def load_tensors(
    config: Config, source: Tensors, dtype: Any = None, sharding: Shardings = None
) -> Any:
    """Params from named tensors; each is checked before any is read.

    Args:
      config: the architecture.
      source: the tensors.
      dtype: of all leaves; None: the source's.
      sharding: one for all leaves, or a function of (path, shape); None: the default device.

    Raises:
      ModelError: tensors that miss, are too many, or have other shapes.
    """
    wanted = leaves(config)
    _check(wanted, source, config)
    params = {leaf.path: _load(leaf, source, dtype, sharding) for leaf in wanted}
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _check(wanted: list[Leaf], source: Tensors, config: Config) -> None:
    shapes = dict(source.shapes())
    expected = {name: leaf.tensor_shape for leaf in wanted for name in leaf.tensors}
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected and not _surplus(name, source, config)]
    for what, some in (("has no", missing), ("has more than it should,", extra)):
        if some:
            listed = "\n  ".join(some[:8]) + (f"\n  and {len(some) - 8} more" * (len(some) > 8))
            raise ModelError(
                f"{source.where}: {what}\n  {listed}\nExpected the {len(expected)} tensors of a "
                f"{config.model_type} of {config.num_hidden_layers} layers, tie_word_embeddings "
                f"{config.tie_word_embeddings}."
            )
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise ModelError(
                f"{source.where}: {name}: got shape {tuple(shapes[name])}, expected {shape}, by "
                f"{CONFIG}."
            )
        source.dtype(name)


def _surplus(name: str, source: Tensors, config: Config) -> bool:
    """Tensors that say nothing new: the frequencies, or the tied head, of older files."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    tied = "model.embed_tokens.weight"
    if name != "lm_head.weight" or not config.tie_word_embeddings or tied not in source.shapes():
        return False
    if not np.array_equal(source.read(name, ()), source.read(tied, ())):
        raise ModelError(
            f"{source.where}: {name}: got other values than in {tied}, expected the same, since "
            f"{CONFIG} has tie_word_embeddings true. Set it to false to keep the head."
        )
    return True


def _load(leaf: Leaf, source: Tensors, dtype: Any, sharding: Shardings) -> jax.Array:
    dtype = source.dtype(leaf.tensors[0]) if dtype is None else dtype

    def read(tensor: str, part: Part) -> np.ndarray:
        return source.read(tensor, part[::-1]).T if leaf.transposed else source.read(tensor, part)

    def part(index: Part | None) -> np.ndarray:
        index = index or (slice(None),) * len(leaf.shape)
        if not leaf.stacked:
            return np.ascontiguousarray(read(leaf.tensors[0], index), dtype)
        layers, within = leaf.tensors[index[0]], index[1:]
        first = read(layers[0], within)
        stack = np.empty((len(layers), *first.shape), dtype)
        for i, tensor in enumerate(layers):
            stack[i] = read(tensor, within) if i else first
        return stack

    if callable(sharding) and not isinstance(sharding, Sharding):
        sharding = sharding(leaf.path, leaf.shape)
    if sharding is None:
        return jax.device_put(part(None))
    return jax.make_array_from_callback(leaf.shape, sharding, part)


class _Safetensors:
    """The tensors of the shards of a directory, opened, read in part."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack):
        self.where = str(directory)
        self._files: dict[str, Any] = {}
        for file in _shards(directory):
            try:
                opened = stack.enter_context(safetensors.safe_open(str(file), "numpy"))
            except Exception as error:  # its own SafetensorError, or of the file system
                raise ModelError(f"{file}: expected a safetensors file: {error}.") from None
            for name in opened.keys():  # noqa: SIM118, it is no dict
                if name in self._files:
                    raise ModelError(f"{file}: {name}: is in another shard too, expected it once.")
                self._files[name] = opened
        self._shapes = {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()
        }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> Any:
        got = self._files[name].get_slice(name).get_dtype()
        if got not in _DTYPES:
            raise ModelError(
                f"{self.where}: {name}: got dtype {got}, expected one of {', '.join(_DTYPES)}: "
                "quantized files are not read. Load the plain model, and jaxlora.quantize it."
            )
        return _DTYPES[got]

    def read(self, name: str, part: Part) -> np.ndarray:
        tensor = self._files[name].get_slice(name)
        return tensor[part or slice(None)]


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not index.is_file():
        raise ModelError(
            f"{directory}: has neither {WEIGHTS} nor {INDEX}. Expected a directory that "
            "Transformers' save_pretrained(..., safe_serialization=True) or hf.save wrote."
        )
    listed = _json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelError(f"{index}: weight_map: got {listed!r}, expected {{tensor: file}}.")
    files = sorted({str(file) for file in listed.values()})
    for file in files:
        if Path(file).name != file or not (directory / file).is_file():
            raise ModelError(f"{index}: {file!r} is no file of {directory}, expected each to be.")
    return [directory / file for file in files]


def fetch(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory itself, or, of a hub name, one in the cache with that model's files."""
    directory = Path(model)
    if directory.is_dir():
        return directory
    name = str(model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ModelError(
            f"{name}: is no directory, and no hub name, expected for instance "
            "'HuggingFaceTB/SmolLM2-135M-Instruct'."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_PATTERNS)))
    except Exception as error:  # of the network, of the hub, of the cache: theirs are many
        raise ModelError(
            f"{name}: is no directory here, and the hub gave none: {type(error).__name__}: {error}"
        ) from error


def load(
    model: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: Shardings = None,
    revision: str | None = None,
) -> tuple[Config, Any]:
    """(config, params) of a directory or a hub name.

    Args:
      model: a directory with config.json and safetensors files, or a name on the hub.
      dtype: of all leaves; None: the file's.
      sharding: one for all leaves, or a function of (path, shape), for instance
        `lambda path, shape: NamedSharding(mesh, specs[path])`; None: the default device.
      revision: of the hub's model, a branch, tag or commit.

    Raises:
      ModelError: it is no model of `llama.py`; the message says in what.
    """
    directory = fetch(model, revision)
    config = read_config(directory)
    with contextlib.ExitStack() as stack:
        return config, load_tensors(config, _Safetensors(directory, stack), dtype, sharding)


# --------------------------------------------------------------------------------------------------
# And back


def save(
    directory: str | os.PathLike[str],
    config: Config,
    params: Any,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a directory that Transformers opens, and `load`: config.json and the weights.

    A leaf at a time comes to the host, and a shard is in memory. An earlier save's weights in the
    directory are replaced; other files stay.

    Args:
      directory: made if it is not there.
      config: the architecture.
      params: plain ones, `jaxlora.merge(lora)` of a tree with adapters.
      dtype: of the files; None: the params'.
      max_shard_bytes: more than that goes to several files with an index.

    Raises:
      ModelError: params that are not those of the config.
    """
    directory = Path(directory)
    wanted = leaves(config)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    expected = {leaf.path: leaf.shape for leaf in wanted}
    for path in (*expected, *flat):
        leaf = flat.get(path)
        got = tuple(leaf.shape) if isinstance(leaf, jax.Array | np.ndarray) else None
        if got is None or got != expected.get(path):
            raise ModelError(
                f"{path}: got {f'shape {got}' if got else type(leaf).__name__}, expected "
                f"{f'shape {expected[path]}' if path in expected else 'nothing'}: the plain arrays "
                f"of a {config.model_type}. Of a tree with adapters, hf.save(directory, config, "
                "jaxlora.merge(lora)); of a quantized one, jaxlora.dequantize(params)."
            )
    dtypes = {path: np.dtype(dtype or leaf.dtype) for path, leaf in flat.items()}
    plan, sizes = _plan(wanted, dtypes, max_shard_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    files = [f"model-{i + 1:05}-of-{len(plan):05}.safetensors" for i in range(len(plan))]
    if len(plan) == 1:
        files = [WEIGHTS]
    (directory / CONFIG).unlink(missing_ok=True)  # until all is there, it is no model
    hosts = _hosted(plan, wanted, flat, dtypes)
    for file in files:
        part = directory / f"{file}.part"
        safetensors.numpy.save_file(next(hosts), part, {"format": "pt"})
        part.chmod(directory.stat().st_mode & 0o666)  # else only the owner can read it
        os.replace(part, directory / file)
    for old in (*directory.glob("model-*-of-*.safetensors"), *directory.glob("model.safetensors*")):
        if old.name not in files:
            old.unlink()
    if len(plan) > 1:
        index = {name: file for file, shard in zip(files, plan, strict=True) for name in shard}
        whole = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
        _write_json(directory / INDEX, whole)
    _write_json(directory / CONFIG, config_json(config, dtypes["norm/scale"]))


def _plan(
    wanted: list[Leaf], dtypes: Mapping[str, np.dtype], limit: int
) -> tuple[list[list[str]], list[int]]:
    """The names of the tensors of each shard, leaf after leaf, and the shards' sizes in bytes."""
    plan: list[list[str]] = [[]]
    sizes = [0]
    for leaf in wanted:
        size = int(np.prod(leaf.tensor_shape)) * dtypes[leaf.path].itemsize
        for name in leaf.tensors:
            if plan[-1] and sizes[-1] + size > limit:
                plan.append([])
                sizes.append(0)
            plan[-1].append(name)
            sizes[-1] += size
    return plan, sizes


def _hosted(
    plan: list[list[str]], wanted: list[Leaf], flat: Any, dtypes: Mapping[str, np.dtype]
) -> Iterator[dict[str, np.ndarray]]:
    """The tensors of one shard after the other."""

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for leaf in wanted:
            whole = np.asarray(flat[leaf.path])
            for i, name in enumerate(leaf.tensors):
                one = whole[i] if leaf.stacked else whole
                one = one.T if leaf.transposed else one
                yield name, np.ascontiguousarray(one, dtypes[leaf.path])

    each = tensors()
    for shard in plan:
        yield {name: array for _, (name, array) in zip(shard, each, strict=False)}


def _write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)
