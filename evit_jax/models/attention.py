# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention that hands out what it was made of.

Letters: B images, N tokens, Q queries, H heads, C width of one head, D width. Softmax runs in
float32.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.models.layers import weight_init
from evit_jax.tokens import softmax_weights


def attend(q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array | None) -> jax.Array:
    """softmax(q k^T) v with weighted keys, in float32.

    A key's weight multiplies its exp(logit). A token counts itself with at least 1 (DynamicViT's
    G_ii = 1), so that no row is ever empty: where its weight is smaller, its own term is added,
    which costs a row of numbers and not a second map.

    Args:
      q: (B, H, Q, C), scaled; the first Q tokens ask.
      k, v: (B, H, N, C).
      weight: (B, N) float32 >= 0, or None for the plain softmax.

    Returns:
      (B, H, Q, C) float32.
    """
    f32 = dict(preferred_element_type=jnp.float32)
    logits = jnp.einsum("bhqc,bhkc->bhqk", q, k, **f32)
    if weight is None:
        unscaled, total = softmax_weights(logits, None)
        # Dividing after the product with v touches Q x C values instead of Q x N.
        return jnp.einsum("bhqk,bhkc->bhqc", unscaled.astype(v.dtype), v, **f32) / total

    queries = q.shape[2]
    own = jnp.einsum("bhqc,bhqc->bhq", q, k[:, :, :queries], **f32)[..., None]
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
    y = jnp.einsum("bhqk,bhkc->bhqc", unscaled.astype(v.dtype), v, **f32)
    return (y + rest * v[:, :, :queries]) / total


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v go to whoever derives scores from them."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, weight: jax.Array | None, first: int | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x (B, N, D), weight (B, N) or None -> (B, N, D), and q, k, v by name (B, H, N, C).

        With `first` only the first `first` tokens are queries, and the result is (B, first, D).
        """
        batch, length, width = x.shape
        head_width = width // self.num_heads
        dense = dict(kernel_init=weight_init, dtype=self.dtype)

        qkv = nn.Dense(3 * width, name="qkv", **dense)(x)
        qkv = qkv.reshape(batch, length, 3, self.num_heads, head_width)
        # Scale q before the transpose; XLA fuses it into the copy.
        q = (qkv[:, :first, 0] * head_width**-0.5).transpose(0, 2, 1, 3)  # (B, H, Q, C)
        k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in (1, 2))  # (B, H, N, C)

        y = attend(q, k, v, weight).astype(self.dtype)
        y = y.transpose(0, 2, 1, 3).reshape(batch, -1, width)
        return nn.Dense(width, name="proj", **dense)(y), dict(q=q, k=k, v=v)
