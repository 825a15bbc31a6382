# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np

from evit_jax.losses import cross_entropy, smooth_labels


def test_smoothing_spreads_over_all_classes():
    targets = smooth_labels(jnp.asarray([2, 0]), 4, 0.1)
    np.testing.assert_allclose(targets[0], [0.025, 0.025, 0.925, 0.025], rtol=1e-6)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(smooth_labels(jnp.asarray([1]), 3, 0.0)[0], [0, 1, 0])


def test_cross_entropy_is_the_formula_and_stays_finite_for_large_logits():
    logits, targets = jnp.asarray([[1.0, 2.0, 0.5]]), jnp.asarray([[0.2, 0.7, 0.1]])
    softmax = np.exp([1, 2, 0.5]) / np.exp([1, 2, 0.5]).sum()
    expected = -(np.array([0.2, 0.7, 0.1]) * np.log(softmax)).sum()
    np.testing.assert_allclose(cross_entropy(logits, targets), [expected], rtol=1e-6)
    huge = cross_entropy(jnp.asarray([[1e4, 0.0]], jnp.bfloat16), jnp.asarray([[0.0, 1.0]]))
    assert huge.dtype == jnp.float32
    np.testing.assert_allclose(huge, 9984, rtol=1e-6)  # 1e4 in bfloat16
