# SPDX-License-Identifier: Apache-2.0
"""Decoded images that stay in memory."""

import pickle
from collections import Counter

import numpy as np
import pytest

from evit_jax.data import cache, open_source
from evit_jax.data.cache import Cached, available_memory
from evit_jax.errors import InputError
from tests.data.test_sources import jpeg, make_folder


class Counting:
    """A source of one damaged JPEG and some others that counts how often each is read."""

    classes = ("a", "b")

    def __init__(self, length=5):
        self.length, self.reads = length, Counter()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.reads[index] += 1
        content = jpeg((10 * index, 0, 0)) if index != 3 else b"nothing"
        return {"image": content, "label": index % 2, "name": f"image {index}"}


def test_an_image_is_read_and_decoded_once():
    source = Counting()
    cached = Cached(source)
    assert (len(cached), cached.classes) == (5, ("a", "b"))
    source.reads.clear()
    one, two = ([cached[index] for index in (0, 4, 2)] for _ in range(2))
    assert source.reads == {0: 1, 4: 1, 2: 1}
    assert one == two  # the very same elements
    assert one[1]["image"].shape == (16, 20, 3)
    assert one[1]["image"].dtype == np.uint8
    assert abs(int(one[1]["image"][0, 0, 0]) - 40) < 3
    assert (one[1]["label"], one[1]["name"]) == (0, "image 4")


def test_a_damaged_image_is_left_to_whoever_decodes_it():
    assert Cached(Counting())[3]["image"] == b"nothing"


def test_another_process_starts_without_images():
    cached = Cached(Counting(500))
    for index in range(500):
        cached[index]
    sent = pickle.dumps(cached)
    assert len(sent) < 10_000
    assert pickle.loads(sent)[4]["image"].shape == (16, 20, 3)


def test_more_images_than_memory_are_refused(tmp_path, monkeypatch):
    root = str(make_folder(tmp_path))  # 6 images of 960 bytes
    monkeypatch.setattr(cache, "available_memory", lambda: 6000)
    assert open_source("folder", "train", root, cache=True)[0]["image"].nbytes == 960
    with pytest.raises(InputError, match=r"6 decoded images would need .* in 2 processes each"):
        open_source("folder", "train", root, cache=True, copies=2)
    monkeypatch.setattr(cache, "available_memory", lambda: 5000)
    with pytest.raises(InputError, match=r"6 decoded images would need .* open the data without"):
        open_source("folder", "train", root, cache=True)
    assert open_source("folder", "train", root)[0]["name"]


def test_the_available_memory_heeds_a_containers_limit(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(cache, "LIMITS", (str(limit),))
    there = available_memory()
    assert 2**26 < there < 2**50
    limit.write_text("max\n")
    assert available_memory() > 2**26
    limit.write_text("12345678\n")
    assert available_memory() == 12345678
