# SPDX-License-Identifier: Apache-2.0
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.training.labeling import TokenLabels, crop_map, dense_map, patch_loss

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "fixtures/labels/crops.npz")


def roi_align(plane, box, size):
    """The definition, sample by sample, in float64: what the device does with two matrices."""
    high, wide = plane.shape
    (top, left), (bottom, right) = (box.reshape(2, 2) * [high, wide] - 0.5).astype(np.float64)
    height, width = max(bottom - top, 1), max(right - left, 1)
    rows, columns = math.ceil(height / size[0]), math.ceil(width / size[1])

    def at(y, x):
        if not (-1 <= y <= high and -1 <= x <= wide):
            return 0.0
        y, x = min(max(y, 0), high - 1), min(max(x, 0), wide - 1)
        low, near = min(int(y), high - 1), min(int(x), wide - 1)
        below, beside = min(low + 1, high - 1), min(near + 1, wide - 1)
        a, b = y - low, x - near
        above = (1 - b) * plane[low, near] + b * plane[low, beside]
        return (1 - a) * above + a * ((1 - b) * plane[below, near] + b * plane[below, beside])

    found = np.zeros(size)
    for p in range(size[0]):
        for q in range(size[1]):
            samples = [
                at(
                    top + height / size[0] * (p + (i + 0.5) / rows),
                    left + width / size[1] * (q + (j + 0.5) / columns),
                )
                for i in range(rows)
                for j in range(columns)
            ]
            found[p, q] = np.mean(samples)
    return found


@pytest.mark.parametrize("size", ["square", "wide", "one"])
def test_crops_are_torchvisions_roi_align(size):
    expected, maps = GOLDEN[size], np.moveaxis(GOLDEN["maps"], 1, -1)
    with jax.enable_x64(True):
        boxes = jnp.asarray(GOLDEN["boxes"], jnp.float64)
        found = crop_map(jnp.asarray(maps, jnp.float64), boxes, expected.shape[2:])
    np.testing.assert_allclose(np.moveaxis(found, -1, 1), expected, rtol=0, atol=1e-6)
    # In float32 a place of 16 is rounded by 1e-6 or two, and neighboring cells here differ by 5.
    rounded = crop_map(jnp.asarray(maps), jnp.asarray(GOLDEN["boxes"]), expected.shape[2:])
    np.testing.assert_allclose(np.moveaxis(rounded, -1, 1), expected, rtol=0, atol=1e-5)


def test_crops_are_the_definition_of_roi_align_for_drawn_boxes():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(20, 18, 18))
    corner = rng.uniform(0, 0.9, (20, 2))
    boxes = np.concatenate([corner, corner + (1 - corner) * rng.uniform(0, 1, (20, 2))], axis=1)
    with jax.enable_x64(True):
        found = crop_map(jnp.asarray(maps[..., None]), jnp.asarray(boxes), (14, 14))
    for one, box, crop in zip(maps, boxes, np.asarray(found)[..., 0], strict=True):
        np.testing.assert_allclose(crop, roi_align(one, box, (14, 14)), rtol=0, atol=1e-9)


