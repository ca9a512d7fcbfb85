"""Convolutions: a spans the window and the input channels, b the output channels."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from cases._registry import case, plain
from cases.linen import linen
from cases.nnx import flax_nnx


def conv(**options):
    """NHWC convolution with a kernel (h, w, in, out)."""
    numbers = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": numbers} | options
    return lambda p, x: jnp.tanh(lax.conv_general_dilated(x, p["w"], **options))


@case({"w": "iio"})
def conv_1d():
    fn = lambda p, x: lax.conv_general_dilated(
        x, p["w"], (2,), [(1, 2)], dimension_numbers=("NWC", "WIO", "NWC")
    )
    return plain(fn, {"w": (3, 5, 7)}, (2, 4, 5))


@case({"w": "iiio"})
def conv_2d():
    return plain(conv(), {"w": (3, 2, 3, 5)}, (1, 4, 3, 3))


@case({"w": "iiio"})
def conv_2d_strided_dilated_padded():
    options = conv(window_strides=(2, 1), padding=[(1, 2), (0, 1)], rhs_dilation=(2, 1))
    return plain(options, {"w": (3, 2, 3, 5)}, (1, 5, 4, 3))


@case({"w": "iiio"})
def conv_2d_input_dilated():
    return plain(
        conv(lhs_dilation=(2, 1), padding=[(0, 1), (1, 0)]), {"w": (3, 2, 3, 5)}, (2, 3, 3, 3)
    )


@case({"w": "oiii"})
def conv_2d_channels_first():
    """PyTorch's layout, which is JAX's default."""
    fn = lambda p, x: jnp.tanh(lax.conv(x, p["w"], (1, 2), "SAME"))
    return plain(fn, {"w": (5, 3, 3, 2)}, (1, 3, 4, 4))


@case({"w": "iiiio"})
def conv_3d():
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    fn = lambda p, x: lax.conv_general_dilated(
        x, p["w"], (1, 2, 1), "VALID", dimension_numbers=numbers
    )
    return plain(fn, {"w": (2, 3, 2, 3, 5)}, (1, 3, 5, 3, 3))


@case({"w": "iiio"})
def conv_grouped():
    return plain(conv(feature_group_count=3), {"w": (3, 2, 2, 9)}, (1, 4, 2, 6))


@case({"w": "oiii"})
def conv_grouped_channels_first():
    fn = lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", feature_group_count=2)
    return plain(fn, {"w": (6, 2, 3, 3)}, (1, 4, 3, 4))


@case({"w": "iiio"})
def conv_depthwise():
    return plain(conv(feature_group_count=5), {"w": (3, 3, 1, 5)}, (1, 4, 2, 5))


@case({"w": "iiio"})
def conv_depthwise_multiplied():
    return plain(conv(feature_group_count=4), {"w": (3, 3, 1, 12)}, (1, 3, 2, 4))


@case({"w": "io"})
def conv_depthwise_of_a_matrix():
    """A causal convolution of each channel by itself (Mamba): the kernel is (window, channels)."""
    numbers = ("NWC", "WIO", "NWC")

    def fn(p, x):
        w = p["w"][:, None, :]
        return lax.conv_general_dilated(
            x, w, (1,), [(3, 0)], dimension_numbers=numbers, feature_group_count=7
        )

    return plain(fn, {"w": (4, 7)}, (1, 3, 7))


@case({"w": "io"})
def conv_of_a_flat_kernel():
    """A patch embedding: windows and channels are one dim of the weight."""
    return plain(
        lambda p, x: conv()({"w": p["w"].reshape(3, 2, 3, 5)}, x), {"w": (18, 5)}, (1, 4, 3, 3)
    )


@case({"w": "iiio"})
def conv_pointwise():
    return plain(conv(), {"w": (1, 1, 7, 11)}, (1, 2, 3, 7))


@case({"w": "iiio"})
def conv_transposed():
    fn = lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "SAME")
    return plain(fn, {"w": (3, 2, 3, 5)}, (1, 2, 4, 3))


@case({"w": "iioi"})
def conv_transposed_flipped():
    """The gradient of a convolution: its kernel turned, its channels swapped."""
    fn = lambda p, x: lax.conv_transpose(x, p["w"], (2, 1), "SAME", transpose_kernel=True)
    return plain(fn, {"w": (3, 2, 5, 3)}, (1, 2, 4, 3))


@case({"w": "oooi"}, declared={"w": "oooi"})
def conv_declared_the_other_way():
    return plain(conv(), {"w": (3, 2, 3, 5)}, (1, 4, 3, 3))


@case({"w": "oiio"}, declared={"w": "oiio"})
def conv_declared_separable():
    """a slides along the width, b along the height."""
    options = conv(window_strides=(2, 1), padding=[(1, 2), (0, 1)], rhs_dilation=(2, 1))
    return plain(options, {"w": (3, 2, 3, 5)}, (1, 5, 4, 3))


@case({"w": "siiio"})
def conv_scanned():
    def fn(p, x):
        return lax.scan(lambda h, w: (conv()({"w": w}, h), None), x, p["w"])[0]

    return plain(fn, {"w": (2, 3, 2, 3, 3)}, (1, 4, 3, 3))


@case({"w": "iiio"})
def conv_vmapped_inputs():
    return plain(
        lambda p, x: jax.vmap(lambda x: conv()(p, x))(x), {"w": (3, 2, 3, 5)}, (2, 1, 2, 3, 3)
    )


@case({"u": "iiio", "v": "iiio"})
def conv_concatenated_kernels():
    """Two convolutions of one input, done as one."""
    join = lambda p: {"w": jnp.concatenate([p["u"], p["v"]], axis=-1)}
    return plain(
        lambda p, x: conv()(join(p), x), {"u": (3, 2, 3, 5), "v": (3, 2, 3, 3)}, (1, 4, 3, 3)
    )


@case({"w": "iiio"})
def conv_part_of_a_kernel():
    cut = lambda p: {"w": p["w"][:, :, :2, 1:]}
    return plain(lambda p, x: conv()(cut(p), x), {"w": (3, 2, 3, 5)}, (1, 4, 3, 2))


@case({"w": "iiio"})
def conv_gradient_inside():
    fn = lambda p, x: jax.grad(lambda x: jnp.sum(jnp.sin(conv()(p, x)) ** 2))(x)
    return plain(fn, {"w": (3, 2, 3, 5)}, (1, 4, 3, 3))


@case({"w": "iiio"})
def conv_mixed_precision():
    def fn(p, x):
        w, x = p["w"].astype(jnp.bfloat16), x.astype(jnp.bfloat16)
        return lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.float32,
        )

    return plain(fn, {"w": (3, 2, 3, 5)}, (1, 4, 3, 3))


# --------------------------------------------------------------------------------------------------
# Flax


@case({"params/kernel": "iiio"})
def linen_conv():
    return linen(nn.Conv(5, (3, 2), strides=2, padding="CIRCULAR"), (1, 4, 4, 3))


@case({"params/kernel": "iio"})
def linen_conv_causal():
    return linen(nn.Conv(7, (3,), padding="CAUSAL", kernel_dilation=2), (2, 5, 5))


@case({"params/kernel": "iiio"})
def linen_conv_transpose():
    return linen(nn.ConvTranspose(5, (3, 2), strides=(2, 2)), (1, 2, 3, 3))


@case({"params/kernel": "sio"})
def linen_conv_local():
    return linen(nn.ConvLocal(7, (3,)), (2, 4, 5))


class _MobileNetBlock(nn.Module):
    """An inverted residual: widen, depthwise, narrow."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu6(nn.Conv(8, (1, 1), use_bias=False, name="expand")(x))
        h = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False, name="depthwise")(h)
        h = nn.Conv(6, (1, 1), use_bias=False, name="project")(nn.relu6(h))
        grouped = nn.Conv(6, (3, 3), feature_group_count=2, name="grouped")(h)
        return x + nn.GroupNorm(num_groups=3)(grouped)


@case(dict.fromkeys(("expand", "depthwise", "project", "grouped"), "iiio"))
def linen_mobilenet_block():
    return linen(_MobileNetBlock(), (1, 2, 2, 6))


@case({"kernel": "iiio"})
def nnx_conv():
    return flax_nnx(
        lambda rngs: nnx.Conv(4, 6, (3, 2), feature_group_count=2, rngs=rngs), (1, 3, 3, 4)
    )


@case({"kernel": "iiio"})
def nnx_conv_transpose():
    return flax_nnx(
        lambda rngs: nnx.ConvTranspose(3, 5, (3, 2), strides=(2, 2), rngs=rngs), (1, 2, 3, 3)
    )
