# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from evit_jax.runtime.layouts import tokens_outside

X = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4)


def test_a_layout_changes_no_value_and_no_gradient():
    np.testing.assert_array_equal(jax.jit(tokens_outside)(X), X)
    np.testing.assert_array_equal(tokens_outside(X), X)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(tokens_outside(x) ** 2)))(X)
    np.testing.assert_array_equal(grad, 2 * X)
    _, tangent = jax.jvp(tokens_outside, (X,), (3 * X,))
    np.testing.assert_array_equal(tangent, 3 * X)
    np.testing.assert_array_equal(jax.vmap(tokens_outside, 1, 1)(X[None]), X[None])


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_a_compiled_program_has_the_layout_and_an_exported_one_goes_without(platform):
    function = jax.jit(lambda x: tokens_outside(x) + 1)
    lowered = function.trace(X).lower(lowering_platforms=(platform,)).as_text()
    assert "dense<[2, 0, 1]>" in lowered  # from the axis that varies fastest
    exported = export.export(function, platforms=[platform])(X)
    assert "LayoutConstraint" not in exported.mlir_module()
