# SPDX-License-Identifier: Apache-2.0
"""EViT token reduction for Vision Transformers in JAX and Flax, with static shapes."""

from evit_jax.errors import InputError
from evit_jax.measure.latency import fit_latency
from evit_jax.models import create_model, list_models
from evit_jax.models.images import preprocess
from evit_jax.tokens import unmerge

__version__ = "0.1.0"
__all__ = ["InputError", "create_model", "fit_latency", "list_models", "preprocess", "unmerge"]
