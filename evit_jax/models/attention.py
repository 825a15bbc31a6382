# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention that hands out what it was made of.

Letters: B images, N tokens, Q queries, H heads, C width of one head, D width. Softmax runs in
float32.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.models.layers import Affine
from evit_jax.runtime.forms import EXACT, Form, by_chip
from evit_jax.runtime.layouts import tokens_outside
from evit_jax.tokens import softmax_weights

TO_F32 = dict(preferred_element_type=jnp.float32)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, form: Form = EXACT) -> jax.Array:
    """softmax(q k^T) v in the form of a chip.

    Args:
      q: (B, H, Q, C), scaled.
      k, v: (B, H, N, C).

    Returns:
      (B, H, Q, C) float32.
    """
    queries, keys = q.shape[2], k.shape[2]
    padding = -keys % form.tile
    if padding:
        q, k, v = (
            jnp.pad(part, ((0, 0), (0, 0), (0, -part.shape[2] % form.tile), (0, 0)))
            for part in (q, k, v)
        )
    logits = jnp.einsum("bhqc,bhkc->bhqk", q, k, **TO_F32)
    if padding:
        logits = jnp.where(jnp.arange(keys + padding)[None, None, None] < keys, logits, -jnp.inf)
    unscaled, total = softmax_weights(logits, None)
    if form.normalize_map:
        return product(unscaled / total, v)[:, :, :queries]
    # Dividing after the product with v touches Q x C values instead of Q x N.
    return product(unscaled, v)[:, :, :queries] / total[:, :, :queries]


def product(scores: jax.Array, v: jax.Array) -> jax.Array:
    """(B, H, Q, N) float32 with values (B, H, N, C) -> (B, H, Q, C) float32."""
    return jnp.einsum("bhqk,bhkc->bhqc", scores.astype(v.dtype), v, **TO_F32)


def attend_weighted(q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array) -> jax.Array:
    """The same with weighted keys.

    A key's weight multiplies its exp(logit). A token counts itself with at least 1 (DynamicViT's
    G_ii = 1), so that no row is ever empty: where its weight is smaller, its own term is added,
    which costs a row of numbers and not a second map.

    Args:
      q, k, v: as for `attend`; the first Q tokens ask.
      weight: (B, N) float32 >= 0.
    """
    logits = jnp.einsum("bhqc,bhkc->bhqk", q, k, **TO_F32)
    queries = q.shape[2]
    own = jnp.einsum("bhqc,bhqc->bhq", q, k[:, :, :queries], **TO_F32)[..., None]
    lacking = 1.0 - weight[:, None, :queries, None]  # of a token's own weight
    visible = jnp.where(weight[:, None, None] > 0, logits, -jnp.inf)
    top = jnp.max(visible, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.maximum(top, jnp.where(lacking > 0, own, -jnp.inf)))
    # A hidden key's logit may lie far above `top`, and its exp must not overflow.
    shifted = jnp.where(logits > top, 0.0, logits - top)
    unscaled = jnp.exp(shifted) * weight[:, None, None]
    own = jnp.exp(jnp.where(lacking >= 0, own - top, 0.0))
    rest = jnp.where(lacking >= 0, lacking, 0.0) * own  # cancels the mask's gradient at 1
    total = jnp.sum(unscaled, axis=-1, keepdims=True) + rest
    return (product(unscaled, v) + rest * v[:, :, :queries]) / total


