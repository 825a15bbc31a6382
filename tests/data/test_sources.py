# SPDX-License-Identifier: Apache-2.0
import io
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from evit_jax.data import known_sources, open_source
from evit_jax.data.augment import decode
from evit_jax.errors import InputError


def jpeg(colour, size=(20, 16)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG")
    return file.getvalue()


def make_folder(root, splits=("train", "val"), classes=("cat", "dog"), count=3):
    for split in splits:
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{index}.jpg").write_bytes(jpeg((100 * number, 10 * index, 0)))
    return root


def test_every_file_is_a_data_set():
    assert known_sources() == ["digits", "folder", "synthetic", "tfds"]
    with pytest.raises(InputError, match=r"unknown data set 'digit'; did you mean 'digits'"):
        open_source("digit", "train")


def test_digits_are_all_there_and_split_once():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1438, 359)
    assert not set(train.indices) & set(test.indices)
    counts = np.bincount(np.concatenate([train.labels, test.labels]))
    np.testing.assert_array_equal(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    assert [train[i]["label"] for i in range(4)] == [0, 1, 2, 3]  # the file counts up at first
    image = train[0]["image"]
    assert (image.shape, image.dtype) == ((32, 32), np.uint8)
    assert image[14:18, 14:18].mean() < 40 < image[4:28].mean()  # the hole of a zero
    with pytest.raises(InputError, match=r"leave data.dir empty"):
        open_source("digits", "train", "somewhere")


def test_synthetic_images_are_the_same_every_time_and_differ_between_splits():
    train, test = open_source("synthetic", "train"), open_source("synthetic", "test")
    np.testing.assert_array_equal(train[5]["image"], train[5]["image"])
    assert (train[5]["image"] != test[5]["image"]).any()
    assert len(train.classes) == 10


def test_class_folders_are_found_in_sorted_order_at_any_depth(tmp_path):
    root = make_folder(tmp_path)
    deep = root / "train" / "dog" / "more"
    deep.mkdir()
    (deep / "x.PNG").write_bytes(jpeg((1, 2, 3)))
    (root / "train" / "dog" / "readme.txt").write_text("no image")
    (root / "train" / "dog" / "._hidden.jpg").write_text("no image")
    train, test = (
        open_source("folder", "train", str(root)),
        open_source("folder", "test", str(root)),
    )
    assert train.classes == ("cat", "dog")
    assert train.labels == [0, 0, 0, 1, 1, 1, 1]
    assert test.labels == [0, 0, 0, 1, 1, 1]
    assert decode(train[6]["image"], train[6]["name"]).size == (20, 16)
    assert train[6]["name"].endswith("train/dog/more/x.PNG")


def test_test_labels_follow_the_training_folders(tmp_path):
    make_folder(tmp_path, splits=("train",), classes=("a", "b", "c"))
    make_folder(tmp_path, splits=("test",), classes=("c",))
    assert open_source("folder", "test", str(tmp_path)).labels == [2, 2, 2]
    make_folder(tmp_path / "test", splits=("new",), classes=("x",))
    with pytest.raises(InputError, match=r"test/new is not among the 3 known classes"):
        open_source("folder", "test", str(tmp_path))


def test_bad_folders_say_what_to_do(tmp_path):
    def refused(folder, text):
        with pytest.raises(InputError, match=text):
            open_source("folder", "train", str(folder))

    refused("", "needs a folder with train/ and val/")
    refused(tmp_path / "none", "is not a folder")
    refused(tmp_path, "no folder train in it; it has nothing")
    (tmp_path / "train").mkdir()
    refused(tmp_path, "train has no class folders")
    make_folder(tmp_path, splits=("train",))
    (tmp_path / "train" / "empty").mkdir()
    refused(tmp_path, "train/empty is a class folder without images")


@pytest.mark.parametrize("content", [b"", b"no image", jpeg((9, 9, 9))[:400]])
def test_a_broken_image_is_named(content):
    with pytest.raises(InputError, match=re.escape("photos/x.jpg cannot be read as an image")):
        decode(content, "photos/x.jpg")


@pytest.mark.parametrize(
    ("mode", "pixel"),
    [("L", 200), ("RGBA", (200, 200, 200, 9)), ("CMYK", (0, 0, 0, 55)), ("1", 1), ("LA", (200, 1))],
)
def test_every_mode_becomes_rgb(mode, pixel):
    file = io.BytesIO()
    Image.new(mode, (4, 4), pixel).save(file, "TIFF")
    image = np.asarray(decode(file.getvalue(), "x"))
    assert image.shape == (4, 4, 3)
    assert image[0, 0, 0] == (255 if mode == "1" else 200)


def test_sixteen_bits_are_scaled_not_clipped():
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 200 * 256, np.uint16)).save(file, "PNG")
    np.testing.assert_array_equal(np.asarray(decode(file.getvalue(), "x")), 200)


