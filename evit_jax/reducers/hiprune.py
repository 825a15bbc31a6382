# SPDX-License-Identifier: Apache-2.0
"""HiPrune: select what an encoder hands on, for a language model or another reader of its patches.

Training-free, from Danielement321/HiPrune: the attention of a middle block finds objects, that of
the last one the tokens that gather the rest of the image.
"""

import dataclasses

import jax
import jax.numpy as jnp

from evit_jax.errors import InputError
from evit_jax.plan.counts import Entry
from evit_jax.reducers._merging import at_place, total
from evit_jax.reducers._scores import best
from evit_jax.tokens import F32, Reducer, Signals, Tokens, drop


@dataclasses.dataclass(frozen=True)
class HiPrune(Reducer):
    """Keeps K patch tokens of the encoder's output, in their own order; the encoder runs in full.

    Scores are attention received, mean over heads and all queries, so no class token is needed.
      anchors    the round(alpha K / 5) tokens with the highest score in the block `shallow`
      buffers    the neighbors of an anchor above, below, left and right
      registers  of the others those with the highest score in the last block, up to K
    Neighbors are found by rows and columns of the grid, where public code adds and subtracts 1 and
    24 and so takes the far end of the next row for a neighbor.
    """

    site = "output"
    alpha: float = 0.1  # share of K for anchors and buffers
    shallow: int | None = None  # a block; the default is 3/8 of the depth, 9 of 24 as in the paper

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise InputError(f"hiprune's alpha is in [0, 1], got {self.alpha}")

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        return 2 * (prefix + n) ** 2 * width

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        blocks = signals.blocks or (signals,)
        middle = len(blocks) * 3 // 8 if self.shallow is None else self.shallow
        if not 0 <= middle < len(blocks):
            raise InputError(
                f"hiprune's shallow is a block from 0 to {len(blocks) - 1}, got {middle}"
            )
        shallow, deep = (
            jax.lax.stop_gradient(blocks[block].received_attention()[:, tokens.prefix :])
            for block in (middle, -1)
        )
        first = near(tokens, shallow, round(self.alpha * keep / 5), signals.grid)
        priority = 2 * first + deep / jnp.max(deep, axis=1, keepdims=True)
        return drop(tokens, jnp.sort(best(priority, tokens, keep), axis=1))


def near(tokens: Tokens, scores: jax.Array, count: int, grid: tuple[int, int]) -> jax.Array:
    """Anchors and buffers: (B, n) bool, the `count` best tokens and their neighbors in the grid."""
    if not count:
        return jnp.zeros(scores.shape, bool)
    batch, n = scores.shape
    chosen = best(scores, tokens, count)
    anchors = jnp.zeros((batch, n), bool).at[jnp.arange(batch)[:, None], chosen].set(True)
    # Patch by patch, wherever each now is.
    flags = at_place(anchors, tokens.owner) & (tokens.owner >= 0)
    flags = jnp.pad(flags.reshape(batch, *grid), ((0, 0), (1, 1), (1, 1)))
    middle, up, down = flags[:, 1:-1, 1:-1], flags[:, :-2, 1:-1], flags[:, 2:, 1:-1]
    flags = middle | up | down | flags[:, 1:-1, :-2] | flags[:, 1:-1, 2:]
    return total(flags.reshape(batch, -1).astype(F32), tokens.owner, n) > 0


REDUCER = HiPrune
