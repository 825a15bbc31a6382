# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import build_model, init_params
from evit_jax.plan.flops import macs
from evit_jax.reducers import create_reducer
from tests.contracts.test_reducers import BATCH, PATCHES, example
from tests.support.by_hand import slopes
from tests.support.learning import drawn, in_float64


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def normed(x, params, name="norm"):
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    return x * params[name]["scale"] + params[name]["bias"]


def layer(x, params, name):
    return x @ params[name]["kernel"] + params[name]["bias"]


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
SIZES = dict(image_size=16, patch_size=4, width=16, depth=4, num_heads=2, num_classes=3)
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
    model = build_model("vit", reducer=name, keep_rate=0.5, **SIZES)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    def loss(params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, images, train=True)[0]))

    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    for block in (1, 2, 3):  # sit's shares begin so alike that their scale alone may get nothing
        learned = jax.tree.leaves(grads[f"blocks_{block}"]["reduction"])
        assert max(jnp.abs(leaf).max() for leaf in learned) > 0


def recovered(x, params):
    """Slimmed patches (K, D) of one image -> all of them (P, D)."""
    y = gelu(layer(normed(x, params, "norm1").T, params, "tokens1"))  # (D, 4 P)
    z = layer(y, params, "tokens2").T
    return z + layer(gelu(layer(normed(z, params, "norm2"), params, "fc1")), params, "fc2")


def test_recovered_patches_and_gradients_are_those_by_hand():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    target = np.random.default_rng(1).normal(size=(2, 7, 5))
    network = create_reducer("sit:recovery=True").reverse(7)
    initial = network.init(jax.random.key(0), x)
    shapes = jax.tree.map(jnp.shape, initial["params"])
    assert (shapes["tokens1"]["kernel"], shapes["tokens2"]["kernel"]) == ((3, 28), (28, 7))
    assert (shapes["fc1"]["kernel"], shapes["fc2"]["kernel"]) == ((5, 20), (20, 5))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), jnp.float32), initial)
    wide = in_float64(params)
    after = network.apply(params, x)
    expected = [recovered(np.asarray(image, np.float64), wide) for image in x]
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)

    def loss(params, x):
        return jnp.mean(jnp.square(network.apply(params, x) - target.astype(np.float32)))

    def by_hand(params, x):
        return np.mean((np.stack([recovered(image, params) for image in x]) - target) ** 2)

    grads, x_grad = jax.grad(loss, argnums=(0, 1))(params, x)
    exact = np.asarray(x, np.float64)
    expected = slopes(lambda x: by_hand(wide, x), exact)
    np.testing.assert_allclose(x_grad, expected, rtol=1e-3, atol=1e-6)
    for name, leaf in dict(tokens1="kernel", tokens2="bias", norm1="scale", fc2="kernel").items():

        def changed(values, name=name, leaf=leaf):
            return by_hand(wide | {name: wide[name] | {leaf: values}}, exact)

        expected = slopes(changed, wide[name][leaf])
        np.testing.assert_allclose(grads["params"][name][leaf], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("remat", "pool"), [(False, "token"), (True, "token"), (False, "avg")])
def test_training_recovers_after_each_block_with_fewer_tokens(remat, pool):
    plan = dict(reducer="sit:recovery=True", tokens=(8, 5), layers=(1, 3), remat=remat, pool=pool)
    model = build_model("vit", **plan, **SIZES)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    with_some = [name for name in params if "blocks" in name and "recovery" in params[name]]
    assert with_some == ["blocks_1", "blocks_2", "blocks_3"]  # block 2 reduces nothing itself
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    _, out = jax.jit(lambda p: model.apply({"params": p}, images, train=True))(params)
    for number, ours in zip((1, 2, 3), out["aux"]["recovered"], strict=True):
        own = in_float64(dict(params=params[f"blocks_{number}"]["recovery"]))
        for image, x in zip(ours, np.asarray(out["blocks"][number], np.float64), strict=True):
            assert len(x) == 1 + (5 if number == 3 else 8)
            np.testing.assert_allclose(image, recovered(x[1:], own), rtol=1e-4, atol=1e-5)

    def loss(params):
        out = model.apply({"params": params}, images, train=True)[1]
        return sum(jnp.mean(jnp.square(x - 1)) for x in out["aux"]["recovered"])

    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    for name in with_some:
        assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[name]["recovery"]))
    assert jnp.abs(grads["patch_embed"]["kernel"]).max() > 0  # the model learns from it


def test_nothing_of_the_recovery_is_in_evaluation():
    plan = dict(tokens=(8, 5), layers=(1, 3), **SIZES)
    plain, with_it = (build_model("vit", reducer=r, **plan) for r in ("sit", "sit:recovery=True"))
    key = jax.random.key(0)
    fewer, params = (jax.jit(lambda key, m=m: init_params(m, key))(key) for m in (plain, with_it))
    for name, tree in params.items():  # and its parameters leave the others as they are
        tree = {k: v for k, v in tree.items() if k != "recovery"} if "blocks" in name else tree
        jax.tree.map(np.testing.assert_array_equal, tree, fewer[name])
    assert plain.plan(keep_rate=0.5) == with_it.plan(keep_rate=0.5)
    assert macs(plain) == macs(with_it)
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    programs = [
        jax.jit(lambda x, m=m, p=p: m.apply({"params": p}, x)).lower(images).as_text()
        for m, p in ((plain, fewer), (with_it, params))
    ]
    assert "stablehlo" in programs[0]
    assert programs[0] == programs[1]  # weights are constants in it
