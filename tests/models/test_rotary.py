# SPDX-License-Identifier: Apache-2.0
"""Rotary positions and relative bias between patches, where timm has no answers to compare with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model
from evit_jax.models.relative import relative_bias, table_size
from evit_jax.models.rotary import KINDS, Rotary

GRID, WIDTH = (4, 3), 8


def turned(kind, positions, x):
    """x (B, H, N, C) turned by the positions (B, N, 2) of a kind, none of them a prefix."""
    frequencies = jax.random.normal(jax.random.key(2), (2, x.shape[1], WIDTH // 2))
    rotary = Rotary(kind, GRID, temperature=10.0, offset=0.5, reference=(5, 7))
    return rotary.rotation(positions, 0, WIDTH, frequencies)(x)


@pytest.mark.parametrize("kind", KINDS)
def test_products_depend_on_the_difference_of_positions_alone(kind):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k = jax.random.normal(keys[0], (2, 1, 2, 5, WIDTH))
    at = jax.random.uniform(keys[1], (1, 5, 2), maxval=3)

    def logits(positions):
        a, b = turned(kind, positions, q), turned(kind, positions, k)
        return jnp.einsum("bhqc,bhkc->bhqk", a, b)

    expected = logits(at)
    np.testing.assert_allclose(logits(at + 1.25), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(logits(at * 1.5) - expected).max() > 1e-2
    own = jnp.sum(q * k, axis=-1)
    np.testing.assert_allclose(jnp.diagonal(expected, axis1=2, axis2=3), own, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_not_turned(kind):
    x = jax.random.normal(jax.random.key(0), (2, 2, 6, WIDTH))
    frequencies = jnp.ones((2, 2, WIDTH // 2))
    rotary = Rotary(kind, GRID, temperature=10.0, offset=1.0)
    positions = jnp.full((1, 6, 2), 2.0)
    y = rotary.rotation(positions, 3, WIDTH, frequencies)(x)
    pairs = jnp.sort(jnp.abs(x[:, :, :3]), axis=-1)
    np.testing.assert_array_equal(jnp.sort(jnp.abs(y[:, :, :3]), axis=-1), pairs)
    assert (
        np.abs(jnp.sort(jnp.abs(y), axis=-1) - jnp.sort(jnp.abs(x), axis=-1))[:, :, 3:] > 0
    ).any()


def test_a_relative_bias_is_the_tables_entry_and_between_patches_its_neighbors_mean():
    rows, columns = GRID
    table = jax.random.normal(jax.random.key(0), (table_size(GRID), 2))
    positions = jnp.asarray([[0, 0], [3, 2], [1, 1], [1.5, 1.0], [1.5, 0.75]])[None]
    bias = np.asarray(relative_bias(table, positions, 1, GRID))[0]
    table, wide = np.asarray(table), 2 * columns - 1

    def entry(down, right):
        return table[(down + rows - 1) * wide + right + columns - 1]

    np.testing.assert_array_equal(bias[:, 1, 2], entry(2, 1))
    np.testing.assert_array_equal(bias[:, 2, 1], entry(-2, -1))
    np.testing.assert_array_equal(bias[:, 2, 2], entry(0, 0))
    np.testing.assert_allclose(bias[:, 3, 2], (entry(0, 0) + entry(1, 0)) / 2, rtol=1e-6)
    left, right = (entry(0, -1) + entry(1, -1)) / 2, (entry(0, 0) + entry(1, 0)) / 2
    np.testing.assert_allclose(bias[:, 4, 2], left / 4 + right * 3 / 4, rtol=1e-5)
    for head in range(2):
        assert (bias[head, 0, 1:] == table[-3, head]).all()  # the class token asks
        assert (bias[head, 1:, 0] == table[-2, head]).all()
        assert bias[head, 0, 0] == table[-1, head]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(rope="rotary"), "rope"),
        (dict(rope="cat", rope_grid="yx"), "rope_grid"),
        (dict(rope="cat", width=30, num_heads=5), "multiple of 4"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        build_model("eva", **settings)
