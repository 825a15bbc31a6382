# SPDX-License-Identifier: Apache-2.0
"""The block of a Vision Transformer, the only place where a reducer is called."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.models.attention import Attention
from evit_jax.models.layers import Mlp, dropout, fold, norm
from evit_jax.plan.counts import Entry
from evit_jax.tokens import Reducer, Signals, Tokens


def reduce(
    parent: nn.Module, reducer: Reducer, tokens: Tokens, signals: Signals, keep: Entry
) -> Tokens:
    """The reducer's result; one with parameters gets its own in `parent`.

    A Linen module that is passed as a field would share one set of parameters over all blocks.
    """
    if isinstance(reducer, nn.Module):
        reducer = reducer.clone(parent=parent, name="reduction")
    return reducer(tokens, signals, keep)


class Block(nn.Module):
    """A pre-norm block that may reduce its tokens."""

    num_heads: int
    hidden: int  # width of the MLP
    reducer: Reducer
    keep: Entry = None  # patch tokens the reducer keeps; None does not reduce
    layer: int = 0  # the block's number
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    pallas: bool = False  # see `Backbone.pallas`

    @nn.compact
    def __call__(
        self, tokens: Tokens, signals: Signals, rngs: jax.Array | None, first: int | None = None
    ) -> tuple[Tokens, Signals]:
        """The tokens after the block, and the signals of its attention.

        Args:
          tokens: those before it.
          signals: of the block before.
          rngs: (B,) random keys, one per image, for what a training model draws; None draws
            nothing.
          first: compute only the first `first` tokens; the others are attended to but not returned.
        """
        site = self.reducer.site if self.keep is not None else None
        signals = signals.replace(layer=self.layer, rng=fold(rngs, 2))
        if site == "input":
            tokens = reduce(self, self.reducer, tokens, signals, self.keep)

        before = tokens.x
        attention = Attention(self.num_heads, self.dtype, self.pallas, name="attn")
        y, parts = attention(norm("norm1")(before), tokens.weight, first)
        y = dropout(y, self.dropout_rate, fold(rngs, 0))
        y = dropout(y, self.drop_path_rate, fold(rngs, 1), whole=True)
        signals = signals.replace(
            **parts, before=before, after=before[:, :first] + y, weight=tokens.weight
        )
        tokens = tokens.replace(
            x=signals.after,
            size=tokens.size[:, :first],
            weight=None if tokens.weight is None else tokens.weight[:, :first],
            positions=None if tokens.positions is None else tokens.positions[:, :first],
        )
        if site == "between" and first is None:
            tokens = reduce(self, self.reducer, tokens, signals, self.keep)

        mlp = Mlp(self.hidden, self.dropout_rate, self.dtype, name="mlp")
        y = mlp(norm("norm2")(tokens.x).astype(self.dtype), fold(rngs, 3))
        y = dropout(y, self.drop_path_rate, fold(rngs, 4), whole=True)
        return tokens.replace(x=tokens.x + y), signals
