# SPDX-License-Identifier: Apache-2.0
"""Position embeddings for another image size."""

import math

import jax
import jax.numpy as jnp

from evit_jax.errors import InputError

RESIZE = jax.image.ResizeMethod
METHODS = {  # how -> method and whether it is antialiased
    "bicubic": (RESIZE.CUBIC_PYTORCH, False),  # a = -0.75
    "bicubic_antialias": (RESIZE.CUBIC, True),  # a = -0.5
    "bilinear": (RESIZE.LINEAR, False),
    "bilinear_antialias": (RESIZE.LINEAR, True),
}


def resize_positions(params: dict, model, *, grid: tuple[int, int] | None = None) -> dict:
    """Parameters of one image size -> parameters for `model`, which may have another.

    The patches' part of `pos_embed` (1, placed_prefix + P, D) is resized as PyTorch does with
    align_corners=False; prefix tokens keep theirs. `model.position_resize` says how:
      "bicubic"            without antialiasing, with PyTorch's own kernel (DeiT, EViT)
      "bicubic_antialias"  with antialiasing and the usual kernel, even where nothing shrinks (timm)
      "bilinear"           without antialiasing (FlexiViT, RADIO)
      "bilinear_antialias" with it (SigLIP 2 in NaFlex)
    Everything else is shared with `params`.

    Args:
      params: of a model like `model`, with positions for `grid`.
      model: has `grid` (rows, columns), `patches`, `placed_prefix` and `position_resize`.
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
    method, antialias = METHODS[model.position_resize]
    resized = jax.image.resize(
        patches.reshape(1, *grid, width), (1, *model.grid, width), method, antialias=antialias
    ).reshape(1, model.patches, width)
    return params | {"pos_embed": jnp.concatenate([prefix, resized], axis=1)}
