# SPDX-License-Identifier: Apache-2.0
import pathlib

import numpy as np
import pytest
from PIL import Image

from evit_jax.data import randaugment
from evit_jax.data.randaugment import FILTERS, OPERATIONS, color_jitter, jitter, rand_augment

TIMM = np.load(pathlib.Path(__file__).parents[1] / "fixtures/augment/timm.npz")
PHOTO = Image.fromarray(TIMM["photo"])
FILL = tuple(TIMM["fill"].tolist())
RECIPE = dict(magnitude=9, std=0.5, layers=2, fill=FILL, interpolation="bicubic")


def test_the_operations_are_those_of_timm_in_its_order():
    names = [
        str(name).removesuffix("Increasing").removesuffix("Rel") for name in TIMM["operations"]
    ]
    assert list(OPERATIONS) == names


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_equals_timm_bit_for_bit(name):
    warp = dict(resample=FILTERS["bicubic"], fillcolor=FILL)
    expected = TIMM["images"][list(OPERATIONS).index(name)]
    for i, magnitude in enumerate(TIMM["levels"].tolist()):
        for j, sign in enumerate(TIMM["signs"].tolist()):
            image = OPERATIONS[name](PHOTO, sign * magnitude / 10, warp)
            np.testing.assert_array_equal(np.asarray(image), expected[i, j])


def test_color_jitter_equals_torchvision_bit_for_bit():
    for order, factors, expected in zip(
        TIMM["jitter_orders"], TIMM["jitter_factors"], TIMM["jittered"], strict=True
    ):
        np.testing.assert_array_equal(np.asarray(jitter(PHOTO, factors, order)), expected)


def spied(monkeypatch, images=4000, **settings):
    """Names and levels of what `rand_augment` applies to so many images, and its last warp."""
    seen = []

    def spy(name):
        return lambda image, level, warp: seen.append((name, level, warp)) or image

    monkeypatch.setattr(randaugment, "OPERATIONS", {name: spy(name) for name in OPERATIONS})
    rng = np.random.default_rng(0)
    for _ in range(images):
        rand_augment(PHOTO, rng, **RECIPE | settings)
    names, levels, warps = zip(*seen, strict=True)
    return names, np.array(levels), warps[-1]


def test_all_operations_are_as_likely_and_applied_half_of_the_time(monkeypatch):
    names, _, _ = spied(monkeypatch)
    counts = np.array([names.count(name) for name in OPERATIONS])
    expected = 4000 * 2 / 2 / 15
    assert abs(counts.sum() - 4000) < 4 * np.sqrt(8000 / 4)
    assert abs(counts - expected).max() < 4 * np.sqrt(expected)
    assert counts.std() > 0.3 * np.sqrt(expected)  # independent draws, not a deck of cards


def test_layers_says_how_many_operations_are_drawn(monkeypatch):
    assert abs(len(spied(monkeypatch, layers=5)[0]) - 10000) < 4 * np.sqrt(20000 / 4)


def test_magnitudes_are_normal_and_signs_as_likely(monkeypatch):
    _, levels, _ = spied(monkeypatch)
    assert abs(np.sign(levels).mean()) < 4 / np.sqrt(len(levels))
    magnitudes = 10 * abs(levels)
    assert abs(magnitudes.mean() - 8.9958) < 0.03  # 9, but for what the clip at 10 takes
    assert abs(np.median(magnitudes) - 9) < 0.04
    assert abs(magnitudes[magnitudes < 10].std() - 0.47) < 0.03
    assert abs((magnitudes == 10).mean() - 0.0228) < 0.01  # above two standard deviations


def test_magnitudes_are_clipped_at_both_ends(monkeypatch):
    _, levels, _ = spied(monkeypatch, magnitude=5, std=10)
    assert abs(levels).max() == 1
    for end in (0, 1):
        assert abs((abs(levels) == end).mean() - 0.3085) < 0.03  # half a standard deviation away


def test_no_deviation_is_one_magnitude(monkeypatch):
    assert set(abs(spied(monkeypatch, images=50, std=0)[1])) == {0.9}


@pytest.mark.parametrize("interpolation", FILTERS)
def test_affine_maps_use_the_interpolation_and_fill(monkeypatch, interpolation):
    _, _, warp = spied(monkeypatch, images=20, interpolation=interpolation, fill=(1, 2, 3))
    named = "bicubic" if interpolation == "lanczos" else interpolation  # which Pillow lacks here
    assert warp == dict(resample=Image.Resampling[named.upper()], fillcolor=(1, 2, 3))
    moved = np.asarray(OPERATIONS["TranslateX"](PHOTO, 1.0, warp))
    np.testing.assert_array_equal(moved[:, -10:], np.broadcast_to([1, 2, 3], (36, 10, 3)))


def test_operations_follow_each_other_and_the_generator_decides_all():
    changed = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        two = rand_augment(PHOTO, np.random.default_rng(seed), **RECIPE)
        one = rand_augment(PHOTO, rng, **RECIPE | {"layers": 1})
        after = rand_augment(one, rng, **RECIPE | {"layers": 1})
        assert (two.mode, two.size) == ("RGB", PHOTO.size)
        np.testing.assert_array_equal(np.asarray(two), np.asarray(after))
        changed += np.any(np.asarray(two) != TIMM["photo"])
    assert 30 < changed < 45  # three quarters


@pytest.mark.parametrize(("strength", "low", "high"), [(0.3, 0.7, 1.3), (1.5, 0, 2.5)])
def test_jitter_draws_factors_around_one_and_every_order(monkeypatch, strength, low, high):
    seen = []
    spy = lambda image, factors, order: seen.append((factors, tuple(order)))  # noqa: E731
    monkeypatch.setattr(randaugment, "jitter", spy)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        color_jitter(PHOTO, rng, strength=strength)
    factors, orders = zip(*seen, strict=True)
    factors = np.array(factors)
    assert factors.min() >= low
    assert factors.max() <= high
    np.testing.assert_allclose(factors.mean(axis=0), (low + high) / 2, atol=0.08 * strength)
    np.testing.assert_allclose(factors.std(axis=0), (high - low) / 12**0.5, rtol=0.05)
    assert abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.1  # three draws, not one
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert min(counts) > 2000 / 6 - 4 * np.sqrt(2000 / 6)
