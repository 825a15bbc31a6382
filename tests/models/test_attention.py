# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models.attention import Attention, attend_by_weight, attend_weighted
from evit_jax.runtime.forms import EXACT, TPU, Form
from evit_jax.tokens import Signals, softmax_weights

BATCH, LENGTH, HEADS, WIDTH = 2, 7, 2, 8


def attention(dtype=jnp.float32):
    module = Attention(num_heads=HEADS, dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
    params = module.init(jax.random.key(1), x, None)
    params = jax.tree.map(lambda a: a * 20, params)  # far from uniform attention

    def apply(x, weight=None):
        """Output, class token's row, keys."""
        y, parts = module.apply(params, x, weight)
        signals = Signals(**parts, before=x, after=x, weight=weight)
        return y, signals.class_attention(), signals.keys()

    return apply, x, params


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


def full_map(weight):
    """The map by hand, (B, H, N, N) float64, of drawn q and k with weighted keys."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, BATCH, HEADS, LENGTH, 4))
    factors = np.maximum(weight[:, None, None, :], np.eye(LENGTH))
    maps = np.exp(q @ k.swapaxes(-1, -2)) * factors
    return (q, k, v), maps / maps.sum(-1, keepdims=True)


@pytest.mark.parametrize("first", [None, 2])
def test_a_tokens_own_weight_is_at_least_one(first):
    weight = np.random.default_rng(1).choice([0, 0.3, 1, 4], (BATCH, LENGTH))
    (q, k, v), maps = full_map(weight)
    q, k, v, weight = (jnp.asarray(a, jnp.float32) for a in (q, k, v, weight))
    got = attend_weighted(q[:, :, :first], k, v, weight)
    np.testing.assert_allclose(got, (maps @ np.asarray(v))[:, :, :first], rtol=2e-5, atol=2e-6)
    signals = Signals(q=q, k=k, v=v, weight=weight)
    np.testing.assert_allclose(signals.attention(), maps, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        signals.class_attention(), maps[:, :, 0].mean(1), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        signals.received_attention(), maps.mean((1, 2)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("form", [EXACT, TPU, Form(normalize_map=True, tile=8)])
@pytest.mark.parametrize("biased", [False, True])
def test_weights_of_at_least_one_are_a_bias_like_any_other(form, biased):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 3, 11, 8)), jnp.float32) for _ in range(3))
    weight = jnp.asarray(rng.integers(1, 20, (2, 11)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=(1, 3, 11, 11)), jnp.float32) if biased else None
    got = attend_by_weight(q, k, v, weight, bias, True, form)
    expected = attend_weighted(q, k, v, weight, bias)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    below = attend_by_weight(q, k, v, weight / 20, bias, False, form)
    np.testing.assert_array_equal(below, attend_weighted(q, k, v, weight / 20, bias))


def test_weights_of_keys_make_no_second_map():
    q = jax.ShapeDtypeStruct((2, 3, 50, 4), jnp.float32)
    weight = jax.ShapeDtypeStruct((2, 50), jnp.float32)
    jaxpr = jax.make_jaxpr(attend_weighted)(q, q, q, weight)
    maps = [
        v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars if v.aval.shape[-2:] == (50, 50)
    ]
    assert all(shape == (2, 3, 50, 50) for shape in maps)  # none that is the same for all heads


def test_a_mask_gets_no_gradient_for_what_a_token_thinks_of_itself():
    (q, k, v), _ = full_map(np.ones((BATCH, LENGTH)))
    q, k, v = (jnp.asarray(a, jnp.float32) for a in (q, k, v))
    for mask in (0.0, 0.5, 1.0):
        weight = jnp.full((BATCH, LENGTH), mask)
        moved = jax.jacobian(lambda w: attend_weighted(q, k, v, w).sum((1, 3)))(
            weight
        )  # (B, Q, B, N)
        for image in range(BATCH):
            np.testing.assert_allclose(jnp.diagonal(moved[image, :, image]), 0, atol=1e-5)
    grad = jax.grad(lambda w: jnp.sum(jnp.sin(attend_weighted(q, k, v, w))))(
        jnp.zeros((BATCH, LENGTH))
    )
    assert (jnp.abs(grad) > 0).all()  # of a hidden token: what it would do to the others


def test_values_and_shifts_are_norms():
    rng = np.random.default_rng(0)
    v, before, after = rng.normal(size=(2, 2, 5, 3)), *rng.normal(size=(2, 2, 5, 6))
    signals = Signals(
        q=v, k=v, v=jnp.asarray(v), before=jnp.asarray(before), after=jnp.asarray(after)
    )
    np.testing.assert_allclose(signals.value_norms(), np.sqrt((v**2).sum(-1)), rtol=1e-5)
    moved = np.sqrt(((after - before) ** 2).sum(-1))
    np.testing.assert_allclose(signals.shift(), moved, rtol=1e-5)


def test_keys_are_those_before_positions_were_applied():
    k, plain = jnp.ones((1, 2, 3, 4)), jnp.full((1, 2, 3, 4), 2.0)
    assert Signals(q=k, k=k, v=k).keys().max() == 1
    assert Signals(q=k, k=k, v=k, plain_k=plain).keys().min() == 2


def test_what_a_model_lacks_is_said_in_one_line():
    k = jnp.ones((1, 2, 3, 4))
    with pytest.raises(InputError, match="no class token; choose a reducer that does without one"):
        Signals(q=k, k=k, v=k, class_token=False, prefix=0).class_attention()
    assert Signals(q=k, k=k, v=k, class_token=False).received_attention().shape == (1, 3)
    with pytest.raises(InputError, match="leave block 0 out of its layers"):
        Signals(layer=0).keys()
