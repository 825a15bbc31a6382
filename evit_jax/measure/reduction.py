# SPDX-License-Identifier: Apache-2.0
"""A reduced model in one call."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

from evit_jax import tables
from evit_jax.errors import InputError
from evit_jax.measure.calibration import calibrate
from evit_jax.plan.flops import macs as count_macs
from evit_jax.reducers import as_spec, create_reducer, written
from evit_jax.tokens import Reducer


def default_method(model) -> str:
    """Ward merging, by what the class token looks at, or the mean of all tokens.

    Without a class token that was the best score (docs/methods.md).
    """
    return "ward" if model.class_token else "ward:by=mean"


def reduce(
    model,
    params: dict,
    *,
    method: str | dict | Reducer | None = None,
    macs: float | None = None,
    share: float | None = None,
    layers: Sequence[int] | None = None,
    images: np.ndarray | None = None,
):
    """The model with fewer tokens, over the same parameters; prints in one line what that means.

    Args:
      model: a model of this package, such as of `create_model`.
      params: its parameters; only read where there are `images`.
      method: a reducer, as in `create_model`; default `default_method`, which needs no training.
      macs: a budget, multiply-accumulates of one image.
      share: the same as a share of the dense model's. Without either, the method's own plan.
      layers: blocks that may reduce; default the method's own.
      images: 64 to 256 images (B, H, W, 3) float32, normalized, on which the plan is calibrated;
        they need no labels, and no figure should be reported on them. See `calibrate`.

    Returns:
      A Linen module: `reduced.apply({"params": params}, images)`.

    Raises:
      InputError: a method or budget that does not go with the model, or nothing to reduce.
    """
    if macs is not None and share is not None:
        raise InputError("give macs or share, not both")
    dense = model.clone(keep=(), reducer=create_reducer(method or default_method(model)))
    full = count_macs(dense)
    budget = full * share if share is not None else macs
    if images is not None:
        if budget is None:
            raise InputError("calibration needs a budget: macs=... or share=0.6")
        reduced = calibrate(dense, params, images, macs=budget, layers=layers).model
    else:
        reduced = dense.clone(keep=dense.plan(macs=budget, layers=layers))
    if isinstance(reduced.reducer, nn.Module):
        check_params(reduced, params)
    if all(entry is None for entry in reduced.kept):
        raise InputError(
            f"nothing would be reduced: the dense model costs {full:g} multiply-accumulates per "
            "image; give a smaller macs, or a share below 1"
        )
    cost = count_macs(reduced)
    name = written(as_spec(reduced.reducer)) + (", calibrated" if images is not None else "")
    print(
        f"{name}: tokens "
        f"{tables.runs(reduced.tokens_per_block)} of {dense.tokens_per_block[0]}, "
        f"{cost / 1e9:.4g} of {full / 1e9:.4g} GMACs ({cost / full:.0%})"
    )
    return reduced


def check_params(reduced, params: dict) -> None:
    """Raises InputError where the parameters lack those of a method that learns."""
    images = jax.ShapeDtypeStruct((1, *reduced.image_size, 3), jnp.float32)
    try:
        jax.eval_shape(lambda params, x: reduced.apply({"params": params}, x), params, images)
    except (ScopeParamNotFoundError, ScopeParamShapeError) as error:
        raise InputError(
            f"{type(reduced.reducer).__name__} learns, and these parameters are of no training "
            "with it for this plan; choose a method without parameters, or train it"
        ) from error
