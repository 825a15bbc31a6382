# SPDX-License-Identifier: Apache-2.0
"""Position embeddings and relative bias for another image size."""

import math

import jax
import jax.numpy as jnp
import numpy as np

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
      "bilinear_corners"   without it and with align_corners=True (two of RADIO's)
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
    image = patches.reshape(1, *grid, width)
    if model.position_resize == "bilinear_corners":
        rows, columns = (between_corners(*sides) for sides in zip(grid, model.grid, strict=True))
        resized = jnp.einsum("yr,xc,brcd->byxd", rows, columns, image, precision="highest")
    else:
        method, antialias = METHODS[model.position_resize]
        resized = jax.image.resize(image, (1, *model.grid, width), method, antialias=antialias)
    resized = resized.reshape(1, model.patches, width)
    return params | {"pos_embed": jnp.concatenate([prefix, resized], axis=1)}


def between_corners(size: int, wanted: int) -> np.ndarray:
    """Weights of `size` entries in each of `wanted`, the first and last in the same places."""
    at = np.arange(wanted) * (size - 1) / max(wanted - 1, 1)
    weights = [np.interp(at, np.arange(size), entry) for entry in np.eye(size)]
    return np.stack(weights, axis=1).astype(np.float32)


def resize_relative_bias(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """A table of `models.relative` for another image size, as BEiT and timm resize it.

    Differences of near positions keep their entries; those between are interpolated linearly where
    the distances of a larger grid are spread over those of the smaller one in geometric
    progression. What concerns the class token stays.

    Args:
      table: ((2 h - 1) (2 w - 1) + 3, H) of a square grid, or of `grid`.
      grid: rows and columns of patches wanted.

    Returns:
      The table for `grid`, or the one given where it is for no square.
    """
    wanted = tuple(2 * side - 1 for side in grid)
    count = len(table) - 3
    side = math.isqrt(max(count, 0))
    if side * side != count or side % 2 == 0 or wanted == (side, side):
        return table
    rows, columns = (interpolation(side, size) for size in wanted)
    image = table[:-3].reshape(side, side, -1)
    resized = np.einsum("yr,xc,rch->yxh", rows, columns, image, optimize=True)
    return np.concatenate([resized.reshape(math.prod(wanted), -1), table[-3:]]).astype(np.float32)


def interpolation(size: int, wanted: int) -> np.ndarray:
    """Weights of `size` entries, 0 in the middle, in each of `wanted`: (wanted, size) float64."""
    steps, reach = np.arange(size // 2), wanted // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if np.sum(ratio**steps) > reach else (ratio, high)
    distances = np.cumsum(ratio**steps)
    at = np.concatenate([-distances[::-1], [0], distances])
    targets = np.arange(wanted) - reach
    return np.stack([np.interp(targets, at, entry) for entry in np.eye(size)], axis=1)