def one_product(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, first: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q (B, H, Q, C), scaled, k and v (B, H, N, C), sliced from a single product.

    Args:
      x: (B, N, D).
      kernel, bias: (D, 3, H, C) and (3, H, C).
      first: Q, the tokens that ask; None: all.
    """
    width, _, heads, head_width = kernel.shape
    qkv = x @ kernel.reshape(width, -1) + bias.reshape(1, 1, -1)
    qkv = qkv.reshape(*x.shape[:2], 3, heads, head_width)
    # Scale q before the transpose; XLA fuses it into the copy.
    q = (qkv[:, :first, 0] * head_width**-0.5).transpose(0, 2, 1, 3)
    k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in (1, 2))
    return q, k, v


def three_products(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    heads: slice,
    num_heads: int,
    first: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same for some of the heads, of three products, each laid out as the next one reads it.

    Args:
      kernel, bias: (D, 3 D) and (3 D,), sliced here as they are stored: of another form each slice
        is one more array, and a TPU's compiler gives up fast memory where there are too many.
    """
    width = x.shape[-1]
    head_width = width // num_heads

    def product(x, number):
        start = number * width
        columns = slice(start + heads.start * head_width, start + heads.stop * head_width)
        y = tokens_outside(x @ kernel[:, columns] + bias[None, None, columns])
        return y.reshape(*y.shape[:2], -1, head_width).transpose(0, 2, 1, 3)

    q, k, v = product(x[:, :first], 0), product(x, 1), product(x, 2)
    return q * head_width**-0.5, k, v


def class_logits(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Logits of the first token's query, up to a number that all keys share, from the tokens.

    q (x W_k)^T is (q W_k^T) x^T: on a TPU another reader of q and k makes the compiler choose other
    layouts for them, and not only in this block; of x it may read as it likes.

    Args:
      x: (B, N, D).
      kernel, bias: (D, 3, H, C) and (3, H, C).

    Returns:
      (B, H, N) float32.
    """
    q = jnp.einsum("bd,dhc->bhc", x[:, 0], kernel[:, 0]) + bias[None, 0]
    q = q * kernel.shape[-1] ** -0.5
    asked = jnp.einsum("bhc,dhc->bhd", q, kernel[:, 1])
    return jnp.einsum("bhd,bnd->bhn", asked, x, **TO_F32)


def attention_branch(
    x: jax.Array,
    kernels: tuple[jax.Array, jax.Array],
    biases: tuple[jax.Array, jax.Array],
    weight: jax.Array | None,
    *,
    num_heads: int,
    first: int | None,
    form: Form = EXACT,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Multi-head self-attention from its parameters, in the form of a chip.

    Args:
      x: (B, N, D).
      kernels, biases: of qkv, (D, 3 D) and (3 D,), and of the projection, (D, D) and (D,); in the
        dtype of x.
      weight: (B, N) float32 >= 0, or None for the plain softmax.
      first: Q, the tokens that ask; None: all.

    Returns:
      (B, Q, D) and, by name, q (B, H, Q, C) scaled, k and v (B, H, N, C), all in the dtype of x,
      and `row` (B, H, N) float32, the logits of the first token's query.
    """
    length, width = x.shape[1:]
    sides = 3, num_heads, width // num_heads
    qkv, bias = kernels[0].reshape(width, *sides), biases[0].reshape(sides)
    size = num_heads
    if not form.fused_qkv:
        x = jax.lax.optimization_barrier(x)  # read many times: compute the norm before it once
        if weight is None and length > form.lanes:
            size = min(max(form.lanes // sides[-1], 1), num_heads)

    seen, parts = [], []
    for start in range(0, num_heads, size):
        heads = slice(start, min(start + size, num_heads))
        if form.fused_qkv:
            q, k, v = one_product(x, qkv, bias, first)
        else:
            q, k, v = three_products(x, kernels[0], biases[0], heads, num_heads, first)
        y = attend(q, k, v, form) if weight is None else attend_weighted(q, k, v, weight)
        y = y.astype(x.dtype).transpose(0, 2, 1, 3)  # (B, Q, heads, C)
        y = y.reshape(*y.shape[:2], -1)
        seen.append(y if form.fused_qkv else tokens_outside(y))
        parts.append((q, k, v))
    y = (jnp.concatenate(seen, axis=-1) if len(seen) > 1 else seen[0]) @ kernels[1]
    q, k, v = (jnp.concatenate(some, axis=1) for some in zip(*parts, strict=True))
    if form.fused_qkv:
        row = jnp.einsum("bhc,bhkc->bhk", q[:, :, 0], k, **TO_F32)
    else:
        row = class_logits(x, qkv, bias)
    return y + biases[1][None, None], dict(q=q, k=k, v=v, row=row)


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v go to whoever derives scores from them."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, weight: jax.Array | None, first: int | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x (B, N, D), weight (B, N) or None -> (B, N, D), and what `attention_branch` names.

        With `first` only the first `first` tokens are queries, and the result is (B, first, D).
        """
        width = x.shape[-1]
        layers = Affine(3 * width, name="qkv")(width), Affine(width, name="proj")(width)
        kernels, biases = zip(*jax.tree.map(lambda a: a.astype(self.dtype), layers), strict=True)
        branch = functools.partial(attention_branch, num_heads=self.num_heads, first=first)
        inputs = x.astype(self.dtype), kernels, biases, weight
        return by_chip(branch, *inputs, dtype=self.dtype)
