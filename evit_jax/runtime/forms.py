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
    # Token counts, from one above the first up to the second, at which half of the heads attend at
    # a time: their keys begin a second tile of 128, and the map of all of them does not fit into a
    # v5e's fast memory.
    halved: tuple[int, int] = (0, 0)
    # GELU by tanh, at most 5e-4 from the exact one: less than bfloat16 rounds a 1 by.
    tanh_gelu: bool = False


EXACT = Form()
HALF_PRECISION = dict(
    tpu=Form(fused_qkv=False, normalize_map=True, halved=(128, 176), tanh_gelu=True),
    cuda=Form(normalize_map=True, tile=8, tanh_gelu=True),
)
SINGLE_PRECISION = dict(tpu=dataclasses.replace(HALF_PRECISION["tpu"], tanh_gelu=False))


def by_chip(function: Callable, *args, dtype: jnp.dtype):
    """function(*args, form=...) in the form of the chip that the program is for.

    Args:
      dtype: of the computation. What rounds otherwise than float32 does is for half precision only.
    """
    forms = HALF_PRECISION if jnp.dtype(dtype).itemsize <= 2 else SINGLE_PRECISION

    def of(form):
        return lambda *args: function(*args, form=form)

    chips = {platform: of(form) for platform, form in forms.items()}
    return jax.lax.platform_dependent(*args, default=of(EXACT), **chips)
