# SPDX-License-Identifier: Apache-2.0
"""Attention that reports what it saw.

Letters: B images, N tokens, H heads, C head width, D width. Softmax runs in float32.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.models.layers import weight_init


def key_weights(weight: jax.Array) -> jax.Array:
    """(B, N) weights of keys -> (B, 1, N, N) factors of exp(logit).

    A token counts itself with at least 1 (DynamicViT's G_ii = 1), so no row is ever empty.
    """
    own = jnp.eye(weight.shape[1], dtype=weight.dtype)[None, None]
    return jnp.maximum(weight[:, None, None, :], own)


def softmax_weights(logits: jax.Array, factors: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """exp(logit) * factor, scaled so that the largest exp is 1, and its sum over keys."""
    seen = logits if factors is None else jnp.where(factors > 0, logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(seen, axis=-1, keepdims=True))
    shifted = logits - top
    if factors is None:
        unscaled = jnp.exp(shifted)
    else:  # a key that nobody may see could lie far above the largest visible one and overflow
        unscaled = jnp.exp(jnp.where(shifted > 0, 0.0, shifted)) * factors
    return unscaled, jnp.sum(unscaled, axis=-1, keepdims=True)


class Attention(nn.Module):
    """Multi-head self-attention; also returns the class token's row and the keys, for reducers."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, weight: jax.Array | None, first: int | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x (B, N, D), weight (B, N) or None -> (B, N, D), row (B, N) float32, keys (B, N, C).

        With `first` only so many tokens ask, and the result is (B, first, D).
        """
        batch, length, width = x.shape
        head_width = width // self.num_heads
        dense = dict(kernel_init=weight_init, dtype=self.dtype)

        qkv = nn.Dense(3 * width, name="qkv", **dense)(x)
        qkv = qkv.reshape(batch, length, 3, self.num_heads, head_width)
        # Scaled before it is turned, q takes part in the copy that turning is on a CPU.
        q = (qkv[:, :first, 0] * head_width**-0.5).transpose(0, 2, 1, 3)  # (B, H, first or N, C)
        k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in (1, 2))  # (B, H, N, C)

        factors = None if weight is None else key_weights(weight)[:, :, :first]
        logits = jnp.einsum("bhqc,bhkc->bhqk", q, k, preferred_element_type=jnp.float32)
        unscaled, total = softmax_weights(logits, factors)
        # Dividing after the product with v touches N x C values instead of N x N.
        y = jnp.einsum(
            "bhqk,bhkc->bhqc", unscaled.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        y = (y / total).astype(self.dtype).transpose(0, 2, 1, 3).reshape(batch, -1, width)
        y = nn.Dense(width, name="proj", **dense)(y)

        # The class token's row is its own small softmax, so that the attention above is free to
        # become a fused kernel, which keeps no map. jit removes it where no reducer reads it.
        row = jnp.einsum("bhc,bhkc->bhk", q[:, :, 0], k, preferred_element_type=jnp.float32)
        unscaled, total = softmax_weights(row, None if factors is None else factors[:, :, 0])
        return y, jnp.mean(unscaled / total, axis=1), jnp.mean(k, axis=1)
