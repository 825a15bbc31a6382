# SPDX-License-Identifier: Apache-2.0
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import build_model, init_params
from evit_jax.reducers import create_reducer
from tests.contracts.test_reducers import BATCH, PATCHES
from tests.contracts.test_reducers import example as narrow_example
from tests.support.by_hand import slopes
from tests.support.learning import drawn, in_float64

REDUCER = create_reducer("dynamicvit")
SIZES = dict(image_size=24, patch_size=4, width=32, depth=3, num_heads=2, num_classes=5)


def example(train=False):
    """Wide enough for the predictor's last layer to be more than one number."""
    tokens, signals = narrow_example(train=train)
    x = np.random.default_rng(1).normal(size=(BATCH, 1 + PATCHES, 8))
    return tokens.replace(x=jnp.asarray(x, jnp.float32)), signals


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def layer(tree, x):
    return x @ tree["kernel"] + tree["bias"]


def log_probabilities(x, there, params):
    """One image by hand: patches (n, D), decisions so far (n,) -> (n, 2)."""
    half = x.shape[1] // 2
    normed = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    z = gelu(layer(params["in"], normed * params["norm"]["scale"] + params["norm"]["bias"]))
    others = sum(d * row[half:] for d, row in zip(there, z, strict=True)) / there.sum()
    y = np.stack([np.concatenate([row[:half], others]) for row in z])
    y = layer(params["out"], gelu(layer(params["fc2"], gelu(layer(params["fc1"], y)))))
    return y - np.log(np.exp(y).sum(axis=1, keepdims=True))


def noise(signals, shape):
    draws = [jax.random.gumbel(key, shape) for key in signals.rng]
    return np.asarray(jnp.stack(draws), np.float64)


def soft(x, there, params, gumbel):
    exp = np.exp(log_probabilities(x, there, params) + gumbel)
    return exp[:, 0] / exp.sum(axis=1)


def so_far(tokens, seed=7):
    """Tokens of which an earlier block hid about a third."""
    mask = np.random.default_rng(seed).random((BATCH, PATCHES)) < 0.7
    weight = jnp.pad(jnp.asarray(mask, jnp.float32), ((0, 0), (1, 0)), constant_values=1)
    return tokens.replace(weight=weight, size=tokens.size * weight), mask


def test_in_evaluation_the_most_probable_stay_in_order():
    tokens, signals = example()
    params = drawn(REDUCER, tokens, signals, 5)
    after = REDUCER.apply(params, tokens, signals, 5)
    assert after.weight is None
    for image in range(BATCH):
        x = np.asarray(tokens.x[image, 1:], np.float64)
        logs = log_probabilities(x, np.ones(PATCHES), in_float64(params))
        order = np.argsort(-logs[:, 0])[:5]
        np.testing.assert_array_equal(after.x[image, 1:], tokens.x[image, 1:][order])


def test_in_training_draws_hide_tokens_and_earlier_decisions_stay():
    tokens, signals = example(train=True)
    tokens, before = so_far(tokens)
    params = drawn(REDUCER, tokens, signals, 5)
    after = REDUCER.apply(params, tokens, signals, 5)
    np.testing.assert_array_equal(after.x, tokens.x)
    gumbel, hidden = noise(signals, (PATCHES, 2)), 0
    for image in range(BATCH):
        x = np.asarray(tokens.x[image, 1:], np.float64)
        logs = log_probabilities(x, before[image], in_float64(params)) + gumbel[image]
        mask = (logs[:, 0] > logs[:, 1]) & before[image]
        for array in (after.weight, after.size):
            np.testing.assert_array_equal(array[image], [1, *mask])
        np.testing.assert_array_equal(after.owner[image], np.where(mask, range(PATCHES), -1))
        share = mask.mean() - 5 / PATCHES
        np.testing.assert_allclose(after.aux["loss"][0][image], 2 * share**2, rtol=1e-5, atol=1e-9)
        hidden += (before[image] & ~mask).sum()
    assert hidden > 2


def test_the_loss_is_a_mean_over_the_blocks_of_the_plan():
    tokens, signals = example(train=True)
    params = drawn(REDUCER, tokens, signals, 5)
    losses = [
        REDUCER.apply(params, tokens, signals.replace(plan=plan), 5).aux["loss"][0]
        for plan in ((None, 5), (8, None, 5, 4))
    ]
    np.testing.assert_allclose(losses[0], 3 * losses[1], rtol=1e-6)


