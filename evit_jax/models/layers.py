# SPDX-License-Identifier: Apache-2.0
"""The parts of a Vision Transformer: attention that reports what it saw, MLP, and the block.

Letters: B images, N tokens, H heads, C head width, D width. Parameters are float32; `dtype` is the
compute dtype; softmax and norms run in float32.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.reducers import Reducer, Signals, Tokens

# DeiT draws weights from a normal truncated at an absolute value of 2, which at this width never
# truncates, and leaves biases at zero.
weight_init = nn.initializers.normal(0.02)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x * Phi(x)."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def norm(name: str) -> nn.LayerNorm:
    """LayerNorm as in DeiT (epsilon 1e-6), computed and returned in float32."""
    return nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=name)


def drop_path(rate: float) -> nn.Dropout:
    """Stochastic depth: drops a whole residual branch per image and rescales the others."""
    return nn.Dropout(rate, broadcast_dims=(1, 2))


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
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, weight: jax.Array | None, *, train: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x (B, N, D), weight (B, N) or None -> (B, N, D), row (B, N) float32, keys (B, N, C)."""
        batch, length, width = x.shape
        head_width = width // self.num_heads
        dense = dict(kernel_init=weight_init, dtype=self.dtype)

        qkv = nn.Dense(3 * width, name="qkv", **dense)(x)
        qkv = qkv.reshape(batch, length, 3, self.num_heads, head_width)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # 3 x (B, H, N, C)
        q = q * head_width**-0.5  # on q: N x C products instead of N x N

        factors = None if weight is None else key_weights(weight)
        logits = jnp.einsum("bhqc,bhkc->bhqk", q, k, preferred_element_type=jnp.float32)
        unscaled, total = softmax_weights(logits, factors)
        # Dividing after the product with v touches N x C values instead of N x N.
        y = jnp.einsum(
            "bhqk,bhkc->bhqc", unscaled.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        y = (y / total).astype(self.dtype).transpose(0, 2, 1, 3).reshape(batch, length, width)
        y = nn.Dense(width, name="proj", **dense)(y)
        y = nn.Dropout(self.dropout_rate)(y, deterministic=not train)

        # The class token's row is its own small softmax, so that the attention above is free to
        # become a fused kernel, which keeps no map. jit removes it where no reducer reads it.
        row = jnp.einsum("bhc,bhkc->bhk", q[:, :, 0], k, preferred_element_type=jnp.float32)
        unscaled, total = softmax_weights(row, None if factors is None else factors[:, :, 0])
        return y, jnp.mean(unscaled / total, axis=1), jnp.mean(k, axis=1)


class Mlp(nn.Module):
    """Two dense layers with the exact GELU between them."""

    hidden: int
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        dense = dict(kernel_init=weight_init, dtype=self.dtype)
        y = gelu(nn.Dense(self.hidden, name="fc1", **dense)(x))
        y = nn.Dropout(self.dropout_rate)(y, deterministic=not train)
        y = nn.Dense(x.shape[-1], name="fc2", **dense)(y)
        return nn.Dropout(self.dropout_rate)(y, deterministic=not train)


class Block(nn.Module):
    """A pre-norm block that may reduce its tokens between attention and MLP."""

    num_heads: int
    hidden: int  # width of the MLP
    reducer: Reducer
    keep: int | None = None  # patch tokens the reducer keeps; None does not reduce
    layer: int = 0  # the block's number
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens, *, train: bool) -> tuple[Tokens, jax.Array]:
        """Returns the tokens after the block and the class token's attention (B, N) before it."""
        attention = Attention(self.num_heads, self.dropout_rate, self.dtype, name="attn")
        y, row, keys = attention(norm("norm1")(tokens.x), tokens.weight, train=train)
        tokens = tokens.replace(
            x=tokens.x + drop_path(self.drop_path_rate)(y, deterministic=not train)
        )
        if self.keep is not None:
            key = self.make_rng("dropout") if train and self.has_rng("dropout") else None
            signals = Signals(row, keys, key=key, layer=self.layer, train=train)
            tokens = self.reducer(tokens, signals, self.keep)
        mlp = Mlp(self.hidden, self.dropout_rate, self.dtype, name="mlp")
        y = mlp(norm("norm2")(tokens.x).astype(self.dtype), train=train)
        y = drop_path(self.drop_path_rate)(y, deterministic=not train)
        return tokens.replace(x=tokens.x + y), row
