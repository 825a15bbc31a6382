# SPDX-License-Identifier: Apache-2.0
"""MCTF: merge patches that are alike, little attended to and small.

Lee et al., "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision
Transformers" (CVPR 2024).
"""

import dataclasses

import jax
import jax.numpy as jnp

from evit_jax.errors import InputError
from evit_jax.plan.counts import Entry, Keep
from evit_jax.reducers._merging import cosines, merge, places, rank
from evit_jax.reducers._removal import check_removal, remove_each
from evit_jax.tokens import Reducer, Signals, Tokens

FEWEST = 10  # tokens that a schedule leaves in a block, as in the public code
TINY = 1e-30  # of what a logarithm is taken of


@dataclasses.dataclass(frozen=True)
class MCTF(Reducer):
    """Merges n patch tokens into K by three criteria at once, in both directions.

    With a_i the attention that token i receives, mean over heads and queries, and s_i its size, the
    score of a pair is

        ((cos(x_i, x_j) + 1) / 2)^(1 / tau_similarity)
        (1 / a_i 1 / a_j)^(1 / tau_attention)  (1 / s_i 1 / s_j)^(1 / tau_size)

    up to a factor that all pairs of an image share. Of r = n - K tokens, r // 2 at even places each
    merge into the odd one of the best score; then, by the same scores, the rest of r at odd places
    each into the best of the even ones that are left, with all that they took in. A cluster becomes
    its mean weighted by a_i s_i, through which gradients reach the attention. What remains of the
    even places comes first, in order, then the odd ones.

    The method works before a block's attention, with the attention of the block before it. That is
    the public code without its one-step-ahead option, which takes the block's own attention of the
    tokens before they merge, and merges the attention map too. Block 0 has none before it.

    r removes that many tokens in each block, but never more than half of the patches, nor below ten
    tokens; the paper's r is 16. With r = 0 the rates or counts given to the model decide, and both
    at once are refused.
    """

    weights_at_least_one = True
    site = "input"
    r: int = 0
    tau_similarity: float = 1.0
    tau_attention: float = 20.0
    tau_size: float = 40.0
    both_ways: bool = True  # False: all merge from even places into odd ones
    proportional: bool = True  # later attention weighs a token by its size

    def __post_init__(self):
        check_removal("mctf", self.r)
        for name in ("tau_similarity", "tau_attention", "tau_size"):
            if getattr(self, name) <= 0:
                raise InputError(f"mctf's {name} must be above 0, got {getattr(self, name):g}")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(1, depth))

    def smallest(self, n: int, prefix: int) -> int:
        return n - n // 2

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        return (n - n // 2) * (n // 2) * width + (prefix + n) ** 2 * width

    def schedule(self, patches: int, prefix: int, layers: tuple[int, ...], depth: int) -> Keep:
        def smallest(n: int) -> int:
            return max(self.smallest(n, prefix), FEWEST - prefix)

        return remove_each(self.r, patches, layers, depth, smallest)

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        prefix, n = tokens.prefix, tokens.patches
        received = signals.received_attention()[:, prefix:]  # (B, n)
        size = tokens.size[:, prefix:]
        even, odd = slice(prefix % 2, None, 2), slice(1 - prefix % 2, None, 2)
        scores = self.scores(tokens.x[:, prefix:], received, size, even, odd)

        removed = n - keep
        first = removed // 2 if self.both_ways else removed
        goes = rank(jnp.max(scores, axis=2)) < first  # (B, even)
        target = jnp.argmax(scores, axis=2)
        back = jnp.where(goes[:, :, None], -jnp.inf, scores)
        returns = rank(jnp.max(back, axis=1)) < removed - first  # (B, odd)
        returned = jnp.argmax(back, axis=1)

        order = jnp.arange(n, dtype=jnp.int32)[None]
        own_even = places(~goes, jnp.broadcast_to(order[:, even], goes.shape))
        own_odd = places(~returns, jnp.broadcast_to(order[:, odd], returns.shape))
        own_odd += goes.shape[1] - first
        odd_place = jnp.where(returns, jnp.take_along_axis(own_even, returned, axis=1), own_odd)
        even_place = jnp.where(goes, jnp.take_along_axis(odd_place, target, axis=1), own_even)
        place = jnp.zeros((goes.shape[0], n), jnp.int32)
        place = place.at[:, even].set(even_place).at[:, odd].set(odd_place)
        share = jnp.maximum(received, TINY) * size
        return merge(tokens, place, share, keep, proportional=self.proportional)

    def scores(
        self, x: jax.Array, received: jax.Array, size: jax.Array, even: slice, odd: slice
    ) -> jax.Array:
        """Logarithms of the scores of pairs: (B, even, odd) float32, no gradient."""

        def log(values):
            return jnp.log(jnp.maximum(jax.lax.stop_gradient(values), TINY))

        each = -log(received) / self.tau_attention - log(size) / self.tau_size
        alike = log((cosines(x[:, even], x[:, odd]) + 1) / 2) / self.tau_similarity
        return alike + each[:, even, None] + each[:, None, odd]


REDUCER = MCTF
