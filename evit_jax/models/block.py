# SPDX-License-Identifier: Apache-2.0
"""The block of a Vision Transformer, the only place where a reducer is called."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.models.attention import Attention
from evit_jax.models.layers import LayerScale, Mlp, dropout, fold, norm
from evit_jax.models.rotary import Rotary
from evit_jax.plan.counts import Entry
from evit_jax.tokens import Reducer, Signals, Tokens


def reduce(
    parent: nn.Module, reducer: Reducer, tokens: Tokens, signals: Signals, keep: Entry
) -> Tokens:
    """The reducer's result; one with parameters gets its own in `parent`.

    A Linen module that is passed as a field would share one set of parameters over all blocks.
    """
    if tokens.positions is not None:  # up to here, one image's may stand for those of all
        shape = *tokens.x.shape[:2], 2
        tokens = tokens.replace(positions=jnp.broadcast_to(tokens.positions, shape))
    if isinstance(reducer, nn.Module):
        reducer = reducer.clone(parent=parent, name="reduction")
    return reducer(tokens, signals, keep)


def recover(parent: nn.Module, reducer: Reducer, tokens: Tokens, signals: Signals) -> Tokens:
    """The same tokens, at the end of a block; in training, what a reducer recovers is reported."""
    patches, training = tokens.owner.shape[1], signals.train or parent.is_initializing()
    if not (training and reducer.recovers and tokens.patches < patches):
        return tokens
    network = reducer.reverse(patches).clone(parent=parent, name="recovery")
    return tokens.report(recovered=network(tokens.x[:, tokens.prefix :]))


class Block(nn.Module):
    """A block that may reduce its tokens; the switches are those of `Backbone` and `models.eva`."""

    num_heads: int
    hidden: int  # width of what enters the MLP's second layer
    reducer: Reducer
    keep: Entry = None  # patch tokens the reducer keeps; None does not reduce
    layer: int = 0  # the block's number
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    pallas: bool = False  # see `Backbone.pallas`
    layer_scale: float | None = None
    flat_layer_scale: bool = False
    branch_scale: float = 1.0  # what both residual branches are multiplied with, see `models.lvvit`
    post_norm: bool = False
    qk_norm: bool = False
    qkv_bias: bool | str = True
    proj_bias: bool = True
    inner_norm: bool = False
    mlp_norm: bool = False
    rotary: Rotary | None = None
    relative_grid: tuple[int, int] | None = None
    norm: str = "layer"
    norm_eps: float = 1e-6
    activation: str = "gelu"
    mlp: str = "plain"

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
        norms = dict(norm=self.norm, norm_eps=self.norm_eps)
        attention = Attention(
            self.num_heads,
            self.dtype,
            self.pallas,
            qkv_bias=self.qkv_bias,
            proj_bias=self.proj_bias,
            qk_norm=self.qk_norm,
            inner_norm=self.inner_norm,
            rotary=self.rotary,
            relative_grid=self.relative_grid,
            at_least_one=self.reducer.weights_at_least_one,
            **norms,
            name="attn",
        )
        enters = before if self.post_norm else self.normed("norm1", before)
        places = dict(positions=tokens.positions, prefix=tokens.prefix)
        y, parts = attention(enters, tokens.weight, first, **places)
        y = self.normed("norm1", y).astype(self.dtype) if self.post_norm else y
        y = self.scaled(1, y)
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

        mlp = Mlp(
            self.hidden,
            self.dropout_rate,
            self.dtype,
            kind=self.mlp,
            activation=self.activation,
            use_bias=self.proj_bias,
            inner_norm=self.inner_norm or self.mlp_norm,
            **norms,
            name="mlp",
        )
        enters = tokens.x if self.post_norm else self.normed("norm2", tokens.x)
        y = mlp(enters.astype(self.dtype), fold(rngs, 3))
        y = self.normed("norm2", y).astype(self.dtype) if self.post_norm else y
        y = self.scaled(2, y)
        y = dropout(y, self.drop_path_rate, fold(rngs, 4), whole=True)
        tokens = tokens.replace(x=tokens.x + y)
        if first is None:
            tokens = recover(self, self.reducer, tokens, signals)
        return tokens, signals

    def normed(self, name: str, x: jax.Array) -> jax.Array:
        """x (B, N, D) after the norm of this name, float32."""
        return norm(name, self.norm, self.norm_eps)(x)

    def scaled(self, branch: int, y: jax.Array) -> jax.Array:
        """A branch's y (B, N, D) on the scale on which it is added."""
        if self.branch_scale != 1:
            y = y * self.branch_scale
        if self.layer_scale is None:
            return y
        if not self.flat_layer_scale:
            return LayerScale(self.layer_scale, name=f"ls{branch}")(y)
        initial = nn.initializers.constant(self.layer_scale)
        return y * self.param(f"gamma_{branch}", initial, y.shape[-1:]).astype(y.dtype)[None, None]
