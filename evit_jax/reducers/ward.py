# SPDX-License-Identifier: Apache-2.0
"""Ward merging: join the patches whose joining loses least of what the class token looks at.

Ours, training-free. Ward's linkage (Ward 1963) joins the two clusters that add least to the sum of
squared distances from the means, which for masses m_i, m_j at a distance d is
m_i m_j / (m_i + m_j) d. Here the mass is attention, so what nobody looks at is joined first and
what matters is joined only with its like.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.plan.counts import Entry
from evit_jax.reducers._merging import cosines, first_least, merge, moments, rank
from evit_jax.reducers._scores import SCORES, Ranks, map_macs
from evit_jax.tokens import F32, Signals, Tokens, take

SMALLEST = 1e-6  # of a distance, so that equal tokens are joined in the order of their masses
TINY = 1e-9  # of a score relative to the mean, whose logarithm is taken
SMALLEST_IMPORTANCE = 1e-4  # relative to the mean: less is noise
SMALLEST_MEAN = 1e-30  # that is divided by: after the last attention nothing reads a patch
RIDGE = 30.0  # of the probe's regression


@dataclasses.dataclass(frozen=True)
class Ward(Ranks):
    """Merges n patch tokens into K, each removed one into the kept one that costs least.

    The mass of a token is its score plus `floor` of its size, each relative to the mean over
    patches. Joining i with a j of larger mass costs m_i m_j / (m_i + m_j) (1 - cos(x_i, x_j)), x
    without its mean over channels. The n - K tokens whose cheapest joining costs least are removed,
    each into the kept token that is cheapest for it. A cluster becomes the mean of its tokens
    weighted by mass, rescaled to their mean length. Kept tokens come in descending order of mass.

    A budget is met by a ramp that ends in a single patch, since nobody looks at patches after the
    last attention; where dense features are wanted, leave the last block out of `layers`.
    """

    ramped = True
    weights_at_least_one = True

    # What says how much a token matters, one of Top-K's scores, such as "class" attention or, where
    # there is no class token, attention "received" or the "shift" by attention.
    by: str = "class"
    floor: float = 0.1
    # The share of the tokens, those of least mass, that may be removed: fewer pairs to compare.
    candidates: float = 1.0
    proportional: bool = True  # later attention weighs a token by its size
    # From `calibrate`, 1 + D numbers for each block: the logarithm of the mass per size is that of
    # the score per size times the first, plus the normalized token times the others.
    probe: tuple[tuple[float, ...], ...] = dataclasses.field(default=(), repr=False)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def last(self, prefix: int) -> int | None:
        return 1 if prefix else None

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        return self.compared(n, keep) * n * width + map_macs(self.by, n, prefix, width)

    def compared(self, n: int, keep: int) -> int:
        """How many tokens may be removed: at least half as many again as are."""
        least = math.ceil(1.5 * (n - keep))
        return min(max(math.ceil(self.candidates * n), least), n)

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        prefix, n = tokens.prefix, tokens.patches
        removed, batch = n - keep, jnp.arange(tokens.x.shape[0])[:, None]
        mass = self.mass(tokens, signals)  # (B, n)
        order = rank(mass)  # (B, n): 0 has the largest mass

        x = tokens.x[:, prefix:]
        count = self.compared(n, keep)
        some = jnp.broadcast_to(jnp.arange(n), (batch.shape[0], n))
        if count < n:  # those of least mass
            _, some = jax.lax.top_k(order, count)  # (B, c)
        m, at = take(mass, some)[:, None], take(order, some)[:, None]
        # (B, n, c): what it costs to join each of the c, along the last axis, into each of the n.
        cosine = cosines(x, take(x, some) if count < n else None, center=True)
        joined = mass[:, :, None] * m / jnp.maximum(mass[:, :, None] + m, SMALLEST)
        cost = jnp.where(
            order[:, :, None] < at, joined * jnp.maximum(1 - cosine, SMALLEST), jnp.inf
        )

        _, cheapest = jax.lax.top_k(-jnp.min(cost, axis=1), removed)  # (B, n - K), among the c
        source = take(some, cheapest)
        kept = jnp.ones(mass.shape, bool).at[batch, source].set(False)
        into = first_least(jnp.where(kept[:, :, None], cost, jnp.inf))  # (B, c)
        # A kept token's place is its rank without those removed before it.
        gone = take(order, source)[:, None] < order[:, :, None]  # (B, n, n - K)
        place = order - jnp.sum(gone, axis=2, dtype=jnp.int32)
        place = place.at[batch, source].set(take(place, take(into, cheapest)))
        return merge(tokens, place, mass, keep, proportional=self.proportional, keep_length=True)

    def evidence(self, tokens: Tokens, signals: Signals, importance: jax.Array) -> Any:
        """Normal equations of the probe: (1 + D, 1 + D) and (1 + D,) float32."""
        features = self.features(tokens, signals)  # (B, n, 1 + D)
        importance = relative(importance[:, tokens.prefix :])
        wanted = 0.5 * jnp.log(importance + SMALLEST_IMPORTANCE)  # a length, not its square
        features -= jnp.mean(features, axis=1, keepdims=True)  # each image alone
        wanted -= jnp.mean(wanted, axis=1, keepdims=True)
        highest = dict(precision="highest")
        return (
            jnp.einsum("bnf,bng->fg", features, features, **highest),
            jnp.einsum("bnf,bn->f", features, wanted, **highest),
        )

    def learned(self, evidence: Sequence[Any]) -> "Ward":
        """With a probe by ridge regression, and half of the tokens compared."""
        probe = []
        for square, product in evidence:
            square = np.asarray(square, np.float64)
            weights = np.linalg.solve(square + RIDGE * np.eye(len(square)), np.asarray(product))
            probe.append(tuple(float(f"{weight:.5g}") for weight in weights))
        return dataclasses.replace(self, probe=tuple(probe), candidates=0.5)

    def features(self, tokens: Tokens, signals: Signals) -> jax.Array:
        """(B, n, 1 + D) float32: the logarithm of the score per size, and the normalized token."""
        x = tokens.x[:, tokens.prefix :].astype(F32)
        mean, square = moments(x)
        x = (x - mean[..., None]) / jnp.sqrt(square - mean**2 + 1e-6)[..., None]
        return jnp.concatenate([self.score_per_size(tokens, signals)[..., None], x], axis=-1)

    def score_per_size(self, tokens: Tokens, signals: Signals) -> jax.Array:
        """(B, n) float32, its logarithm."""
        score = relative(SCORES[self.by](signals)[:, tokens.prefix :])
        return jnp.log((score + TINY) / tokens.size[:, tokens.prefix :])

    def probed(self, tokens: Tokens, signals: Signals) -> jax.Array:
        """`features` times the probe: (B, n) float32, the logarithm of the mass per size.

        The token is normalized after its product with the probe, which so takes fewer steps.
        """
        first, *others = self.probe[signals.layer]
        weights = jnp.asarray(others, F32)
        x = tokens.x[:, tokens.prefix :].astype(F32)
        mean, square = moments(x)
        product = jnp.dot(x, weights, precision="highest") - mean * float(np.sum(others))
        product = product / jnp.sqrt(square - mean**2 + 1e-6)
        return product + first * self.score_per_size(tokens, signals)

    def mass(self, tokens: Tokens, signals: Signals) -> jax.Array:
        """(B, n) float32 > 0."""
        size = tokens.size[:, tokens.prefix :]
        if self.probe:
            per_size = self.probed(tokens, signals)
            score = jnp.exp(per_size - jnp.max(per_size, axis=1, keepdims=True)) * size
        else:
            score = SCORES[self.by](signals)[:, tokens.prefix :]
        return jax.lax.stop_gradient(relative(score) + self.floor * relative(size))


def relative(values: jax.Array) -> jax.Array:
    """(B, n) >= 0, relative to their mean over the tokens; all 0 if they are."""
    return values / jnp.maximum(jnp.mean(values, axis=1, keepdims=True), SMALLEST_MEAN)


REDUCER = Ward
