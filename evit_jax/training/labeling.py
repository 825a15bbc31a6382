# SPDX-License-Identifier: Apache-2.0
"""Token labeling: every patch token learns what a machine annotator saw at its place.

https://arxiv.org/abs/2104.10858. The annotator saw the whole image (`data/labels.py`), the model
sees a crop of it, so the map is cropped as the image was, here on the device. RoIAlign, which the
paper's code takes for it, is separable: two small matrices do it.

Letters: B images, K largest logits, h and w cells of a map, C classes, P patches, n patch tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from evit_jax.training import losses

EXACT = jax.lax.Precision.HIGHEST
# What `ground_truth` leaves of the map's class target: less where both agree on the class.
DISAGREE, AGREE = 0.9, 0.5


@dataclasses.dataclass(frozen=True)
class TokenLabels:
    """How patches and images learn from label maps."""

    weight: float = 1.0  # of the patches' loss, beside the image's
    ground_truth: bool = False  # mix the true class into the image's target
    transposed: bool = False  # exchange the axes of the crop, as the paper's code seems to

    def targets(
        self, batch: dict[str, jax.Array], num_classes: int, grid: tuple[int, int], smoothing: float
    ) -> dict[str, jax.Array]:
        """What a batch with label maps is to learn.

        Args:
          batch: label (B,), label_logits and label_ids (B, K, h, w), label_box (B, 4).
          grid: rows and columns of the patches.
          smoothing: spread over all classes.

        Returns:
          label (B, C), of the image; patches (B, P, C), of its patches row by row. float32.
        """
        box = batch["label_box"]
        if self.transposed:
            box = box[:, jnp.array([1, 0, 3, 2])]
        maps = dense_map(batch["label_logits"], batch["label_ids"], num_classes)
        image, patches = (
            smoothed(jax.nn.softmax(crop_map(maps, box, size)), smoothing)
            for size in ((1, 1), grid)
        )
        image = image[:, 0, 0]
        if self.ground_truth:
            agree = jnp.argmax(image, axis=-1) == batch["label"]
            share = jnp.where(agree, AGREE, DISAGREE)[:, None]
            image = share * image + (1 - share) * jax.nn.one_hot(batch["label"], num_classes)
        return dict(label=image, patches=patches.reshape(len(image), -1, num_classes))

    def loss(self, out: dict, targets: jax.Array, *, fuses: bool) -> jax.Array:
        """The patches' share of the loss, (B,); arguments as for `patch_loss`."""
        return self.weight * patch_loss(out, targets, fuses=fuses)


def smoothed(targets: jax.Array, smoothing: float) -> jax.Array:
    """Targets (..., C) with `smoothing` spread over all classes, as the paper's code does it.

    Each sums to 1 + smoothing / C.
    """
    spread = smoothing / targets.shape[-1]
    return (1 - smoothing + spread) * targets + spread


def dense_map(logits: jax.Array, ids: jax.Array, num_classes: int) -> jax.Array:
    """The K largest logits and their classes (B, K, h, w) -> all (B, h, w, C), others 0, float32.

    A comparison with every class instead of a scatter: it fuses, and TPUs do it fast.
    """
    classes = jnp.arange(num_classes, dtype=ids.dtype)[None, None, None]
    dense = jnp.zeros((*ids[:, 0].shape, num_classes), jnp.float32)
    for number in range(ids.shape[1]):
        there = ids[:, number, ..., None] == classes
        dense += jnp.where(there, logits[:, number, ..., None].astype(jnp.float32), 0.0)
    return dense


def crop_map(maps: jax.Array, box: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Maps (B, h, w, C) in a box (B, 4) of fractions, resampled to `size`: (B, *size, C).

    As torchvision's `roi_align(sampling_ratio=-1, aligned=False)` with the box in cells, less half
    a cell, so that centers of cells are at whole numbers.
    """
    (high, wide), (rows, columns) = maps.shape[1:3], size
    top, left, bottom, right = box.T
    vertical = jax.vmap(lambda a, b: crop_matrix(a * high - 0.5, b * high - 0.5, high, rows))
    across = jax.vmap(lambda a, b: crop_matrix(a * wide - 0.5, b * wide - 0.5, wide, columns))
    maps = jnp.einsum("bph,bhwc->bpwc", vertical(top, bottom), maps, precision=EXACT)
    return jnp.einsum("bqw,bpwc->bpqc", across(left, right), maps, precision=EXACT)


def crop_matrix(start: jax.Array, stop: jax.Array, cells: int, bins: int) -> jax.Array:
    """(bins, cells) float32: how much of each cell is in each bin between two places of an axis.

    A bin is the mean of samples at equal steps, as many as there are cells in it, rounded up; each
    sample lies between the centers of two cells, or takes the nearest one at the border.
    """
    length = jnp.maximum(stop - start, 1.0)
    step = length / bins
    most = -(-cells // bins)  # a box never reaches over more than all cells
    count = jnp.minimum(jnp.ceil(step), most)
    sample = jnp.arange(most)[None]
    place = start + jnp.arange(bins)[:, None] * step + (sample + 0.5) * step / count
    used = (sample < count) & (place >= -1) & (place <= cells)
    place = jnp.clip(place, 0, cells - 1)[..., None]
    near = jnp.maximum(1 - jnp.abs(place - jnp.arange(cells)[None, None]), 0.0)
    return jnp.sum(jnp.where(used[..., None], near, 0.0), axis=1) / count  # near: bins, most, cells


def patch_loss(out: dict, targets: jax.Array, *, fuses: bool) -> jax.Array:
    """The mean cross entropy of the patch tokens that are left, (B,).

    A token learns the mean of the targets of its patches. A fused token, wherever it was made,
    learns nothing: it stands for what the others are not.

    Args:
      out: the model's; patch_logits (B, n, C), owner and size are read.
      targets: (B, P, C), of the original patches.
      fuses: whether the reducer appends such tokens.
    """
    logits = out["patch_logits"]
    count = logits.shape[1]
    supervised = jnp.ones(logits.shape[:2])
    if out["owner"]:
        owns = out["owner"][-1][:, None] == jnp.arange(count)[None, :, None]  # (B, n, P)
        owned = jnp.sum(owns, axis=-1)
        shares = owns / jnp.maximum(owned, 1)[..., None]
        targets = jnp.einsum("bnp,bpc->bnc", shares, targets, precision=EXACT)
        alone = (owned == 1) & (out["size"][:, -count:] == 1)
        supervised = (alone if fuses else owned > 0).astype(jnp.float32)
    each = losses.cross_entropy(logits, targets)
    return jnp.sum(each * supervised, axis=1) / jnp.maximum(jnp.sum(supervised, axis=1), 1)
