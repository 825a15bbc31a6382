# SPDX-License-Identifier: Apache-2.0
"""Ward merging: join the patches whose joining loses least of what the class token looks at.

Ours, training-free. Ward's linkage (Ward 1963) joins the two clusters that add least to the sum of
squared distances from the means, which for masses m_i, m_j at a distance d is
m_i m_j / (m_i + m_j) d. Here the mass is attention, so what nobody looks at is joined first and what
matters is joined only with its like.
"""

import dataclasses

import jax
import jax.numpy as jnp

from evit_jax.plan.counts import Entry
from evit_jax.reducers._merging import cosines, merge, places, rank
from evit_jax.tokens import F32, Reducer, Signals, Tokens

SMALLEST = 1e-6  # of a distance: equal tokens are joined in the order of their masses


@dataclasses.dataclass(frozen=True)
class Ward(Reducer):
    """Merges n patch tokens into K, each removed one into the kept one with the smallest cost.

    The mass of a token is its class attention plus `floor` of its size, each relative to the mean
    over patches. Tokens are ordered by mass. Joining i with a j before it costs
    m_i m_j / (m_i + m_j) (1 - cos(x_i, x_j)), x without its mean over channels; the n - K tokens
    whose cheapest joining costs least are removed, each into the kept token that is cheapest for
    it. A cluster becomes the mean of its tokens weighted by mass, rescaled to their mean length.
    Kept tokens come in descending order of mass.
    """

    floor: float = 0.1
    proportional: bool = True  # later attention weighs a token by its size

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        return n**2 * width

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        prefix = tokens.prefix
        mass = self.mass(tokens, signals)  # (B, n)
        order = rank(mass)
        x = tokens.x[:, prefix:].astype(F32)
        x = (x - jnp.mean(x, axis=-1, keepdims=True)).astype(tokens.x.dtype)
        distance = jnp.maximum(1 - cosines(x), SMALLEST)  # (B, n, n)
        joined = mass[:, :, None] * mass[:, None] / (mass[:, :, None] + mass[:, None])
        before = order[:, None] < order[:, :, None]  # (B, i, j): j has the larger mass
        cost = jnp.where(before, joined * distance, jnp.inf)
        kept = rank(jnp.min(cost, axis=2)) < keep  # those whose cheapest joining is dearest
        place = places(kept, order)
        target = jnp.argmin(jnp.where(kept[:, None], cost, jnp.inf), axis=2)
        into = jnp.take_along_axis(place, target, axis=1)
        return merge(
            tokens,
            jnp.where(kept, place, into),
            mass,
            keep,
            proportional=self.proportional,
            keep_length=True,
        )

    def mass(self, tokens: Tokens, signals: Signals) -> jax.Array:
        """(B, n) float32 > 0."""
        attention = signals.class_attention()[:, tokens.prefix :]
        size = tokens.size[:, tokens.prefix :]

        def relative(values):
            return values / jnp.mean(values, axis=1, keepdims=True)

        return jax.lax.stop_gradient(relative(attention) + self.floor * relative(size))


REDUCER = Ward