def test_the_losss_gradient_is_that_of_the_probabilities_by_hand():
    tokens, signals = example(train=True)
    tokens, before = so_far(tokens)
    params = drawn(REDUCER, tokens, signals, 5)

    def loss(params, x):
        after = REDUCER.apply(params, tokens.replace(x=x), signals, 5)
        return jnp.sum(after.aux["loss"][0])

    grads, x_grad = jax.grad(loss, argnums=(0, 1))(params, tokens.x)
    gumbel, wide = noise(signals, (PATCHES, 2)), in_float64(params)
    after = REDUCER.apply(params, tokens, signals, 5)
    share = np.asarray(after.weight[:, 1:], np.float64).mean(axis=1) - 5 / PATCHES

    def straight_through(x, params):
        """What has the same gradient: the share's own value times the soft share."""
        parts = [
            share[i] * (soft(x[i, 1:], before[i], params, gumbel[i]) * before[i]).mean()
            for i in range(BATCH)
        ]
        return 2 * 2 * sum(parts)

    x = np.asarray(tokens.x, np.float64)
    expected = slopes(lambda x: straight_through(x, wide), x)
    np.testing.assert_allclose(x_grad, expected, rtol=1e-4, atol=1e-6)
    for name in ("in", "fc1", "out"):

        def of(values, name=name):
            return straight_through(x, wide | {name: wide[name] | dict(kernel=values)})

        found = grads["params"][name]["kernel"]
        np.testing.assert_allclose(found, slopes(of, wide[name]["kernel"]), rtol=1e-4, atol=1e-6)


def test_what_a_block_has_left_nothing_of_stays_finite():
    tokens, signals = example(train=True)
    nothing = jnp.pad(jnp.zeros((BATCH, PATCHES)), ((0, 0), (1, 0)), constant_values=1)
    params = drawn(REDUCER, tokens, signals, 5)

    def loss(params):
        after = REDUCER.apply(params, tokens.replace(weight=nothing), signals, 5)
        return jnp.sum(after.aux["loss"][0] + after.weight.sum(axis=1))

    value, grads = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, BATCH * (2 * (5 / PATCHES) ** 2 + 1), rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "kind", [{}, pytest.param(dict(class_token=False, pool="avg"), marks=pytest.mark.slow)]
)
def test_a_mask_in_training_is_a_real_reduction_in_evaluation(kind):
    model = build_model("vit", reducer="dynamicvit", keep_rate=0.5, layers=(1, 2), **SIZES, **kind)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(3))
    # Of the size at which trained weights decide: drawn, all probabilities are next to 1/2.
    params = jax.tree.map(lambda a: 6 * a if a.ndim == 2 else a, params)
    images = jax.random.normal(jax.random.key(1), (2, 24, 24, 3))
    train = jax.jit(functools.partial(model.apply, train=True))
    for image in images[:, None]:  # nothing is drawn without random keys
        masked, out = train({"params": params}, image)
        left = tuple(int((owner >= 0).sum()) for owner in out["owner"])
        assert 0 < left[1] < left[0] < 36
        real = model.clone(keep=(None, *left))
        reduced, found = jax.jit(real.apply)({"params": params}, image)
        np.testing.assert_allclose(masked, reduced, rtol=0, atol=1e-5)
        for name in ("size", "dense"):
            np.testing.assert_allclose(out[name].sum(axis=1), found[name].sum(axis=1), atol=1e-4)


def test_gradients_of_the_model_reach_what_decides():
    model = build_model("vit", reducer="dynamicvit", keep_rate=0.7, layers=(1, 2), **SIZES)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (4, 24, 24, 3))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params):
        rngs = dict(dropout=jax.random.key(2))
        logits, out = model.apply({"params": params}, images, train=True, rngs=rngs)
        return jnp.sum(jnp.sin(logits)), out["owner"]

    grads, owners = gradients(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    for block in (1, 2):
        assert jnp.abs(grads[f"blocks_{block}"]["reduction"]["in"]["kernel"]).max() > 0
    first, second = ((np.asarray(owner) >= 0).mean() for owner in owners)
    assert second < first < 1  # each image draws, and what is hidden stays hidden
    assert ((owners[1] >= 0) <= (owners[0] >= 0)).all()
