# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention that hands out what it was made of.

Where nothing comes between the products for q, k and v and the softmax, nor between that and the
projection, attention has a form for every chip (`attention_branch`). With norms in between, or with
rotation or bias by positions, one form of the products serves all chips (`Attention.extended`).

Letters: B images, N tokens, Q queries, H heads, C width of one head, D width. Softmax runs in
float32.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.models import fused_gpu, fused_tpu
from evit_jax.models.layers import Affine, norm, weight_init
from evit_jax.models.relative import relative_bias, table_size
from evit_jax.models.rotary import Rotary
from evit_jax.runtime.forms import EXACT, Form, by_chip
from evit_jax.runtime.layouts import tokens_outside
from evit_jax.tokens import softmax_weights

TO_F32 = dict(preferred_element_type=jnp.float32)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    form: Form = EXACT,
    bias: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T + bias) v in the form of a chip.

    Args:
      q: (B, H, Q, C), scaled.
      k, v: (B, H, N, C).
      bias: (B or 1, H or 1, Q or 1, N) float32.

    Returns:
      (B, H, Q, C) float32.
    """
    queries, keys = q.shape[2], k.shape[2]
    padding = -keys % form.tile
    if padding:
        q, k, v = (
            jnp.pad(part, ((0, 0), (0, 0), (0, -part.shape[2] % form.tile), (0, 0)))
            for part in (q, k, v)
        )
    logits = jnp.einsum("bhqc,bhkc->bhqk", q, k, **TO_F32)
    if bias is not None:
        more = logits.shape[2] - queries if bias.shape[2] > 1 else 0
        logits += jnp.pad(bias, ((0, 0), (0, 0), (0, more), (0, padding)))
    if padding:
        logits = jnp.where(jnp.arange(keys + padding)[None, None, None] < keys, logits, -jnp.inf)
    if form.normalize_map and keys > form.lanes:
        return product(rounded_softmax(logits, v.dtype), v)[:, :, :queries]
    unscaled, total = softmax_weights(logits, None)
    if form.normalize_map:
        return product(unscaled / total, v)[:, :, :queries]
    # Dividing after the product with v touches Q x C values instead of Q x N.
    return product(unscaled, v)[:, :, :queries] / total[:, :, :queries]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def rounded_softmax(logits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Softmax over the last axis, computed in float32 and rounded to `dtype`.

    Its derivative is taken from the rounded map, which the product with v reads anyway: so that map
    is all that a backward pass has to keep, in half of the memory where `dtype` is half as wide.
    """
    unscaled, total = softmax_weights(logits, None)
    return (unscaled / total).astype(dtype)


@rounded_softmax.defjvp
def _(dtype, primals, tangents):
    (logits,), (change,) = primals, tangents
    rounded = rounded_softmax(logits, dtype)
    scores = rounded.astype(jnp.float32)
    change = scores * (change - jnp.sum(scores * change, axis=-1, keepdims=True))
    return rounded, change.astype(dtype)


def product(scores: jax.Array, v: jax.Array) -> jax.Array:
    """(B, H, Q, N) float32 with values (B, H, N, C) -> (B, H, Q, C) float32."""
    return jnp.einsum("bhqk,bhkc->bhqc", scores.astype(v.dtype), v, **TO_F32)


