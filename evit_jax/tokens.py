# SPDX-License-Identifier: Apache-2.0
"""The seam between a Vision Transformer's blocks and a token-reduction method.

In a reducing block the model calls

    tokens = reducer(tokens, signals, keep)

and continues with whatever came back. `Tokens` carries everything that later blocks and users need
to know about the tokens, `Signals` what the attention before the reducer was made of, and `keep` is
static, the number of patch tokens to keep, so every shape is known before tracing. One file in
`reducers/` is one method, found by its file name; the contract tests pick it up from there.

Letters: B images, P original patches, N tokens now (prefix included), n patch tokens now
(N - prefix), K patch tokens kept, H heads, C width of one head, D width.

The contract
  * The first `prefix` tokens (class, distillation, registers) come back untouched, first, in order.
  * Exactly K + `extra` patch tokens come back. `keep` is never n: the plan says None instead. It is
    more than n only for a method that `brings_back` what it removed.
  * `owner` says for every original patch which patch token now holds it, or -1.
  * Total `size` never grows; a method that merges conserves it.
  * `positions`, where there are any, stay with their tokens: a kept token's to the last bit, of
    merged tokens a mean of coordinates, from which angles and biases are computed again.
  * Each image is treated alone, and gradients are finite.

A reducer is a frozen dataclass, or a Linen module where it has parameters: both are hashable, so
they are part of the compile key. It never looks at the model. How each family of methods fits:

  * Drop (EViT without fusing, Top-K): `drop(tokens, kept)`. Dropped patches get owner -1.
  * Fuse (EViT): `extra = 1`; the fused token goes last and owns everything that was not kept.
  * Size-weighted merging (ToMe, DiffRate): `size` holds the patches inside each token; the new x is
    a mean weighted by it, sizes are summed, and `follow` moves the owners of a source to its
    destination. Proportional attention is `weight = size`: later blocks multiply exp(logit) of a
    key by its weight. `size` alone changes nothing, so EViT's fused token gets no bonus.
  * Two counts per block (prune to, merge to): the plan's entry, and so `keep`, is a static tuple;
    the last one is what the block is left with.
  * Soft assignment (PatchMerger, SiT): `owner` is the argmax, and every token stands for an equal
    part of the patches.
  * Training masks (DynamicViT, DiffRate's search): in training (`signals.train`) return all tokens
    and set `weight` to the straight-through mask. Attention counts a token's own weight as at
    least 1, so a masked token still sees itself and no row is empty; a log bias would not do, since
    the gradient of log 0 is infinite. Outside training drop for real.
  * Empty slots (ATS): K slots, empty ones with weight 0, size 0 and no owner. No other token
    attends to a slot of weight 0.
  * Parameters (predictors, learned queries): a class that derives from both `nn.Module` and
    `Reducer`. Every reducing block clones it, so that each has parameters of its own, under
    `blocks_I/reduction`. What a loss or a user needs, `tokens.report(name=value)` puts into the
    model's `out["aux"]`; training adds what is reported as `loss` to the loss, and the cross
    entropy of what is reported as `logits`. What is for training alone is made where
    `signals.train`, or where parameters are drawn (`self.is_initializing()`).
  * Tokens that training makes whole again (SiT): `recovers`. After every block that leaves fewer
    patch tokens than P, a network of the reducer's makes all P of them, with parameters of its own
    under `blocks_I/recovery`, and `recovered` is reported. Nothing of it is left in evaluation.
  * Removed tokens that return (Cropr's last layer fusion): `brings_back`. What is removed waits in
    `aside`; before the last block `keep` is P, and `append` makes one of both.
  * Another place than between attention and MLP: `site`, see `Reducer`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from evit_jax.errors import InputError
from evit_jax.plan.counts import Entry, Keep, quarter_layers
from evit_jax.runtime.forms import EXACT, Form, by_chip
from evit_jax.runtime.layouts import tokens_outside


@struct.dataclass
class Tokens:
    """The tokens that flow from block to block.

    x          (B, N, D) compute dtype.
    size       (B, N) float32, original patches that each token stands for; 1 for a prefix token.
    owner      (B, P) int32, which patch token holds each original patch, counted from 0 behind the
               prefix in the current order; -1 if it was dropped.
    weight     (B, N) float32 >= 0 or None. Multiplies exp(logit) of that key in later attention.
               None is the plain softmax, to the last bit.
    positions  (B, N, 2) float32 or None: row and column of each token in patches, where attention
               needs to know (rotary positions, relative bias); those of prefix tokens mean nothing.
               Before anything is reduced (1, N, 2), alike in all images; a reducer gets B.
    aux        name -> what each reducing block reported under it, in order; see `report`.
    aside      removed patch tokens that will return, without a prefix; None: none do.
    prefix     static: how many tokens at the front are never reduced.
    """

    x: jax.Array
    size: jax.Array
    owner: jax.Array
    weight: jax.Array | None = None
    positions: jax.Array | None = None
    aux: dict[str, tuple[jax.Array, ...]] = struct.field(default_factory=dict)
    aside: "Tokens | None" = None
    prefix: int = struct.field(pytree_node=False, default=1)

    @property
    def patches(self) -> int:
        """n, the patch tokens present."""
        return self.x.shape[1] - self.prefix

    def report(self, **values: jax.Array) -> "Tokens":
        """The same tokens, with values for `out["aux"]`.

        Args:
          **values: (B, ...) arrays, one entry per image. `loss` (B,) is added to the training loss,
            and so is the cross entropy of `logits` (B, num_classes) with the images' targets.
        """
        reported = {name: (*self.aux.get(name, ()), value) for name, value in values.items()}
        return self.replace(aux=self.aux | reported)


@struct.dataclass
class Signals:
    """What the attention before a reducer was made of, and the scores that follow from it.

    Reducers call the methods. Under jit nothing is computed that no reducer calls, so there are no
    flags and no declared needs. At the site "input" it is the attention of the block before; the
    first block has none, and asking for it is an error.

    q, k, v      (B, H, N, C) compute dtype, as attention used them; q is scaled by C^-0.5.
    row          (B, H, N) float32, the logits of the first token's query, up to a number that all
                 keys share; where attention leaves it out, `class_rows` takes it from q and k.
    before       (B, N, D) the tokens that entered the attention branch (before its norm).
    after        (B, N, D) the tokens after its residual connection.
    weight       (B, N) `Tokens.weight` as attention used it, or None.
    plain_q,
    plain_k      q and k before positions were applied to them; None where none are.
    bias         (B or 1, H, N, N) float32, what positions add to the logits; None: nothing. `row`
                 has it.
    probe        (B, H, D) float32, map pooling's query as it asks tokens that are standardized as
                 by the last norm; None: the model has no map pooling.
    rng          (B,) random keys in training, one per image (None otherwise), for sampling.
    blocks       at the site "output": the signals of every block, else ().
    class_token  static: whether the first token is a class token.
    last_norm    static: kind and epsilon of the last norm, None where there is none.
    grid         static: rows and columns of the original patches.
    prefix, layer, depth, train   static: tokens never reduced, this block's number, the number of
                 blocks, and whether the model is training.
    plan         static: what each block keeps; () where there is no plan.
    num_classes  static: of the model's classifier; 0: it has none.
    mlp_macs     static: multiply-accumulates of a block's MLP for one token.
    """

    q: jax.Array | None = None
    k: jax.Array | None = None
    v: jax.Array | None = None
    row: jax.Array | None = None
    before: jax.Array | None = None
    after: jax.Array | None = None
    weight: jax.Array | None = None
    plain_q: jax.Array | None = None
    plain_k: jax.Array | None = None
    bias: jax.Array | None = None
    probe: jax.Array | None = None
    rng: jax.Array | None = None
    blocks: tuple["Signals", ...] = ()
    class_token: bool = struct.field(pytree_node=False, default=True)
    last_norm: tuple[str, float] | None = struct.field(pytree_node=False, default=("layer", 1e-6))
    grid: tuple[int, int] | None = struct.field(pytree_node=False, default=None)
    prefix: int = struct.field(pytree_node=False, default=1)
    layer: int = struct.field(pytree_node=False, default=0)
    depth: int = struct.field(pytree_node=False, default=1)
    train: bool = struct.field(pytree_node=False, default=False)
    plan: Keep = struct.field(pytree_node=False, default=())
    num_classes: int = struct.field(pytree_node=False, default=0)
    mlp_macs: int = struct.field(pytree_node=False, default=0)

    def class_attention(self) -> jax.Array:
        """(B, N) float32: what the class token attends to, mean over heads; each row sums to 1.

        Raises:
          InputError: the model has no class token.
        """
        return jnp.mean(self.class_rows(), axis=1)

    def class_rows(self) -> jax.Array:
        """(B, H, N) float32: `class_attention` of each head."""
        self.need_attention()
        if not self.class_token:
            raise InputError(
                "this reducer ranks patches by the class token's attention, and the model has no "
                "class token; choose a reducer that does without one, such as tome"
            )
        # One row as its own small softmax, so that attention itself is free to be a fused kernel,
        # which keeps no map.
        row, weight = self.row, self.weight
        if row is None:
            row = jnp.einsum("bhc,bhkc->bhk", self.q[:, :, 0], self.k, preferred_element_type=F32)
            row = row if self.bias is None else row + self.bias[:, :, 0]
        if weight is not None:
            weight = weight.at[:, 0].set(jnp.where(weight[:, 0] <= 1, 1.0, weight[:, 0]))[:, None]
        unscaled, total = softmax_weights(row, weight)
        return unscaled / total

    def attention(self) -> jax.Array:
        """(B, H, N, N) float32: the whole map, a row per query; each row sums to 1."""
        self.need_attention()
        logits = jnp.einsum("bhqc,bhkc->bhqk", self.q, self.k, preferred_element_type=F32)
        logits = logits if self.bias is None else logits + self.bias
        weight = self.weight
        if weight is not None:  # a token counts itself with at least 1
            own = jnp.eye(weight.shape[1], dtype=bool)[None]
            weight = jnp.where(own & (weight[:, None] <= 1), 1.0, weight[:, None])[:, None]
        unscaled, total = softmax_weights(logits, weight)
        return unscaled / total

    def received_attention(self) -> jax.Array:
        """(B, N) float32: attention that each token receives, mean over heads and queries.

        It needs no class token, but the whole (B, H, N, N) map.
        """
        return jnp.mean(self.attention(), axis=(1, 2))

    def mean_attention(self) -> jax.Array:
        """(B, N) float32: what the mean of the patches' queries attends to, mean over heads.

        It needs no class token and no map: one row for each head. The softmax of a mean of logits
        leans less on a few queries than `received_attention`, which is a mean of softmaxes. Each
        row sums to 1. A query counts by its token's weight.
        """
        self.need_attention()
        q, weight = self.q[:, :, self.prefix :].astype(F32), self.weight
        share = jnp.ones(q.shape[::2], F32) if weight is None else weight[:, self.prefix :]
        share = (share / jnp.sum(share, axis=1, keepdims=True))[:, None, :, None]
        q = jnp.sum(q * share, axis=2)  # (B, H, C)
        row = jnp.einsum("bhc,bhkc->bhk", q, self.k.astype(F32))
        if self.bias is not None:
            row += jnp.sum(self.bias[:, :, self.prefix :] * share, axis=2)
        return mean_softmax(row, weight)

    def probe_attention(self) -> jax.Array:
        """(B, N) float32: what map pooling would attend to if it came now, mean over heads.

        The pooling probe asks the tokens after this block's attention as it will ask those after
        the last block, behind the last norm; prefix tokens get nothing. One row for each head.

        Raises:
          InputError: the model has no map pooling.
        """
        self.need_attention()
        if self.probe is None:
            raise InputError("by=probe asks the probe of map pooling, and the model has none")
        x = standardized(self.after[:, self.prefix :].astype(F32), self.last_norm)
        row = jnp.einsum("bhd,bnd->bhn", self.probe, x)
        weight = None if self.weight is None else self.weight[:, self.prefix :]
        return jnp.pad(mean_softmax(row, weight), ((0, 0), (self.prefix, 0)))

    def keys(self) -> jax.Array:
        """(B, N, C) compute dtype: keys before positions are applied, mean over heads (ToMe)."""
        self.need_attention()
        return jnp.mean(self.k if self.plain_k is None else self.plain_k, axis=1)

    def value_norms(self) -> jax.Array:
        """(B, H, N) float32: L2 norm of each token's values, per head."""
        self.need_attention()
        return jnp.linalg.norm(self.v.astype(F32), axis=-1)

    def key_norms(self) -> jax.Array:
        """(B, H, N) float32: L2 norm of each token's keys, per head, whether rotated or not."""
        self.need_attention()
        return jnp.linalg.norm(self.k.astype(F32), axis=-1)

    def shift(self) -> jax.Array:
        """(B, N) float32: how far attention moved each token, ||after - before||.

        Representation shift (arXiv 2508.00367): an importance that needs no attention map.
        """
        self.need_attention()
        return jnp.linalg.norm(self.after.astype(F32) - self.before.astype(F32), axis=-1)

    def need_attention(self) -> None:
        """Raises InputError where there was no attention yet."""
        if self.q is None:
            raise InputError(
                f"this reducer reads attention, and at block {self.layer} there is none to read: "
                "at the input of its block it is that of the block before, so leave block 0 out of "
                "its layers; a model of your own gives q, k and v in Signals"
            )


