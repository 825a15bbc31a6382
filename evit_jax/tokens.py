# SPDX-License-Identifier: Apache-2.0
"""The seam between a Vision Transformer's blocks and a token-reduction method.

Between attention and MLP of a reducing block the model calls

    tokens = reducer(tokens, signals, keep)

and goes on with whatever came back. `Tokens` carries everything later blocks and users need to know
about the tokens, `Signals` what this block's attention saw, and `keep` is a Python int, the number
of patch tokens to keep, so every shape is known before tracing. A reducer is a frozen dataclass:
hashable, so it is part of the compile key, and it never looks at the model. One file in this folder
is one method, found by its file name; the contract tests pick it up from there.

Letters: B images, P original patches, N tokens now (prefix included), n patch tokens now
(N - prefix), K patch tokens kept, D width, C width of one head.

The contract
  * The first `prefix` tokens (class, distillation, registers) come back untouched, first, in order.
  * Exactly K + `extra` patch tokens come back. `keep` is never n: the plan says None instead.
  * `owner` says for every original patch in which patch token it now is, or -1.
  * Total `size` never grows; a method that merges conserves it.
  * Each image is treated alone, and gradients are finite.

How each family of methods fits
  * Drop (EViT without fusing, Top-K): `drop(tokens, kept)`. Dropped patches get owner -1.
  * Fuse (EViT): `extra = 1`; the fused token goes last and owns everything that was not kept.
  * Size-weighted merging (ToMe, DiffRate): `size` holds the patches inside each token; the new x is
    a mean weighted with it, sizes are summed, and `follow` moves the owners of a source to its
    destination. Proportional attention is `weight = size`: later blocks multiply exp(logit) of a
    key by its weight. `size` alone changes nothing, so EViT's fused token gets no bonus. A method
    with two counts per block (prune to, merge to) gets a static tuple as `keep`.
  * Soft assignment (PatchMerger, Sinkhorn): `owner` is the argmax.
  * Training masks (DynamicViT, DiffRate's search): in training (`signals.train`) return all tokens
    and set `weight` to the straight-through mask. Attention counts a token's own weight as at
    least 1, so a masked token still sees itself and no row is empty; a log bias would not do, the
    gradient of log 0 is infinite. Outside training drop for real.
  * Validity slots (ATS): K slots, empty ones with weight 0, size 0 and no owner. No other token
    attends to a slot of weight 0.
  * Methods with weights of their own (predictors, learnt queries): a Linen module in the same
    field, cloned by each reducing block, so that every block has its own weights. What their loss
    needs goes into the model's `out`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from evit_jax.plan.counts import Keep, quarter_layers


@struct.dataclass
class Tokens:
    """The tokens that flow from block to block.

    x       (B, N, D) compute dtype.
    size    (B, N) float32, how many original patches each token stands for; a prefix token has 1.
    owner   (B, P) int32, which patch token holds each original patch, counted from 0 behind the
            prefix in the current order; -1 if it was dropped.
    weight  (B, N) float32 >= 0 or None. Multiplies exp(logit) of that key in later attention.
            None is the plain softmax, to the last bit.
    prefix  static: the first tokens, never reduced.
    """

    x: jax.Array
    size: jax.Array
    owner: jax.Array
    weight: jax.Array | None = None
    prefix: int = struct.field(pytree_node=False, default=1)

    @property
    def patches(self) -> int:
        """n, the patch tokens present."""
        return self.x.shape[1] - self.prefix


@struct.dataclass
class Signals:
    """What a reducer may look at, as seen by the attention just before it.

    cls_attention  (B, N) float32, the class token's row of the softmax, mean over heads.
    keys           (B, N, C) compute dtype, mean over heads.
    key            (B,) random keys in training, one per image (None otherwise), for methods that
                   sample.
    layer, train   static: the block's number and whether the model is training.
    """

    cls_attention: jax.Array
    keys: jax.Array
    key: jax.Array | None = None
    layer: int = struct.field(pytree_node=False, default=0)
    train: bool = struct.field(pytree_node=False, default=False)


@dataclasses.dataclass(frozen=True)
class Reducer:
    """Base of all methods: the three numbers that the token plan asks for, and the call."""

    @property
    def extra(self) -> int:
        """Patch tokens appended on top of the K kept."""
        return 0

    def smallest(self, n: int, prefix: int) -> int:
        """The fewest of n patch tokens this method can keep."""
        del n, prefix
        return 1

    def schedule(self, patches: int, prefix: int, layers: tuple[int, ...], depth: int) -> Keep:
        """What each block keeps when the user names neither rates nor counts: everything."""
        del patches, prefix, layers
        return (None,) * depth

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """The blocks that reduce when the user names none."""
        return quarter_layers(depth)

    def __call__(self, tokens: Tokens, signals: Signals, keep: int) -> Tokens:
        raise TypeError(f"{type(self).__name__} does not define how it reduces tokens")


def follow(owner: jax.Array, destination: jax.Array) -> jax.Array:
    """Moves patches along with their tokens.

    Args:
      owner: (B, P) int32, patch -> token before, -1 if dropped.
      destination: (B, n) int32, token before -> token after, -1 if dropped.

    Returns:
      (B, P) int32, patch -> token after.
    """
    moved = jnp.take_along_axis(destination, jnp.maximum(owner, 0), axis=1, mode="clip")
    return jnp.where(owner < 0, -1, moved)


def destinations(kept: jax.Array, n: int, rest: int) -> jax.Array:
    """(B, K) indices of kept tokens -> (B, n) int32 new positions, `rest` for all the others."""
    batch, count = kept.shape
    rows = jnp.arange(batch)[:, None]
    positions = jnp.arange(count, dtype=jnp.int32)[None]
    return jnp.full((batch, n), rest, jnp.int32).at[rows, kept].set(positions, unique_indices=True)


def drop(tokens: Tokens, kept: jax.Array) -> Tokens:
    """Keeps the prefix and the patch tokens `kept` (B, K), in that order; the rest is gone."""
    prefix = jnp.broadcast_to(jnp.arange(tokens.prefix), (kept.shape[0], tokens.prefix))
    index = jnp.concatenate([prefix, kept + tokens.prefix], axis=1)

    def gather(array):  # (B, N) -> (B, prefix + K); `kept` is in bounds by construction
        return jnp.take_along_axis(array, index, axis=1, mode="promise_in_bounds")

    return tokens.replace(
        x=jnp.take_along_axis(tokens.x, index[..., None], axis=1, mode="promise_in_bounds"),
        size=gather(tokens.size),
        owner=follow(tokens.owner, destinations(kept, tokens.patches, rest=-1)),
        weight=None if tokens.weight is None else gather(tokens.weight),
    )


def unmerge(x: jax.Array, owner: jax.Array, *, prefix: int) -> jax.Array:
    """Dense features back: every original patch gets the features of the token it now is in.

    Exact for a patch that was kept; a patch that was merged or fused shares its token's features,
    and one that was dropped gets zeros (`owner < 0` tells which).

    Args:
      x: (B, N, D) tokens, such as `out["blocks"][-1]`.
      owner: (B, P) int32, such as `out["owner"][-1]`.
      prefix: `model.prefix`, 2 for distilled models.

    Returns:
      (B, P, D), patches in row-major order of `model.grid`.
    """
    index = jnp.maximum(owner, 0)[..., None] + prefix
    features = jnp.take_along_axis(x, index, axis=1, mode="clip")
    return jnp.where(owner[..., None] < 0, jnp.zeros((), x.dtype), features)
