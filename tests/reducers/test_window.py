# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.plan.flops import block_macs, macs
from evit_jax.reducers import create_reducer
from tests.contracts.test_reducers import BATCH, call, example
from tests.support.by_hand import slopes

GRID = (4, 6)
SPECS = ["window", "window:learned", "window:proportional"]


def groups(rows, columns):
    """Patches of each window, in the order of windows."""
    return [
        [r * columns + c for r in (top, top + 1) for c in (left, left + 1)]
        for top in range(0, rows, 2)
        for left in range(0, columns, 2)
    ]


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def learned_by_hand(members, params):
    """One window: members (4, D) -> (D,)."""
    w1, b1, w2, b2 = params
    mean = members.sum(axis=0) / 4
    scores = []
    for u in members:
        hidden = gelu(np.concatenate([u, mean]) @ w1 + b1)
        scores.append(hidden @ w2 + b2)
    exp = np.exp(scores)
    return sum(exp[i] / exp.sum(axis=0) * members[i] for i in range(4))


def drawn(reducer, tokens, signals, keep, seed=2):
    """Parameters of the learned form that are not at their start."""
    params = reducer.init(jax.random.key(0), tokens, signals, keep)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)


def in_float64(params):
    tree = params["params"]
    order = (("in", "kernel"), ("in", "bias"), ("out", "kernel"), ("out", "bias"))
    return [np.asarray(tree[layer][name], np.float64) for layer, name in order]


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("spec", SPECS)
def test_windows_become_their_means(spec, prefix):
    tokens, signals = example(prefix, grid=GRID)
    grid = jnp.stack(jnp.divmod(jnp.arange(24), 6), axis=-1).astype(jnp.float32)
    positions = jnp.tile(jnp.pad(grid, ((prefix, 0), (0, 0)))[None], (BATCH, 1, 1))
    weight = jnp.asarray(np.random.default_rng(1).uniform(1, 2, tokens.size.shape), jnp.float32)
    tokens = tokens.replace(positions=positions, weight=weight)
    after = call(create_reducer(spec), tokens, signals, 6)
    np.testing.assert_array_equal(after.x[:, :prefix], tokens.x[:, :prefix])
    np.testing.assert_array_equal(after.size, [[1] * prefix + [4] * 6] * BATCH)
    assert after.owner.dtype == jnp.int32
    for image in range(BATCH):
        for place, group in enumerate(groups(*GRID)):
            now, members = prefix + place, [prefix + patch for patch in group]
            np.testing.assert_array_equal(
                np.flatnonzero(np.asarray(after.owner[image]) == place), group
            )
            for name in ("x", "positions", "weight"):
                if name == "weight" and "proportional" in spec:
                    continue
                before = np.asarray(getattr(tokens, name)[image], np.float64)
                mean = sum(before[member] for member in members) / 4
                np.testing.assert_allclose(
                    getattr(after, name)[image, now], mean, rtol=1e-6, atol=1e-6
                )
    if "proportional" in spec:
        np.testing.assert_array_equal(after.weight, after.size)


def test_the_learned_form_starts_exactly_as_the_mean():
    tokens, signals = example(grid=GRID)
    mean = call(create_reducer("window"), tokens, signals, 6)
    np.testing.assert_array_equal(
        call(create_reducer("window:learned"), tokens, signals, 6).x, mean.x
    )


