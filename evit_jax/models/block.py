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


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x * Phi(x). For the backward pass only x is stored, and the rest redone."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def norm(name: str) -> nn.LayerNorm:
    """LayerNorm as in DeiT (epsilon 1e-6), computed and returned in float32."""
    return nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=name)


def fold(keys: jax.Array | None, number: int) -> jax.Array | None:
    """Random keys (B,), one per image -> others for another purpose; None stays None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None, *, whole: bool = False) -> jax.Array:
    """Zeroes values of x (B, N, D) at this rate and rescales the others.

    Args:
      x: any float dtype, returned as such.
      rate: in [0, 1).
      keys: (B,) one random key per image, so that an image's draws are the same however a batch is
        split over devices or micro-batches; None changes nothing.
      whole: zero all of an image's values or none (stochastic depth of a residual branch).
    """
    if keys is None or not rate:
        return x
    shape = (1, 1) if whole else x.shape[1:]
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


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


class Mlp(nn.Module):
    """Two dense layers with the exact GELU between them."""

    hidden: int
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        dense = dict(kernel_init=weight_init, dtype=self.dtype)
        y = gelu(nn.Dense(self.hidden, name="fc1", **dense)(x))
        y = dropout(y, self.dropout_rate, fold(keys, 0))
        y = nn.Dense(x.shape[-1], name="fc2", **dense)(y)
        return dropout(y, self.dropout_rate, fold(keys, 1))


class Block(nn.Module):
    """A pre-norm block that may reduce its tokens between attention and MLP."""

    num_heads: int
    hidden: int  # width of the MLP
    reducer: Reducer
    keep: int | None = None  # patch tokens the reducer keeps; None does not reduce
    layer: int = 0  # the block's number
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    train: bool = False  # what reducers are told
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Tokens, keys: jax.Array | None, first: int | None = None
    ) -> tuple[Tokens, jax.Array]:
        """Returns the tokens after the block and the class token's attention (B, N) before it.

        `keys` (B,) are random, one per image, for what a training model draws; None draws nothing.
        With `first` only so many of the first tokens are worked out and none is reduced; the others
        are looked at and gone.
        """
        attention = Attention(self.num_heads, self.dtype, name="attn")
        y, row, seen = attention(norm("norm1")(tokens.x), tokens.weight, first)
        y = dropout(y, self.dropout_rate, fold(keys, 0))
        y = dropout(y, self.drop_path_rate, fold(keys, 1), whole=True)
        tokens = tokens.replace(x=tokens.x[:, :first] + y, size=tokens.size[:, :first])
        if self.keep is not None and first is None:
            signals = Signals(row, seen, key=fold(keys, 2), layer=self.layer, train=self.train)
            tokens = self.reducer(tokens, signals, self.keep)
        mlp = Mlp(self.hidden, self.dropout_rate, self.dtype, name="mlp")
        y = mlp(norm("norm2")(tokens.x).astype(self.dtype), fold(keys, 3))
        y = dropout(y, self.drop_path_rate, fold(keys, 4), whole=True)
        return tokens.replace(x=tokens.x + y), row
