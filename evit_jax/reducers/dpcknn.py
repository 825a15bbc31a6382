# SPDX-License-Identifier: Apache-2.0
"""DPC-KNN: merge patches around density peaks (Zeng et al., "TCFormer", CVPR 2022; Du et al. 2016).

As a reducer of a plain ViT in Haurum et al., "Which Tokens to Use?" (ICCV 2023 workshops).
"""

import dataclasses

import jax
import jax.numpy as jnp

from evit_jax.errors import InputError
from evit_jax.plan.counts import Entry
from evit_jax.reducers._merging import merge, places, rank
from evit_jax.tokens import F32, Reducer, Signals, Tokens


@dataclasses.dataclass(frozen=True)
class DPCKNN(Reducer):
    """Clusters n patch tokens around K density peaks; each cluster becomes its mean.

    With D_ij = ||x_i - x_j|| / sqrt(D), the density rho_i is exp of minus the mean of D_ij^2 over
    the `neighbors` nearest tokens, i itself among them, and delta_i is the smallest distance to a
    denser token (for the densest, the largest of all distances). The K tokens with the highest
    rho_i delta_i are centers, in descending order of it; each other token joins the nearest one.

    Of two equally dense tokens the one with the lower index counts as denser, where public code
    adds noise, so results repeat. Means are weighted by size instead of by a learned score. The
    method works before a block's attention, on tokens alone.
    """

    weights_at_least_one = True
    site = "input"
    neighbors: int = 5
    equal: bool = False  # every token of a cluster weighs the same in its mean, whatever its size
    proportional: bool = False  # later attention weighs a token by its size

    def __post_init__(self):
        if self.neighbors < 1:
            raise InputError(f"dpcknn's neighbors is a number from 1 up, got {self.neighbors}")

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        return n**2 * width

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        squares = squared_distances(tokens.x[:, tokens.prefix :])  # (B, n, n)
        scores = peaks(squares, self.neighbors)
        order = rank(scores)
        place = places(order < keep, order)  # (B, n), -1 unless a center
        to_center = jnp.where((place < 0)[:, None], jnp.inf, squares)
        nearest = jnp.argmin(to_center, axis=2)
        into = jnp.take_along_axis(place, nearest, axis=1)
        size = tokens.size[:, tokens.prefix :]
        return merge(
            tokens,
            jnp.where(place < 0, into, place),  # a center stays itself beside its double
            jnp.ones_like(size) if self.equal else size,
            keep,
            proportional=self.proportional,
        )


def squared_distances(x: jax.Array) -> jax.Array:
    """||x_i - x_j||^2 / D of every pair, no gradient: (B, n, D) -> (B, n, n) float32."""
    x = jax.lax.stop_gradient(x.astype(F32))
    x = x - jnp.mean(x, axis=1, keepdims=True)  # smaller numbers cancel less
    # Differences of large products: rounding the factors to half of the bits would show.
    products = jnp.einsum("bid,bjd->bij", x, x, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(jnp.square(x), axis=-1)
    distances = jnp.maximum(squares[:, :, None] + squares[:, None] - 2 * products, 0)
    return jnp.where(jnp.eye(x.shape[1], dtype=bool)[None], 0, distances) / x.shape[2]


def peaks(squares: jax.Array, neighbors: int) -> jax.Array:
    """log(rho_i delta_i) of DPC-KNN from squared distances (B, n, n): (B, n) float32.

    Of logarithms, since exp underflows for tokens as far apart as those of deep blocks.
    """
    nearest = -jax.lax.top_k(-squares, min(neighbors, squares.shape[2]))[0]
    density = -jnp.mean(nearest, axis=2)
    order = rank(density)
    denser = order[:, None] < order[:, :, None]  # (B, i, j): j is denser than i
    nearest_denser = jnp.min(jnp.where(denser, squares, jnp.inf), axis=2)
    furthest = jnp.max(squares, axis=(1, 2))[:, None]
    delta = jnp.where(order == 0, furthest, nearest_denser)
    return density + jnp.log(delta) / 2  # delta is a squared distance


REDUCER = DPCKNN
