# SPDX-License-Identifier: Apache-2.0
"""Linear layers with 8-bit weights and activations, of any model here, without calibration.

A kernel (E, D) becomes whole numbers from -127 to 127 and a scale for each output channel; each
token that enters a layer, whole numbers and a scale of its own, found as it comes. Their product is
a sum of 32-bit whole numbers, times both scales. The rest of the model is as it was: norms,
softmax, positions, convolutions, attention's products, which have no weights, and methods with
parameters, whose decisions are worth more than their few numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.export.rewrite import rewritten
from evit_jax.runtime.forms import EXACT, only_form
from evit_jax.weights.names import of_reducer

MOST = 127
TINY = np.finfo(np.float32).tiny


class Weight(NamedTuple):
    """A quantized kernel."""

    values: jax.Array  # (E, D) int8
    scale: jax.Array  # (D,) float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the kernel that this stands for."""
        return self.scale.dtype


def is_weight(value) -> bool:
    """Whether a value is a quantized kernel."""
    return isinstance(value, Weight)


def quantize(kernel: np.ndarray) -> Weight:
    """A kernel (E, D) float32, rounded; a channel of zeros has a scale of 1."""
    largest = np.abs(kernel).max(axis=0)
    scale = np.where(largest > 0, largest / MOST, 1).astype(np.float32)
    return Weight(np.rint(kernel / scale).astype(np.int8), scale)


def quantized(params: dict) -> dict:
    """Parameters with each linear layer's kernel as a `Weight`, those of reducers excepted."""

    def each(path, array):
        names = [key.key for key in path]
        linear = names[-1] == "kernel" and np.ndim(array) == 2 and not of_reducer(names)
        return quantize(np.asarray(array)) if linear else array

    return jax.tree_util.tree_map_with_path(each, params)


def with_int8_products(function: Callable) -> Callable:
    """function(params, *arrays) -> the same for parameters that `quantized` made.

    It takes the CPU's form of each part on all platforms, in which linear layers are plain
    products. Of a kernel that is used otherwise, only the storage is quantized.
    """
    with_rules = rewritten(
        function,
        dict(dot_general=product, slice=columns, convert_element_type=same),
        plain=as_array,
    )

    def apply(*args):
        with only_form(EXACT):
            return with_rules(*args)

    return apply


def as_array(value) -> jax.Array:
    """A quantized kernel as the float32 kernel that it stands for; anything else as it is."""
    return value.values.astype(jnp.float32) * value.scale[None] if is_weight(value) else value


def product(equation, inputs: list) -> list | None:
    """The rule for activations (..., E) times a kernel (E, D)."""
    x, weight = inputs
    dimensions = equation.params["dimension_numbers"]
    if not is_weight(weight) or dimensions != (((len(x.shape) - 1,), (0,)), ((), ())):
        return None
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / MOST
    rounded = jnp.round(x / jnp.maximum(scale, TINY)).astype(jnp.int8)
    sums = jax.lax.dot_general(rounded, weight.values, dimensions, preferred_element_type=jnp.int32)
    channels = weight.scale.reshape((1,) * (len(x.shape) - 1) + (-1,))
    return [sums.astype(jnp.float32) * scale * channels]


def columns(equation, inputs: list) -> list | None:
    """The rule for some output channels of a kernel, such as those of queries."""
    (weight,) = inputs
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    if not is_weight(weight) or equation.params["strides"] is not None:
        return None
    if (starts[0], limits[0]) != (0, weight.shape[0]):
        return None
    some = slice(starts[1], limits[1])
    return [Weight(weight.values[:, some], weight.scale[some])]


def same(equation, inputs: list) -> list | None:
    """The rule for a kernel in the dtype of the computation, which here is float32."""
    kept = is_weight(inputs[0]) and equation.params["new_dtype"] == jnp.float32
    return [inputs[0]] if kept else None