def make_batch(seed=0, images=2, classes=7):
    """Two images with maps of three classes each, and boxes."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permuted(np.tile(np.arange(classes), (6, 5, 1)), axis=-1)[..., :3]
                    for _ in range(images)])  # fmt: skip
    return dict(
        label=np.int32([1, 2]),
        label_ids=np.moveaxis(ids, -1, 1).astype(np.int16),
        label_logits=rng.normal(2, 2, (images, 3, 6, 5)).astype(np.float16),
        label_box=np.float32([[0, 0, 1, 1], [0.2, 0.1, 0.9, 0.55]]),
    )


def by_hand(batch, number, size, box, classes=7):
    """Softmax of the cropped dense map of one image, one sample at a time."""
    dense = np.zeros((6, 5, classes))
    for k, r, c in np.ndindex(3, 6, 5):
        dense[r, c, batch["label_ids"][number, k, r, c]] = batch["label_logits"][number, k, r, c]
    planes = [roi_align(dense[..., c], box, size) for c in range(classes)]
    values = np.exp(np.stack(planes, axis=-1))
    return values / values.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_targets_are_softmaxes_of_the_cropped_map_smoothed_as_in_the_papers_code(transposed):
    batch, spread = make_batch(), 0.1 / 7
    found = TokenLabels(transposed=transposed).targets(batch, 7, (3, 4), 0.1)
    assert found["patches"].shape == (2, 12, 7)
    assert found["label"].shape == (2, 7)
    for number, box in enumerate(batch["label_box"]):
        box = box[[1, 0, 3, 2]] if transposed else box
        for name, size in (("patches", (3, 4)), ("label", (1, 1))):
            expected = by_hand(batch, number, size, box).reshape(-1, 7) * (0.9 + spread) + spread
            np.testing.assert_allclose(
                found[name][number].reshape(-1, 7), expected, rtol=0, atol=3e-6
            )


def test_the_map_of_all_classes_is_zero_where_none_is_named():
    batch = make_batch()
    dense = np.asarray(dense_map(batch["label_logits"], batch["label_ids"], 7))
    assert dense.shape == (2, 6, 5, 7)
    assert (np.count_nonzero(dense, axis=-1) == 3).all()
    picked = np.take_along_axis(dense, np.moveaxis(batch["label_ids"], 1, -1).astype(int), axis=-1)
    np.testing.assert_array_equal(picked, np.moveaxis(batch["label_logits"], 1, -1))


def test_the_true_class_has_half_or_a_tenth_of_the_target_of_an_image():
    batch = make_batch()
    seen = np.asarray(TokenLabels().targets(batch, 7, (3, 4), 0.1)["label"])
    batch["label"] = np.int32([seen[0].argmax(), (seen[1].argmax() + 1) % 7])
    mixed = TokenLabels(ground_truth=True).targets(batch, 7, (3, 4), 0.1)["label"]
    truth = np.eye(7)[batch["label"]]
    np.testing.assert_allclose(mixed[0], 0.5 * seen[0] + 0.5 * truth[0], rtol=1e-6)
    np.testing.assert_allclose(mixed[1], 0.9 * seen[1] + 0.1 * truth[1], rtol=1e-6)


def dense_loss(logits, targets):
    """(B, n) cross entropies."""
    return np.asarray(-jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))


def drawn(tokens, patches=6, images=2, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(images, tokens, classes)).astype(np.float32)
    targets = rng.dirichlet(np.ones(classes), (images, patches)).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(targets)


def test_where_nothing_is_dropped_it_is_the_mean_over_all_patches():
    logits, targets = drawn(6)
    out = dict(patch_logits=logits, owner=(), size=jnp.ones((2, 7)))
    loss = patch_loss(out, targets, fuses=True)
    assert loss.shape == (2,)
    np.testing.assert_allclose(loss.mean(), dense_loss(logits, targets).mean(), rtol=1e-6)


def test_kept_patches_learn_their_own_place_and_fused_tokens_nothing():
    """Token 1 was fused in an earlier block and kept; token 3 is the new fused one."""
    logits, targets = drawn(4)
    owner = jnp.asarray([[2, 1, 1, 0, 3, 3], [0, 1, 1, 2, 3, -1]])
    # In image 1 the last fused token has a single patch that is left, but two are inside it.
    size = jnp.asarray([[1, 1, 2, 1, 2], [1, 1, 2, 1, 2]], jnp.float32)
    own = jnp.stack([targets[0, jnp.array([3, 0])], targets[1, jnp.array([0, 3])]])
    each = dense_loss(logits[:, ::2], own)
    out = dict(patch_logits=logits, owner=(None, owner), size=size)
    np.testing.assert_allclose(patch_loss(out, targets, fuses=True), each.mean(axis=1), rtol=1e-6)


def test_a_merged_token_learns_the_mean_of_its_patches_and_an_empty_one_nothing():
    logits, targets = drawn(3)
    owner = jnp.asarray([[0, 0, 1, 0, 1, -1], [1, 1, 1, 1, 1, 1]])
    size = jnp.asarray([[1, 3, 2, 0], [1, 0, 6, 0]], jnp.float32)
    out = dict(patch_logits=logits, owner=(owner,), size=size)
    loss = patch_loss(out, targets, fuses=False)
    parts = (targets[0][jnp.array(patches)].mean(axis=0) for patches in ([0, 1, 3], [2, 4]))
    means = jnp.stack([*parts])
    np.testing.assert_allclose(loss[0], dense_loss(logits[0, :2], means).mean(), rtol=1e-6)
    np.testing.assert_allclose(loss[1], dense_loss(logits[1, 1], targets[1].mean(0)), rtol=1e-6)


def test_gradients_are_finite_where_no_token_is_supervised():
    logits, targets = drawn(1)
    out = dict(owner=(jnp.zeros((2, 6), int),), size=jnp.full((2, 2), 6.0))

    def loss(logits):
        return patch_loss(out | dict(patch_logits=logits), targets, fuses=True).sum()

    assert float(loss(logits)) == 0
    assert not np.asarray(jax.grad(loss)(logits)).any()
