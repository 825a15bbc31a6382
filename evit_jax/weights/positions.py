# SPDX-License-Identifier: Apache-2.0
"""Position embeddings for another image size."""

import math

import jax
import jax.numpy as jnp

from evit_jax.errors import InputError


def resize_positions(params: dict, model, *, grid: tuple[int, int] | None = None) -> dict:
    """Parameters of one image size -> parameters for `model`, which may have another.

    The patches' part of `pos_embed` (1, placed_prefix + P, D) is resized bicubically as PyTorch
    does with align_corners=False; prefix tokens keep theirs. DeiT and EViT do it without
    antialiasing, timm with it, where PyTorch's kernel is another one even if nothing shrinks:
    `model.antialias_positions` says which. Everything else is shared with `params`.

    Args:
      params: of a model like `model`, with positions for `grid`.
      model: has `grid` (rows, columns), `patches`, `placed_prefix` and `antialias_positions`.
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
    # PyTorch's kernel is the usual cubic (a = -0.5) with antialiasing, another (a = -0.75) without.
    method = jax.image.ResizeMethod
    resized = jax.image.resize(
        patches.reshape(1, *grid, width),
        (1, *model.grid, width),
        method.CUBIC if model.antialias_positions else method.CUBIC_PYTORCH,
        antialias=model.antialias_positions,
    ).reshape(1, model.patches, width)
    return params | {"pos_embed": jnp.concatenate([prefix, resized], axis=1)}
