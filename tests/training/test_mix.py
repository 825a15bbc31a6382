# SPDX-License-Identifier: Apache-2.0
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.training.losses import smooth_labels
from evit_jax.training.mix import (
    ASPECT,
    Mix,
    blend,
    box_of,
    erase,
    first_fitting,
    inside,
    token_box,
)

TIMM = np.load(pathlib.Path(__file__).parents[1] / "fixtures/augment/timm.npz")
MIXING = ("mix_cut", "mix_lam", "mix_centre", "mix_box", "mix_share")
SIZE = (32, 48)
KEY = jax.random.key(5)
EVERYTHING = jax.jit(Mix(erasing=0.5, mixup=0.8, cutmix=1.0))
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


def batch(count):
    """Images, two leaves of targets and indices."""
    rng = np.random.default_rng(0)
    images, one, two = (
        jnp.float32(rng.normal(size=(count, *shape))) for shape in ((*SIZE, 3), (7,), (5,))
    )
    return images, {"labels": one, "teacher": two}, jnp.arange(count)


@pytest.mark.parametrize("example", range(7))
def test_erasing_equals_timm_for_its_draws(example):
    areas, aspects, box, erased = (
        TIMM[name][example] for name in ("erase_areas", "erase_aspects", "erase_box", "erased")
    )
    picture, noise = TIMM["picture"], TIMM["noise"]
    sides = first_fitting(jnp.float32(areas), jnp.float32(aspects), picture.shape[:2])
    np.testing.assert_array_equal(sides, box[2:] - box[:2])
    np.testing.assert_array_equal(erase(jnp.array(picture), box, jnp.array(noise)), erased)


def test_timms_examples_of_erasing_reach_later_tries_and_none():
    fits = [  # on an image of (12, 31)
        [
            round((area * 372 * aspect) ** 0.5) < 12 and round((area * 372 / aspect) ** 0.5) < 31
            for area, aspect in zip(*draws, strict=True)
        ]
        for draws in zip(TIMM["erase_areas"], TIMM["erase_aspects"], strict=True)
    ]
    assert [row.index(True) if any(row) else None for row in fits] == [0, 1, 0, 1, 2, 2, None]


def test_a_box_as_large_as_the_image_does_not_fit():
    tries = jnp.array([1.0, 0.999, 0.5]), jnp.array([1.0, 1.0, 2.0])
    np.testing.assert_array_equal(first_fitting(*tries, (10, 10)), [0, 0])
    np.testing.assert_array_equal(first_fitting(*tries, (11, 10)), [10, 5])


@pytest.mark.parametrize("example", range(6))
def test_mixing_equals_timm_for_its_draws(example):
    cut, lam, center, box, share, mixed, targets = (
        TIMM[name][example] for name in (*MIXING, "mixed", "mixed_targets")
    )
    images = jnp.array(TIMM["batch"])
    weights = jnp.float32(share)
    if cut:
        size = images.shape[1:3]
        np.testing.assert_array_equal(box_of(jnp.float32(lam), jnp.array(center), size), box)
        weights = ~inside(box, size)[None, :, :, None]
        close(weights.mean(), share)
    close(blend(images, weights), mixed)
    smooth = smooth_labels(TIMM["labels"], int(TIMM["classes"]), float(TIMM["smoothing"]))
    close(blend(smooth, jnp.float32(share)), targets)


def test_partners_are_neighbors_both_ways():
    np.testing.assert_array_equal(blend(jnp.arange(6.0), 0.0), [1, 0, 3, 2, 5, 4])


@functools.cache
def erased(count=1024):
    """Where and by what zeros were replaced: (count, H, W) and values."""
    mix = Mix(erasing=0.25)
    images, _ = jax.jit(mix)(jnp.zeros((count, *SIZE, 3)), (), KEY, jnp.arange(count))
    return np.asarray(images != 0).all(axis=-1), np.asarray(images[images != 0])


def test_erasing_happens_as_often_as_asked():
    where, _ = erased()
    assert abs(where.any(axis=(1, 2)).mean() - 0.25) < 4 * (0.25 * 0.75 / 1024) ** 0.5


