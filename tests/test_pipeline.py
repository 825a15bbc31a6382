# SPDX-License-Identifier: Apache-2.0
import contextlib

import numpy as np
import pytest
from PIL import Image

from evit_jax.data import open_source
from evit_jax.data.augment import centre_crop, random_box
from evit_jax.data.pipeline import eval_batches, train_batches
from evit_jax.errors import InputError

VIEW = dict(size=(16, 16), interpolation="bicubic")
AUGMENT = dict(scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3), flip=True, seed=3)


def take(count, **settings):
    """The first `count` training batches."""
    batches = train_batches(open_source("digits", "train"), **VIEW, **AUGMENT | settings)
    with contextlib.closing(batches):
        return [next(batches) for _ in range(count)]


def assert_same(a, b):
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one["label"], other["label"])
        np.testing.assert_array_equal(one["image"], other["image"])


def test_batches_are_uint8_images_and_int32_labels():
    batch = take(1, batch_size=8)[0]
    assert (batch["image"].shape, batch["image"].dtype) == ((8, 16, 16, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((8,), np.int32)


def test_resuming_at_a_step_gives_the_batches_of_an_uninterrupted_run():
    whole = take(6, batch_size=400)  # across the end of the first epoch
    assert_same(take(3, batch_size=400, start=3), whole[3:])


def test_the_number_of_threads_changes_nothing():
    assert_same(take(4, batch_size=16, threads=1), take(4, batch_size=16, threads=5))


def test_hosts_share_every_batch_between_them():
    one = take(2, batch_size=8)
    hosts = [take(2, batch_size=8, host=host, hosts=2) for host in range(2)]
    for number in range(2):
        for host in range(2):
            assert_same([hosts[host][number]], [{k: v[host::2] for k, v in one[number].items()}])


def test_every_epoch_sees_every_image_once_in_another_order():
    source = open_source("synthetic", "train")
    batches = train_batches(source, **VIEW, **AUGMENT, batch_size=256)
    with contextlib.closing(batches):
        labels = np.concatenate([next(batches)["label"] for _ in range(4)])
    expected = np.bincount(np.arange(512) % 10)
    np.testing.assert_array_equal(np.bincount(labels[:512]), expected)
    np.testing.assert_array_equal(np.bincount(labels[512:]), expected)
    assert (labels[:512] != labels[512:]).any()


def test_another_seed_is_another_order():
    assert (take(1, batch_size=32)[0]["label"] != take(1, batch_size=32, seed=4)[0]["label"]).any()


@pytest.mark.parametrize("batch_size", [7, 100, 359, 400])
@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_counts_every_image_exactly_once(batch_size, hosts):
    source = open_source("digits", "test")
    batch_size -= batch_size % hosts
    counts = np.zeros(10, int)
    for host in range(hosts):
        batches = eval_batches(
            source, **VIEW, crop=1.0, batch_size=batch_size, host=host, hosts=hosts
        )
        with contextlib.closing(batches):
            for batch in batches:
                assert batch["image"].shape == (batch_size // hosts, 16, 16, 3)
                counts += np.bincount(batch["label"][batch["mask"]], minlength=10)
    np.testing.assert_array_equal(counts, np.bincount(source.labels))


def test_a_broken_image_stops_the_run_and_is_named():
    class Broken:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"image": b"nothing", "label": 0, "name": f"folder/{index}.jpg"}

    batches = train_batches(Broken(), **VIEW, **AUGMENT, batch_size=2)
    with contextlib.closing(batches), pytest.raises(InputError, match=r"folder/\d.jpg cannot be"):
        next(batches)


def test_random_boxes_stay_inside_and_follow_scale_and_ratio():
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(500):
        left, top, right, bottom = random_box(200, 100, rng, (0.2, 0.5), (3 / 4, 4 / 3))
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 100
        wide, high = right - left, bottom - top
        assert 0.73 < wide / high < 1.36
        areas.append(wide * high / 20000)
    assert 0.19 < min(areas) < 0.22
    assert 0.45 < max(areas) < 0.51


def test_an_impossible_aspect_falls_back_to_the_centre():
    box = random_box(1000, 10, np.random.default_rng(0), (0.9, 1.0), (3 / 4, 4 / 3))
    assert box == (493, 0, 506, 10)


def crop(width, height, size, fraction):
    """Which of the pixels, numbered by column, the centre crop shows."""
    image = Image.fromarray(np.tile(np.arange(width, dtype=np.uint8), (height, 1)))
    return np.asarray(centre_crop(image, size=size, crop=fraction, interpolation="nearest"))


def test_the_centre_crop_resizes_the_shorter_side_and_cuts_the_middle():
    np.testing.assert_array_equal(crop(8, 4, (4, 4), 1.0)[0], [2, 3, 4, 5])
    np.testing.assert_array_equal(crop(8, 8, (4, 4), 0.5)[0], [2, 3, 4, 5])
    assert crop(5, 50, (4, 4), 0.875).shape == (4, 4)
    assert crop(50, 5, (4, 4), 0.875).shape == (4, 4)
    np.testing.assert_array_equal(crop(8, 4, (4, 8), 1.0)[0], range(8))  # not square


def test_a_photo_is_resized_to_256_and_its_longer_side_rounded_down():
    seen = {}

    class Spy:
        size = (500, 375)

        def resize(self, size, _):
            seen["size"] = size
            return self

        def crop(self, box):
            seen["box"] = box

    centre_crop(Spy(), size=(224, 224), crop=0.875, interpolation="bicubic")
    assert seen == dict(size=(341, 256), box=(58, 16, 282, 240))
