# SPDX-License-Identifier: Apache-2.0
"""EViT token reduction for Vision Transformers in JAX and Flax, with static shapes."""

from evit_jax.errors import InputError
from evit_jax.measure.calibration import calibrate
from evit_jax.measure.latency import fit_latency
from evit_jax.measure.reduction import reduce
from evit_jax.models import create_model, list_models
from evit_jax.models.images import preprocess
from evit_jax.plan.counts import token_counts, token_plan
from evit_jax.reducers import create_reducer
from evit_jax.tokens import Reducer, Signals, Tokens, unmerge

__version__ = "0.2.0"
__all__ = [
    "InputError",
    "Reducer",
    "Signals",
    "Tokens",
    "calibrate",
    "create_model",
    "create_reducer",
    "fit_latency",
    "list_models",
    "preprocess",
    "reduce",
    "token_counts",
    "token_plan",
    "unmerge",
]
