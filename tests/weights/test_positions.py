# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model
from evit_jax.weights.positions import resize_positions

SIZES = dict(patch_size=8, width=8, depth=1, num_heads=2, num_classes=3)


def table(rows, columns, prefix=1):
    """Positions that are linear in row and column, with a mark on the prefix."""
    y, x = np.mgrid[:rows, :columns]
    patches = np.stack([y + 0.5, x + 0.5], axis=-1).reshape(1, -1, 2)
    return jnp.asarray(np.concatenate([np.full((1, prefix, 2), 99.0), patches], axis=1))


def model_for(rows, columns, **settings):
    return build_model("vit", image_size=(8 * rows, 8 * columns), **SIZES | settings)


def test_a_constant_table_stays_constant_in_every_shape():
    params = dict(pos_embed=jnp.full((1, 37, 3), 1.5).at[0, 0].set(99.0))
    for rows, columns in ((12, 9), (3, 6), (1, 1)):
        resized = resize_positions(params, model_for(rows, columns))["pos_embed"]
        np.testing.assert_allclose(resized[0, 1:], 1.5, rtol=1e-6)
        np.testing.assert_array_equal(resized[0, 0], 99)


def test_weights_are_those_of_pytorchs_cubic():
    impulse = jnp.zeros((1, 17, 1)).at[0, 1 + 1 * 4 + 1].set(1.0)  # row 1, column 1 of 4 x 4
    resized = resize_positions(dict(pos_embed=impulse), model_for(8, 8))["pos_embed"][0, 1:, 0]

    def cubic(t, a=-0.75):
        t = abs(t)
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        return near if t <= 1 else far if t < 2 else 0.0

    # Output i looks at input (i + 0.5) / 2 - 0.5; past the border PyTorch repeats the edge, which
    # row and column 1 do not notice at outputs 2 to 5.
    line = np.array([cubic((i + 0.5) / 2 - 0.5 - 1) for i in range(8)])
    got = resized.reshape(8, 8)[2:6, 2:6]
    np.testing.assert_allclose(got, np.outer(line, line)[2:6, 2:6], atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(7, 3), (2, 9), (1, 1)])
def test_between_corners_linear_positions_stay_linear(rows, columns):
    model = model_for(rows, columns, position_resize="bilinear_corners")
    resized = resize_positions(dict(pos_embed=table(4, 4)), model)["pos_embed"]
    ends = [np.linspace(0.5, 3.5, side) for side in (rows, columns)]
    expected = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 2)
    np.testing.assert_allclose(resized[0, 1:], expected, atol=1e-6)
    np.testing.assert_array_equal(resized[0, 0], 99)


def test_with_antialiasing_weights_are_those_of_timms_cubic():
    """Keys' kernel (a = -0.5), as wide as the step where the grid shrinks, and summing to 1."""
    impulse = jnp.zeros((1, 145, 1)).at[0, 1 + 5 * 12 + 5].set(1.0)  # row 5, column 5 of 12 x 12
    model = model_for(4, 6, position_resize="bicubic_antialias")
    resized = resize_positions(dict(pos_embed=impulse), model)["pos_embed"][0, 1:, 0]

    def cubic(t, a=-0.5):
        t = abs(t)
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        return near if t <= 1 else far if t < 2 else 0.0

    def line(count):
        step = 12 / count
        centers = [(i + 0.5) * step - 0.5 for i in range(count)]
        weights = np.array([[cubic((j - center) / step) for j in range(12)] for center in centers])
        return (weights / weights.sum(axis=1, keepdims=True))[:, 5]

    np.testing.assert_allclose(resized.reshape(4, 6), np.outer(line(4), line(6)), atol=1e-6)


def test_the_same_grid_is_left_alone_and_prefix_tokens_are_kept():
    params = dict(pos_embed=table(4, 4))
    assert resize_positions(params, model_for(4, 4)) is params
    two = resize_positions(dict(pos_embed=table(4, 4, prefix=2)), model_for(2, 2, distilled=True))
    assert two["pos_embed"].shape == (1, 6, 2)
    np.testing.assert_array_equal(two["pos_embed"][0, :2], 99)


def test_a_grid_that_is_not_square_has_to_be_named():
    params = dict(pos_embed=table(3, 5))
    with pytest.raises(InputError, match="say which it is"):
        resize_positions(params, model_for(4, 4))
    resized = resize_positions(params, model_for(4, 4), grid=(3, 5))
    assert resized["pos_embed"].shape == (1, 17, 2)


def test_a_resized_model_runs():
    model = model_for(6, 4)
    params = dict(pos_embed=jax.random.normal(jax.random.key(0), (1, 17, 8)))
    assert resize_positions(params, model)["pos_embed"].shape == (1, 1 + model.patches, 8)
