# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.models.pooling import MapPool, average

WIDTH = 12


def example(count=6):
    """Tokens, a pooling and its parameters, all random."""
    x = jax.random.normal(jax.random.key(0), (2, count, WIDTH))
    pool = MapPool(WIDTH, num_heads=3, hidden=20)
    params = pool.init(jax.random.key(1), x, jnp.ones(x.shape[:2]))
    params = jax.tree.map(lambda p: p + jax.random.normal(jax.random.key(p.size), p.shape), params)
    return x, pool, params


def test_equal_tokens_may_be_joined_and_empty_ones_added():
    x, pool, params = example()
    apart = jnp.concatenate([x, x[:, 1:2], x[:, 1:2], x[:, 4:5]], axis=1)
    joined = jnp.concatenate([x, jnp.full((2, 2, WIDTH), 100.0)], axis=1)
    one, size = jnp.ones(apart.shape[:2]), jnp.asarray([[1, 3, 1, 1, 2, 1, 0, 0]] * 2, jnp.float32)
    np.testing.assert_allclose(average(joined, size), average(apart, one), rtol=1e-5, atol=1e-6)
    expected, attention = pool.apply(params, apart, one)
    pooled, seen = pool.apply(params, joined, size)
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(seen[:, 6:], 0)
    np.testing.assert_allclose(seen[:, 1], attention[:, [1, 6, 7]].sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(seen.sum(axis=1), 1, rtol=1e-6)


def test_the_probe_asks_as_the_pooling_attends():
    x, pool, params = example()
    _, attention = pool.apply(params, x, jnp.ones(x.shape[:2]))
    asked = pool.apply(params, method="asked")
    logits = jnp.einsum("hd,bnd->bhn", asked, x)
    np.testing.assert_allclose(jax.nn.softmax(logits, axis=-1).mean(axis=1), attention, rtol=1e-4)


def test_gradients_of_half_precision_are_finite():
    x, _, params = example()
    pool = MapPool(WIDTH, num_heads=3, hidden=20, dtype=jnp.bfloat16)
    size = jnp.asarray([[1, 2, 0, 1, 1, 1]] * 2, jnp.float32)
    grads = jax.grad(lambda params: pool.apply(params, x, size)[0].astype(jnp.float32).sum())(
        params
    )
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
