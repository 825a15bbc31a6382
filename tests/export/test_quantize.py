# SPDX-License-Identifier: Apache-2.0
"""Operations replaced in a traced function, and linear layers in 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.export.quantize import Weight, quantize, quantized, with_int8_products
from evit_jax.export.rewrite import rewritten
from evit_jax.export.savedmodel import erf, top_k
from evit_jax.models import build_model, init_params

SIZES = dict(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, num_classes=3)


def by_hand(x, kernel):
    """x (N, E) times a kernel (E, D) with both rounded, in Python's whole numbers."""
    result = np.zeros((x.shape[0], kernel.shape[1]))
    for row in range(x.shape[0]):
        step = np.abs(x[row]).max() / np.float32(127)
        numbers = [round(float(value / step)) if step else 0 for value in x[row]]
        for column in range(kernel.shape[1]):
            wide = np.abs(kernel[:, column]).max() / np.float32(127)
            weights = [round(float(value / wide)) for value in kernel[:, column]]
            total = sum(a * b for a, b in zip(numbers, weights, strict=True))
            result[row, column] = total * step * wide
    return result


def test_a_product_is_that_of_whole_numbers_with_a_scale_per_token_and_channel():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 4, 8)), rng.normal(size=(8, 5))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    x[0, 1], x[1, 2] = 0, 1000 * x[1, 2]  # empty, and large: neither touches another token

    def layer(params, x):
        return jax.checkpoint(lambda x: x @ params["kernel"])(x)

    y = jax.jit(with_int8_products(layer))(quantized(dict(kernel=kernel)), x)
    expected = np.stack([by_hand(each, kernel) for each in x])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(y - x @ kernel).max() > 1e-3  # it is rounded


def test_a_kernel_of_which_columns_are_taken_stays_in_8_bits():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(8, 6))
    params = quantized(dict(kernel=kernel.astype(np.float32)))

    def some(params, x):
        return x @ params["kernel"].astype(jnp.float32)[:, 2:5]

    function = with_int8_products(some)
    np.testing.assert_allclose(function(params, x), by_hand(x, kernel[:, 2:5]), rtol=1e-4)
    kinds = [one.params["preferred_element_type"] for one in products(function, params, x)]
    assert kinds == [jnp.int32]


def products(function, *args):
    jaxpr = jax.make_jaxpr(lambda *args: function(*args))(*args).jaxpr
    return [one for one in jaxpr.eqns if one.primitive.name == "dot_general"]


def test_a_kernel_that_is_used_otherwise_is_the_float_that_it_stands_for():
    weight = quantize(np.asarray([[1.0, 0, -3], [0.5, 0, 2]], np.float32))
    assert weight.values.dtype == np.int8
    np.testing.assert_array_equal(weight.values[:, 1], 0)
    function = with_int8_products(lambda params, x: params["kernel"].sum(axis=0) + x)
    y = function(dict(kernel=weight), np.zeros(3, np.float32))
    np.testing.assert_allclose(y, [1.5, 0, -1], atol=0.01)


@pytest.mark.parametrize("more", [{}, dict(qk_norm=True), dict(mlp="swiglu")])
def test_all_linear_layers_of_a_model_are_in_8_bits_and_its_answers_stay(more):
    model = build_model("vit", **SIZES, keep_rate=0.6, layers=(1,), **more)
    params = init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), params)
    small = quantized(params)
    kernels = [leaf for leaf in jax.tree.leaves(small, is_leaf=is_weight) if is_weight(leaf)]
    per_block = 5 if more.get("mlp") else 4
    assert len(kernels) == 3 * per_block + 2  # the patch embedding and the head

    def logits(params, images):
        return model.apply({"params": params}, images)[0]

    images = rng.normal(size=(4, 16, 16, 3)).astype(np.float32)
    function = with_int8_products(logits)
    wanted = logits(params, images)
    got = jax.jit(function)(small, images)
    assert 0 < np.abs(got - wanted).max() < 0.1 * np.abs(wanted).max()
    inside = [
        one
        for one in products(function, small, images)
        if one.params["preferred_element_type"] == jnp.int32
    ]
    # The last block's patches are not computed, its prefix asks with q, k and v of all.
    assert len(inside) >= len(kernels)


def is_weight(value):
    return isinstance(value, Weight)


def test_rank_by_comparison_is_top_k_with_ties_to_the_first():
    x = jnp.asarray([[3.0, 1, 3, -jnp.inf, 2], [0, 0, 0, 0, 0], [5, 4, 3, 2, 9]])

    def best(x):
        return jax.jit(lambda x: jax.lax.top_k(x, 3))(x)

    found = rewritten(best, dict(top_k=top_k))(x)
    for ours, theirs in zip(found, jax.lax.top_k(x, 3), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    names = {
        one.primitive.name for one in jax.make_jaxpr(rewritten(best, dict(top_k=top_k)))(x).eqns
    }
    assert "top_k" not in names


def test_what_no_result_needs_is_left_out():
    traced = jax.make_jaxpr(rewritten(lambda x: (jnp.sin(x), jnp.cos(x))[1], {}))(1.0)
    assert [one.primitive.name for one in traced.eqns] == ["cos"]


def test_the_error_function_without_an_operation_of_its_name():
    x = jnp.linspace(-6, 6, 20001)
    found = rewritten(jax.lax.erf, dict(erf=erf))(x)
    np.testing.assert_allclose(found, jax.lax.erf(x), atol=1e-6)  # float32: 4e-7 from the truth
    names = [
        one.primitive.name for one in jax.make_jaxpr(rewritten(jax.lax.erf, dict(erf=erf)))(x).eqns
    ]
    assert "erf" not in names
