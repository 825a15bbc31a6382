# SPDX-License-Identifier: Apache-2.0
"""ATS: sample patches by what they give the class token (Fayyaz et al., ECCV 2022).

Adaptive token sampling: an image whose attention sits on few patches keeps fewer of them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from evit_jax.plan.counts import Entry
from evit_jax.reducers._scores import (
    SCORES,
    Ranks,
    class_value,
    value,
)
from evit_jax.tokens import F32, Signals, Tokens, drop, follow


@dataclasses.dataclass(frozen=True)
class ATS(Ranks):
    """Has K slots for patch tokens, of which an image fills as many as it samples.

    The score of token j is its share of the sum over heads of a_hj ||v_hj||, a_hj the class token's
    attention and v_hj the token's values. Sorted ascending and summed up, scores are a distribution
    function, stretched to [0, 1]; K points, evenly spaced from its smallest value above 0 to 1,
    each take the token whose value is nearest. A token with a large score is taken by several
    points: the first slot has it, and the others stay empty, with weight 0, size 0, x = 0 and no
    patches. Nothing attends to them later, but computation and memory are those of K slots.

    The paper samples the queries inside attention, with all keys. Here attention is complete and
    the same tokens are taken after it: an output of attention depends on its own query alone, so
    they are equal, and only the rows of attention that the paper saves in this block are not saved.
    Paper and public code begin at block 3 of 12. A block with as many slots as it has tokens does
    not sample, and the public code's minimum of 8 tokens is for the plan to say.
    """

    whole: bool = False  # as in the public code, mean over heads of a_hj times ||v_j|| of all heads
    # What is multiplied by the norm of the values: another of Top-K's scores in place of the mean
    # of a_hj, for a model without a class token; then that of all heads.
    by: str = "class"

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth // 4, depth))

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        prefix = tokens.prefix
        if self.by == "class" and not self.whole:
            scores = class_value(signals)
        else:
            scores = SCORES[self.by](signals) * value(signals)
        scores = jax.lax.stop_gradient(scores[:, prefix:])
        taken, first = sample(scores, tokens.size[:, prefix:] > 0, keep)  # (B, K)
        fills = first[:, None] & (taken[:, None] == jnp.arange(tokens.patches)[None, :, None])
        place = jnp.argmax(fills, axis=2).astype(jnp.int32)  # (B, n)
        place = jnp.where(jnp.any(fills, axis=2), place, -1)
        reduced = drop(tokens, taken)
        full = jnp.pad(first, ((0, 0), (prefix, 0)), constant_values=True)  # (B, prefix + K)
        weight = jnp.ones_like(reduced.size) if reduced.weight is None else reduced.weight
        return reduced.replace(
            x=jnp.where(full[..., None], reduced.x, 0),
            size=jnp.where(full, reduced.size, 0),
            owner=follow(tokens.owner, place),
            weight=jnp.where(full, weight, 0),
        )


def sample(scores: jax.Array, there: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The token that each point of the distribution function takes, and whether it is the first to.

    Args:
      scores: (B, n) float32 >= 0.
      there: (B, n) bool, False for empty slots, which nothing takes.

    Returns:
      (B, count) int32 and bool.
    """
    order = jnp.argsort(jnp.where(there, scores, -1), axis=1, stable=True)  # empty ones first
    there = jnp.take_along_axis(there, order, axis=1)
    values = jnp.take_along_axis(scores, order, axis=1)
    values = jnp.cumsum(jnp.where(there, values, 0), axis=1)

    def smallest(of, values):
        return jnp.min(jnp.where(of, values, jnp.inf), axis=1, keepdims=True)

    low = smallest(there, values)
    values = (values - low) / jnp.maximum(values[:, -1:] - low, jnp.finfo(F32).tiny)
    start = smallest(there & (values > 0), values)
    start = jnp.where(start > 1, 1, start)  # one token has it all
    steps = jnp.linspace(0, 1, count)[None] if count > 1 else jnp.ones((1, 1))
    points = start + (1 - start) * steps  # (B, K)
    apart = jnp.abs(points[:, :, None] - values[:, None])  # (B, K, n)
    nearest = jnp.argmin(jnp.where(there[:, None], apart, jnp.inf), axis=2)
    taken = jnp.take_along_axis(order, nearest, axis=1).astype(jnp.int32)
    earlier = jnp.tril(jnp.ones((count, count), bool), -1)[None]
    again = jnp.any(earlier & (taken[:, :, None] == taken[:, None]), axis=2)
    return taken, ~again


REDUCER = ATS
