# SPDX-License-Identifier: Apache-2.0
"""Position embeddings for another image size."""

import math

import jax
import jax.numpy as jnp

from evit_jax.errors import InputError


def resize_positions(params: dict, model, *, grid: tuple[int, int] | None = None) -> dict:
    """Parameters of one image size -> parameters for `model`, which may have another.

    The patches' part of `pos_embed` (1, placed_prefix + P, D) is resized bicubically as PyTorch
    does with align_corners=False and no antialiasing, which is what DeiT and EViT do; prefix tokens
    keep theirs. Everything else is shared with `params`.

    Args:
      params: of a model like `model`, with positions for `grid`.
      model: has `grid` (rows, columns), `patches` and `placed_prefix`.
      grid: rows and columns that `params` are for; default a square.

    Raises:
      InputError: the table does not fit `grid`, or is no square and `grid` is not given.
    """
    table = params["pos_embed"]
    prefix, patches = table[:, : model.placed_prefix], table[:, model.placed_prefix :]
    count, width = patches.shape[1:]
    if grid is None:
        side = math.isqrt(count)
        grid = model.grid if count == model.patches else (side, side)
    if grid[0] * grid[1] != count:
        raise InputError(
            f"the position embeddings are for {count} patches, which is no grid of "
            f"{grid[0]}x{grid[1]}; say which it is with grid=(rows, columns)"
        )
    if tuple(grid) == tuple(model.grid):
        return params
    # PyTorch's kernel (a = -0.75) is not the usual cubic (a = -0.5).
    resized = jax.image.resize(
        patches.reshape(1, *grid, width),
        (1, *model.grid, width),
        jax.image.ResizeMethod.CUBIC_PYTORCH,
        antialias=False,
    ).reshape(1, model.patches, width)
    return params | {"pos_embed": jnp.concatenate([prefix, resized], axis=1)}
