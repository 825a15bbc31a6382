# SPDX-License-Identifier: Apache-2.0
"""Representation shift: keep the patches that the layer changed most (ICCV 2025, arXiv 2508.00367).

It needs neither an attention map nor a class token, so it goes with any attention kernel.
"""

import dataclasses
import math

from evit_jax.errors import InputError
from evit_jax.plan.counts import Entry, Keep
from evit_jax.reducers._scores import best, importance
from evit_jax.tokens import Reducer, Signals, Tokens, drop


@dataclasses.dataclass(frozen=True)
class Shift(Reducer):
    """Keeps the K patch tokens that attention moved furthest, in descending order of the shift.

    The shift is ||after - before||, the L2 norm of what the attention branch added to a token. The
    paper takes it over the MLP, its best choice; here the reducer stands before the MLP, which then
    works on the kept tokens alone, so the shift is attention's. With stochastic depth, an image
    whose attention branch was left out has no shifts: it keeps its first K tokens.

    Without rates, blocks 1, 4, 7 of 12 each drop a fifth of their tokens, as in the paper. Where
    the model's rates or counts are to decide, say rate=1.
    """

    rate: float = 0.8  # of the tokens, kept at each of its layers; 1 leaves it to the model's plan

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise InputError(f"shift's rate is in (0, 1], got {self.rate}")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({depth * twelfth // 12 for twelfth in (1, 4, 7)}))

    def schedule(self, patches: int, prefix: int, layers: tuple[int, ...], depth: int) -> Keep:
        keep, n = [], patches
        for block in range(depth):
            now = math.ceil(self.rate * n) if block in layers else n
            keep.append(now if now < n else None)
            n = now
        return tuple(keep)

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        return drop(tokens, best(importance("shift", tokens, signals), tokens, keep))


REDUCER = Shift