class Reducer:
    """Base of all methods: the numbers that the token plan asks for, and the call.

    `site` is where in a reducing block the method works:
      "between"  between attention and MLP (EViT, ToMe); the default
      "input"    before the block's attention (DynamicViT, MCTF)
      "output"   after the last block (HiPrune), which so is the only one in its layers
    """

    site = "between"
    # Whether a budget is met by a ramp (plan/ramp.py), not by one keep rate for all layers.
    ramped = False
    # Whether what it learns is for the plan that it is trained with alone, so that rates which
    # change during training (a warm-up, a sandwich) are refused.
    one_plan = False
    # Whether training finds counts for another plan, which the tool learned_plan reads.
    learns_counts = False
    # Whether the weights that it sets are never below 1, as sizes are. Attention then needs no term
    # for a token's own key, so that a fused kernel can do it.
    weights_at_least_one = False

    @property
    def reads_class_token(self) -> bool:
        """Whether it asks for what the class token attends to, which a model may not have."""
        return False

    @property
    def brings_back(self) -> bool:
        """Whether what it removed returns before the last block, whose entry in a plan is P."""
        return False

    @property
    def recovers(self) -> bool:
        """Whether training makes all P patches again after each block that leaves fewer of them.

        They are learned from a teacher's after the same block, see `Distillation.token_loss`. It is
        for methods whose counts never rise again, and not for the site "output".
        """
        return False

    def reverse(self, patches: int) -> Any:
        """The network that does it: a Linen module without a parent, (B, n, D) -> (B, P, D)."""
        raise TypeError(f"{type(self).__name__} does not define how it recovers {patches} patches")

    @property
    def extra(self) -> int:
        """Patch tokens appended on top of the K kept."""
        return 0

    def smallest(self, n: int, prefix: int) -> int:
        """The fewest of n patch tokens this method can keep."""
        del n, prefix
        return 1

    def matching_macs(self, n: int, keep: Entry, prefix: int, width: int, num_heads: int) -> int:
        """Multiply-accumulates of one image that the method itself spends on pairs of tokens.

        Such as similarities, or an attention map that is made for it alone. What grows with n but
        not with its square is not counted, as nowhere in `plan.flops`.

        Args:
          n, keep: patch tokens before it, and what it keeps of them.
        """
        del n, keep, prefix, width, num_heads
        return 0

    def last(self, prefix: int) -> int | None:
        """What a ramp leaves of the last block's patch tokens at most; None: no less than others.

        After the last attention nobody needs patches where logits read the prefix alone.
        """
        del prefix
        return None

    def schedule(self, patches: int, prefix: int, layers: tuple[int, ...], depth: int) -> Keep:
        """What each block keeps when the user names neither rates nor counts: everything."""
        del patches, prefix, layers
        return (None,) * depth

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """The blocks that reduce when the user names none."""
        return quarter_layers(depth) if self.site != "output" else (depth - 1,)

    def evidence(self, tokens: Tokens, signals: Signals, importance: jax.Array) -> Any:
        """What one block of the dense model tells a method that learns from unlabelled images.

        Args:
          importance: (B, N) float32, the squared gradient of the model's own predictions by each
            token: how much a change of it would change them.

        Returns:
          A pytree of sums over the images, see `learned`; None: nothing is learned.
        """
        del tokens, signals, importance

    def learned(self, evidence: Sequence[Any]) -> "Reducer":
        """The method with what it learned from the `evidence` of each block, summed over images."""
        del evidence
        return self

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        raise TypeError(f"{type(self).__name__} does not define how it reduces tokens")


