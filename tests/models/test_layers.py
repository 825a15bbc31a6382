# SPDX-License-Identifier: Apache-2.0
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models.attention import Attention, key_weights, softmax_weights
from evit_jax.models.layers import dropout, gelu

BATCH, LENGTH, HEADS, WIDTH = 2, 7, 2, 8


def attention(dtype=jnp.float32):
    module = Attention(num_heads=HEADS, dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
    params = module.init(jax.random.key(1), x, None)
    params = jax.tree.map(lambda a: a * 20, params)  # far from uniform attention
    return lambda x, weight=None: module.apply(params, x, weight), x, params


def by_hand(params, x, bias=0.0):
    """The textbook formula in float64: output, class token's row, keys."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    qkv = np.asarray(x, np.float64) @ p["qkv"]["kernel"] + p["qkv"]["bias"]
    q, k, v = np.moveaxis(qkv.reshape(BATCH, LENGTH, 3, HEADS, -1), (2, 3), (0, 2))
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(WIDTH // HEADS) + bias
    maps = np.exp(logits - logits.max(-1, keepdims=True))
    maps /= maps.sum(-1, keepdims=True)
    y = np.moveaxis(maps @ v, 1, 2).reshape(BATCH, LENGTH, WIDTH)
    return y @ p["proj"]["kernel"] + p["proj"]["bias"], maps.mean(1)[:, 0], k.mean(1)


def test_attention_is_the_textbook_formula_and_reports_what_it_saw():
    apply, x, params = attention()
    for got, expected in zip(apply(x), by_hand(params, x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_scores_stay_float32_under_bfloat16():
    apply, x, _ = attention(jnp.bfloat16)
    y, row, keys = apply(x)
    assert (y.dtype, row.dtype, keys.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(row.sum(-1), 1, rtol=1e-6)


def test_weights_multiply_the_exponential_of_a_keys_logit():
    apply, x, params = attention()
    size = jnp.asarray(np.random.default_rng(0).integers(1, 9, (BATCH, LENGTH)), jnp.float32)
    bias = np.log(np.asarray(size, np.float64))[:, None, None]
    for got, expected in zip(apply(x, size), by_hand(params, x, bias), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_token_of_weight_zero_is_not_there_for_the_others():
    apply, x, _ = attention()
    shown = [0, 1, 3, 4, 6]
    weight = jnp.zeros((BATCH, LENGTH)).at[:, jnp.asarray(shown)].set(1.0)
    y, row, _ = apply(x, weight)
    without, row_without, _ = apply(x[:, jnp.asarray(shown)])
    np.testing.assert_allclose(y[:, jnp.asarray(shown)], without, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(row[:, jnp.asarray(shown)], row_without, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(row[:, jnp.asarray([2, 5])], 0)
    assert np.isfinite(y).all()  # a hidden token still sees itself


def test_a_hidden_key_with_a_huge_logit_does_no_harm():
    logits = jnp.asarray([[[[0.0, 1.0, 500.0]]]])
    unscaled, total = softmax_weights(logits, jnp.asarray([[[[1.0, 1.0, 0.0]]]]))
    expected = jax.nn.softmax(jnp.asarray([0.0, 1.0]))
    np.testing.assert_allclose((unscaled / total)[0, 0, 0], [*expected, 0], rtol=1e-6)


def test_a_straight_through_mask_has_finite_and_useful_gradients():
    apply, x, _ = attention()
    soft = jnp.linspace(0.1, 0.9, BATCH * LENGTH).reshape(BATCH, LENGTH)

    def loss(soft):
        hard = (soft > 0.5).astype(jnp.float32)
        return jnp.sum(apply(x, hard + soft - jax.lax.stop_gradient(soft))[0] ** 2)

    grad = jax.grad(loss)(soft)
    assert np.isfinite(grad).all()
    assert (np.abs(grad) > 0).sum() > BATCH * LENGTH / 2


def test_weights_of_one_change_neither_values_nor_gradients():
    apply, x, _ = attention()
    ones = jnp.ones((BATCH, LENGTH))
    value, grad = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(apply(x)[0])))(x)
    weighted, weighted_grad = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(apply(x, ones)[0])))(x)
    np.testing.assert_allclose(weighted, value, rtol=1e-6)
    np.testing.assert_allclose(weighted_grad, grad, rtol=1e-4, atol=1e-5)


def test_a_tokens_own_weight_is_at_least_one():
    factors = key_weights(jnp.asarray([[0.0, 2.0]]))
    np.testing.assert_array_equal(factors[0, 0], [[1, 2], [0, 2]])


def test_gelu_is_the_exact_one():
    x = jnp.linspace(-5, 5, 101)
    np.testing.assert_allclose(gelu(x), nn.gelu(x, approximate=False), rtol=1e-5, atol=1e-6)


def keys_of(count, first=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(first + jnp.arange(count))


def test_stochastic_depth_drops_whole_images_and_rescales_the_others():
    x = jnp.ones((1000, 3, 2))
    per_image = np.asarray(dropout(x, 0.25, keys_of(1000), whole=True)).reshape(1000, -1)
    assert (per_image == per_image[:, :1]).all()
    assert set(np.unique(per_image)) == {0, np.float32(1 / 0.75)}
    assert per_image.mean() == pytest.approx(1, abs=0.06)


def test_dropout_drops_single_values_and_keeps_the_dtype():
    x = jnp.ones((50, 10, 8), jnp.bfloat16)
    y = dropout(x, 0.25, keys_of(50))
    assert y.dtype == x.dtype
    assert float((y == 0).mean()) == pytest.approx(0.25, abs=0.02)
    assert all(image.min() == 0 and image.max() > 1 for image in y)  # none as a whole
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, keys_of(50)) is x


def test_what_an_image_draws_does_not_depend_on_its_neighbours():
    x = jnp.ones((8, 10, 8))
    whole = dropout(x, 0.5, keys_of(8))
    halves = [dropout(x[:4], 0.5, keys_of(4, first)) for first in (0, 4)]
    np.testing.assert_array_equal(whole, jnp.concatenate(halves))
    assert (whole[0] != whole[1]).any()
