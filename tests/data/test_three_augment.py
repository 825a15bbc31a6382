# SPDX-License-Identifier: Apache-2.0
import numpy as np
from PIL import Image, ImageFilter

from evit_jax.data.augment import simple_crop
from evit_jax.data.three_augment import OPERATIONS, three_augment
from tests.data.test_augment import photo

PHOTO = photo(40, 30)


class Drawn:
    """A generator of these numbers."""

    def __init__(self, *integers, uniform=None):
        self.integer, self.value, self.ends = list(integers), uniform, []

    def integers(self, end):
        self.ends.append(end)
        return self.integer.pop(0)

    def uniform(self, low, high):
        return low if self.value is None else self.value


def test_each_of_the_three_operations_is_what_its_name_says():
    pixels = np.asarray(PHOTO)
    gray = np.asarray(three_augment(PHOTO, Drawn(0)))
    luma = pixels @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(gray, np.repeat(luma[..., None], 3, axis=2), atol=1)
    solarized = np.asarray(three_augment(PHOTO, Drawn(1)))
    np.testing.assert_array_equal(solarized, np.where(pixels >= 128, 255 - pixels, pixels))
    blurred = three_augment(PHOTO, Drawn(2, uniform=1.5))
    np.testing.assert_array_equal(blurred, PHOTO.filter(ImageFilter.GaussianBlur(1.5)))


def test_each_comes_a_third_of_the_time_and_radii_are_uniform(monkeypatch):
    seen = []
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda image, r, name=name: seen.append((name, r)))
    rng = np.random.default_rng(0)
    for _ in range(3000):
        three_augment(PHOTO, rng)
    names, radii = zip(*seen, strict=True)
    for name in ("grayscale", "solarize", "blur"):
        assert abs(names.count(name) - 1000) < 4 * np.sqrt(3000 * 2 / 9)
    assert 0.1 <= min(radii) < 0.12
    assert 1.98 < max(radii) <= 2.0
    assert abs(np.mean(radii) - 1.05) < 4 * 1.9 / np.sqrt(12 * 3000)


def test_the_simple_crop_is_a_window_of_the_padded_image_at_its_own_aspect():
    """Shorter side to 24, the longer one rounded down; mirrored pixels around it, the edge once."""
    settings = dict(size=(24, 24), interpolation="bicubic")
    small = np.asarray(PHOTO.resize((32, 24), Image.Resampling.BICUBIC))
    padded = np.pad(small, ((4, 4), (4, 4), (0, 0)), "reflect")
    for top, left in ((0, 0), (4, 4), (8, 16)):
        rng = Drawn(top, left)
        crop = np.asarray(simple_crop(PHOTO, rng, **settings))
        np.testing.assert_array_equal(crop, padded[top : top + 24, left : left + 24])
        assert rng.ends == [9, 17]
    np.testing.assert_array_equal(padded[3, 4:-4], small[1])
