# SPDX-License-Identifier: Apache-2.0
"""SiT: patches slim to K learned mixtures of them (Zong et al., "Self-slimmed ViT", ECCV 2022)."""

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

    The paper also trains a network that makes all tokens of the slimmed ones again, to compare them
    with a teacher's after every block. That is left out: a reducer sees no later block and no
    teacher. The teacher's logits are learned with config.distill, as by any other method.
    """

    one_plan = True
    site = "input"

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


REDUCER = SiT
