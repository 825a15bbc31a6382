# SPDX-License-Identifier: Apache-2.0
"""BEiT's bias by relative position (arXiv 2106.08254): a table of numbers added to the logits.

A query and a key look up the difference of their positions, so what was learned stays with the
tokens however these are selected, reordered or merged. For tokens that are single patches that is
exactly timm's index. A merged token may lie between patches; its bias is then interpolated.

Letters: B images, N tokens, H heads.
"""

import jax
import jax.numpy as jnp


def table_size(grid: tuple[int, int]) -> int:
    """Entries of the table: one for every difference in the grid, three for the class token."""
    rows, columns = grid
    return (2 * rows - 1) * (2 * columns - 1) + 3


def relative_bias(
    table: jax.Array, positions: jax.Array, prefix: int, grid: tuple[int, int]
) -> jax.Array:
    """The bias of each query and key.

    Args:
      table: (table_size(grid), H) float32, as timm has it: by difference of rows, then of columns;
        then what the class token adds to patches, patches to it, and it to itself.
      positions: (B, N, 2) float32, row and column in patches.
      prefix: tokens at the front without a position.
      grid: rows and columns of patches of the table.

    Returns:
      (B, H, N, N) float32, queries before keys.
    """
    rows, columns = grid
    high, wide = 2 * rows - 1, 2 * columns - 1
    apart = positions[:, :, None] - positions[:, None]  # (B, N, N, 2)
    row, column = apart[..., 0] + (rows - 1), apart[..., 1] + (columns - 1)
    top = jnp.clip(jnp.floor(row).astype(jnp.int32), 0, high - 1)
    left = jnp.clip(jnp.floor(column).astype(jnp.int32), 0, wide - 1)
    down, right = (row - top)[None], (column - left)[None]
    image = table[:-3].T  # (H, high * wide)

    def value(row, column):  # (H, B, N, N)
        return image[:, jnp.minimum(row, high - 1) * wide + jnp.minimum(column, wide - 1)]

    upper = value(top, left) * (1 - right) + value(top, left + 1) * right
    lower = value(top + 1, left) * (1 - right) + value(top + 1, left + 1) * right
    bias = jnp.swapaxes(upper * (1 - down) + lower * down, 0, 1)

    first = jnp.arange(positions.shape[1]) < prefix
    query, key = first[None, None, :, None], first[None, None, None, :]
    to_patch, from_patch, itself = table[-3:, None, :, None, None]
    bias = jnp.where(query, to_patch, bias)
    bias = jnp.where(key, from_patch, bias)
    return jnp.where(query & key, itself, bias)
