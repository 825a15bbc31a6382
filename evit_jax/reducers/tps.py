# SPDX-License-Identifier: Apache-2.0
"""TPS: squeeze the patches that are pruned into those that stay.

Wei et al., "Joint Token Pruning and Squeezing Towards More Aggressive Compression of Vision
Transformers" (CVPR 2023).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from evit_jax.plan.counts import Entry
from evit_jax.reducers._merging import merge
from evit_jax.reducers._scores import Ranks, best, importance, map_macs
from evit_jax.tokens import F32, Signals, Tokens, drop


@dataclasses.dataclass(frozen=True)
class TPS(Ranks):
    """Keeps the K patch tokens with the highest class attention and squeezes each other into one.

    A pruned token p goes to the kept token k to which its cosine is largest, and of those that go
    to k it becomes

        (e x_k + sum_p exp(cos_kp) x_p) / (e + sum_p exp(cos_kp))

    so a pruned token counts as much as k itself only where it equals it. Gradients pass through the
    cosines too. Kept tokens come in descending order of class attention; ties go to the lower
    index, also between kept tokens that are equally similar, which in public code both receive.

    This is eTPS, the variant that ranks as EViT does, without parameters. dTPS ranks by a
    predictor, which is not here.
    """

    by: str = "class"  # the score, one of Top-K's; others need no class token

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        return (n - keep) * keep * width + map_macs(self.by, n, prefix, width)

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        prefix, n = tokens.prefix, tokens.patches
        tokens = drop(tokens, best(importance(self.by, tokens, signals), tokens, n))  # sorted
        kept, pruned = tokens.x[:, prefix : prefix + keep], tokens.x[:, prefix + keep :]
        similarity = jnp.einsum(
            "bpd,bkd->bpk", unit(pruned), unit(kept), preferred_element_type=F32
        )
        into = jnp.argmax(similarity, axis=2).astype(jnp.int32)  # (B, n - K)
        closest = jnp.take_along_axis(similarity, into[..., None], axis=2)[..., 0]
        there = tokens.size[:, prefix + keep :] > 0  # others are empty slots
        own = jnp.broadcast_to(jnp.arange(keep, dtype=jnp.int32)[None], kept.shape[:2])
        return merge(
            tokens,
            jnp.concatenate([own, jnp.where(there, into, -1)], axis=1),
            jnp.concatenate([jnp.full(own.shape, math.e), jnp.exp(closest)], axis=1),
            keep,
            proportional=False,
        )


def unit(x: jax.Array) -> jax.Array:
    """Tokens (B, n, D) at length 1, in their dtype."""
    squares = jnp.sum(jnp.square(x.astype(F32)), axis=-1, keepdims=True)
    return (x.astype(F32) * jax.lax.rsqrt(squares + 1e-12)).astype(x.dtype)


REDUCER = TPS
