# SPDX-License-Identifier: Apache-2.0
import pathlib

import numpy as np
import pytest
from PIL import Image

from evit_jax.data.augment import random_box, random_resized_crop

TIMM = np.load(pathlib.Path(__file__).parents[1] / "fixtures/augment/crop.npz")
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


class Recorded:
    """The numbers timm drew: area and aspect of each try, and of the last one top and left."""

    def __init__(self, draws):
        self.draws = list(draws[~np.isnan(draws)])

    def uniform(self, low, high):
        assert low <= self.draws[0] <= high
        return self.draws.pop(0)

    def integers(self, end):  # we ask for left before top
        assert self.draws[-1] < end
        return self.draws.pop()


def photo(width, height):
    y, x = np.mgrid[:height, :width]
    wave, ramp = 127 + 120 * np.sin(x / 5 + y / 9), 255 * (x + y) / (width + height)
    image = np.stack([wave, ramp, 255 * ((x // 7 + y // 5) % 2)], axis=-1)
    return Image.fromarray(image.astype(np.uint8))


def examples():
    return enumerate(zip(TIMM["draws"], TIMM["boxes"], TIMM["sizes"], strict=True))


def test_random_boxes_are_timms_for_the_same_draws():
    for _, (draws, box, size) in examples():
        assert random_box(*size.tolist(), Recorded(draws), SCALE, RATIO) == tuple(box)
    tries = [(~np.isnan(draws)).sum() for draws in TIMM["draws"]]
    assert {4, 20} <= set(tries)  # at the first try, and at none


@pytest.mark.parametrize("number", range(10))
def test_random_resized_crops_are_timms_bit_for_bit(number):
    _, (draws, _, size) = list(examples())[number]
    crop = random_resized_crop(
        photo(*size.tolist()), Recorded(draws), size=(16, 16), scale=SCALE, ratio=RATIO,
        interpolation="bicubic",
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(crop), TIMM[f"pixels_{number}"])
    if number == 0:
        flipped = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        np.testing.assert_array_equal(np.asarray(flipped), TIMM["flipped"])
