# SPDX-License-Identifier: Apache-2.0
"""SiT: patches slim to K learned mixtures of them (Zong et al., "Self-slimmed ViT", ECCV 2022)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.plan.counts import Entry
from evit_jax.reducers._soft import mix
from evit_jax.tokens import F32, Reducer, Signals, Tokens


class SiT(nn.Module, Reducer):
    """K sums of all patch tokens, with a softmax over tokens of s W_2 gelu(W_1 norm(x)) as shares.

    W_1 is D x D / 2 and W_2 is D / 2 x K, both with a bias; s is learned too, from 1. So the
    parameters are for this plan's counts alone. It works before a block's attention, which is after
    the block before; the paper ends stages with it. Its cost, n D (D + K) / 2 and K n D for the
    sums, is not in the counts of `plan.flops` but for the sums, which are pairs of tokens.

    `recovery` is the paper's feature recalibration distillation: in training a `Reverse` network
    after every block with fewer tokens makes all of them again, and config.distill.tokens is the
    weight of their mean squared difference from the teacher's after the same block; 2 in the paper,
    beside the cross entropy and 2 KL to the teacher's logits. Evaluation has nothing of it.
    """

    one_plan = True
    site = "input"

    recovery: bool = False  # learn the tokens of a teacher, too

    @property
    def recovers(self) -> bool:
        return self.recovery

    def reverse(self, patches: int) -> nn.Module:
        return Reverse(patches, parent=None)

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        return keep * n * width

    @nn.compact
    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        x, dtype = tokens.x[:, tokens.prefix :], tokens.x.dtype
        settings = dict(dtype=dtype, kernel_init=nn.initializers.normal(0.02))
        y = nn.LayerNorm(dtype=F32, epsilon=1e-6, name="norm")(x).astype(dtype)
        y = nn.Dense(max(x.shape[-1] // 2, 1), name="fc1", **settings)(y)
        y = nn.Dense(keep, name="fc2", **settings)(nn.gelu(y, approximate=False))
        scale = self.param("scale", nn.initializers.ones, (1,))
        there = tokens.size[:, tokens.prefix :, None] > 0
        scores = jnp.where(there, scale[None, None] * y.astype(F32), -jnp.inf)
        return mix(tokens, jax.nn.softmax(scores, axis=1))


class Reverse(nn.Module):
    """All P patch tokens of K slimmed ones, for training alone.

    An MLP over tokens, K -> 4 P -> P, of each channel of norm(x), and then a residual MLP over
    channels, D -> 4 D -> D: z + MLP(norm(z)).
    """

    patches: int  # P

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, K, D) -> (B, P, D) in the dtype of x."""
        width, dtype = x.shape[-1], x.dtype
        layer = functools.partial(nn.Dense, dtype=dtype, kernel_init=nn.initializers.normal(0.02))
        norm = functools.partial(nn.LayerNorm, dtype=F32, epsilon=1e-6)
        y = norm(name="norm1")(x).astype(dtype).swapaxes(1, 2)  # (B, D, K)
        y = nn.gelu(layer(4 * self.patches, name="tokens1")(y), approximate=False)
        z = layer(self.patches, name="tokens2")(y).swapaxes(1, 2)
        y = norm(name="norm2")(z).astype(dtype)
        y = nn.gelu(layer(4 * width, name="fc1")(y), approximate=False)
        return z + layer(width, name="fc2")(y)


REDUCER = SiT
