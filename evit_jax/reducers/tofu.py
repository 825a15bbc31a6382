# SPDX-License-Identifier: Apache-2.0
"""ToFu: fuse patches by pruning them in early blocks and by merging them in late ones.

Kim et al., "Token Fusion: Bridging the Gap between Token Pruning and Token Merging" (WACV 2024).
"""

import dataclasses

import jax
import jax.numpy as jnp

from evit_jax.plan.counts import Entry, Keep
from evit_jax.reducers._merging import merge, places, total
from evit_jax.reducers._removal import check_removal, remove_each
from evit_jax.reducers.tome import pair
from evit_jax.tokens import F32, Reducer, Signals, Tokens


@dataclasses.dataclass(frozen=True)
class ToFu(Reducer):
    """Pairs patch tokens as ToMe does; what it makes of a pair depends on the block.

    Tokens at even places find their most similar neighbor at an odd place, by the cosine of keys
    averaged over heads, and the n - K closest pairs become one token each. With c the tokens of a
    cluster, its destination among them:
      to block depth // 2   x of the destination, as it is; the sources vanish
      after it              mean(x_c) max ||x_c|| / ||mean(x_c)||
    since what early blocks make of a mean is far from the mean of what they make of its tokens, and
    since means are shorter than what they are of. Sizes add up in both cases, and a patch whose
    token vanished is owned by the destination, which stands for it. What remains of the even places
    comes first, in order, then the odd ones.

    Public code divides by ||x|| that the destination had before instead of ||mean(x_c)||, so the
    less alike tokens are, the shorter they become; `upstream` does so.

    r removes that many tokens in each block; with r = 0 the rates or counts given to the model
    decide, and both at once are refused.
    """

    weights_at_least_one = True

    r: int = 0  # tokens removed per block, as far as half of the patches allow
    weighted: bool = False  # means weighted by size
    upstream: bool = False  # public code's length
    proportional: bool = True  # later attention weighs a token by its size

    def __post_init__(self):
        check_removal("tofu", self.r)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def smallest(self, n: int, prefix: int) -> int:
        return n - n // 2

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        length = prefix + n
        return (length - length // 2) * (length // 2) * (width // num_heads)

    def schedule(self, patches: int, prefix: int, layers: tuple[int, ...], depth: int) -> Keep:
        return remove_each(self.r, patches, layers, depth, lambda n: self.smallest(n, prefix))

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        prefix, n = tokens.prefix, tokens.patches
        sources, targets = pair(signals.keys(), prefix, n - keep)  # (B, n - K): among all tokens
        rows = jnp.arange(sources.shape[0])[:, None]
        stays = jnp.ones((sources.shape[0], n), bool).at[rows, sources - prefix].set(False)
        at = prefix + jnp.arange(n, dtype=jnp.int32)
        own = places(stays, jnp.broadcast_to(at + at % 2 * (prefix + n), stays.shape))
        into = jnp.take_along_axis(own, targets - prefix, axis=1)
        place = own.at[rows, sources - prefix].set(into)  # (B, n)
        size = tokens.size[:, prefix:]
        share = size if self.weighted else jnp.ones_like(size)
        early = signals.layer <= signals.depth // 2
        if early:
            share = jnp.where(stays, share, 0)
        merged = merge(tokens, place, share, keep, proportional=self.proportional)
        return merged if early else self.lengthened(merged, tokens.x[:, prefix:], place, stays)

    def lengthened(
        self, merged: Tokens, x: jax.Array, place: jax.Array, stays: jax.Array
    ) -> Tokens:
        """The merged tokens at the length of the longest in each cluster.

        Args:
          x: (B, n, D) the patch tokens before.
          place: (B, n) int32, the clusters they are in.
          stays: (B, n) bool, False for the sources.
        """
        keep = merged.patches
        length = norms(x)
        member = place[:, None] == jnp.arange(keep)[None, :, None]  # (B, K, n)
        longest = jnp.max(jnp.where(member, length[:, None], 0), axis=2)
        means = merged.x[:, merged.prefix :].astype(F32)
        destination = total(jnp.where(stays, length, 0), place, keep)
        divisor = destination if self.upstream else norms(means)
        alone = jnp.sum(member, axis=2) == 1
        means = jnp.where(alone[..., None], means, means * (longest / divisor)[..., None])
        means = means.astype(merged.x.dtype)
        return merged.replace(x=jnp.concatenate([merged.x[:, : merged.prefix], means], axis=1))


def norms(x: jax.Array) -> jax.Array:
    """(B, n, D) -> (B, n) float32: lengths, with a gradient where they are 0."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(F32)), axis=-1) + 1e-12)


REDUCER = ToFu
