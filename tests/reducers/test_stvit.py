# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import build_model
from evit_jax.reducers import create_reducer
from evit_jax.reducers.stvit import regions
from evit_jax.tokens import Tokens
from tests.contracts.test_reducers import example
from tests.reducers.test_sit import gelu
from tests.support.by_hand import slopes
from tests.support.learning import drawn, in_float64

# Five regions of a grid of 3 x 4: two bands, of one row and of two, in two and three parts.
GROUPS = [[0, 1], [2, 3], [4, 5, 8, 9], [6, 10], [7, 11]]


def normed(x, params):
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    return x * params["scale"] + params["bias"]


def dense(x, params):
    return x @ params["kernel"] + params["bias"]


def gather(s, x, params, heads):
    """One layer for one image, a query at a time."""
    q = dense(normed(s + params.get("centers", 0), params["norm_q"]), params["q"])
    k, v = np.split(dense(normed(np.concatenate([s, x]), params["norm_kv"]), params["kv"]), 2, 1)
    channels = s.shape[1] // heads
    y = np.zeros_like(s)
    for head in range(heads):
        part = slice(head * channels, (head + 1) * channels)
        for query in range(len(s)):
            share = np.exp(k[:, part] @ q[query, part] / np.sqrt(channels))
            y[query, part] = (share / share.sum()) @ v[:, part]
    s = s + params["scale_1"] * dense(y, params["proj"])
    y = gelu(dense(normed(s, params["norm_mlp"]), params["fc1"]))
    return s + params["scale_2"] * dense(y, params["fc2"])


def by_hand(x, params, heads=1):
    s = np.stack([x[group].max(axis=0) for group in GROUPS])
    for layer in range(2):
        s = gather(s, x, params[f"gather_{layer}"], heads)
    return s


def test_semantic_tokens_start_as_maxima_and_gather_from_all():
    tokens, signals = example(prefix=2)
    grid = np.stack(np.divmod(np.arange(12), 4), axis=-1).astype(np.float64)
    positions = jnp.asarray(np.tile(np.pad(grid, ((2, 0), (0, 0)))[None], (3, 1, 1)), jnp.float32)
    tokens = tokens.replace(positions=positions)
    reducer = create_reducer("stvit")
    params = drawn(reducer, tokens, signals, 5)
    after = reducer.apply(params, tokens, signals, 5)
    np.testing.assert_array_equal(after.x[:, :2], tokens.x[:, :2])
    for image in range(3):
        expected = by_hand(np.asarray(tokens.x[image, 2:], np.float64), in_float64(params))
        np.testing.assert_allclose(after.x[image, 2:], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(after.size[image], [1, 1, 2, 2, 4, 2, 2])
        for place, group in enumerate(GROUPS):
            assert (np.asarray(after.owner[image])[group] == place).all()
            centre = grid[group].mean(axis=0)
            np.testing.assert_allclose(after.positions[image, 2 + place], centre, rtol=1e-6)


def test_wide_tokens_have_heads_of_64_channels():
    rng = np.random.default_rng(0)
    tokens, signals = example(batch=1)
    tokens = tokens.replace(x=jnp.asarray(rng.normal(size=(1, 13, 128)), jnp.float32))
    reducer = create_reducer("stvit")
    params = jax.tree.map(lambda p: p / 2, drawn(reducer, tokens, signals, 5))
    after = reducer.apply(params, tokens, signals, 5).x[0, 1:]
    x, wide = np.asarray(tokens.x[0, 1:], np.float64), in_float64(params)
    np.testing.assert_allclose(after, by_hand(x, wide, heads=2), rtol=1e-4, atol=1e-4)
    assert np.abs(after - by_hand(x, wide, heads=1)).max() > 0.01


def test_gradients_are_those_by_hand():
    tokens, signals = example(batch=1)
    reducer = create_reducer("stvit")
    params = jax.tree.map(lambda p: p / 2, drawn(reducer, tokens, signals, 5))

    def loss(params, x):
        return jnp.sum(jnp.sin(reducer.apply(params, tokens.replace(x=x), signals, 5).x[:, 1:]))

    grads, x_grad = jax.grad(loss, argnums=(0, 1))(params, tokens.x)
    wide, x = in_float64(params), np.asarray(tokens.x, np.float64)
    expected = slopes(lambda x: np.sin(by_hand(x[0, 1:], wide)).sum(), x)
    np.testing.assert_allclose(x_grad, expected, rtol=1e-4, atol=1e-4)

    def with_centers(centers):
        second = wide["gather_1"] | {"centers": centers}
        return np.sin(by_hand(x[0, 1:], wide | {"gather_1": second})).sum()

    expected = slopes(with_centers, wide["gather_1"]["centers"])
    centers = grads["params"]["gather_1"]["centers"]
    np.testing.assert_allclose(centers, expected, rtol=1e-4, atol=1e-4)


def test_slots_that_hold_no_patch_change_nothing():
    """What an earlier method left empty, in a row of tokens that is no grid any more."""
    tokens, signals = example(batch=1)
    reducer = create_reducer("stvit")
    short = Tokens(
        x=tokens.x[:, :8], size=tokens.size[:, :8].at[:, jnp.asarray([2, 7])].set(0.0),
        owner=jnp.asarray([[0, -1, 2, 3, 4, 5, -1, 0, 0, 0, 2, 2]]), prefix=1,
    )  # fmt: skip
    params = drawn(reducer, short, signals, 3)
    after = reducer.apply(params, short, signals, 3)
    other = short.replace(x=short.x.at[:, jnp.asarray([2, 7])].set(1e4))
    np.testing.assert_array_equal(after.x, reducer.apply(params, other, signals, 3).x)
    np.testing.assert_array_equal(after.size, [[1, 2, 2, 1]])  # of three, two and two slots
    np.testing.assert_array_equal(after.owner, [[0, -1, 0, 1, 1, 2, -1, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize(("rows", "columns"), [(14, 14), (3, 4), (7, 16), (1, 9), (8, 2)])
def test_regions_cover_the_grid_with_every_count(rows, columns):
    for keep in range(1, rows * columns + 1):
        region = regions(rows, columns, keep)
        counts = np.bincount(region, minlength=keep)
        assert len(counts) == keep
        assert counts.min() >= 1
        assert region.shape == (rows * columns,)
    np.testing.assert_array_equal(region, np.arange(rows * columns))


def test_nine_regions_of_a_square_are_three_by_three():
    region = regions(6, 6, 9).reshape(6, 6)
    np.testing.assert_array_equal(region, np.kron(np.arange(9).reshape(3, 3), np.ones((2, 2))))


def test_a_model_makes_them_once_after_a_third_of_its_blocks():
    model = build_model("deit_tiny_patch16_224", reducer="stvit", keep_rate=0.5)
    assert model.keep == (None,) * 4 + (98,) + (None,) * 7
