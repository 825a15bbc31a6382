# SPDX-License-Identifier: Apache-2.0
"""The honest baseline: keep K patch tokens at random and drop the rest."""

import dataclasses

import jax
import jax.numpy as jnp

from evit_jax.plan.counts import Entry
from evit_jax.tokens import Reducer, Signals, Tokens, drop


@dataclasses.dataclass(frozen=True)
class Random(Reducer):
    """A method has to beat this one to have chosen anything.

    In training every image draws its own K at every step. In evaluation all images share one draw,
    fixed by `seed` and the block, so that a result does not depend on the batch an image came in.
    The kept tokens are in random order.
    """

    seed: int = 0  # of the draw used in evaluation

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        rngs = signals.rng
        if rngs is None:
            rngs = jax.random.fold_in(jax.random.key(self.seed), signals.layer)[None]
        scores = jax.vmap(lambda rng: jax.random.uniform(rng, (tokens.patches,)))(rngs)
        _, kept = jax.lax.top_k(scores, keep)
        return drop(tokens, jnp.broadcast_to(kept, (tokens.x.shape[0], keep)))


REDUCER = Random
