# SPDX-License-Identifier: Apache-2.0
"""What methods that merge patches share: similarities, ranks, and the merge itself.

Letters: B images, n patch tokens, K of them afterwards, D width.
"""

import jax
import jax.numpy as jnp

from evit_jax.runtime.forms import EXACT, Form, by_chip
from evit_jax.runtime.layouts import tokens_outside
from evit_jax.tokens import F32, Tokens, follow


def cosines(x: jax.Array, y: jax.Array | None = None, *, center: bool = False) -> jax.Array:
    """Cosine of every pair: x (B, n, D), y (B, m, D) or x itself -> (B, n, m) float32.

    No gradient passes: which tokens resemble each other is a decision. A vector of zeros resembles
    nothing.

    Args:
      center: of the vectors without their mean over channels.
    """
    x = jax.lax.stop_gradient(x)
    y = x if y is None else jax.lax.stop_gradient(y)
    products = jnp.einsum("bid,bjd->bij", x, y, preferred_element_type=F32)
    (mean, square), (other_mean, other_square) = moments(x), moments(y)
    width = x.shape[-1]
    if center:
        products -= width * mean[:, :, None] * other_mean[:, None]
        square, other_square = square - mean**2, other_square - other_mean**2

    def per_length(square):  # 1 / length
        length = jnp.sqrt(jnp.maximum(width * square, 0))
        return 1 / jnp.maximum(length, jnp.finfo(F32).tiny)

    return products * per_length(square)[:, :, None] * per_length(other_square)[:, None]


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and mean square over channels of (B, n, D): twice (B, n) float32."""
    x = x.astype(F32)
    return jnp.mean(x, axis=-1), jnp.mean(x * x, axis=-1)


def rank(scores: jax.Array) -> jax.Array:
    """(B, n) -> (B, n) int32: the place of each in descending order, ties to the lower index.

    Every pair is compared, which a chip does faster than it sorts so few.
    """
    ahead = scores[:, None] > scores[:, :, None]  # (B, i, j): j goes before i
    lower = jnp.tril(jnp.ones(ahead.shape[1:], bool), -1)[None]
    ahead |= lower & (scores[:, None] == scores[:, :, None])
    return jnp.sum(ahead, axis=2, dtype=jnp.int32)


def places(kept: jax.Array, before: jax.Array) -> jax.Array:
    """Places of the kept tokens among themselves, and -1 for the others: (B, n) int32.

    Args:
      kept: (B, n) bool.
      before: (B, n) int32, such as `rank`: kept tokens come out in ascending order of it.
    """
    ahead = kept[:, None] & (before[:, None] < before[:, :, None])
    return jnp.where(kept, jnp.sum(ahead, axis=2, dtype=jnp.int32), -1)


def first_least(cost: jax.Array) -> jax.Array:
    """The first index of the smallest along axis 1: (B, n, m) -> (B, m) int32; an argmin.

    Of two minima, which a CPU takes five times faster than an argmin.
    """
    least = jnp.min(cost, axis=1, keepdims=True)
    index = jnp.arange(cost.shape[1], dtype=jnp.int32)[None, :, None]
    return jnp.min(jnp.where(cost == least, index, cost.shape[1] - 1), axis=1)


def total(values: jax.Array, place: jax.Array, count: int) -> jax.Array:
    """Sums of values (B, n) over the tokens of each place: (B, count); place -1 goes nowhere."""

    def sums(values, place, form):
        if form.one_hot:
            member = place[:, None] == jnp.arange(count, dtype=place.dtype)[None, :, None]
            return jnp.sum(jnp.where(member, values[:, None], 0), axis=2)
        return scatter_add(values, place, count)

    return by_chip(sums, values, place, dtype=jnp.bfloat16)


def scatter_add(values: jax.Array, place: jax.Array, count: int) -> jax.Array:
    """values (B, n, ...) added up over each place: (B, count, ...); place -1 goes nowhere."""
    rows = jnp.arange(values.shape[0])[:, None]
    place = jnp.where(place < 0, count, place)  # one past the end is left out
    sums = jnp.zeros((values.shape[0], count, *values.shape[2:]), values.dtype)
    return sums.at[rows, place].add(values, mode="drop")


def at_place(values: jax.Array, place: jax.Array) -> jax.Array:
    """values (B, count) of each token's place: (B, n); anything where the place is -1."""
    return jnp.take_along_axis(values, jnp.maximum(place, 0), axis=1, mode="clip")


