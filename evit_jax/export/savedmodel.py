# SPDX-License-Identifier: Apache-2.0
"""TensorFlow's SavedModel by jax2tf, for TF Serving and for programs of TensorFlow.

TensorFlow 2.21 reads an older StableHLO than JAX writes, in which there is no top-k as JAX has it.
Here it is a rank by comparing all pairs and a product with a one-hot matrix, which gives the same
tokens in the same order. The error function, of the exact GELU, is a quotient of polynomials.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.errors import InputError
from evit_jax.export.rewrite import rewritten
from evit_jax.runtime.forms import EXACT, only_form
from evit_jax.runtime.parallel import portable


def check_installed() -> None:
    """Raises InputError where TensorFlow is missing."""
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError('savedmodel needs TensorFlow: pip install "evit_jax[tf]"')


def top_k(equation, inputs: list) -> list:
    """The rule for the k largest along the last axis, in descending order, ties to the first."""
    (x,), k = inputs, equation.params["k"]
    # What is not a number would be of no rank.
    ahead = x[..., None, :] > x[..., :, None]  # (..., i, j): j goes before i
    lower = jnp.tril(jnp.ones((x.shape[-1],) * 2, bool), -1)
    ahead |= lower.reshape((1,) * (len(x.shape) - 1) + lower.shape) & (
        x[..., None, :] == x[..., :, None]
    )
    rank = jnp.sum(ahead, axis=-1, dtype=jnp.int32)  # (..., n)
    places = jnp.arange(k, dtype=jnp.int32).reshape((1,) * (len(x.shape) - 1) + (k, 1))
    chosen = rank[..., None, :] == places  # (..., k, n)
    index = jnp.arange(x.shape[-1], dtype=jnp.int32).reshape((1,) * len(x.shape) + (-1,))
    values = jnp.sum(jnp.where(chosen, x[..., None, :], jnp.zeros((), x.dtype)), axis=-1)
    return [values, jnp.sum(jnp.where(chosen, index, 0), axis=-1, dtype=jnp.int32)]


def erf(equation, inputs: list) -> list | None:
    """The rule for the error function, x p(x^2) / q(x^2) up to 4, as Eigen and so XLA have it."""
    (x,) = inputs
    if x.dtype != jnp.float32:
        return None
    x = jnp.clip(x, -4.0, 4.0)
    square = x * x
    above = (
        -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06,
        -5.69250639462346e-05, -7.34990630326855e-04, -2.95459980854025e-03,
        -1.60960333262415e-02,
    )  # fmt: skip
    below = (
        -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03,
        -7.37332916720468e-03, -1.42647390514189e-02,
    )  # fmt: skip
    return [x * horner(above, square) / horner(below, square)]


def horner(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    """A polynomial, its highest power first."""
    y = jnp.full(x.shape, coefficients[0], x.dtype)
    for coefficient in coefficients[1:]:
        y = y * x + jnp.asarray(coefficient, x.dtype).reshape((1,) * len(x.shape))
    return y


def write(
    path: Path,
    function: Callable[[jax.Array], jax.Array],
    image_size: tuple[int, int],
    *,
    batch: int | None = None,
) -> None:
    """Writes images (B, height, width, 3) float32 -> an array, with its constants, to a folder.

    Args:
      batch: B; None: any.

    Raises:
      InputError: TensorFlow is missing, or cannot read what jax2tf wrote.
    """
    check_installed()
    import tensorflow as tf
    from jax.experimental import jax2tf

    def of_cpu(images):
        with only_form(EXACT):
            return rewritten(function, dict(top_k=top_k, erf=erf))(images)

    shape = f"({batch or 'batch'}, {image_size[0]}, {image_size[1]}, 3)"
    converted = jax2tf.convert(
        portable(of_cpu), polymorphic_shapes=[shape], native_serialization_platforms=["cpu"]
    )
    module = tf.Module()
    images = tf.TensorSpec((batch, *image_size, 3), tf.float32, name="images")
    try:
        module.call = tf.function(
            lambda images: dict(logits=converted(images)), [images], autograph=False
        )
        signatures = module.call.get_concrete_function()
        tf.saved_model.save(module, str(path), signatures=signatures)
    except Exception as error:  # TensorFlow raises many kinds
        raise InputError(
            f"TensorFlow {tf.__version__} cannot save this model: "
            f"{' '.join(str(error).split())[:300]}; --batch=N, a fixed batch, asks less of it"
        ) from error


def load(path: str | Path) -> Callable[[np.ndarray], np.ndarray]:
    """The function in a folder that `write` made, in TensorFlow on the CPU."""
    check_installed()
    import tensorflow as tf

    module = tf.saved_model.load(str(path))
    call = module.signatures["serving_default"]
    return lambda images: call(images=tf.constant(np.asarray(images, np.float32)))["logits"].numpy()
