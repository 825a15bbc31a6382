# SPDX-License-Identifier: Apache-2.0
"""ToMe: merge the patches that look alike (Bolya et al., "Token Merging: Your ViT But Faster")."""

import dataclasses

import jax
import jax.numpy as jnp

from evit_jax.errors import InputError
from evit_jax.plan.counts import Entry, Keep
from evit_jax.tokens import Reducer, Signals, Tokens, follow


@dataclasses.dataclass(frozen=True)
class ToMe(Reducer):
    """Bipartite soft matching: every other token may merge into its most similar neighbor.

    Tokens at even places may be merged into tokens at odd ones; similarity is the cosine of their
    keys, averaged over heads. The n - K most similar pairs merge into size-weighted means, several
    into one where they agree. Prefix tokens take no part. What remains of the even places comes
    first, in order, then the odd ones; the next block so pairs others.

    r removes that many tokens in each block; `linear` tilts it from r * (1 - linear) in the first
    block to r * (1 + linear) in the last; a tuple lists it per block. With r = 0 the rates or
    counts given to the model decide; both at once are refused.
    """

    weights_at_least_one = True

    r: int | tuple[int, ...] = 0  # tokens removed per block, as far as half of the patches allow
    linear: float = 0.0
    proportional: bool = True  # later attention weighs a token by its size (proportional attention)

    def smallest(self, n: int, prefix: int) -> int:
        return n - n // 2

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        length = prefix + n
        return (length - length // 2) * (length // 2) * (width // num_heads)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def schedule(self, patches: int, prefix: int, layers: tuple[int, ...], depth: int) -> Keep:
        removed = self.r
        if isinstance(removed, int):
            first = int(removed * (1 - self.linear))
            step = (2 * removed - 2 * first) / max(depth - 1, 1)
            removed = [int(first + step * block) for block in range(depth)]
        removed = [*removed, *[0] * (depth - len(removed))]
        if len(removed) > depth or min(removed) < 0:
            raise InputError(
                f"tome's r is a number from 0 up, or at most {depth} of them, got {self.r} "
                f"with linear={self.linear}"
            )
        keep, n = [], patches
        for block in range(depth):
            now = n - removed[block] if block in layers else n
            now = max(now, self.smallest(n, prefix))
            keep.append(now if now < n else None)
            n = now
        return tuple(keep)

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        prefix, length = tokens.prefix, tokens.x.shape[1]
        removed = tokens.patches - keep
        sources, targets = pair(signals.keys(), prefix, removed)  # (B, r): places among all tokens

        # Where every token goes: sources into their target, all others to a place of their own.
        rows = jnp.arange(tokens.x.shape[0])[:, None]
        stays = jnp.ones(tokens.size.shape, bool).at[rows, sources].set(False)
        order = jnp.arange(length)
        # Prefix first, then even places, then odd ones, each in order.
        rank = jnp.where(order < prefix, order - 2 * length, (order % 2) * length + order)
        survivors = jnp.argsort(jnp.where(stays, rank[None], 2 * length), axis=1)[
            :, : length - removed
        ]
        places = jnp.arange(length - removed, dtype=jnp.int32)[None]
        place = jnp.zeros(tokens.size.shape, jnp.int32).at[rows, survivors].set(places)
        target_places = jnp.take_along_axis(place, targets, axis=1)
        place = place.at[rows, sources].set(target_places)

        size = tokens.size[..., None]
        weighted = gather(tokens.x.astype(jnp.float32) * size, survivors)
        weighted = weighted.at[rows, target_places].add(
            gather(tokens.x.astype(jnp.float32) * size, sources)
        )
        sizes = gather(size, survivors).at[rows, target_places].add(gather(size, sources))
        weight = tokens.weight
        if weight is not None:
            weight = jnp.take_along_axis(weight, survivors, axis=1)
        positions = tokens.positions
        if positions is not None:  # of a merged token: the mean of its patches', by shifts, so that
            # one that nothing merges into stays exactly where it is
            shift = gather(positions, sources) - gather(positions, targets)
            shifts = jnp.zeros_like(sizes * positions[:, :1])
            shifts = shifts.at[rows, target_places].add(shift * gather(size, sources))
            positions = gather(positions, survivors) + shifts / jnp.maximum(sizes, 1)
        return tokens.replace(
            x=(weighted / sizes).astype(tokens.x.dtype),
            size=sizes[..., 0],
            owner=follow(tokens.owner, place[:, prefix:] - prefix),
            positions=positions,
            weight=sizes[..., 0] if self.proportional else weight,
        )


def gather(array: jax.Array, index: jax.Array) -> jax.Array:
    """(B, N, D) and (B, K) -> (B, K, D)."""
    return jnp.take_along_axis(array, index[..., None], axis=1, mode="promise_in_bounds")


def pair(keys: jax.Array, prefix: int, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` most similar pairs: places of sources (even) and of their targets (odd), (B, r).

    Args:
      keys: (B, N, C), compared by cosine in float32.
    """
    keys = jax.lax.stop_gradient(keys.astype(jnp.float32))
    length = jnp.linalg.norm(keys, axis=-1, keepdims=True)
    keys = keys / jnp.maximum(length, jnp.finfo(jnp.float32).tiny)
    even, odd = keys[:, ::2], keys[:, 1::2]
    similarity = jnp.einsum("bic,bjc->bij", even, odd)
    protected_even, protected_odd = (prefix + 1) // 2, prefix // 2
    similarity = similarity.at[:, :protected_even].set(-jnp.inf)
    similarity = similarity.at[:, :, :protected_odd].set(-jnp.inf)
    best, target = jnp.max(similarity, axis=-1), jnp.argmax(similarity, axis=-1)
    _, source = jax.lax.top_k(best, count)
    return 2 * source, 2 * jnp.take_along_axis(target, source, axis=1) + 1


REDUCER = ToMe