SITES = ("between", "input", "output")
F32 = jnp.float32


def softmax_weights(logits: jax.Array, weight: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """exp(logit) * weight, scaled so that the largest visible exp is 1, and its sum over keys.

    Args:
      logits: (..., keys) float32.
      weight: of the keys, broadcast against the logits; None is the plain softmax.
    """
    seen = logits if weight is None else jnp.where(weight > 0, logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(seen, axis=-1, keepdims=True))
    shifted = logits - top
    if weight is None:
        unscaled = jnp.exp(shifted)
    else:  # a key that nobody may see could lie far above the largest visible one and overflow
        unscaled = jnp.exp(jnp.where(shifted > 0, 0.0, shifted)) * weight
    return unscaled, jnp.sum(unscaled, axis=-1, keepdims=True)


def mean_softmax(row: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Logits (B, H, N) float32 of one query per head -> (B, N): softmax, mean over heads.

    Args:
      weight: (B, N) of the keys, or None.
    """
    unscaled, total = softmax_weights(row, None if weight is None else weight[:, None])
    return jnp.mean(unscaled / total, axis=1)


def standardized(x: jax.Array, norm: tuple[str, float] | None) -> jax.Array:
    """x (B, N, D) float32 as a norm of this kind and epsilon leaves it, before scale and bias."""
    if norm is None:
        return x
    kind, epsilon = norm
    x = x - jnp.mean(x, axis=-1, keepdims=True) if kind == "layer" else x
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


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


def drop(tokens: Tokens, kept: jax.Array, fused: jax.Array | None = None) -> Tokens:
    """Keeps the prefix and the patch tokens `kept` (B, K), in that order; the rest is gone.

    Args:
      fused: (B, n) float32, shares of the patch tokens in one more x, put last; what else such a
        token has is the caller's to append.
    """
    index = kept + tokens.prefix
    if tokens.prefix:  # ONNX cannot take an array without elements
        prefix = jnp.broadcast_to(jnp.arange(tokens.prefix), (kept.shape[0], tokens.prefix))
        index = jnp.concatenate([prefix, index], axis=1)
    if fused is not None:
        fused = jnp.pad(fused, ((0, 0), (tokens.prefix, 0)))

    def of(array):
        return None if array is None else take(array, index)

    return tokens.replace(
        x=by_chip(pick, tokens.x, index, fused, dtype=tokens.x.dtype),
        size=of(tokens.size),
        owner=follow(tokens.owner, destinations(kept, tokens.patches, rest=-1)),
        weight=of(tokens.weight),
        positions=of(tokens.positions),
    )


def behind_prefix(tokens: Tokens) -> Tokens:
    """The patch tokens alone, without what was reported."""

    def of(array):
        return None if array is None else array[:, tokens.prefix :]

    arrays = {name: of(getattr(tokens, name)) for name in ("x", "size", "weight", "positions")}
    return Tokens(**arrays, owner=tokens.owner, prefix=0)


def append(tokens: Tokens, more: Tokens | None) -> Tokens:
    """The tokens with the patch tokens of `more`, which has no prefix, behind them.

    Both hold different patches, and both have weights and positions or neither has.
    """
    if more is None:
        return tokens

    def both(name):
        one, other = getattr(tokens, name), getattr(more, name)
        return None if one is None else jnp.concatenate([one, other], axis=1)

    theirs = jnp.where(more.owner < 0, -1, more.owner + tokens.patches)
    joined = {name: both(name) for name in ("x", "size", "weight", "positions")}
    return tokens.replace(**joined, owner=jnp.where(tokens.owner < 0, theirs, tokens.owner))


def take(array: jax.Array, index: jax.Array) -> jax.Array:
    """(B, N, ...) at (B, K), each in [0, N) -> (B, K, ...)."""
    at = index.reshape(*index.shape, *[1] * (array.ndim - 2))
    return jnp.take_along_axis(array, at, axis=1, mode="promise_in_bounds")


def pick(
    x: jax.Array, index: jax.Array, fused: jax.Array | None = None, form: Form = EXACT
) -> jax.Array:
    """Tokens x (B, N, D) at index (B, K), and their sum with the shares `fused` (B, N) float32.

    Returns:
      (B, K, D), or (B, K + 1, D) with the sum as the last token, in the dtype of x.
    """
    if form.one_hot:
        return tokens_outside(pick_by_product(x, index, fused))
    picked = take(x, index)
    if fused is None:
        return picked
    total = jnp.einsum("bn,bnd->bd", fused, x.astype(F32))[:, None]
    return jnp.concatenate([picked, total.astype(x.dtype)], axis=1)


def pick_by_product(x: jax.Array, index: jax.Array, fused: jax.Array | None) -> jax.Array:
    """`pick`, for chips where a gather is slow and its gradient, a scatter, more so.

    A product with zeros and ones is exact. The shares of the fused token are one more row of the
    matrix: bfloat16 would round them, so that row makes it float32 in "high" precision, of which a
    TPU takes 16 bits in two products. Both, and the matrix, are in one kernel: to sum the token
    apart and put it behind the others costs more than all of the rest.
    """
    places = jnp.arange(x.shape[1])[None, None]
    if fused is None:
        matrix = (index[..., None] == places).astype(x.dtype)
        y = jnp.einsum("bkn,bnd->bkd", matrix, x, preferred_element_type=F32)
        return y.astype(x.dtype)
    count = index.shape[1]
    last = jnp.arange(count + 1)[None, :, None] == count
    one_hot = jnp.pad(index, ((0, 0), (0, 1)))[..., None] == places  # the last row is not read
    matrix = jnp.where(last, fused[:, None], one_hot.astype(F32))
    y = jnp.einsum("bkn,bnd->bkd", matrix, x.astype(F32), precision=jax.lax.Precision.HIGH)
    return y.astype(x.dtype)


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
