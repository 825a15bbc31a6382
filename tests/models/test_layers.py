# SPDX-License-Identifier: Apache-2.0
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models.layers import dropout, gelu


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


def test_what_an_image_draws_does_not_depend_on_its_neighbors():
    x = jnp.ones((8, 10, 8))
    whole = dropout(x, 0.5, keys_of(8))
    halves = [dropout(x[:4], 0.5, keys_of(4, first)) for first in (0, 4)]
    np.testing.assert_array_equal(whole, jnp.concatenate(halves))
    assert (whole[0] != whole[1]).any()
