# SPDX-License-Identifier: Apache-2.0
import contextlib
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from evit_jax.data import open_source, randaugment
from evit_jax.data import view as views
from evit_jax.data.labels import (
    LabelMap,
    file_name,
    map_path,
    open_label_maps,
    read_label_map,
    write_label_map,
)
from evit_jax.data.pipeline import train_batches
from evit_jax.data.randaugment import OPERATIONS, moved
from evit_jax.data.view import View
from evit_jax.errors import InputError
from tests.data.test_pipeline import AUGMENT, VIEW, assert_same
from tests.data.test_sources import make_folder

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures/labels"
SPATIAL = "Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"
GRID = 6, 8  # cells of the maps here
PIXELS = 20  # of a cell's side


def make_map(seed=0, shape=(5, 4, 3)):
    rng = np.random.default_rng(seed)
    logits, ids = rng.normal(size=shape), rng.integers(0, 2, shape)
    return LabelMap(logits.astype(np.float16), ids.astype(np.int16))


def same(a, b):
    for one, other in zip(a, b, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_published_map_and_one_of_ours_are_read_alike(tmp_path):
    published = read_label_map(FOLDER / "map.pt")
    assert published.logits.shape == published.ids.shape == (5, 3, 4)
    assert (published.logits.dtype, published.ids.dtype) == (np.float16, np.int16)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(published.ids, rng.permutation(1000)[:60].reshape(5, 3, 4))
    assert (np.diff(published.logits, axis=0) <= 0).all()  # the largest first
    write_label_map(tmp_path / "class" / "a.npz", published)
    same(read_label_map(tmp_path / "class" / "a.npz"), published)


def write_all(folder, source, **settings):
    for index in range(len(source)):
        element = source[index]
        place = map_path(folder, source.classes[element["label"]], file_name(element))
        write_label_map(place.with_suffix(".npz"), make_map(index, **settings))


def test_every_source_names_the_map_of_each_image(tmp_path):
    root = make_folder(tmp_path / "data")
    source = open_source("folder", "train", str(root))
    (root / "train/cat/0.jpg").rename(root / "train/cat/n01_7.one.jpg")
    source = open_source("folder", "train", str(root))
    write_all(tmp_path / "maps", source)
    assert (tmp_path / "maps/cat/n01_7.npz").is_file()  # up to the first dot
    maps = open_label_maps(str(tmp_path / "maps"), source, 2)
    assert maps.shape == (5, 4, 3)
    for index in range(len(source)):
        same(maps(source[index]), make_map(index))
        assert source.describe(index)["name"] == source[index]["name"]
    digit = dict(label=3, name="digit 17")
    assert map_path("maps", "3", file_name(digit)) == pathlib.Path("maps/3/digit 17")
    example = dict(label=3, name="imagenet2012:5.1.0 train example 2", file="n03_2.JPEG")
    assert map_path("maps", "n03", file_name(example)) == pathlib.Path("maps/n03/n03_2")


def test_a_first_image_without_a_map_is_passed_over(tmp_path):
    source = open_source("folder", "train", str(make_folder(tmp_path / "data")))
    write_all(tmp_path, source)
    (tmp_path / "cat/0.npz").unlink()  # as of a damaged image
    assert open_label_maps(str(tmp_path), source, 2).shape == (5, 4, 3)


def test_what_is_wrong_with_a_map_is_one_line(tmp_path):
    source = open_source("folder", "train", str(make_folder(tmp_path / "data")))
    with pytest.raises(InputError, match=r"has no label map: neither .*0\.npz nor \.pt"):
        open_label_maps(str(tmp_path), source, 2)
    write_all(tmp_path, source)
    path = tmp_path / "cat/1.npz"
    maps = open_label_maps(str(tmp_path), source, 2)
    write_label_map(path, make_map(shape=(5, 3, 4)))
    with pytest.raises(InputError, match=re.escape("of shape (5, 3, 4), others of (5, 4, 3)")):
        maps(source[1])
    labels = make_map()
    write_label_map(path, labels._replace(ids=labels.ids + 7))
    with pytest.raises(InputError, match="names class 8, and the model has 2"):
        maps(source[1])
    path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match="the label map"):
        maps(source[1])
    np.savez(path, weights=labels.logits)
    with pytest.raises(InputError, match="is no label map: it has weights"):
        maps(source[1])
    np.savez(path, logits=labels.logits[0], ids=labels.ids[0])
    with pytest.raises(InputError, match="is no label map"):
        maps(source[1])
    np.savez(path, logits=np.full_like(labels.logits, np.nan), ids=labels.ids)
    with pytest.raises(InputError, match="not all of its numbers are finite"):
        maps(source[1])


