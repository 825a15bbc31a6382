# SPDX-License-Identifier: Apache-2.0
"""Which image is where, with and without repeated augmentation."""

import numpy as np
import pytest

from evit_jax.data.order import Order


def shown(order, count):
    return np.array([order[place] for place in range(count)])


def test_every_epoch_shows_every_image_once_in_another_order():
    order = Order(50, seed=0, batch_size=8)
    one, two = shown(order, 100).reshape(2, 50)
    np.testing.assert_array_equal(np.sort(one), np.arange(50))
    np.testing.assert_array_equal(np.sort(two), np.arange(50))
    assert (one != two).any()
    assert (one != shown(Order(50, seed=1, batch_size=8), 50)).any()


@pytest.mark.parametrize("batch_size", [16, 17])
@pytest.mark.parametrize("repeats", [2, 3])
def test_repeats_share_the_images_among_as_many_epochs(repeats, batch_size):
    order = Order(48, seed=0, batch_size=batch_size, repeats=repeats)
    places = 48 * repeats * 17  # whole rounds of epochs, and whole batches
    counts = np.bincount(shown(order, places), minlength=48)
    np.testing.assert_array_equal(counts, repeats * 17)
    # A batch holds what is next when every image of the plain order comes so many times in a row.
    once = shown(Order(48, seed=0, batch_size=batch_size), places)
    expected = np.repeat(once, repeats)[:places].reshape(-1, batch_size)
    batches = shown(order, places).reshape(-1, batch_size)
    np.testing.assert_array_equal(np.sort(batches), np.sort(expected))


@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_neighbors_in_a_batch_are_never_repeats_of_one_image(repeats):
    order = Order(1000, seed=0, batch_size=16, repeats=repeats)
    pairs = shown(order, 960).reshape(-1, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()


def test_a_place_has_its_own_generator():
    order = Order(50, seed=3, batch_size=8)
    draws = [order.generator(place).random() for place in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert Order(50, seed=4, batch_size=8).generator(0).random() != draws[0]
