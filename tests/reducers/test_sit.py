# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import build_model, init_params
from evit_jax.reducers import create_reducer
from tests.contracts.test_reducers import BATCH, PATCHES, example
from tests.support.by_hand import slopes
from tests.support.learning import drawn, in_float64


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def normed(x, params):
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    return x * params["norm"]["scale"] + params["norm"]["bias"]


def sit(x, params):
    """Patches (n, D) of one image -> shares (n, K), and what they are shares of."""
    y = gelu(normed(x, params) @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    scores = params["scale"] * (y @ params["fc2"]["kernel"] + params["fc2"]["bias"])
    return np.exp(scores) / np.exp(scores).sum(axis=0), x


def patchmerger(x, params):
    y = normed(x, params)
    scores = np.exp(y @ params["queries"].T)
    return scores / scores.sum(axis=0), y


BY_HAND = dict(sit=sit, patchmerger=patchmerger)
every_method = pytest.mark.parametrize("name", sorted(BY_HAND))


@every_method
def test_tokens_are_learned_means_of_all_patches(name):
    tokens, signals = example(prefix=2)
    reducer = create_reducer(name)
    grid = jnp.stack(jnp.divmod(jnp.arange(PATCHES), 4), axis=-1).astype(jnp.float32)
    positions = jnp.tile(jnp.pad(grid, ((2, 0), (0, 0)))[None], (BATCH, 1, 1))
    weight = jnp.asarray(np.random.default_rng(1).uniform(1, 2, tokens.size.shape), jnp.float32)
    tokens = tokens.replace(positions=positions, weight=weight)
    params = drawn(reducer, tokens, signals, 5)
    after = reducer.apply(params, tokens, signals, 5)
    np.testing.assert_allclose(after.size, [[1, 1] + [PATCHES / 5] * 5] * BATCH, rtol=1e-6)
    for image in range(BATCH):
        x = np.asarray(tokens.x[image, 2:], np.float64)
        share, values = BY_HAND[name](x, in_float64(params))
        np.testing.assert_allclose(after.x[image, 2:], share.T @ values, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(after.positions[image, 2:], share.T @ grid, atol=1e-5)
        np.testing.assert_allclose(after.weight[image, 2:], share.T @ weight[image, 2:], atol=1e-5)
        np.testing.assert_array_equal(after.owner[image], share.argmax(axis=1))


@every_method
def test_gradients_are_those_by_hand(name):
    tokens, signals = example(batch=2)
    reducer = create_reducer(name)
    params = drawn(reducer, tokens, signals, 3)

    def loss(params, x):
        return jnp.sum(jnp.sin(reducer.apply(params, tokens.replace(x=x), signals, 3).x[:, 1:]))

    def by_hand(params, x):
        parts = [BY_HAND[name](image[1:], params) for image in x]
        return sum(np.sin(share.T @ values).sum() for share, values in parts)

    grads, x_grad = jax.grad(loss, argnums=(0, 1))(params, tokens.x)
    wide, x = in_float64(params), np.asarray(tokens.x, np.float64)
    expected = slopes(lambda x: by_hand(wide, x), x)
    np.testing.assert_allclose(x_grad, expected, rtol=1e-4, atol=1e-5)
    leaf = dict(sit="scale", patchmerger="queries")[name]
    expected = slopes(lambda values: by_hand(wide | {leaf: values}, x), wide[leaf])
    np.testing.assert_allclose(grads["params"][leaf], expected, rtol=1e-4, atol=1e-4)


@every_method
def test_a_model_trains_at_its_plan(name):
    sizes = dict(image_size=16, patch_size=4, width=16, depth=4, num_heads=2, num_classes=3)
    model = build_model("vit", reducer=name, keep_rate=0.5, **sizes)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    def loss(params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, images, train=True)[0]))

    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    for block in (1, 2, 3):  # sit's shares begin so alike that their scale alone may get nothing
        learned = jax.tree.leaves(grads[f"blocks_{block}"]["reduction"])
        assert max(jnp.abs(leaf).max() for leaf in learned) > 0