@pytest.mark.parametrize("level", [-0.9, 0.31])
@pytest.mark.parametrize("name", SPATIAL)
def test_a_map_moves_as_pillow_moves_the_pixels(name, level):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 250, (2, 17, 23)).astype(np.int16)
    labels = LabelMap(ids.astype(np.float16), ids)
    warped = labels.warped(moved(name, level, 23, 17), 23, 17)  # a cell is a pixel
    warp = dict(resample=Image.Resampling.NEAREST, fillcolor=0)
    for plane, found in zip(ids, warped.ids, strict=True):
        image = OPERATIONS[name](Image.fromarray(plane.astype(np.uint8)), level, warp)
        assert (np.asarray(image) != found).sum() <= 2  # where two cells are as near
    same(labels.warped((1, 0, 0, 0, 1, 0), 50, 40), labels)


def test_colors_leave_a_map_where_it_is():
    assert {name for name in OPERATIONS if moved(name, 0.5, 10, 10)} == set(SPATIAL)


def colored():
    """An image whose cells have a color each, and a map that knows them by their number."""
    numbers = np.arange(GRID[0] * GRID[1]).reshape(GRID)
    image = np.stack([numbers * 5, 255 - numbers * 5, numbers % 7 * 30], axis=-1).astype(np.uint8)
    image = image.repeat(PIXELS, axis=0).repeat(PIXELS, axis=1)
    labels = LabelMap(np.ones((1, *GRID), np.float16), numbers[None].astype(np.int16))
    return Image.fromarray(image), labels


def look(**changes):
    plain = dict(size=(96, 96), crop="resized", three_augment=False, fill=(1, 2, 3))
    plain |= {name: AUGMENT[name] for name in ("scale", "ratio", "flip", "color_jitter")}
    randaugment = {name: AUGMENT[name] for name in AUGMENT if name.startswith("randaugment")}
    return View(**plain | randaugment | dict(interpolation="nearest") | changes)


@pytest.mark.parametrize("magnitude", [0, 9])
def test_the_map_in_the_box_shows_what_the_crop_shows(magnitude, monkeypatch):
    """Flipped, moved by RandAugment and cropped: center of the image, center of the box."""
    spatial = {name: OPERATIONS[name] for name in SPATIAL}
    monkeypatch.setattr(randaugment, "OPERATIONS", spatial)
    monkeypatch.setattr(views, "OPERATIONS", spatial)
    image, labels = colored()
    show = look(randaugment_magnitude=magnitude, scale=(0.05, 0.3))
    right, seen = 0, set()
    for seed in range(300):
        example = show.labeled(image, labels, np.random.default_rng(seed))
        top, left, bottom, right_edge = example["label_box"]
        at = 48.5 / 96
        row = int((top + (bottom - top) * at) * GRID[0])
        column = int((left + (right_edge - left) * at) * GRID[1])
        number = int(example["label_ids"][0, row, column])
        there = example["image"][48, 48].tolist() == [number * 5, 255 - number * 5, number % 7 * 30]
        outside = not number and example["image"][48, 48].tolist() == [1, 2, 3]
        right += there or outside
        seen.add(number)
    # A cell that was moved onto several shows in the map where its center went, or not at all.
    assert right >= (298 if not magnitude else 225)
    assert len(seen) > 20


def test_batches_bring_maps_and_boxes_whoever_makes_them(tmp_path):
    source = open_source("folder", "train", str(make_folder(tmp_path / "data")), cache=True)
    write_all(tmp_path / "maps", source)
    maps = open_label_maps(str(tmp_path / "maps"), source, 2)

    def take(**more):
        settings = AUGMENT | dict(batch_size=4, maps=maps, randaugment_magnitude=9) | more
        with contextlib.closing(train_batches(source, **VIEW, **settings)) as batches:
            return [next(batches) for _ in range(4)]

    batch = take()[0]
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == dict(
        image=((4, 16, 16, 3), "uint8"),
        label=((4,), "int32"),
        label_logits=((4, 5, 4, 3), "float16"),
        label_ids=((4, 5, 4, 3), "int16"),
        label_box=((4, 4), "float32"),
        index=((4,), "int32"),
        damaged=((4,), "bool"),
    )
    assert (batch["label_box"][:, :2] < batch["label_box"][:, 2:]).all()
    assert_same(take(), take(workers=1))
    for other in (dict(crop="simple"), dict(three_augment=True)):
        with pytest.raises(InputError, match=r"label maps follow the resized crop"):
            take(**other)
