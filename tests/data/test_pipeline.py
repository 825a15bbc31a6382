# SPDX-License-Identifier: Apache-2.0
import contextlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from evit_jax.data import open_source
from evit_jax.data.augment import center_crop, random_box, random_resized_crop
from evit_jax.data.order import Order
from evit_jax.data.pipeline import eval_batches, split_host_arrays, train_batches
from evit_jax.data.randaugment import color_jitter, rand_augment
from evit_jax.errors import InputError
from tests.data.test_sources import jpeg, make_folder

VIEW = dict(size=(16, 16), interpolation="bicubic")
PLAIN = dict(randaugment_magnitude=0, randaugment_std=0.5, randaugment_layers=2, color_jitter=0)
AUGMENT = PLAIN | dict(
    scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3), flip=True, repeats=1, fill=(124, 116, 104), seed=3
)


def take(count, source=None, **settings):
    """The first `count` training batches, of digits unless told otherwise."""
    source = source or open_source("digits", "train")
    with contextlib.closing(train_batches(source, **VIEW, **AUGMENT | settings)) as batches:
        return [next(batches) for _ in range(count)]


def evaluate(source, **settings):
    """All evaluation batches."""
    with contextlib.closing(eval_batches(source, **VIEW, crop=1.0, **settings)) as batches:
        return list(batches)


