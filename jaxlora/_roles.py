"""`trace_roles`: reads the role of each dimension of each weight from how the model uses it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax

from jaxlora import _paths
from jaxlora._apply import Arguments, Interpreter, as_array, is_array
from jaxlora._contractions import Contraction, letter_of
from jaxlora._factored import Node
from jaxlora._moves import Move
from jaxlora._quantized import is_quantized
from jaxlora._weight import is_node

MATMUL, LOOKUP, OTHER = "matmul", "lookup", "other"


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight: its kind, a letter for each dimension of the weight, and where.

    Letters: `i` contracted or looked up, `o` free, `s` batched or indexed, `k` the window of a
    convolution, `!` both contracted and free (after a split). Those of dimensions of size one,
    which serve as anything, are in upper case, or `1` where the use does not see the dimension.
    """

    kind: str
    letters: str
    where: str

    def __str__(self) -> str:
        letters = self.letters.lower().replace("k", "i")
        both = " (!: contracted and free)" if "!" in letters else ""
        roles = f"{self.kind} {letters!r}{both}" if self.kind != OTHER else ""
        return f"{roles} {self.where}".strip()


@dataclasses.dataclass(frozen=True)
class TracedRoles(Mapping[str, str]):
    """{path: roles} of the weights of a traced model, and what was seen of all others.

    Attributes:
      roles: the weights whose uses one string of roles serves.
      uses: every use of every leaf of the params, those without roles too.
    """

    roles: Mapping[str, str]
    uses: Mapping[str, tuple[Use, ...]]

    def __getitem__(self, path: str) -> str:
        return self.roles[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.roles)

    def __len__(self) -> int:
        return len(self.roles)

    def is_linear(self, path: str) -> bool:
        """Whether the weight is used in matmuls as a matrix, and is no embedding.

        One that is summed over but has no output of its own, as in einsum("bhp,hp->bh"), is a
        vector for each index of a stack, and no more to be adapted than a bias is.
        """
        uses = self.uses.get(path, ())
        if any(use.kind == LOOKUP for use in uses):
            return False
        sides = [set(_complete(use.letters)) for use in uses if use.kind == MATMUL]
        return any({"i", "o"} <= s or "!" in s for s in sides)