def test_erased_boxes_have_timms_areas_aspects_and_places():
    where = erased()[0]
    where = where[where.any(axis=(1, 2))]
    high, wide = where.any(axis=2).sum(axis=1), where.any(axis=1).sum(axis=1)
    areas = where.sum(axis=(1, 2))
    np.testing.assert_array_equal(areas, high * wide)  # boxes, not other shapes
    areas = areas / (SIZE[0] * SIZE[1])
    assert 0.015 < areas.min() < 0.04
    assert 0.3 < areas.max() < 0.35
    assert abs(areas.mean() - 0.17) < 0.02
    aspects = np.log(high / wide)
    assert np.log(ASPECT[0]) - 0.2 < aspects.min() < -0.9
    assert 0.7 < aspects.max() < np.log(ASPECT[1]) + 0.2
    assert 0.45 < aspects.std() < 0.72
    # Where there is room, the corner is anywhere in it, both ends included.
    rows, columns = where.any(axis=2).argmax(axis=1), where.any(axis=1).argmax(axis=1)
    for corner, room in ((rows, SIZE[0] - high), (columns, SIZE[1] - wide)):
        assert abs((corner / room).mean() - 0.5) < 0.08
        assert (corner == 0).any()
        assert (corner == room).any()
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.25


def test_erased_pixels_are_standard_normal():
    values = erased()[1]
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert len(np.unique(values)) > 0.9 * len(values)  # no value for a whole box or image


def weights(mix, count=4000):
    """(cut, share) of so many steps: which ones were cutmix and the targets' weights."""
    keys = jax.random.split(KEY, count)
    pixels, shares = jax.jit(jax.vmap(lambda key: mix.random_weights(key, SIZE)))(keys)
    pixels, shares = np.asarray(pixels, np.float32).reshape(count, -1), np.asarray(shares)
    cut = np.isin(pixels, (0, 1)).all(axis=1)
    close(pixels.mean(axis=1), shares, atol=1e-5)  # pixels and targets are mixed alike
    return cut, shares


def test_mixup_weighs_by_a_beta_distribution():
    cut, shares = weights(Mix(mixup=0.3))
    assert cut.mean() < 0.01  # an extreme weight looks like cutmix
    assert abs(shares.mean() - 0.5) < 0.025
    np.testing.assert_allclose(shares.var(), 1 / (4 * (2 * 0.3 + 1)), rtol=0.06)


