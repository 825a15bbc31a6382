# SPDX-License-Identifier: Apache-2.0
"""Attention as one kernel of cuDNN: neither its logits nor its map are ever written to memory.

Letters as in attention.py. Heads stay behind tokens, (B, N, H, C), which is how the kernel reads
and writes them, so nothing is turned around.

jax lets a program have the kernel only where the process that traces it finds cuDNN, whatever the
program is compiled for, and export refuses the kernel unless told that its target is trusted:

    jax.export.export(..., disabled_checks=[*map(DisabledSafetyCheck.custom_call, EXPORTED)])

So whether a program may have it is decided when it is traced, by `has_cudnn`.
"""

import functools

import jax
import jax.numpy as jnp

EXTRA = 8  # channels for weights: the kernel takes multiples of 8
AMPERE = 8.0  # the first compute capability that has the kernel
EXPORTED = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weight: jax.Array | None = None,
    implementation: str = "cudnn",
) -> jax.Array:
    """softmax(q k^T) v, the exp of each logit times the key's weight.

    Args:
      q: (B, Q, H, C), scaled; float16 or bfloat16.
      k, v: (B, N, H, C), of the same dtype.
      weight: (B, N) float32 > 0, or None for the plain softmax. It is two more features of the
        keys, log(weight) and what rounding leaves of it, against ones of the queries.
      implementation: of `jax.nn.dot_product_attention`; "xla" is the same function for any chip.

    Returns:
      (B, Q, H, C) in the dtype of q; the map meets v in that dtype too.

    Raises:
      RuntimeError: where this process has no cuDNN.
      NotImplementedError: for a width of heads that the kernel does not take.
    """
    if weight is None:
        return kernel(q, k, v, implementation)
    width = v.shape[-1]
    q, k, v = (jnp.pad(part, ((0, 0), (0, 0), (0, 0), (0, EXTRA))) for part in (q, k, v))
    return kernel(*weighted(q, k, weight), v, implementation)[..., :width]


def weighted(q: jax.Array, k: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries and keys whose plain softmax is the weighted one.

    The logarithm is exact to 16 bits: a size of 100 to a part in 10 thousand.

    Args:
      q, k: (B, Q or N, H, C + EXTRA), the last `EXTRA` channels zero.
      weight: (B, N) float32 > 0.
    """
    logs = jnp.log(weight)[:, :, None, None]
    high = logs.astype(k.dtype)
    low = (logs - high.astype(logs.dtype)).astype(k.dtype)
    channel = (jnp.arange(k.shape[-1]) - (k.shape[-1] - EXTRA))[None, None, None]
    first, second = channel == 0, channel == 1
    zero = jnp.zeros((), k.dtype)
    return q + (first | second).astype(q.dtype), k + jnp.where(
        first, high, jnp.where(second, low, zero)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def kernel(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str) -> jax.Array:
    """`attend`, whose gradient is that of `even`."""
    return jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation=implementation)


def even(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str) -> jax.Array:
    """The same by an even number of queries and of keys, one of each more where they are odd.

    To train with an odd number is refused by jax, which takes every call for one with a bias.
    """
    sides, lengths = (q.shape[1], k.shape[1]), {}
    if any(side % 2 for side in sides):
        q, k, v = (jnp.pad(a, ((0, 0), (0, a.shape[1] % 2), (0, 0), (0, 0))) for a in (q, k, v))
        names = "query_seq_lengths", "key_value_seq_lengths"
        lengths = {
            name: jnp.full(q.shape[:1], side, jnp.int32)
            for name, side in zip(names, sides, strict=True)
        }
    seen = jax.nn.dot_product_attention(
        q, k, v, scale=1.0, implementation=implementation, **lengths
    )
    return seen[:, : sides[0]]


def kernel_forward(q, k, v, implementation):
    return jax.vjp(functools.partial(even, implementation=implementation), q, k, v)


def kernel_backward(implementation, back, gradient):
    del implementation
    return back(gradient)


kernel.defvjp(kernel_forward, kernel_backward)


def has_cudnn(x: jax.Array, num_heads: int, *, weighted: bool = False) -> bool:
    """Whether `attend` can be traced here, for programs that run on this process's GPUs.

    Without a GPU in the process, cuDNN's library is enough: such a program is for another machine.

    Args:
      x: (B, N, D), all heads of q, of k or of v, or its shape and dtype.
      weighted: with weights of the keys.
    """
    batch, length, width = x.shape
    width += EXTRA * num_heads if weighted else 0
    return cudnn_takes((batch, length, width), jnp.dtype(x.dtype).name, num_heads)


@functools.lru_cache(maxsize=256)
def cudnn_takes(shape: tuple[int, int, int], dtype: str, num_heads: int) -> bool:
    """The same from shape and dtype, looked up once for all blocks."""
    if jnp.dtype(dtype).itemsize != 2:
        return False
    part = jax.ShapeDtypeStruct((*shape[:2], num_heads, shape[2] // num_heads), dtype)
    # Versions of jax differ in which error says that there is no cuDNN, or no kernel for a shape.
    try:
        jax.eval_shape(lambda *args: jax.vjp(attend, *args)[0], part, part, part)
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return all(capability >= AMPERE for capability in capabilities())


def capabilities() -> list[float]:
    """The compute capability of each of this process's NVIDIA GPUs, such as 9.0 of an H100."""
    try:
        gpus = jax.local_devices(backend="cuda")
    except RuntimeError:  # no such backend
        return []
    return [float(gpu.compute_capability) for gpu in gpus]
