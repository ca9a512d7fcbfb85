"""The values that codes of 4 and of 8 bits stand for: data, without a device."""

from __future__ import annotations

import functools

import numpy as np

NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""NormalFloat: quantiles of the normal distribution, eight above zero and seven below, over the
largest of them: Phi^-1 at equal steps from 0.9677083 down to 0.5, exclusive. Ascending.

Reference: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and, for the values, appendix E.
"""

_FP4_TIMES_12 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32)

FP4 = np.concatenate([_FP4_TIMES_12, 0 - _FP4_TIMES_12]) / np.float32(12)
"""Four-bit floats, over their largest value, 12: a sign, two bits of exponent, one of mantissa.

Not ascending: the order is that of bitsandbytes' codes, of which 0 and 8 both mean +0.
"""


@functools.cache
def dynamic_code(signed: bool) -> np.ndarray:
    """The 256 values, ascending, that one byte can mean: 0, 1, and seven decades of fractions.

    The k-th decade is (0.1, 1) * 10^-k, cut into 2^(7 - k) equal parts (unsigned; half as many,
    and their negatives, if signed), of which the middles are values: fine where values are large,
    and down to 5.5e-7 (signed) or 3.25e-7. Computed in float32, as bitsandbytes'
    `create_dynamic_map` does, and equal to it bit for bit (where PyTorch fuses multiply and add,
    which it does on all current CPUs).

    References:
      Dettmers et al. 2021, arXiv 2110.02861, sections 1.3 and 2.2. Dettmers 2015, 8-Bit
      Approximations for Parallelism in Deep Learning, arXiv 1511.04561, section 2.

    >>> code = dynamic_code(signed=True)
    >>> code.shape, float(code[0]), float(code[127]), float(code[255])
    ((256,), -0.992968738079071, 0.0, 1.0)
    """
    values = [np.array([0, 1], np.float32)]
    for k in range(7):
        parts = 2 ** (6 - k) if signed else 2 ** (7 - k)
        decade = middles(_boundaries(parts)) * np.float32(10.0**-k)
        values += [decade, -decade] if signed else [decade]
    return np.sort(np.concatenate(values))


def _boundaries(parts: int) -> np.ndarray:
    """`parts + 1` equally spaced numbers from 0.1 to 1, counted from the nearer end."""
    start, stop = np.float32(0.1), np.float32(1)
    step = np.float64((stop - start) / np.float32(parts))
    i = np.arange(parts + 1)
    upward, downward = np.float64(start) + step * i, np.float64(stop) - step * (parts - i)
    return np.where(i < (parts + 1) // 2, upward, downward).astype(np.float32)


def middles(x: np.ndarray) -> np.ndarray:
    """The midpoints between neighbours, rounded to the dtype of x."""
    return (x[:-1] + x[1:]) / x.dtype.type(2)
