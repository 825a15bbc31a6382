# SPDX-License-Identifier: Apache-2.0
"""GTP: drop patches and hand a part of them on to their neighbors in a graph.

Xu et al., "GTP-ViT: Efficient Vision Transformers via Graph-based Token Propagation" (WACV 2024).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.errors import InputError
from evit_jax.plan.counts import Entry, Keep
from evit_jax.reducers._merging import cosines, total
from evit_jax.reducers._removal import check_removal, remove_each
from evit_jax.tokens import F32, Reducer, Signals, Tokens, destinations, drop, follow, take

GRAPH = "gtp_graph"  # its name among what blocks report


@dataclasses.dataclass(frozen=True)
class GTP(Reducer):
    """Drops the n - K patch tokens of the lowest score and propagates them to those that stay.

    Token i scores max_h A_hii max_h sum_j A_hji, A_h the attention map of head h: what looks at
    itself is hard to put together from others, and what many look at is needed. Kept token k
    becomes x_k + alpha sum_p G_kp x_p over the dropped tokens p, and all stay in their order.

    The graph G is made once, of the tokens that enter the first block that reduces; of the
    embedding, as in the paper, where that is block 0. i is joined to the 8 patches around it and to
    the `neighbors` patches of the largest cosine, never to itself; with d_i the number of those,
    G_ij = 1 / sqrt(d_i d_j) where i is joined to j. What is left of it travels in the report
    "gtp_graph".

    A dropped patch is owned by the kept token that it gives most to, though others get of it too,
    and by none where no neighbor stays. The paper's sparse attention is not here, since it is a
    change of attention; nor is the cost of the graph, n^2 D once per image, in `matching_macs`.

    r removes that many tokens in each block (the paper's P); with r = 0 the rates or counts given
    to the model decide, and both at once are refused.
    """

    r: int = 0
    alpha: float = 0.1  # the share of a dropped token that is handed on
    neighbors: int = 8
    spatial: bool = True  # False: without the patches around
    semantic: bool = True  # False: without the similar ones
    # Later attention weighs a token by s_k + alpha sum_p G_kp s_p, s being 1 at first.
    proportional: bool = False

    def __post_init__(self):
        check_removal("gtp", self.r)
        if not (self.spatial or self.semantic):
            raise InputError("gtp's graph needs spatial=True, semantic=True or both")
        if self.neighbors < 1:
            raise InputError(f"gtp's neighbors is a number from 1 up, got {self.neighbors}")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        return (prefix + n) ** 2 * width + keep * (n - keep) * width

    def schedule(self, patches: int, prefix: int, layers: tuple[int, ...], depth: int) -> Keep:
        return remove_each(self.r, patches, layers, depth, lambda n: self.smallest(n, prefix))

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        prefix, n = tokens.prefix, tokens.patches
        order = jnp.argsort(-scores(signals)[:, prefix:], axis=1, stable=True)
        kept, dropped = jnp.sort(order[:, :keep], axis=1), jnp.sort(order[:, keep:], axis=1)

        earlier = tokens.aux.get(GRAPH)
        graph = self.graph(signals, prefix) if earlier is None else earlier[-1]  # (B, n, n)
        graph = take(graph, kept)  # (B, K, n)
        received = self.alpha * jnp.take_along_axis(graph, dropped[:, None], axis=2)
        graph = jnp.take_along_axis(graph, kept[:, None], axis=2)  # (B, K, K)

        lost = take(tokens.x[:, prefix:], dropped)
        gain = jnp.einsum("bkp,bpd->bkd", received, lost.astype(F32))
        reduced = drop(tokens, kept)
        x = reduced.x.at[:, prefix:].add(gain.astype(reduced.x.dtype))

        heir = jnp.where(jnp.max(received, axis=1) > 0, jnp.argmax(received, axis=1), -1)
        place = destinations(kept, n, rest=-1)
        rows = jnp.arange(place.shape[0])[:, None]
        place = place.at[rows, dropped].set(heir.astype(jnp.int32), unique_indices=True)
        sizes = total(tokens.size[:, prefix:], place, keep)
        weight = reduced.weight
        if self.proportional:
            before = jnp.ones_like(tokens.size) if tokens.weight is None else tokens.weight
            weight = jnp.ones_like(reduced.size) if weight is None else weight
            lost = take(before[:, prefix:], dropped)
            weight = weight.at[:, prefix:].add(jnp.einsum("bkp,bp->bk", received, lost))
        reduced = reduced.replace(
            x=x,
            size=reduced.size.at[:, prefix:].set(sizes),
            owner=follow(tokens.owner, place),
            weight=weight,
        )
        return reduced.report(**{GRAPH: graph})

    def graph(self, signals: Signals, prefix: int) -> jax.Array:
        """G of the paper: (B, n, n) float32, no gradient."""
        similarity = cosines(signals.before[:, prefix:])
        batch, n, _ = similarity.shape
        joined = jnp.zeros(similarity.shape, bool)
        if self.spatial:
            row, column = np.divmod(np.arange(n), signals.grid[1])
            steps = (abs(at[:, None] - at[None]) for at in (row, column))
            joined |= jnp.asarray(np.maximum(*steps) == 1)[None]
        if self.semantic and n > 1:
            others = jnp.where(jnp.eye(n, dtype=bool)[None], -jnp.inf, similarity)
            _, nearest = jax.lax.top_k(others, min(self.neighbors, n - 1))
            at = jnp.arange(batch)[:, None, None], jnp.arange(n)[None, :, None]
            joined = joined.at[*at, nearest].set(True)
        scale = jax.lax.rsqrt(jnp.maximum(jnp.sum(joined, axis=2, dtype=F32), 1))
        return jnp.where(joined, scale[:, :, None] * scale[:, None], 0)


def scores(signals: Signals) -> jax.Array:
    """max_h A_hii max_h sum_j A_hji of each token: (B, N) float32, no gradient."""
    attention = jax.lax.stop_gradient(signals.attention())
    own = jnp.max(jnp.diagonal(attention, axis1=2, axis2=3), axis=1)
    return own * jnp.max(jnp.sum(attention, axis=2), axis=1)


REDUCER = GTP