def test_the_learned_form_is_the_formula_by_hand():
    tokens, signals = example(prefix=2, grid=GRID)
    reducer = create_reducer("window:learned")
    params = drawn(reducer, tokens, signals, 6)
    after = reducer.apply(params, tokens, signals, 6)
    for image in range(BATCH):
        patches = np.asarray(tokens.x[image, 2:], np.float64)
        for place, group in enumerate(groups(*GRID)):
            expected = learned_by_hand(patches[group], in_float64(params))
            np.testing.assert_allclose(after.x[image, 2 + place], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_gradients_are_those_by_hand(learned):
    tokens, signals = example(batch=2, grid=(2, 4))
    reducer = create_reducer(f"window:learned={learned}")
    params = drawn(reducer, tokens, signals, 2)

    def loss(x, params):
        return jnp.sum(jnp.sin(reducer.apply(params, tokens.replace(x=x), signals, 2).x))

    def by_hand(x, params):
        total = np.sin(x[:, 0]).sum()
        for image in range(2):
            for group in groups(2, 4):
                members = x[image, 1:][group]
                y = learned_by_hand(members, params) if learned else members.sum(axis=0) / 4
                total += np.sin(y).sum()
        return total

    x_grad, grads = jax.grad(loss, argnums=(0, 1))(tokens.x, params)
    wide = in_float64(params) if learned else None
    expected = slopes(lambda x: by_hand(x, wide), tokens.x)
    np.testing.assert_allclose(x_grad, expected, rtol=1e-5, atol=1e-5)
    if not learned:
        return
    x = np.asarray(tokens.x, np.float64)
    for number, grad in enumerate(in_float64(grads)):

        def of(values, at=number):
            return by_hand(x, [*wide[:at], values, *wide[at + 1 :]])

        np.testing.assert_allclose(grad, slopes(of, wide[number]), rtol=1e-5, atol=1e-5)


def test_the_learned_form_learns_from_its_start():
    tokens, signals = example(grid=GRID)
    reducer = create_reducer("window:learned")
    params = reducer.init(jax.random.key(0), tokens, signals, 6)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(reducer.apply(p, tokens, signals, 6).x)))(params)
    assert jnp.abs(grads["params"]["out"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize("spec", SPECS)
def test_images_are_treated_alone_and_windows_of_windows_hold_sixteen(spec):
    tokens, signals = example(grid=(4, 4))
    reducer = create_reducer(spec)
    params = drawn(reducer, tokens, signals, 4)
    once = reducer.apply(params, tokens, signals, 4)
    twice = reducer.apply(params, once, signals, 1)
    np.testing.assert_array_equal(twice.size, [[1, 16]] * BATCH)
    np.testing.assert_array_equal(twice.owner, np.zeros((BATCH, 16)))
    for image in range(BATCH):
        one = jax.tree.map(lambda array: array[image : image + 1], tokens)  # noqa: B023
        alone = reducer.apply(params, one, signals, 4)
        np.testing.assert_allclose(alone.x[0], once.x[image], rtol=1e-6, atol=1e-6)


def test_a_model_quarters_its_tokens_at_the_middle_block_or_where_it_is_told():
    model = build_model("vit", depth=4, reducer="window")
    assert model.tokens_per_block == (197, 197, 50, 50)
    assert macs(model) == model.stem_macs + model.head_macs + 2 * sum(
        block_macs(n, n, 384, 1536) for n in (197, 50)
    )
    sizes = dict(image_size=256, depth=4, reducer="window")
    assert build_model("vit", layers=(0, 2), **sizes).tokens_per_block == (65, 65, 17, 17)
    assert build_model("vit", keep_rate=1, **sizes).tokens_per_block == (257,) * 4
    for wanted in (dict(keep_rate=0.25), dict(tokens=64), dict(macs=1e9)):
        with pytest.raises(InputError, match="has a schedule of its own"):
            build_model("vit", **wanted, **sizes)


@pytest.mark.parametrize("learned", [False, True])
def test_a_whole_model_runs_with_parameters_of_its_own_where_it_learns(learned):
    sizes = dict(image_size=32, patch_size=4, width=16, depth=4, num_heads=2, num_classes=3)
    model = build_model("vit", reducer=f"window:learned={learned}", layers=(1, 2), **sizes)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    assert [name for name in params if "blocks" in name and "reduction" in params[name]] == (
        ["blocks_1", "blocks_2"] if learned else []
    )
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    logits, out = jax.jit(model.apply)({"params": params}, images)
    assert np.isfinite(logits).all()
    expected = np.arange(64).reshape(8, 8)
    expected = expected // 8 // 4 * 2 + expected % 8 // 4
    np.testing.assert_array_equal(out["owner"][1], np.tile(expected.reshape(-1), (2, 1)))


def test_what_is_no_even_grid_or_another_count_is_refused():
    reducer = create_reducer("window")
    with pytest.raises(InputError, match="a grid of 3 x 4 has an odd side; choose fewer layers"):
        reducer.apply({}, *example(), 3)
    tokens, signals = example(grid=(2, 6))
    with pytest.raises(InputError, match="window keeps 3 of 12 patch tokens"):
        reducer.apply({}, tokens, signals, 5)
    with pytest.raises(InputError, match="12 tokens are not those of 4 x 4 patches"):
        reducer.apply({}, tokens, signals.replace(grid=(4, 4)), 3)
    odd = build_model("vit", depth=4, reducer="window", layers=(1, 2))
    with pytest.raises(InputError, match="a grid of 7 x 7 has an odd side"):
        jax.eval_shape(lambda key: init_params(odd, key), jax.random.key(0))
