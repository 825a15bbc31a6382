# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.training import metrics


def test_sums_count_only_what_the_mask_shows():
    logits = jnp.eye(6)[jnp.asarray([0, 1, 2, 3])] - 0.01 * jnp.arange(6.0)[None]
    labels = jnp.asarray([0, 5, 4, 0])  # right; sixth, so not in the top 5; third; hidden
    loss, mask = jnp.asarray([1.0, 2.0, 3.0, 100.0]), jnp.asarray([True, True, True, False])
    sums = {name: float(value) for name, value in metrics.sums(logits, labels, loss, mask).items()}
    assert sums == dict(images=3, loss=6, top1=1, top5=2)


def test_means_of_uneven_batches_weigh_every_image_alike():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(10, 7)), jnp.float32)
    labels, loss = jnp.arange(10) % 7, jnp.arange(10.0)
    whole = metrics.means([metrics.sums(logits, labels, loss)], "test")
    parts = [metrics.sums(logits[a:b], labels[a:b], loss[a:b]) for a, b in ((0, 7), (7, 10))]
    assert metrics.means(parts, "test") == pytest.approx(whole)
    assert set(whole) == {"test_loss", "test_top1", "test_top5"}


def test_fewer_than_five_classes_are_fine():
    sums = metrics.sums(jnp.asarray([[0.0, 1.0]]), jnp.asarray([0]), jnp.zeros(1))
    assert (float(sums["top1"]), float(sums["top5"])) == (0, 1)


def test_zeros_have_the_structure_of_sums():
    sums = metrics.sums(jnp.zeros((1, 3)), jnp.zeros(1, int), jnp.zeros(1))
    assert metrics.zeros().keys() == sums.keys()
