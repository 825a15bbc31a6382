# SPDX-License-Identifier: Apache-2.0
"""Attention of short sequences as one Pallas kernel: the map of a head never leaves fast memory.

Letters: B images, N tokens, H heads, C width of one head, D = H C. The kernel reads what one
product for q, k and v wrote, (B, N, 3 D), and writes what the projection reads, (B, N, D): no array
around it is sliced or turned. A step of its grid works on a few images, head by head; the largest
thing it holds is a head's map, N x N float32.

A TPU's registers and matrix unit are 128 lanes wide, so heads of 64 come in pairs. A head is taken
out of its pair by zeros in the lanes of the other, never by moving it: q with zeros contracts with
the whole pair of k, and the map times the pair of v is right in the head's own lanes. Both cost the
matrix unit what half the width would.

The backward pass makes the map again from the same (B, N, 3 D), so nothing else is kept for it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
IMAGES = 4  # of one step of the grid, at most
ROOM = 14 * 2**20  # bytes of fast memory for their blocks, each held twice; the compiler allows 16
LONGEST = 256  # tokens; the code of a map is unrolled, and longer ones were not tried
F32 = jnp.float32


def supports(length: int, num_heads: int, width: int) -> bool:
    """Whether `attend` takes so many tokens and heads of that width C."""
    return length <= LONGEST and width in (32, 64, LANES) and num_heads % (LANES // width) == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attend(
    qkv: jax.Array, weight: jax.Array | None, num_heads: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T C^-0.5) v, and the logits of the first token's query.

    Args:
      qkv: (B, N, 3 D): q, not scaled, then k, then v, heads in order within each.
      weight: (B, N) float32 >= 0, which multiplies exp(logit) of a key, or None. As everywhere, a
        token counts itself with at least 1.
      num_heads: H, for which `supports` holds.
      interpret: run on any chip, slowly, to test it.

    Returns:
      (B, N, D) in the dtype of qkv, and (B, H, N) float32 logits, before any weight.
    """
    return forward_call(qkv, weight, num_heads, interpret)


def attend_forward(qkv, weight, num_heads, interpret):
    return forward_call(qkv, weight, num_heads, interpret), (qkv, weight)


def attend_backward(num_heads, interpret, kept, gradients):
    return backward_call(*kept, *gradients, num_heads, interpret)


attend.defvjp(attend_forward, attend_backward)


def heads_of(group: int, width: int) -> list[tuple[int, jax.Array]]:
    """The heads of a group of 128 lanes: the number of each, and its lanes as a (1, 128) mask."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    each = LANES // width
    masks = ((i * width <= lane) & (lane < (i + 1) * width) for i in range(each))
    return [(group * each + i, mask) for i, mask in enumerate(masks)]


def places(group: int, dim: int) -> list[slice]:
    """Where q, k and v of a group are in the last axis; q's is also where its result goes."""
    at = group * LANES
    return [slice(start + at, start + at + LANES) for start in (0, dim, 2 * dim)]


def only(mask: jax.Array, x: jax.Array) -> jax.Array:
    """x with zeros in the other heads' lanes."""
    return jnp.where(mask, x, jnp.zeros_like(x))


def dot(a: jax.Array, b: jax.Array, sides: tuple[int, int]) -> jax.Array:
    """The product over one side of each, in float32."""
    return jax.lax.dot_general(
        a, b, (((sides[0],), (sides[1],)), ((), ())), preferred_element_type=F32
    )


def exponentials(logits: jax.Array, weight: jax.Array | None):
    """A head's map before its rows are divided by their sums.

    Args:
      logits: (N, N) float32, a row per query.
      weight: (1, N) float32 or None.

    Returns:
      (N, N) float32; with weights also what it would be if all were 1, and where the logit still
      counts.
    """
    if weight is None:
        return jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True)), None
    counted = jnp.where(own(logits.shape), jnp.maximum(weight, 1.0), weight)
    top = jnp.max(jnp.where(counted > 0, logits, -jnp.inf), axis=1, keepdims=True)
    # A hidden key's logit may lie far above `top`, and its exp must not overflow.
    free = logits <= top
    unweighted = jnp.exp(jnp.where(free, logits - top, 0.0))
    return unweighted * counted, (unweighted, free)