def assert_same(a, b):
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def put_together(hosts):
    """What several hosts show of each batch, one after another."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*hosts, strict=True)
    ]


def test_what_a_batch_consists_of():
    source = open_source("digits", "train")
    batch = take(1, source, batch_size=8)[0]
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == dict(
        image=((8, 16, 16, 3), "uint8"),
        label=((8,), "int32"),
        index=((8,), "int32"),
        damaged=((8,), "bool"),
    )
    np.testing.assert_array_equal(batch["label"], source.labels[batch["index"]])
    assert not batch["damaged"].any()


def test_resuming_at_a_step_gives_the_batches_of_an_uninterrupted_run():
    whole = take(6, batch_size=400)  # across the end of the first epoch
    assert_same(take(3, batch_size=400, start=3), whole[3:])


def test_the_number_of_threads_changes_nothing():
    assert_same(take(4, batch_size=16, threads=1), take(4, batch_size=16, threads=5))


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_hosts_show_contiguous_parts_of_the_batches_of_a_single_one(hosts, repeats):
    settings = dict(batch_size=8, start=1, repeats=repeats)
    parts = [take(2, **settings, host=host, hosts=hosts) for host in range(hosts)]
    assert_same(put_together(parts), take(3, **settings | dict(start=0))[1:])


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(workers, tmp_path):
    source = open_source("folder", "train", str(make_folder(tmp_path)), cache=True)
    settings = dict(batch_size=8, repeats=3, logits=np.eye(6, 5, dtype=np.float16))
    one, other = (take(5, source, **settings, workers=count) for count in (0, workers))
    assert_same(one, other)
    assert type(other[0]["image"]) is np.ndarray  # memory of its own, not shared with a worker
    assert_same(evaluate(source, batch_size=4), evaluate(source, batch_size=4, workers=workers))


def test_an_image_is_drawn_several_times_and_augmented_differently():
    batch = take(1, batch_size=12, repeats=3)[0]
    first = np.flatnonzero(batch["index"] == batch["index"][0])
    assert len(first) == 3
    images = {batch["image"][place].tobytes() for place in first}
    assert len(images) == 3


def test_a_teachers_logits_come_with_their_images():
    source = open_source("digits", "train")
    logits = np.random.default_rng(0).normal(size=(len(source), 10)).astype(np.float16)
    batch = take(1, source, batch_size=8, logits=logits)[0]
    assert batch["teacher"].dtype == np.float32
    np.testing.assert_array_equal(batch["teacher"], logits[batch["index"]])
    with pytest.raises(InputError, match=r"5 teacher's logits for 1,438 images"):
        take(1, source, batch_size=8, logits=logits[:5])


@pytest.mark.parametrize("augment", [dict(randaugment_magnitude=9), dict(color_jitter=0.4), {}])
def test_images_are_cropped_then_flipped_then_augmented(augment):
    source, fill = open_source("synthetic", "train"), (200, 0, 0)
    batch = take(1, source, batch_size=64, fill=fill, **augment)[0]
    for place in range(64):
        rng = Order(512, seed=3, batch_size=64).generator(place)
        image = Image.fromarray(source[batch["index"][place]]["image"])
        shape = dict(scale=AUGMENT["scale"], ratio=AUGMENT["ratio"])
        image = random_resized_crop(image, rng, **VIEW, **shape)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if "randaugment_magnitude" in augment:
            warp = dict(fill=fill, interpolation="bicubic")
            image = rand_augment(image, rng, magnitude=9, std=0.5, layers=2, **warp)
        if "color_jitter" in augment:
            image = color_jitter(image, rng, strength=0.4)
        np.testing.assert_array_equal(batch["image"][place], image)


def test_colors_are_jittered_only_where_randaugment_is_off():
    both = take(1, batch_size=8, randaugment_magnitude=9, color_jitter=0.4)
    assert_same(both, take(1, batch_size=8, randaugment_magnitude=9))


def test_every_epoch_sees_every_image_once_in_another_order():
    one, two = np.concatenate(
        [batch["index"] for batch in take(4, open_source("synthetic", "train"), batch_size=256)]
    ).reshape(2, 512)
    np.testing.assert_array_equal(np.sort(one), np.arange(512))
    np.testing.assert_array_equal(np.sort(two), np.arange(512))
    assert (one != two).any()


def test_another_seed_is_another_order():
    assert (take(1, batch_size=32)[0]["index"] != take(1, batch_size=32, seed=4)[0]["index"]).any()


@pytest.mark.parametrize("batch_size", [7, 100, 359, 400])
@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_counts_every_image_exactly_once(batch_size, hosts):
    source = open_source("digits", "test")
    batch_size -= batch_size % hosts
    batches = put_together(
        evaluate(source, batch_size=batch_size, host=host, hosts=hosts) for host in range(hosts)
    )
    assert {batch["image"].shape for batch in batches} == {(batch_size, 16, 16, 3)}
    index, label, mask = (
        np.concatenate([batch[name] for batch in batches]) for name in ("index", "label", "mask")
    )
    np.testing.assert_array_equal(index, np.arange(len(index)))  # in order, whatever the hosts
    np.testing.assert_array_equal(mask, index < 359)
    np.testing.assert_array_equal(label[mask], source.labels)


@pytest.fixture
def partly_damaged(tmp_path):
    """Six images of two classes, of which images 1, 2 and 5 are damaged."""
    root = make_folder(tmp_path)
    for split in ("train", "val"):
        for file in ("cat/1.jpg", "cat/2.jpg", "dog/2.jpg"):
            (root / split / file).write_bytes(jpeg((9, 9, 9))[:300])
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_stops_the_run_and_is_named(workers, partly_damaged):
    train, test = (open_source("folder", split, str(partly_damaged)) for split in ("train", "test"))
    with pytest.raises(InputError) as error:
        take(3, train, batch_size=4, workers=workers)
    text = r".*/train/(cat/1|cat/2|dog/2)\.jpg cannot be read as an image: [\w ]+"
    assert re.fullmatch(text, str(error.value))
    with pytest.raises(InputError, match=r"/val/cat/1\.jpg cannot be read as an image: [\w ]+$"):
        evaluate(test, batch_size=4, workers=workers)


def test_an_error_of_a_worker_process_is_one_line_on_a_terminal(partly_damaged):
    program = f"""
