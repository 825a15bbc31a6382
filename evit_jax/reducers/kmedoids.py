# SPDX-License-Identifier: Apache-2.0
"""K-Medoids: keep the K patches that lie in the middle of K clusters.

As a reducer of a plain ViT in Haurum et al., "Which Tokens to Use?" (ICCV 2023 workshops).
"""

import dataclasses

import jax
import jax.numpy as jnp

from evit_jax.errors import InputError
from evit_jax.plan.counts import Entry
from evit_jax.reducers._scores import Ranks, best, importance, map_macs
from evit_jax.reducers.dpcknn import squared_distances
from evit_jax.tokens import Signals, Tokens, drop


@dataclasses.dataclass(frozen=True)
class KMedoids(Ranks):
    """Clusters n patch tokens and keeps the medoid of each cluster, as it is; the rest is dropped.

    With weights w_i, by default class attention, the first medoids are the K tokens of the highest
    weight. Each iteration assigns every token to the nearest medoid, D_ij = ||x_i - x_j||, and
    makes of each cluster that member i the medoid whose sum over members j of w_j D_ij is least.
    Ties go to the lower index. Medoids come in the order of those that they began as.

    The public code takes w_i times the sum of D_ij over all tokens j instead, within the cluster
    or not: a token counts against itself by its own weight, so `upstream` rather keeps what nobody
    looks at. The method works before a block's attention, with the weights from the block before.
    """

    site = "input"
    by: str = "class"  # the weight, one of Top-K's scores
    iterations: int = 3
    upstream: bool = False  # the public code's objective

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 0:
            raise InputError(f"kmedoids' iterations is a number from 0 up, got {self.iterations}")

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        return n**2 * width + map_macs(self.by, n, prefix, width)

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        weight = importance(self.by, tokens, signals)  # (B, n)
        there = tokens.size[:, tokens.prefix :] > 0  # others are empty slots, which no cluster has
        weight = jnp.where(there, weight, 0)
        distance = jnp.sqrt(squared_distances(tokens.x[:, tokens.prefix :]))
        medoids = best(weight, tokens, keep)  # (B, K)
        slots = jnp.arange(keep, dtype=jnp.int32)[None, :, None]
        for _ in range(self.iterations):
            cluster = jnp.where(there, assign(distance, medoids), -1)
            if self.upstream:
                cost = weight * jnp.sum(jnp.where(there[:, None], distance, 0), axis=2)
            else:
                together = cluster[:, :, None] == cluster[:, None]
                cost = jnp.sum(jnp.where(together, weight[:, None] * distance, 0), axis=2)
            member = cluster[:, None] == slots  # (B, K, n)
            chosen = jnp.argmin(jnp.where(member, cost[:, None], jnp.inf), axis=2)
            # A slot for which no token was left keeps its empty one.
            medoids = jnp.where(jnp.any(member, axis=2), chosen, medoids)
        return drop(tokens, medoids)


def assign(distance: jax.Array, medoids: jax.Array) -> jax.Array:
    """Which of the medoids (B, K) is nearest to each token: (B, n) int32, by (B, n, n) distances.

    A medoid is its own, even beside another that lies in the same place.
    """
    rows = jnp.arange(distance.shape[0])[:, None]
    slots = jnp.arange(medoids.shape[1], dtype=jnp.int32)[None]
    own = jnp.full(distance.shape[:2], -1, jnp.int32).at[rows, medoids].set(slots)
    to_medoid = jnp.take_along_axis(distance, medoids[:, None], axis=2, mode="clip")  # (B, n, K)
    return jnp.where(own < 0, jnp.argmin(to_medoid, axis=2).astype(jnp.int32), own)


REDUCER = KMedoids