def attend_weighted(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    """The same with weighted keys.

    A key's weight multiplies its exp(logit). A token counts itself with at least 1 (DynamicViT's
    G_ii = 1), so that no row is ever empty: where its weight is smaller, its own term is added,
    which costs a row of numbers and not a second map.

    Args:
      q, k, v: as for `attend`; the first Q tokens ask.
      weight: (B, N) float32 >= 0.
      bias: (B or 1, H, Q, N) float32.
    """
    logits = jnp.einsum("bhqc,bhkc->bhqk", q, k, **TO_F32)
    queries = q.shape[2]
    own = jnp.einsum("bhqc,bhqc->bhq", q, k[:, :, :queries], **TO_F32)[..., None]
    if bias is not None:
        logits += bias
        own += jnp.diagonal(bias, axis1=2, axis2=3)[..., None]
    lacking = 1.0 - weight[:, None, :queries, None]  # of a token's own weight
    visible = jnp.where(weight[:, None, None] > 0, logits, -jnp.inf)
    top = jnp.max(visible, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.maximum(top, jnp.where(lacking > 0, own, -jnp.inf)))
    # A hidden key's logit may lie far above `top`, and its exp must not overflow.
    shifted = jnp.where(logits > top, 0.0, logits - top)
    unscaled = jnp.exp(shifted) * weight[:, None, None]
    own = jnp.exp(jnp.where(lacking >= 0, own - top, 0.0))
    rest = jnp.where(lacking >= 0, lacking, 0.0) * own  # cancels the mask's gradient at 1
    total = jnp.sum(unscaled, axis=-1, keepdims=True) + rest
    return (product(unscaled, v) + rest * v[:, :, :queries]) / total


def attend_by_weight(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    at_least_one: bool,
    form: Form,
) -> jax.Array:
    """`attend`, or `attend_weighted` where weights may be below 1: (B, H, Q, C) float32.

    Args:
      weight: (B, N) float32 or None.
      at_least_one: whether no weight is below 1. A token then counts itself by its weight, and the
        weights' logarithms are a bias like any other.
    """
    if weight is None:
        return attend(q, k, v, form, bias)
    if not at_least_one:
        return attend_weighted(q, k, v, weight, bias)
    logs = jnp.log(weight)[:, None, None]
    return attend(q, k, v, form, logs if bias is None else bias + logs)


def query_key_value(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, columns: slice, first: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q (B, Q, E), not scaled, k and v (B, N, E), of three products.

    Args:
      x: (B, N, D).
      kernel, bias: (D, 3 D) and (3 D,), sliced here as they are stored: of another form each slice
        is one more array, and a TPU's compiler gives up fast memory where there are too many.
      columns: E of the D columns of each, such as those of some heads.
      first: Q, the tokens that ask; None: all.
    """
    width = kernel.shape[1] // 3
    ranges = [slice(i * width + columns.start, i * width + columns.stop) for i in range(3)]
    asking = (x[:, :first], x, x)
    q, k, v = (
        some @ kernel[:, at] + bias[None, None, at] for some, at in zip(asking, ranges, strict=True)
    )
    return q, k, v


def heads_first(x: jax.Array, head_width: int) -> jax.Array:
    """(B, N, H * C) -> (B, H, N, C)."""
    return x.reshape(*x.shape[:2], -1, head_width).transpose(0, 2, 1, 3)


def heads_last(x: jax.Array) -> jax.Array:
    """(B, H, N, C) -> (B, N, H * C)."""
    x = x.transpose(0, 2, 1, 3)
    return x.reshape(*x.shape[:2], -1)


def class_logits(x: jax.Array, kernel: jax.Array, bias: jax.Array, num_heads: int) -> jax.Array:
    """Logits of the first token's query, up to a number that all keys share, from the tokens.

    q (x W_k)^T is (q W_k^T) x^T: on a TPU another reader of q and k makes the compiler choose other
    layouts for them, and not only in this block; of x it may read as it likes.

    Args:
      x: (B, N, D).
      kernel, bias: (D, 3 D) and (3 D,).

    Returns:
      (B, H, N) float32.
    """
    kernel = kernel.reshape(x.shape[-1], 3, num_heads, -1)
    bias = bias.reshape(3, num_heads, -1)
    q = jnp.einsum("bd,dhc->bhc", x[:, 0], kernel[:, 0]) + bias[None, 0]
    q = q * kernel.shape[-1] ** -0.5
    asked = jnp.einsum("bhc,dhc->bhd", q, kernel[:, 1])
    return jnp.einsum("bhd,bnd->bhn", asked, x, **TO_F32)


def with_all_heads(x, kernel, bias, weight, num_heads, first, at_least_one, form):
    """Attention from one product for q, k and v, sliced after it. See `attention_branch`."""
    batch, length, width = x.shape
    qkv = (x @ kernel + bias[None, None]).reshape(batch, length, 3, num_heads, -1)
    # Scale q before the transpose; XLA fuses it into the copy.
    q = (qkv[:, :first, 0] * (width // num_heads) ** -0.5).transpose(0, 2, 1, 3)
    k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in (1, 2))
    y = attend_by_weight(q, k, v, weight, None, at_least_one, form)
    row = jnp.einsum("bhc,bhkc->bhk", q[:, :, 0], k, **TO_F32)
    return heads_last(y.astype(x.dtype)), dict(q=q, k=k, v=v, row=row)


def with_some_heads_at_a_time(x, kernel, bias, weight, num_heads, first, at_least_one, form):
    """Attention from products of their own for q, k and v. See `attention_branch`.

    Everything between the products has its tokens outside, as a TPU reads and writes it.
    """
    length, width = x.shape[1:]
    head_width = width // num_heads
    x = jax.lax.optimization_barrier(x)  # read many times: compute the norm before it once
    size = num_heads
    if (weight is None or at_least_one) and length > form.lanes:
        size = min(max(form.lanes // head_width, 1), num_heads)

    seen, parts = [], []
    for start in range(0, num_heads, size):
        columns = slice(start * head_width, min(start + size, num_heads) * head_width)
        three = query_key_value(x, kernel, bias, columns, first)
        q, k, v = (heads_first(tokens_outside(part), head_width) for part in three)
        q = q * head_width**-0.5
        y = attend_by_weight(q, k, v, weight, None, at_least_one, form)
        seen.append(tokens_outside(heads_last(y.astype(x.dtype))))
        parts.append((q, k, v))
    q, k, v = (jnp.concatenate(some, axis=1) for some in zip(*parts, strict=True))
    y = jnp.concatenate(seen, axis=-1) if len(seen) > 1 else seen[0]
    row = class_logits(x, kernel, bias, num_heads)
    return y, dict(q=q, k=k, v=v, row=row)


def by_cudnn(x, kernel, bias, weight, num_heads):
    """Attention by cuDNN's kernel, which writes no map. See `attention_branch`.

    With weights every head has `fused_gpu.EXTRA` more channels, in the result as well.
    """
    head_width = x.shape[-1] // num_heads
    if weight is not None:  # room for them straight from the products: no copy
        kernel, bias = (with_room(part, 3 * num_heads) for part in (kernel, bias))
    q, k, v = (
        part.reshape(*x.shape[:2], num_heads, -1)
        for part in query_key_value(x, kernel, bias, slice(0, kernel.shape[1] // 3))
    )
    q = q * head_width**-0.5
    asking = (q, k) if weight is None else fused_gpu.weighted(q, k, weight)
    y = fused_gpu.kernel(*asking, v, "cudnn")
    q, k, v = (part[..., :head_width].transpose(0, 2, 1, 3) for part in (q, k, v))
    row = jnp.einsum("bhc,bhkc->bhk", q[:, :, 0], k, **TO_F32)
    return y.reshape(*x.shape[:2], -1), dict(q=q, k=k, v=v, row=row)


def with_room(part: jax.Array, heads: int) -> jax.Array:
    """(..., heads * C) -> (..., heads * (C + EXTRA)), with zeros in the new channels."""
    part = part.reshape(*part.shape[:-1], heads, -1)
    padding = [(0, 0)] * (part.ndim - 1) + [(0, fused_gpu.EXTRA)]
    return jnp.pad(part, padding).reshape(*part.shape[:-2], -1)


def by_pallas(x, kernel, bias, weight, num_heads):
    """Attention by our kernel for TPUs, which writes no map. See `attention_branch`."""
    head_width = x.shape[-1] // num_heads
    qkv = x @ kernel + bias[None, None]
    y, row = fused_tpu.attend(qkv, weight, num_heads)
    q, k, v = (heads_first(part, head_width) for part in jnp.split(qkv, 3, axis=-1))
    return y, dict(q=q * head_width**-0.5, k=k, v=v, row=row)


def kernel_takes(
    x: jax.Array, weight: jax.Array | None, num_heads: int, at_least_one: bool
) -> bool:
    """Whether cuDNN's kernel can do it; x is of the shape of all heads of q, (B, N, D)."""
    if weight is None:
        return fused_gpu.has_cudnn(x, num_heads)
    return at_least_one and fused_gpu.has_cudnn(x, num_heads, weighted=True)


def attention_branch(
    x: jax.Array,
    kernels: tuple[jax.Array, jax.Array],
    biases: tuple[jax.Array, jax.Array],
    weight: jax.Array | None,
    *,
    num_heads: int,
    first: int | None,
    pallas: bool = False,
    at_least_one: bool = False,
    form: Form = EXACT,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Multi-head self-attention from its parameters, in the form of a chip.

    Args:
      x: (B, N, D).
      kernels, biases: of qkv, (D, 3 D) and (3 D,), and of the projection, (D, D) and (D,); in the
        dtype of x.
      weight: (B, N) float32 >= 0, or None for the plain softmax.
      first: Q, the tokens that ask; None: all.
      pallas: by the Pallas kernel, where the form has one and it takes these shapes.
      at_least_one: whether no weight is below 1, see `Reducer.weights_at_least_one`.

    Returns:
      (B, Q, D) and, by name, q (B, H, Q, C) scaled, k and v (B, H, N, C), all in the dtype of x,
      and `row` (B, H, N) float32, the logits of the first token's query.
    """
    length, head_width = x.shape[1], x.shape[2] // num_heads
    whole = first is None
    inputs = x, kernels[0], biases[0]
    if pallas and form.pallas and whole and fused_tpu.supports(length, num_heads, head_width):
        y, parts = by_pallas(*inputs, weight, num_heads)
    elif form.cudnn and whole and kernel_takes(x, weight, num_heads, at_least_one):
        y, parts = by_cudnn(*inputs, weight, num_heads)
    else:
        plain = with_all_heads if form.fused_qkv else with_some_heads_at_a_time
        y, parts = plain(*inputs, weight, num_heads, first, at_least_one, form)
    projection = kernels[1]
    if y.shape[-1] != projection.shape[0]:
        projection = with_room(projection.T, num_heads).T
    return y @ projection + biases[1][None, None], parts


def attend_extended(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    at_least_one: bool = False,
    form: Form = EXACT,
) -> jax.Array:
    """`attend_by_weight`, or cuDNN's kernel: (B, H, Q, C) in the dtype of v."""
    whole = q.shape == k.shape and bias is None
    if form.cudnn and whole and kernel_takes(heads_last(v), weight, v.shape[1], at_least_one):
        y = fused_gpu.attend(*(part.transpose(0, 2, 1, 3) for part in (q, k, v)), weight)
        return y.transpose(0, 2, 1, 3)
    return attend_by_weight(q, k, v, weight, bias, at_least_one, form).astype(v.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v go to whoever derives scores from them."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    pallas: bool = False  # see `Backbone.pallas`
    qkv_bias: bool | str = True  # "qv": of queries and values alone (BEiT, EVA)
    proj_bias: bool = True
    qk_norm: bool = False  # of each head's queries and keys
    inner_norm: bool = False  # of what enters the projection
    norm: str = "layer"
    norm_eps: float = 1e-6
    rotary: Rotary | None = None  # queries and keys are turned by the tokens' positions
    relative_grid: tuple[int, int] | None = None  # a bias by relative position, in this grid
    at_least_one: bool = False  # no weight is below 1, see `Reducer.weights_at_least_one`

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        weight: jax.Array | None,
        first: int | None = None,
        *,
        positions: jax.Array | None = None,
        prefix: int = 0,
    ) -> tuple[jax.Array, dict[str, jax.Array | None]]:
        """Attends.

        Args:
          x: (B, N, D).
          weight: (B, N) or None, see `Tokens.weight`.
          first: only the first `first` tokens are queries; None: all.
          positions: (B or 1, N, 2), see `Tokens.positions`, read for `rotary` and `relative_grid`.
          prefix: tokens at the front that have no position.

        Returns:
          (B, N, D), or (B, first, D), and by name what it was made of, see `attention_branch` and
          `extended`.
        """
        width = x.shape[-1]
        qkv = Affine(3 * width, self.qkv_bias is True, name="qkv")(width)
        if self.qkv_bias == "qv":
            zeros = nn.initializers.zeros_init()
            q, v = (self.param(name, zeros, (width,)) for name in ("q_bias", "v_bias"))
            qkv = qkv[0], jnp.concatenate([q, jnp.zeros_like(q), v])
        proj = Affine(width, self.proj_bias, name="proj")(width)
        # Where there is no bias, one of zeros keeps the forms few.
        layers = [(k, jnp.zeros(k.shape[1:]) if b is None else b) for k, b in (qkv, proj)]
        kernels, biases = zip(*jax.tree.map(lambda a: a.astype(self.dtype), layers), strict=True)
        inputs = x.astype(self.dtype), kernels, biases, weight
        if self.qk_norm or self.inner_norm or self.rotary or self.relative_grid:
            return self.extended(*inputs, first, positions, prefix)
        branch = functools.partial(
            attention_branch,
            num_heads=self.num_heads,
            first=first,
            pallas=self.pallas,
            at_least_one=self.at_least_one,
        )
        return by_chip(branch, *inputs, dtype=self.dtype)

    def extended(self, x, kernels, biases, weight, first, positions, prefix):
        """Attention with norms or positions; arguments as for `__call__` and `attention_branch`.

        Returns:
          (B, Q, D) and, by name, q, k, v and `row` as `attention_branch` has them; plain_q and
          plain_k, what q and k were before they were turned, None where they are not; `bias`
          (B or 1, H, N, N) float32 of the logits, or None.
        """
        three = query_key_value(x, kernels[0], biases[0], slice(0, x.shape[-1]), first)
        q, k, v = (heads_first(part, x.shape[-1] // self.num_heads) for part in three)
        if self.qk_norm:
            q, k = (
                norm(name, self.norm, self.norm_eps)(part).astype(x.dtype)
                for name, part in (("q_norm", q), ("k_norm", k))
            )
        q = q * q.shape[-1] ** -0.5
        parts = dict(plain_q=None, plain_k=None, bias=None)
        if self.rotary:
            parts |= dict(plain_q=q, plain_k=k)
            frequencies = None
            if self.rotary.kind == "mixed":
                shape = 2, self.num_heads, k.shape[-1] // 2
                frequencies = self.param("freqs", self.rotary.draw, shape)
            rotation = self.rotary.rotation(positions, prefix, k.shape[-1], frequencies)
            q, k = rotation(q), rotation(k)
        row = jnp.einsum("bhc,bhkc->bhk", q[:, :, 0], k, **TO_F32)
        bias = None
        if self.relative_grid:
            shape = table_size(self.relative_grid), self.num_heads
            table = self.param("relative_position_bias_table", weight_init, shape)
            bias = parts["bias"] = relative_bias(table, positions, prefix, self.relative_grid)
            row += bias[:, :, 0]
            bias = bias[:, :, :first]
        branch = functools.partial(attend_extended, at_least_one=self.at_least_one)
        y = heads_last(by_chip(branch, q, k, v, weight, bias, dtype=self.dtype))
        if self.inner_norm:
            y = norm("norm", self.norm, self.norm_eps)(y).astype(self.dtype)
        y = y @ kernels[1] + biases[1][None, None]
        return y, parts | dict(q=q, k=k, v=v, row=row)