from evit_jax import cli
from tests.data.test_pipeline import evaluate, open_source
source = open_source("folder", "test", {str(partly_damaged)!r})
cli.guard(lambda: evaluate(source, batch_size=1, workers=2))
"""
    result = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert "cat/1.jpg cannot be read" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("cache", [False, True])
def test_training_shows_the_next_readable_image_in_place_of_a_damaged_one(partly_damaged, cache):
    source = open_source("folder", "train", str(partly_damaged), cache=cache)
    logits = np.eye(6, dtype=np.float32)
    batches = take(3, source, batch_size=6, damaged="skip", logits=logits)
    for batch in batches:
        row = {name: array[np.argsort(batch["index"])] for name, array in batch.items()}
        np.testing.assert_array_equal(row["index"], range(6))
        np.testing.assert_array_equal(row["damaged"], [False, True, True, False, False, True])
        np.testing.assert_array_equal(row["teacher"].argmax(axis=1), [0, 3, 3, 3, 4, 0])
        np.testing.assert_array_equal(row["label"], [0, 1, 1, 1, 1, 0])
        np.testing.assert_allclose(row["image"][:, 8, 8, 0], 100 * row["label"], atol=3)
    assert_same(batches, take(3, source, batch_size=6, damaged="skip", logits=logits))


def test_evaluation_leaves_damaged_images_out(partly_damaged):
    source = open_source("folder", "test", str(partly_damaged))
    first, second = evaluate(source, batch_size=4, damaged="skip")
    np.testing.assert_array_equal(first["mask"], [True, False, False, True])
    np.testing.assert_array_equal(second["mask"], [True, False, False, False])
    np.testing.assert_array_equal(first["damaged"], [False, True, True, False])
    np.testing.assert_array_equal(second["damaged"], [False, True, False, False])
    np.testing.assert_array_equal(second["index"], [4, 5, 6, 7])


def test_a_folder_of_damaged_images_ends_the_run(tmp_path):
    root = make_folder(tmp_path, count=2)
    for file in root.glob("train/*/*.jpg"):
        file.write_bytes(b"nothing")
    source = open_source("folder", "train", str(root))
    with pytest.raises(InputError, match=r"4 images in a row cannot be read; the last: .*/train/"):
        take(1, source, batch_size=2, damaged="skip")
    with pytest.raises(InputError, match=r"data.damaged must be 'stop' or 'skip', got 'ignore'"):
        take(1, source, batch_size=2, damaged="ignore")


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


def test_an_impossible_aspect_falls_back_to_the_center():
    box = random_box(1000, 10, np.random.default_rng(0), (0.9, 1.0), (3 / 4, 4 / 3))
    assert box == (493, 0, 506, 10)


def crop(width, height, size, fraction):
    """Which of the pixels, numbered by column, the center crop shows."""
    image = Image.fromarray(np.tile(np.arange(width, dtype=np.uint8), (height, 1)))
    return np.asarray(center_crop(image, size=size, crop=fraction, interpolation="nearest"))


def test_squashing_resizes_both_sides_and_cuts_the_same_of_each():
    image = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(6, 16))
    view = dict(interpolation="nearest", squash=True)
    whole = center_crop(image, size=(3, 4), crop=1.0, **view)
    np.testing.assert_array_equal(whole, image.resize((4, 3), Image.Resampling.NEAREST))
    middle = center_crop(image, size=(3, 4), crop=0.5, **view)
    expected = np.asarray(image.resize((8, 6), Image.Resampling.NEAREST))[2:5, 2:6]
    np.testing.assert_array_equal(middle, expected)


def test_the_center_crop_resizes_the_shorter_side_and_cuts_the_middle():
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

    center_crop(Spy(), size=(224, 224), crop=0.875, interpolation="bicubic")
    assert seen == dict(size=(341, 256), box=(58, 16, 282, 240))


def test_what_the_devices_do_not_need_stays_on_the_host():
    batch = dict(image=np.zeros(2), label=np.ones(2), index=np.arange(2), damaged=np.zeros(2, bool))
    devices, host = split_host_arrays(batch)
    assert set(devices) == {"image", "label"}
    assert set(host) == {"index", "damaged"}