def test_cutmix_keeps_more_than_it_draws_as_boxes_are_clipped():
    cut, shares = weights(Mix(cutmix=1.0))
    assert cut.all()
    rng = np.random.default_rng(0)
    sides = np.sqrt(1 - rng.random((20000, 1))) * SIZE // 1
    centers = rng.integers(SIZE, size=(20000, 2))
    ends = np.clip([centers - sides // 2, centers + (sides + 1) // 2], 0, SIZE)
    expected = 1 - (ends[1] - ends[0]).prod(axis=1) / (SIZE[0] * SIZE[1])
    for quantile in (0.1, 0.5, 0.9):
        assert abs(np.quantile(shares, quantile) - np.quantile(expected, quantile)) < 0.02


def test_cutmix_replaces_mixup_as_often_as_asked():
    cut, shares = weights(Mix(mixup=0.8, cutmix=3.0, switch=0.3))
    assert abs(cut.mean() - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    # Each follows its own alpha: cutmix seldom cuts much, mixup is often extreme.
    np.testing.assert_allclose(shares[~cut].var(), 1 / (4 * 2.6), rtol=0.1)
    assert shares[cut].var() < 0.04
    assert 0.6 < shares[cut].mean() < 0.75


def test_a_box_of_tokens_is_mixtokens_for_its_draws():
    """Half of each side, rounded down, either way of the center, inside the grid."""
    for share, center, grid, expected in (
        (0.5, (7, 7), (14, 14), (3, 3, 11, 11)),  # sides of 9, which lose one
        (0.5, (0, 13), (14, 14), (0, 9, 4, 14)),
        (0.99, (7, 7), (14, 14), (7, 7, 7, 7)),  # sides of 1 are none
        (0.0, (4, 8), (8, 12), (0, 2, 8, 12)),
    ):
        box = token_box(jnp.float32(share), jnp.array(center), grid)
        np.testing.assert_array_equal(box, expected)


def test_tokens_are_drawn_as_by_mixtokens_code():
    grid, count = (14, 10), 4000
    keys = jax.random.split(KEY, count)
    swap = np.asarray(jax.vmap(lambda key: Mix(token=1.0).random_tokens(key, grid))(keys))
    assert swap.shape == (count, 140)
    rng = np.random.default_rng(0)
    sides = np.floor(np.array(grid) * np.sqrt(1 - rng.random((20000, 1))))
    centers = rng.integers(grid, size=(20000, 2))
    ends = np.clip([centers - sides // 2, centers + sides // 2], 0, grid)
    expected = (ends[1] - ends[0]).prod(axis=1) / 140
    for quantile in (0.1, 0.5, 0.9):
        found = np.quantile(swap.mean(axis=1), quantile)
        assert abs(found - np.quantile(expected, quantile)) < 0.025
    assert len(np.unique(swap, axis=0)) > 500


def test_splitting_a_batch_changes_nothing():
    images, targets, index = batch(8)
    for seed in range(3):
        key = jax.random.key(seed)
        whole = EVERYTHING(images, targets, key, index)
        parts = []
        for half in (slice(4), slice(4, 8)):
            part = jax.tree.map(lambda leaf, half=half: leaf[half], (images, targets))
            parts.append(EVERYTHING(*part, key, index[half]))
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        jax.tree.map(close, whole, joined)
        other, _ = EVERYTHING(images, targets, key, index + 8)
        assert (whole[0] != other).any()  # the index matters


def test_another_key_is_another_mixture():
    images, targets, index = batch(4)
    one, other = (EVERYTHING(images, targets, jax.random.key(seed), index)[1] for seed in (0, 1))
    assert (one["labels"] != other["labels"]).all()


def test_images_and_every_leaf_of_the_targets_are_mixed_with_one_weight():
    images, targets, index = batch(4)
    mixed, mixed_targets = jax.jit(Mix(mixup=0.8))(images, targets, KEY, index)
    partners = jnp.array([1, 0, 3, 2])
    share = jnp.median((mixed - images[partners]) / (images - images[partners]))
    assert 0.01 < share < 0.99
    for before, after in [(images, mixed), *((targets[k], mixed_targets[k]) for k in targets)]:
        expected = before * share + before[partners] * (1 - share)
        np.testing.assert_allclose(after, expected, atol=1e-5)


def test_a_part_that_is_off_draws_nothing_and_leaves_its_input():
    images, targets, index = batch(4)
    same_images, same_targets = Mix()(images, targets, None, None)
    assert same_images is images
    assert same_targets is targets

    def draws(**settings):
        """Whether the program draws bits and gamma variables."""
        number = index if "erasing" in settings else None  # mixing alone needs none
        program = str(jax.make_jaxpr(Mix(**settings))(images, (), KEY, number))
        return "random_bits[" in program, "random_gamma[" in program

    assert draws(erasing=0.1) == (True, False)
    assert draws(mixup=1.0) == (False, True)
    assert draws(cutmix=1.0) == (True, True)


def test_an_odd_batch_is_erased_but_cannot_be_mixed():
    images, targets, index = batch(3)
    for mix in (Mix(mixup=1.0), Mix(cutmix=1.0), Mix(token=1.0)):
        with pytest.raises(InputError, match=r"pairs of images, got a batch of 3; choose a"):
            jax.eval_shape(mix, images, targets, KEY, index)
    erased, same = jax.jit(Mix(erasing=1.0))(images, targets, KEY, index)
    assert (erased != images).any(axis=(1, 2, 3)).all()
    jax.tree.map(np.testing.assert_array_equal, same, targets)


@pytest.mark.parametrize(
    "setting",
    [
        dict(erasing=1.1),
        dict(switch=-0.1),
        dict(mixup=-1.0),
        dict(token=-1.0),
        dict(token=1.0, cutmix=1.0),
    ],
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(InputError, match="got Mix"):
        Mix(**setting)