@dataclasses.dataclass(frozen=True)
class Track:
    """What a probe knows of one weight.

    Attributes:
      path: the weight.
      whole: its shape.
      made_of: for each present dim of the probe, the dims of the weight that it is made of.
      picked: dims of the weight of which one index was picked.
      batched: dims of the weight that a lookup paired with a batch of its indices.
      blocks: dims of the weight of which a device, under shard_map, has a single index.
    """

    path: str
    whole: tuple[int, ...]
    made_of: tuple[frozenset[int], ...]
    picked: frozenset[int] = frozenset()
    batched: frozenset[int] = frozenset()
    blocks: frozenset[int] = frozenset()

    def moved(self, move: Move) -> Track:
        made_of = tuple(
            frozenset().union(*(self.made_of[d] for d in source)) for source in move.sources
        )
        picked = self.picked.union(*(self.made_of[d] for d in move.picked))
        batched = self.batched.union(*(self.made_of[d] for d in move.batched))
        return dataclasses.replace(self, made_of=made_of, picked=picked, batched=batched)

    def contracted(self, shape: tuple[int, ...], contraction: Contraction) -> tuple[str, str]:
        """(kind, letters) of a contraction, the probe being of that shape."""
        letters = ["1" if n == 1 else "s" for n in self.whole]
        seen = set()
        for j, dims in enumerate(self.made_of):
            cut = any(self.whole[d] != 1 for d in dims - self.blocks)
            if dims & self.picked or (shape[j] == 1 and cut):
                continue
            letter = letter_of(j, contraction.summed, contraction.batch, contraction.window)
            seen.add(letter)
            for d in dims:
                if letters[d] == "1":
                    letters[d] = letter.upper()
                elif letters[d] == "s" or (letters[d] == "k" and letter != "s"):
                    letters[d] = letter
                elif letter == "k":
                    continue  # either factor may span a window
                elif letters[d] != letter and not letters[d].isupper() and letter != "s":
                    letters[d] = "!"
        # Picked rows need an input and an output of their own to be weights (an expert's matrix);
        # otherwise they are activations (an embedding's rows).
        if self.picked and not {"i", "o"} <= seen:
            return self.looked_up()
        return MATMUL, "".join(letters)

    def looked_up(self) -> tuple[str, str]:
        """(kind, letters) of a use of picked rows as activations."""
        here = frozenset().union(*self.made_of)
        return LOOKUP, "".join(
            "1" if n == 1 else "i" if d in self.picked else "o" if d in here - self.batched else "s"
            for d, n in enumerate(self.whole)
        )


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Probe(Node):
    """A weight, or a concatenation of weights, that records how it is used."""

    w: Any
    tracks: tuple[Track, ...]
    record: Callable[[str, Use], None]
    origin: int | None = None
    only_records: ClassVar[bool] = True

    def tree_flatten(self):
        return (self.w,), (self.tracks, self.record, self.origin)

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children, *aux)

    @property
    def is_row(self) -> bool:
        return any(t.picked for t in self.tracks)

    def blocks(self, leaves: Sequence[Any], spec: Sequence[Any], nested: bool) -> Probe:
        (w,) = leaves

        def block(t: Track) -> Track:
            alone = (dims for j, dims in enumerate(t.made_of) if w.shape[j] == 1)
            return dataclasses.replace(t, blocks=t.blocks.union(*alone))

        return self._with(w, block).replace(origin=self.origin)

    def _with(self, w: Any, change: Callable[[Track], Track]) -> Probe:
        return self.replace(w=w, tracks=tuple(map(change, self.tracks)))

    def moved(self, move: Move, w: Any) -> Probe:
        return self._with(w, lambda t: t.moved(move))

    def dropped(self, d: int, leaves: Sequence[Any]) -> Probe:
        return self._with(
            leaves[0],
            lambda t: dataclasses.replace(t, made_of=t.made_of[:d] + t.made_of[d + 1 :]),
        )

    def stacked(self, leaves: Sequence[Any]) -> Probe:
        return self._with(
            leaves[0], lambda t: dataclasses.replace(t, made_of=(frozenset(), *t.made_of))
        )

    @classmethod
    def joined(cls, w: Any, parts: Sequence[Any], axis: int) -> Probe:
        probes = [p for p in parts if isinstance(p, Probe)]
        return cls(w, tuple(t for p in probes for t in p.tracks), probes[0].record)

    def scaled(self, w: Any, factor: Any) -> Probe:
        return self.replace(w=w)

    def like(self, other: Node) -> bool:
        return isinstance(other, Probe) and self.shape == other.shape

    def either(self, nodes: Sequence[Any], leaves: Sequence[Any]) -> Probe:
        tracks = dict.fromkeys(t for node in nodes for t in node.tracks)
        return self.replace(w=leaves[0], tracks=tuple(tracks))

    def contracted(self, x: Any, contraction: Contraction) -> Any:
        y = contraction.base(x.w if isinstance(x, Node) else x, self.w)
        where = f"`{contraction.eqn.primitive.name}` at {contraction.where()}"
        if isinstance(x, Probe) and self.is_row:
            self.used(where)
            return y
        for t in self.tracks:
            kind, letters = t.contracted(self.shape, contraction)
            self.record(t.path, Use(kind, letters, f"in {where}"))
        return y

    def used(self, use: str) -> None:
        """Records a use other than a contraction."""
        for t in self.tracks:
            kind, letters = t.looked_up() if t.picked else (OTHER, "")
            self.record(t.path, Use(kind, letters, f"in {use}"))


