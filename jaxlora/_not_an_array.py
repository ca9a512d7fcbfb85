"""`NotAnArray`: what stands for an array in a tree, and says so when it is taken for one."""

from __future__ import annotations

from typing import Any, NoReturn

from jaxlora._errors import MaterializeError


class NotAnArray:
    """Each use as an array raises a MaterializeError that names the calls which take it."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        name = type(self).__name__
        value = "jaxlora.dequantize(params)" if name == "QuantizedArray" else "jaxlora.merge(lora)"
        raise MaterializeError(
            f"got a {name} where an array was expected: code that knows arrays only was called "
            "with it. Call jaxlora.lora_apply(fn)(lora, ...) instead of fn(lora, ...), which takes "
            f"it as it is; or give the function plain arrays, {value}."
        )

    __array__ = __jax_array__ = __getitem__ = __iter__ = __float__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __neg__ = __pow__ = _refuse
    astype = reshape = transpose = _refuse