def pool(
    x: jax.Array, place: jax.Array, share: jax.Array, count: int, form: Form = EXACT
) -> jax.Array:
    """Weighted sums of tokens x (B, n, D) over each place: (B, count, D) float32.

    Args:
      place: (B, n) int32 in [0, count), or -1: in no sum.
      share: (B, n) float32, weights.
    """
    if form.one_hot:
        member = place[:, None] == jnp.arange(count, dtype=place.dtype)[None, :, None]
        matrix = jnp.where(member, share[:, None], 0).astype(x.dtype)
        y = jnp.einsum("bkn,bnd->bkd", matrix, x, preferred_element_type=F32)
        return tokens_outside(y)
    return scatter_add(x.astype(F32) * share[..., None], place, count)


def merge(
    tokens: Tokens,
    place: jax.Array,
    share: jax.Array,
    count: int,
    *,
    proportional: bool,
    keep_length: bool = False,
) -> Tokens:
    """Patch tokens become `count` weighted means; a token alone in its place is itself, exactly.

    Sizes are summed, weights of keys are means weighted by size. A position is the mean with the
    shares of the tokens' mean: a token is where what it is made of is.

    Args:
      place: (B, n) int32 in [0, count), each of which has a token; -1 drops a token.
      share: (B, n) float32 > 0, weights of the means, which need no sum.
      proportional: later attention weighs a token by its size (proportional attention, ToMe).
      keep_length: rescale each mean to the mean length of its tokens: means are shorter than what
        they are of.
    """
    prefix = tokens.prefix
    patches, size = tokens.x[:, prefix:], tokens.size[:, prefix:]
    least = jnp.finfo(F32).tiny  # where a place has empty slots alone
    share = share / at_place(jnp.maximum(total(share, place, count), least), place)
    # As the product reads them; of what rounding leaves of them they are still means.
    share = share.astype(tokens.x.dtype).astype(F32)
    sums = jnp.maximum(total(share, place, count), least)[..., None]  # (B, K, 1)
    x = by_chip(
        lambda *args, form: pool(*args, count, form),
        patches,
        place,
        share,
        dtype=tokens.x.dtype,
    )
    x = x / sums
    if keep_length:
        lengths = jnp.sqrt(moments(patches)[1] + 1e-12)
        wanted = total(share * lengths, place, count)[..., None] / sums
        now = jnp.sqrt(moments(x)[1][..., None] + 1e-12)
        alone = total(jnp.ones_like(share), place, count)[..., None] == 1
        x = jnp.where(alone, x, x * wanted / now)

    sizes = total(size, place, count)

    def mean(values):  # (B, N) of all tokens -> (B, prefix + count)
        summed = total(values[:, prefix:] * size, place, count) / sizes
        return jnp.concatenate([values[:, :prefix], summed], axis=1)

    def joined(front, back):
        return jnp.concatenate([front[:, :prefix], back], axis=1)

    weight, positions = tokens.weight, tokens.positions
    if proportional:
        weight = joined(tokens.size, sizes)
    elif weight is not None:
        weight = mean(weight)
    if positions is not None:
        part = jax.lax.stop_gradient(share)[..., None] * positions[:, prefix:]
        middle = [total(part[..., axis], place, count) for axis in (0, 1)]
        positions = joined(positions, jnp.stack(middle, axis=-1) / jax.lax.stop_gradient(sums))
    return tokens.replace(
        x=joined(tokens.x, x.astype(tokens.x.dtype)),
        size=joined(tokens.size, sizes),
        owner=follow(tokens.owner, place),
        weight=weight,
        positions=positions,
    )