def trace_roles(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> TracedRoles:
    """The roles of the weights of `params`, read from how `fn(params, ...)` uses them.

    `fn` is traced abstractly: no FLOPs, no memory. Dims that a matmul contracts are inputs (`i`),
    those that it leaves are outputs (`o`), those that are scanned over, batched, or indexed before
    a matmul are stacked (`s`); an embedding is looked up along `i`, the window of a convolution is
    `i`. A use over all outputs (`w.T`, a tied head) agrees with its transpose.

    Args:
      fn: the function whose weights are to be adapted.
      params: its first argument; arrays or `jax.ShapeDtypeStruct`s.
      *args, **kwargs: the rest, likewise.

    Returns:
      A mapping {path: roles} of the weights whose uses one string of roles serves. `init` takes it
      as `roles`, and raises a RolesError with the uses of a target that is missing from it.

    >>> import jax.numpy as jnp
    >>> params = {"q": jnp.ones((8, 2, 4)), "scale": jnp.ones(8)}
    >>> fn = lambda params, x: jnp.einsum("td,dhk->thk", x * params["scale"], params["q"])
    >>> dict(trace_roles(fn, params, jnp.ones((3, 8))))
    {'q': 'ioo'}
    """

    def is_abstract(x: Any) -> bool:
        return is_array(x) or is_quantized(x) or isinstance(x, jax.ShapeDtypeStruct)

    arguments, dynamic = Arguments.split((params, *args), kwargs, is_abstract)
    arrays = [as_array(x, path) for x, path in zip(dynamic, arguments.paths(dynamic), strict=True)]
    pairs, _ = _paths.flatten_with_paths(params, is_leaf=is_node)
    paths = [path for path, x in pairs if is_abstract(x) or is_node(x)]
    uses: dict[str, dict[Use, None]] = {path: {} for path in paths}

    def record(path: str, use: Use) -> None:
        uses[path].setdefault(use)

    def materialize(node: Node, use: str) -> Any:
        assert isinstance(node, Probe)
        node.used(use)
        return node.w

    def flat(arrays: list[Any]) -> list[Any]:
        args, kwargs = arguments.rebuild(arrays)
        return jax.tree.leaves(fn(*args, **kwargs))

    closed = jax.make_jaxpr(flat)(arrays)

    def interpret(arrays: list[Any]) -> list[Any]:
        probes = [
            Probe(w, (Track(path, w.shape, tuple(frozenset([d]) for d in range(w.ndim))),), record)
            for path, w in zip(paths, arrays, strict=False)
        ]
        outs = Interpreter(materialize).eval(closed, [*probes, *arrays[len(paths) :]])
        for v in outs:
            if isinstance(v, Probe) and v not in probes:
                v.used("what the function returns")
        return [v.w if isinstance(v, Node) else v for v in outs]

    jax.make_jaxpr(interpret)(arrays)
    shapes = {path: tuple(w.shape) for path, w in zip(paths, arrays, strict=False)}
    # Lookups first: they say which side is the input, matmuls only that the sides differ.
    found = {
        path: _agreed(
            [u.letters for kind in (LOOKUP, MATMUL) for u in uses[path] if u.kind == kind]
        )
        for path in paths
    }
    return TracedRoles(
        roles={p: r for p, r in found.items() if r and len(shapes[p]) >= 2},
        uses={path: tuple(seen) for path, seen in uses.items()},
    )


def _agreed(uses: Sequence[str]) -> str | None:
    """The letters that serve every use, up to a swap of inputs and outputs; None if none do."""
    if not uses or any("!" in u for u in uses):
        return None
    merged = uses[0]
    for use in uses[1:]:
        fitting = next((u for u in (use, swapped(use)) if agree(merged, u)), None)
        if fitting is None:
            return None
        merged = "".join(map(_stricter, merged, fitting))
    merged = _complete(merged)
    return merged if {"i", "o"} <= set(merged) else None


def swapped(letters: str) -> str:
    """The letters with inputs and outputs exchanged."""
    return letters.translate(str.maketrans("ioIO", "oiOI"))


def agree(roles: str, use: str) -> bool:
    """Whether roles and a use's letters are the same wherever a dimension has only one way."""
    return all(
        u == v or _any_way(u) or _any_way(v) or {u, v} in ({"k", "i"}, {"k", "o"})
        for u, v in zip(roles, use, strict=True)
    )


def _any_way(letter: str) -> bool:
    return letter == "1" or letter.isupper()


def _stricter(u: str, v: str) -> str:
    """Of two letters that agree, the one that says more."""
    return min(u, v, key=lambda x: (x == "1", x.isupper(), x == "k"))


def _complete(letters: str) -> str:
    """Gives every dim a role: windows are inputs, dims of size one what they were used as.

    Those that were not used are inputs if there is no other, else outputs.
    """
    full = letters.lower().replace("k", "i")
    full = full if "i" in full else full.replace("1", "i", 1)
    full = full.replace("1", "o")
    for letter in "io":  # a side that no dim is on takes one of size one, if the other has more
        units = [k for k, x in enumerate(letters) if x.isupper() and full[k] != letter]
        if letter not in full and units:
            full = full[: units[-1]] + letter + full[units[-1] + 1 :]
    return full
