# SPDX-License-Identifier: Apache-2.0
"""The attention branch by every way there is to compute it."""

import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.models.attention import attention_branch
from evit_jax.runtime.forms import EXACT, by_chip
from evit_jax.runtime.parallel import DataParallel
from tests.accelerator.timing import take_turns
from tests.accelerator.workers import brief

COMPILERS = min(8, os.cpu_count() or 1)  # programs that are compiled at once
DEVICES = DataParallel(jax.devices()[:1])


def fused_branch(x, kernels, biases, *, num_heads: int, implementation: str, tile: int = 1):
    """The attention branch around `jax.nn.dot_product_attention`; x (B, N, D) -> (B, N, D).

    Args:
      tile: pad the tokens to a multiple of this, hidden from the softmax.
    """
    batch, length, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % tile), (0, 0)))
    qkv = x @ kernels[0] + biases[0][None, None]
    q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, num_heads, -1), 2, 0)
    visible = dict(key_value_seq_lengths=jnp.full((batch,), length, jnp.int32))
    y = jax.nn.dot_product_attention(
        q, k, v, implementation=implementation, **(visible if length % tile else {})
    )
    y = y[:, :length].reshape(batch, length, width)
    return y @ kernels[1] + biases[1][None, None]


def attention(
    lengths: list[int], num_heads: int, head_width: int, batch_size: int, limit: float, **timing
) -> list[dict]:
    """The attention branch, projections included, in every form at the model's token counts.

    Args:
      limit: seconds, after which no further token count is begun.
    """
    end = time.monotonic() + limit
    width = num_heads * head_width

    def ours(x, kernels, biases):
        branch = functools.partial(attention_branch, num_heads=num_heads, first=None)
        return by_chip(branch, x, kernels, biases, None, dtype=x.dtype)[0]

    def exact(x, kernels, biases):
        fixed = dict(num_heads=num_heads, first=None, form=EXACT)
        return attention_branch(x, kernels, biases, None, **fixed)[0]

    fused = functools.partial(fused_branch, num_heads=num_heads)
    forms = {
        "the model's": ours,
        "the CPU's": exact,
        "XLA": functools.partial(fused, implementation="xla"),
        "cuDNN": functools.partial(fused, implementation="cudnn"),
        "cuDNN, tiles of 8": functools.partial(fused, implementation="cudnn", tile=8),
    }

    def gradient(form):
        return jax.grad(lambda *args: jnp.sum(form(*args).astype(jnp.float32) ** 2), (0, 1, 2))

    rows = []
    for length in lengths:
        if rows and time.monotonic() > end:
            break
        shapes = ((batch_size, length, width), (width, 3 * width), (width, width))

        def draw(key, shapes=shapes):
            x, *kernels = (jax.random.normal(key, shape, jnp.bfloat16) for shape in shapes)
            biases = jnp.zeros(3 * width, jnp.bfloat16), jnp.zeros(width, jnp.bfloat16)
            return x, tuple(kernel * width**-0.5 for kernel in kernels), biases

        args = DEVICES.init(draw, jax.random.key(0))

        def compiled(form, args=args):
            return jax.jit(form).lower(*args).compile()

        modes = dict(inference=forms, gradient={name: gradient(forms[name]) for name in forms})
        with ThreadPoolExecutor(COMPILERS) as pool:
            futures = {
                (mode, name): pool.submit(compiled, form)
                for mode, some in modes.items()
                for name, form in some.items()
            }
        for mode in modes:
            calls, errors, expected = {}, {}, None
            for name in forms:
                try:
                    call = functools.partial(futures[mode, name].result(), *args)
                    got = np.asarray(jax.tree.leaves(call())[0], np.float32)
                    expected = got if expected is None else expected
                    off = np.linalg.norm(got - expected) / np.linalg.norm(expected)
                    errors[name] = dict(difference=float(off))
                    calls[name] = call
                except Exception as error:
                    errors[name] = dict(error=brief(error))
            times = take_turns(calls, **timing)
            for name in forms:
                row = dict(num_heads=num_heads, tokens=length, mode=mode, form=name)
                row |= errors[name]
                if name in times:
                    row["ms"] = 1000 * float(np.median(times[name]))
                rows.append(row)
    return rows
