# SPDX-License-Identifier: Apache-2.0
"""Cropr: a learned query scores the patches, and a head that reads what it finds trains it.

Bergner, Lippert and Mahendran, "Token Cropr: Faster ViTs for Quite a Few Tasks" (CVPR 2025).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.errors import InputError
from evit_jax.plan.counts import Entry, Keep
from evit_jax.reducers._scores import best
from evit_jax.tokens import F32, Reducer, Signals, Tokens, append, behind_prefix, drop


class Cropr(nn.Module, Reducer):
    """Keeps the K patch tokens with the highest <x, query>, in that order; the query is learned.

    In training the query also pools all tokens x, without a gradient into them: softmax over tokens
    of <x, query> D^-0.5, then y + MLP(norm(y)) with hidden width 4 D, a norm and a classifier.
    Its logits are reported as `logits`, so that their cross entropy with the images' own targets
    is added to the loss, with weight 1 for every reducing block. Query and head learn from it
    alone, and the rest of the model from its own loss alone. In evaluation only a product of
    tokens with one vector is left. A model without a classifier (num_classes=0) has no such head.

    r removes that many tokens in each block, in the first one more, as in the public code, whose
    default is 8. With r = 0 the rates or counts given to the model decide; both at once are
    refused. It works before a block's attention, which is after the block before; by default before
    all blocks but the first.

    `fusion` is the paper's last layer fusion: all removed tokens return before the last block as
    they were, so every patch leaves the model as a token of its own, for segmentation and the like.
    Nothing is removed before that block then. The paper has no stochastic depth in it.
    """

    site = "input"

    r: int = 0  # tokens removed per block
    fusion: bool = False  # removed tokens return before the last block

    @property
    def brings_back(self) -> bool:
        return self.fusion

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(1, depth - self.fusion))

    def schedule(self, patches: int, prefix: int, layers: tuple[int, ...], depth: int) -> Keep:
        if self.r < 0:
            raise InputError(f"cropr's r is a number from 0 up, got {self.r}")
        keep, n = [], patches
        for block in range(depth):
            removed = self.r if block in layers else 0
            removed += removed > 0 and n == patches
            now = max(n - removed, 1)
            keep.append(now if now < n else None)
            n = now
        return tuple(keep)

    @nn.compact
    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        if keep > tokens.patches:
            return append(tokens, tokens.aside).replace(aside=None)
        width = tokens.x.shape[-1]
        init = nn.initializers.truncated_normal(width**-0.5)
        query = self.param("query", init, (width,))
        x = jax.lax.stop_gradient(tokens.x)
        scores = jnp.einsum("bnd,d->bn", x, query.astype(x.dtype), preferred_element_type=F32)
        count = tokens.patches if self.fusion else keep
        order = best(jax.lax.stop_gradient(scores[:, tokens.prefix :]), tokens, count)
        if signals.num_classes and (signals.train or self.is_initializing()):
            share = nn.softmax(scores * width**-0.5)
            pooled = jnp.einsum("bn,bnd->bd", share, x.astype(F32))
            tokens = tokens.report(logits=self.classified(pooled, signals.num_classes))
        after = drop(tokens, order[:, :keep])
        if not self.fusion:
            return after
        removed = drop(behind_prefix(tokens), order[:, keep:])
        return after.replace(aside=removed if after.aside is None else append(after.aside, removed))

    def classified(self, pooled: jax.Array, num_classes: int) -> jax.Array:
        """(B, D) float32 -> logits (B, num_classes) float32, for training alone."""
        width, init = pooled.shape[-1], nn.initializers.normal(0.02)
        y = nn.LayerNorm(epsilon=1e-6, name="mlp_norm")(pooled)
        y = nn.gelu(nn.Dense(4 * width, kernel_init=init, name="fc1")(y), approximate=False)
        y = pooled + nn.Dense(width, kernel_init=init, name="fc2")(y)
        y = nn.LayerNorm(epsilon=1e-6, name="norm")(y)
        return nn.Dense(num_classes, kernel_init=init, name="out")(y)


REDUCER = Cropr
