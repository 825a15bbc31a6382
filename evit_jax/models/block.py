# SPDX-License-Identifier: Apache-2.0
"""The parts of a Vision Transformer: attention that reports what it saw, MLP, and the block.

Letters: B images, N tokens, H heads, C head width, D width. Parameters are float32; `dtype` is the
compute dtype; softmax and norms run in float32.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.models.attention import Attention
from evit_jax.models.layers import Mlp, dropout, fold, norm
from evit_jax.tokens import Reducer, Signals, Tokens


class Block(nn.Module):
    """A pre-norm block that may reduce its tokens between attention and MLP."""

    num_heads: int
    hidden: int  # width of the MLP
    reducer: Reducer
    keep: int | None = None  # patch tokens the reducer keeps; None does not reduce
    layer: int = 0  # the block's number
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    train: bool = False  # what reducers are told
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Tokens, keys: jax.Array | None, first: int | None = None
    ) -> tuple[Tokens, jax.Array]:
        """Returns the tokens after the block and the class token's attention (B, N) before it.

        `keys` (B,) are random, one per image, for what a training model draws; None draws nothing.
        With `first` only so many of the first tokens are worked out and none is reduced; the others
        are looked at and gone.
        """
        attention = Attention(self.num_heads, self.dtype, name="attn")
        y, row, seen = attention(norm("norm1")(tokens.x), tokens.weight, first)
        y = dropout(y, self.dropout_rate, fold(keys, 0))
        y = dropout(y, self.drop_path_rate, fold(keys, 1), whole=True)
        tokens = tokens.replace(x=tokens.x[:, :first] + y, size=tokens.size[:, :first])
        if self.keep is not None and first is None:
            signals = Signals(row, seen, key=fold(keys, 2), layer=self.layer, train=self.train)
            tokens = self.reducer(tokens, signals, self.keep)
        mlp = Mlp(self.hidden, self.dropout_rate, self.dtype, name="mlp")
        y = mlp(norm("norm2")(tokens.x).astype(self.dtype), fold(keys, 3))
        y = dropout(y, self.drop_path_rate, fold(keys, 4), whole=True)
        return tokens.replace(x=tokens.x + y), row
