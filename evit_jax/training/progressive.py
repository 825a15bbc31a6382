# SPDX-License-Identifier: Apache-2.0
"""Coarse patches first: the same weights trained on fewer tokens for the first epochs.

After As-ViT's progressive tokenization (https://arxiv.org/abs/2202.11921), as read here: the kernel
that embeds a patch takes every n-th pixel of a patch n times as high and wide, and a coarse patch's
position is the mean of the positions of the patches under it. So a stage costs an n^2-th of the
tokens, and no parameter is its own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from evit_jax.errors import InputError
from evit_jax.models import init_params
from evit_jax.plan.stages import Stage


def coarse_model(model, factor: int):
    """The model on images of a `factor`-th of its sides, keeping all patches.

    Raises:
      InputError: no whole number, or sides that it does not divide.
    """
    if type(factor) is not int or factor < 2:
        raise InputError(f"progressive.factors must be whole numbers above 1, got {factor}")
    units = [patch * factor for patch in model.patch_size]
    if any(side % unit for side, unit in zip(model.image_size, units, strict=True)):
        raise InputError(
            f"patches {factor} times as large do not divide images of {model.image_size}: "
            f"progressive.factors must divide the grid of patches, {model.grid}"
        )
    return model.clone(image_size=tuple(side // factor for side in model.image_size), keep=())


def check_factors(model, factors: Sequence[int], epochs: float, token_loss: float) -> None:
    """Raises InputError where a model cannot begin with patches so many times as large.

    Args:
      factors, epochs: of config.progressive, one is nothing without the other.
      token_loss: config.distill.tokens, for which there is no teacher with coarse patches.
    """
    if bool(factors) != bool(epochs):
        raise InputError(
            "progressive.factors and progressive.epochs go together: set both, or neither, got "
            f"{tuple(factors)} and {epochs}"
        )
    if factors and token_loss:
        raise InputError(
            "distill.tokens compares every patch with the teacher's, and coarse patches are "
            "others: set it to 0, or progressive.factors to ()"
        )
    for factor in factors:
        fine, coarse = (
            dict(jax.tree_util.tree_leaves_with_path(parameter_shapes(m)))
            for m in (model, coarse_model(model, factor))
        )
        changed = [path for path, leaf in fine.items() if coarse[path].shape != leaf.shape]
        if any(path[-1].key != "pos_embed" for path in changed):
            raise InputError(
                "this model has other weights for coarse patches, so it cannot begin with them: "
                "set progressive.factors to ()"
            )


def parameter_shapes(model) -> dict:
    """Of a model that keeps all patches, which has those of any plan."""
    return jax.eval_shape(lambda key: init_params(model.clone(keep=()), key), jax.random.key(0))


def stage_models(model, stage: Stage) -> tuple:
    """The models that a stage trains, over the same parameters."""
    if stage.coarse > 1:
        model = coarse_model(model, stage.coarse)
    return tuple(model.clone(keep=keep) for keep in (stage.keep, *stage.others))


def coarse_images(images: jax.Array, model) -> jax.Array:
    """(B, H, W, 3) -> those that the model takes: every n-th pixel, or all of them."""
    rows, columns = (
        there // asked for there, asked in zip(images.shape[1:3], model.image_size, strict=True)
    )
    return images[:, ::rows, ::columns]


def coarse_params(params: dict, model) -> dict:
    """The parameters with positions for the model's grid: means, where there are more of them."""
    if "pos_embed" not in params:
        return params
    positions, (rows, columns) = params["pos_embed"], model.grid
    prefix, width = model.placed_prefix, positions.shape[-1]
    factor = round(((positions.shape[1] - prefix) / model.patches) ** 0.5)
    if factor == 1:
        return params
    patches = positions[:, prefix:].reshape(1, rows, factor, columns, factor, width)
    patches = jnp.mean(patches, axis=(2, 4)).reshape(1, model.patches, width)
    return params | dict(pos_embed=jnp.concatenate([positions[:, :prefix], patches], axis=1))
