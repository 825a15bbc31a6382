# SPDX-License-Identifier: Apache-2.0
"""What the tests of methods that learn share: parameters, and a short training on digits."""

import jax
import jax.numpy as jnp
import numpy as np


def drawn(reducer, tokens, signals, keep, seed=2):
    """A reducer's parameters, all drawn, so that none is at a start that hides it."""
    params = reducer.init(jax.random.key(0), tokens, signals, keep)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), jnp.float32), params)


def in_float64(params):
    """The tree of `drawn`, in NumPy."""
    return jax.tree.map(lambda p: np.asarray(p, np.float64), params["params"])