def test_grey_and_colour_arrays_are_decoded_alike():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for array in (grey, grey[..., None], np.stack([grey] * 3, axis=-1)):
        np.testing.assert_array_equal(np.asarray(decode(array, "x"))[..., 1], grey)


def test_class_lists_set_the_labels(tmp_path):
    root = str(make_folder(tmp_path))
    file = tmp_path / "classes.json"
    file.write_text('["wolf", "dog", "fox", "cat"]')
    for classes in (str(file), file, ["wolf", "dog", "fox", "cat"]):
        for split in ("train", "test"):
            source = open_source("folder", split, root, classes=classes)
            assert source.classes == ("wolf", "dog", "fox", "cat")
            assert source.labels == [3, 3, 3, 1, 1, 1]
    assert open_source("folder", "train", root, classes="").classes == ("cat", "dog")
    with pytest.raises(InputError, match=r"'digits' brings its own classes"):
        open_source("digits", "train", classes=file)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("cat, dog", r"classes.json is not JSON"),
        ('{"cat": 0}', r"should be a JSON list of folder names"),
        ("[0, 1]", r"should be a JSON list of folder names"),
        ("[]", r"names no classes"),
        ('["cat", "dog", "cat"]', r"names 'cat' 2 times"),
        ('["cat", "fox"]', r"train/dog is not among the 2 known classes"),
    ],
)
def test_bad_class_lists_are_refused(content, text, tmp_path):
    root = make_folder(tmp_path)
    file = tmp_path / "classes.json"
    file.write_text(content)
    with pytest.raises(InputError, match=text):
        open_source("folder", "train", str(root), classes=str(file))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A tiny TFDS set in ArrayRecord, written without TensorFlow."""
    from tests.support import tiny_dataset

    data_dir = tmp_path_factory.mktemp("tfds")
    builder = tiny_dataset.Tiny(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return data_dir


def test_tfds_reads_array_records_without_tensorflow(prepared):
    import sys

    train = open_source("tfds", "train", str(prepared / "tiny"))
    test = open_source("tfds", "test", str(prepared / "tiny" / "1.0.0"))
    assert (len(train), len(test)) == (6, 4)
    assert train.classes == ("red", "blue")
    seen = sorted((train[i]["label"], decode(train[i]["image"], "x").size) for i in range(6))
    assert seen == [(0, (20, 16))] * 3 + [(1, (20, 16))] * 3
    assert train[0]["name"] == "tiny/1.0.0 train example 0"
    assert "tensorflow" not in sys.modules


def test_a_tfds_set_that_was_read_from_can_be_sent_to_worker_processes(prepared):
    source = open_source("tfds", "train", str(prepared / "tiny"))
    first = source[0]
    assert pickle.loads(pickle.dumps(source))[0] == first


def test_bad_tfds_folders_say_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"needs --config.data.dir"):
        open_source("tfds", "train")
    with pytest.raises(InputError, match=r"no prepared TFDS set.*file_format='array_record'"):
        open_source("tfds", "train", str(tmp_path))