def own(shape: tuple[int, int]) -> jax.Array:
    """Where a query meets its own key."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, side) for side in (0, 1))
    return row == column


def forward_kernel(width, qkv, *refs):
    """One grid step: blocks (images, N, 3 D), weights (images, 1, N) if any -> as `attend`."""
    *weight, out, row = refs
    images, _, dim = out.shape

    def image(i, _):
        per_key = weight[0][i] if weight else None
        for group in range(dim // LANES):
            q, k, v = (qkv[i, :, place] for place in places(group, dim))
            q = q * jnp.asarray(width**-0.5, q.dtype)
            # Step by step for all heads of the group, so that the matrix unit has the next head's
            # product to do while this one's exponentials are taken.
            heads = heads_of(group, width)
            logits = [dot(only(mask, q), k, (1, 1)) for _, mask in heads]
            maps = [exponentials(one, per_key)[0] for one in logits]
            seen = jnp.zeros(q.shape, F32)
            for (head, mask), one, logit in zip(heads, maps, logits, strict=True):
                row[i, head : head + 1, :] = logit[:1]
                total = jnp.sum(one, axis=1, keepdims=True)
                # Dividing after the product touches N x 128 values instead of N x N.
                seen = jnp.where(mask, dot(one.astype(v.dtype), v, (1, 0)) / total, seen)
            out[i, :, places(group, dim)[0]] = seen.astype(out.dtype)

    jax.lax.fori_loop(0, images, image, None)


def backward_kernel(width, qkv, *refs):
    """One grid step: what `forward_kernel` read, gradients of what it wrote -> of what it read."""
    count = (len(refs) - 3) // 2  # 1 with weights
    weight, (dout, drow, dqkv), dweight = refs[:count], refs[count : count + 3], refs[count + 3 :]
    images, length, dim = dout.shape
    first = jax.lax.broadcasted_iota(jnp.int32, (length, 1), 0) == 0

    def image(i, _):
        per_key = weight[0][i] if count else None
        of_weight = jnp.zeros((1, length), F32)
        for group in range(dim // LANES):
            q, k, v = (qkv[i, :, place] for place in places(group, dim))
            q = q * jnp.asarray(width**-0.5, q.dtype)
            dy = dout[i, :, places(group, dim)[0]].astype(F32)
            dq, dk, dv = (jnp.zeros(q.shape, F32) for _ in range(3))
            heads = heads_of(group, width)
            asking = [only(mask, q) for _, mask in heads]
            maps = [exponentials(dot(asked, k, (1, 1)), per_key) for asked in asking]
            shares = [1.0 / jnp.sum(one, axis=1, keepdims=True) for one, _ in maps]
            # Rows of the map are divided by their sums here, where they are 128 long.
            mine = [
                only(mask, dy * share).astype(v.dtype)
                for (_, mask), share in zip(heads, shares, strict=True)
            ]
            throughs = [dot(part, v, (1, 1)) for part in mine]
            steps = zip(heads, asking, maps, shares, mine, throughs, strict=True)
            for (head, mask), asked, (one, weighted), share, part, through in steps:
                through = through - share * jnp.sum(one * through, axis=1, keepdims=True)
                dlogits = one * through
                if weighted:
                    unweighted, free = weighted
                    dlogits = jnp.where(free, dlogits, 0.0)
                    # A token's own weight counts only above 1.
                    unseen = own(through.shape) & (per_key <= 1)
                    through = jnp.where(unseen, 0.0, unweighted * through)
                    of_weight = of_weight + jnp.sum(through, axis=0, keepdims=True)
                dlogits = dlogits + jnp.where(first, drow[i, head : head + 1, :], 0.0)
                dlogits = dlogits.astype(k.dtype)
                dq = jnp.where(mask, dot(dlogits, k, (1, 0)), dq)
                dk = dk + dot(dlogits, asked, (0, 0))
                dv = dv + dot(one.astype(v.dtype), part, (0, 0))
            parts = dq * width**-0.5, dk, dv
            for place, part in zip(places(group, dim), parts, strict=True):
                dqkv[i, :, place] = part.astype(dqkv.dtype)
        if count:
            dweight[0][i] = of_weight

    jax.lax.fori_loop(0, images, image, None)


def call(kernel, inputs, outputs, name, interpret):
    """Runs a kernel over images: every array has three axes, images first, and only they are cut.

    Args:
      inputs: arrays.
      outputs: shapes and dtypes.
    """
    batch = inputs[0].shape[0]
    image = sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in (*inputs, *outputs))
    most = max(1, min(IMAGES, batch, ROOM // (2 * image)))
    images = next(n for n in range(most, 0, -1) if batch % n == 0)
    blocks = [
        pl.BlockSpec((images, *a.shape[1:]), lambda step: (step, 0, 0)) for a in (*inputs, *outputs)
    ]
    return pl.pallas_call(
        kernel,
        grid=(batch // images,),
        in_specs=blocks[: len(inputs)],
        out_specs=blocks[len(inputs) :],
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name=name,
    )(*inputs)


def forward_call(qkv, weight, num_heads, interpret):
    batch, length, triple = qkv.shape
    outputs = [
        jax.ShapeDtypeStruct((batch, length, triple // 3), qkv.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, length), F32),
    ]
    inputs = [qkv] if weight is None else [qkv, weight[:, None]]
    kernel = functools.partial(forward_kernel, triple // 3 // num_heads)
    return tuple(call(kernel, inputs, outputs, "attend", interpret))


def backward_call(qkv, weight, dout, drow, num_heads, interpret):
    inputs = [qkv] if weight is None else [qkv, weight[:, None]]
    outputs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs]
    kernel = functools.partial(backward_kernel, qkv.shape[-1] // 3 // num_heads)
    dqkv, *rest = call(kernel, [*inputs, dout, drow], outputs, "attend_backward", interpret)
    return dqkv, rest[0][:, 0] if rest else None
