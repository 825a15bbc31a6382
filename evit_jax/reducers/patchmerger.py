# SPDX-License-Identifier: Apache-2.0
"""PatchMerger: K learned queries, each of which gathers from all patches.

Renggli et al., "Learning to Merge Tokens in Vision Transformers" (2022).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.plan.counts import Entry
from evit_jax.reducers._soft import mix
from evit_jax.tokens import F32, Reducer, Signals, Tokens


class PatchMerger(nn.Module, Reducer):
    """softmax(Q norm(x)^T) norm(x) takes the place of the patch tokens, Q (K, D) learned.

    What is summed is normalized, and logits are not scaled, as in the paper; Q is drawn from a
    standard normal. So the parameters are for this plan's counts alone. It works before a block's
    attention, which is after the block before.
    """

    one_plan = True
    site = "input"

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        return 2 * keep * n * width

    @nn.compact
    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        x, dtype = tokens.x[:, tokens.prefix :], tokens.x.dtype
        queries = self.param("queries", nn.initializers.normal(1.0), (keep, x.shape[-1]))
        y = nn.LayerNorm(dtype=F32, epsilon=1e-6, name="norm")(x).astype(dtype)
        scores = jnp.einsum("bnd,kd->bnk", y, queries.astype(dtype), preferred_element_type=F32)
        there = tokens.size[:, tokens.prefix :, None] > 0
        return mix(tokens, jax.nn.softmax(jnp.where(there, scores, -jnp.inf), axis=1), y)


REDUCER = PatchMerger
