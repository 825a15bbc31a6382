# SPDX-License-Identifier: Apache-2.0
"""How each kind of chip computes the same block: the forms that its compiler does best with.

Every form is the same function of the same parameters. Which is chosen was decided by what the
chips' compilers expect of it (docs/performance.md, "What the chips' compilers expect"). The choice
is made where a program is lowered, so one that is compiled or exported for another chip than this
machine's has that chip's form.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Form:
    """What may differ between chips in attention and MLP; the default is the CPU's."""

    # One product for q, k and v, sliced after; else three, each written where attention reads it.
    # Slicing costs a TPU a quarter of a block in copies.
    fused_qkv: bool = True
    # Divide the map by its sums before the product with v, not the result after it: more numbers,
    # but chips do it in the kernel of the exponential, and what leaves that is the compute dtype's.
    normalize_map: bool = False
    # Zero rows added to q, k and v up to a multiple of this, hidden from the softmax. cuBLAS takes
    # multiples of 8 in bfloat16; for others XLA pads each factor in a kernel of its own.
    tile: int = 1
    # Of three products: where there are more tokens than this, only as many heads as fill so many
    # lanes attend at a time. Their map stays in a TPU's fast memory, that of all would not fit.
    lanes: int = 128
    # cuDNN's attention kernel, where the process that traces the program has it.
    cudnn: bool = False
    # Our Pallas kernel, where a model asks for it.
    pallas: bool = False
    # Patches by a convolution, not by a product of rows that a copy has to make first.
    convolve: bool = False
    # Pick tokens by a product with a one-hot matrix instead of a gather.
    one_hot: bool = False
    # GELU by tanh, at most 5e-4 from the exact one: less than bfloat16 rounds a 1 by.
    tanh_gelu: bool = False
    # Take GELU again in the backward pass instead of storing what it gave the next product: a
    # third of a block's activations, which a TPU computes faster than it reads them.
    redo_gelu: bool = False


EXACT = Form()
TPU = Form(
    fused_qkv=False,
    normalize_map=True,
    pallas=True,
    convolve=True,
    one_hot=True,
    tanh_gelu=True,
    redo_gelu=True,
)
HALF_PRECISION = dict(tpu=TPU, cuda=Form(cudnn=True, normalize_map=True, tile=8, tanh_gelu=True))
# A one-hot product of float32 is exact only at six times the cost.
SINGLE_PRECISION = dict(tpu=dataclasses.replace(TPU, one_hot=False, tanh_gelu=False))


# with only_form(EXACT): programs that are traced here have this form, whatever they run on: for a
# format that has no choice by platform. Part of the key of jax's caches of traced functions.
only_form = jax.make_user_context(None)


def by_chip(function: Callable, *args, dtype: jnp.dtype):
    """function(*args, form=...) in the form of the chip that the program is for.

    Args:
      dtype: of the computation. What rounds otherwise than float32 does is for half precision only.
    """
    if only_form.value is not None:
        return function(*args, form=only_form.value)
    forms = HALF_PRECISION if jnp.dtype(dtype).itemsize <= 2 else SINGLE_PRECISION

    def of(form):
        return lambda *args: function(*args, form=form)

    chips = {platform: of(form) for platform, form in forms.items()}
    return jax.lax.platform_dependent(*args, default=of(EXACT), **chips)
