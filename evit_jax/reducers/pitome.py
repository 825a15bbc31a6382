# SPDX-License-Identifier: Apache-2.0
"""PiToMe: merge where many patches are alike, and protect those that are like no other.

Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging" (NeurIPS 2024).
"""

import dataclasses
import math

import jax.numpy as jnp

from evit_jax.errors import InputError
from evit_jax.plan.counts import Entry
from evit_jax.reducers._merging import cosines, merge, places, rank
from evit_jax.tokens import Reducer, Signals, Tokens


@dataclasses.dataclass(frozen=True)
class PiToMe(Reducer):
    """Orders n patch tokens by energy, pairs them alternately and merges n - K pairs.

    The energy of token i is the mean over j of elu(cos_ij - m), cosines of the keys averaged over
    heads: high in a large group of tokens that are alike, low for a token on its own. The margin m
    falls linearly, from `margin` in the first block to 0 behind the last.

    In descending order of energy, tokens at even places may be merged into tokens at odd ones.
      all         every even token finds its most similar odd one; the n - K closest pairs merge
      protected   only the first 2 (n - K) tokens take part, and all of their even ones merge
    The first half of the blocks does the one and the second half the other. A cluster becomes its
    mean, weighted by size. Kept tokens come in descending order of energy, those that can take in
    others last; ties go to the lower index.

    Proportional attention is on, as in the paper; public code for classification never passes
    sizes on, which turns it off. The paper keeps 0.9 to 0.95 of the tokens in every block.
    """

    weights_at_least_one = True

    margin: float = 0.75  # 0.9 for AugReg's ViTs, in the public code
    falling: bool = True  # False: the margin is the same in all blocks, 0.95 for CLIP
    protect_last: bool = True  # False: blocks of the first half protect, as for MAE
    proportional: bool = True  # later attention weighs a token by its size

    def __post_init__(self):
        if not 0 <= self.margin <= 1:
            raise InputError(f"pitome's margin is a cosine from 0 to 1, got {self.margin:g}")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def smallest(self, n: int, prefix: int) -> int:
        return n - n // 2

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        return n**2 * (width // num_heads)

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        n, removed = tokens.patches, tokens.patches - keep
        similarity = cosines(signals.keys()[:, tokens.prefix :])  # (B, n, n)
        above = similarity - self.margin_of(signals.layer, signals.depth)
        order = rank(jnp.mean(jnp.where(above > 0, above, jnp.expm1(above)), axis=2))

        even = order % 2 == 0
        if self.protects(signals.layer, signals.depth):
            taking = ~even & (order < 2 * removed)
            merged = even & (order < 2 * removed)
        else:
            taking = ~even
            best = jnp.max(jnp.where(taking[:, None], similarity, -jnp.inf), axis=2)
            merged = rank(jnp.where(even, best, -jnp.inf)) < removed
        target = jnp.argmax(jnp.where(taking[:, None], similarity, -jnp.inf), axis=2)
        place = places(~merged, order + n * taking)
        into = jnp.take_along_axis(place, target, axis=1)
        return merge(
            tokens,
            jnp.where(merged, into, place),
            tokens.size[:, tokens.prefix :],
            keep,
            proportional=self.proportional,
        )

    def margin_of(self, layer: int, depth: int) -> float:
        """m of a block."""
        return self.margin * (1 - layer / depth) if self.falling else self.margin

    def protects(self, layer: int, depth: int) -> bool:
        """Whether a block protects the tokens of low energy."""
        return (layer >= math.ceil(depth / 2)) == self.protect_last


REDUCER = PiToMe
