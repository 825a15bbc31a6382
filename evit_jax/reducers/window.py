# SPDX-License-Identifier: Apache-2.0
"""Window pooling: every 2 x 2 patches become one token, a mean or a learned one.

The windowed token compression of LLaVA-UHD v3 (thunlp/LLaVA-UHD).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from evit_jax.errors import InputError
from evit_jax.plan.counts import Entry, Keep
from evit_jax.tokens import F32, Reducer, Signals, Tokens, follow


class Window(nn.Module, Reducer):
    """Replaces the four tokens u_i of each 2 x 2 window by sum_i w_i * u_i; the grid is halved.

    w_i is 1/4. With `learned` it is a softmax over the four tokens, for each channel by itself, of
    W2 gelu(W1 [u_i; m] + b1) + b2 with m their mean (3 D^2 multiply-accumulates a token, which the
    counts of `plan.flops` leave out). W2 and b2 start at zero, so it starts as the mean, exactly.
    In the public code W1 and b1 start at zero too, where no gradient would reach any of them.

    The grid decides the count: each reducing block keeps a quarter of its tokens, by default the
    middle block alone, and its rows and columns have to be even. So rates and counts are refused,
    and layers are all there is to choose. The tokens are those of every patch in the order of the
    grid. It works before a block's attention, which is after the MLP of the block before.
    """

    weights_at_least_one = True

    learned: bool = False
    proportional: bool = False  # later attention weighs a token by its size

    site = "input"

    def smallest(self, n: int, prefix: int) -> int:
        return max(n // 4, 1)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return (depth // 2,)

    def schedule(self, patches: int, prefix: int, layers: tuple[int, ...], depth: int) -> Keep:
        keep, n = [], patches
        for block in range(depth):
            n = self.smallest(n, prefix) if block in layers and n > 1 else n
            keep.append(n if block in layers else None)
        return tuple(keep)

    @nn.compact
    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        prefix = tokens.prefix
        rows, columns = halved(signals.grid, tokens.patches, keep)

        def windows(array):  # (B, N, ...) -> (B, K, 4, ...)
            last = array.shape[2:]
            array = array[:, prefix:].reshape(-1, rows, 2, columns, 2, *last)
            return jnp.swapaxes(array, 2, 3).reshape(-1, rows * columns, 4, *last)

        def joined(array, pooled):
            return jnp.concatenate([array[:, :prefix], pooled.astype(array.dtype)], axis=1)

        members = windows(tokens.x).astype(F32)  # (B, K, 4, D)
        share = self.shares(members, tokens.x.dtype) if self.learned else 0.25
        size = joined(tokens.size, jnp.sum(windows(tokens.size), axis=2))
        weight, positions = tokens.weight, tokens.positions
        if self.proportional:
            weight = size
        elif weight is not None:  # windows are of equal sizes, so means are plain ones
            weight = joined(weight, jnp.mean(windows(weight), axis=2))
        if positions is not None:
            positions = joined(positions, jnp.mean(windows(positions), axis=2))
        row, column = jnp.divmod(jnp.arange(tokens.patches, dtype=jnp.int32), 2 * columns)
        place = jnp.broadcast_to(row // 2 * columns + column // 2, size.shape[:1] + row.shape)
        return tokens.replace(
            x=joined(tokens.x, jnp.sum(share * members, axis=2)),
            size=size,
            owner=follow(tokens.owner, place),
            weight=weight,
            positions=positions,
        )

    def shares(self, members: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """(B, K, 4, D) float32, which sum to 1 over the four."""
        width = members.shape[-1]
        mean = jnp.broadcast_to(jnp.mean(members, axis=2, keepdims=True), members.shape)
        y = jnp.concatenate([members, mean], axis=-1).astype(dtype)
        y = nn.gelu(nn.Dense(width, dtype=dtype, name="in")(y), approximate=False)
        zeros = nn.initializers.zeros
        y = nn.Dense(width, dtype=dtype, kernel_init=zeros, name="out")(y)
        return nn.softmax(y.astype(F32), axis=2)


def halved(grid: tuple[int, int], n: int, keep: Entry) -> tuple[int, int]:
    """Rows and columns of windows, for the n tokens of a grid that was halved before or not.

    Raises:
      InputError: the tokens are not all there, their grid is odd, or another count is wanted.
    """
    rows, columns = grid
    while rows * columns > n and rows % 2 == columns % 2 == 0:
        rows, columns = rows // 2, columns // 2
    if rows * columns != n:
        raise InputError(
            f"window pools the patches of a whole grid, and {n} tokens are not those of "
            f"{grid[0]} x {grid[1]} patches, or of these halved"
        )
    if rows % 2 or columns % 2:
        raise InputError(
            f"window pools 2 x 2 patches, and a grid of {rows} x {columns} has an odd side; choose "
            f"fewer layers, or an image size that makes it even"
        )
    if keep != n // 4:
        raise InputError(
            f"window keeps {n // 4} of {n} patch tokens, a quarter, and no other count, got "
            f"{keep}; leave out rates, counts, multiple_of and the keep-rate warm-up"
        )
    return rows // 2, columns // 2


REDUCER = Window
