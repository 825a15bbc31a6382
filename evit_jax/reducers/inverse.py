# SPDX-License-Identifier: Apache-2.0
"""A diagnostic: keep the patches that score lowest, where Top-K keeps the highest.

A score that says which patches matter has Top-K above random, and this one below.
"""

import dataclasses

from evit_jax.plan.counts import Entry
from evit_jax.reducers._scores import best, importance
from evit_jax.reducers.topk import TopK
from evit_jax.tokens import Signals, Tokens, drop


@dataclasses.dataclass(frozen=True)
class Inverse(TopK):
    """Keeps the K patch tokens with the lowest score, in ascending order of it.

    `by` names the score, as in Top-K; ties go to the lower index.
    """

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        return drop(tokens, best(-importance(self.by, tokens, signals), tokens, keep))


REDUCER = Inverse
