# SPDX-License-Identifier: Apache-2.0
"""Random erasing, mixup and cutmix with timm's distributions, on the device inside the train step.

Random erasing: https://arxiv.org/abs/1708.04896; mixup: https://arxiv.org/abs/1710.09412;
cutmix: https://arxiv.org/abs/1905.04899; MixToken, cutmix of patch tokens instead of pixels, so
that no token has two images in it: https://arxiv.org/abs/2104.10858. The functions below `Mix` take
fixed draws; boxes are (4,) int32: top, left, bottom, right, the last two outside.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from evit_jax.errors import InputError

AREA = 0.02, 1 / 3  # of an erased box, as a fraction of the image
ASPECT = 0.3, 1 / 0.3  # its height over its width
TRIES = 10


@dataclasses.dataclass(frozen=True)
class Mix:
    """What is done to a training batch after normalization; 0 switches a part off."""

    erasing: float = 0.0  # probability that a box of an image becomes standard normal noise
    mixup: float = 0.0  # alpha of the weight's distribution Beta(alpha, alpha)
    cutmix: float = 0.0  # the same of the fraction of the image that stays
    switch: float = 0.5  # probability of cutmix where both are on
    token: float = 0.0  # MixToken: alpha of the fraction of the patch tokens that stay

    def __post_init__(self):
        if not (0 <= self.erasing <= 1 and 0 <= self.switch <= 1):
            raise InputError(f"erasing and switch are probabilities in [0, 1], got {self}")
        if min(self.mixup, self.cutmix, self.token) < 0:
            raise InputError(f"mixup, cutmix and token are 0 (off) or greater, got {self}")
        if self.token and (self.mixup or self.cutmix):
            raise InputError(
                f"MixToken takes the place of mixup and cutmix: set them or token to 0, got {self}"
            )

    @property
    def pairs(self) -> bool:
        """Whether images are mixed with one another, in pairs of neighbors."""
        return bool(self.mixup or self.cutmix or self.token)

    def __call__(
        self, images: jax.Array, targets: Any, key: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, Any]:
        """One step's images and targets -> the same shapes, erased and mixed.

        Erasing draws per image from (key, index) and mixing once from key: a batch split over
        devices or micro-batches gives the same images as the whole, as long as pairs stay together.

        Args:
          images: (B, H, W, 3) float32, normalized.
          targets: pytree of (B, C) float32, mixed as the images are.
          key: the step's.
          index: (B,) int32, an image's number in the whole batch.
        """
        size = images.shape[1:3]
        if self.erasing:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, 0), index)
            images = jax.vmap(self.random_erase)(images, keys)
        if self.pairs and len(images) % 2:
            raise InputError(
                f"mixup, cutmix and MixToken mix pairs of images, got a batch of {len(images)}; "
                "choose a batch size that is even on every device and in every micro-batch, "
                "or set them to 0"
            )
        if self.mixup or self.cutmix:
            weights, share = self.random_weights(jax.random.fold_in(key, 1), size)
            images = blend(images, weights)
            targets = jax.tree.map(lambda leaf: blend(leaf, share), targets)
        return images, targets

    def random_tokens(self, key: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """(P,) bool: the patches that MixToken takes from an image's partner, a box of the grid."""
        beta_key, center_key = jax.random.split(jax.random.fold_in(key, 2))
        share = jax.random.beta(beta_key, self.token, self.token)
        center = jax.random.randint(center_key, (2,), 0, jnp.array(grid))
        return inside(token_box(share, center, grid), grid).reshape(-1)

    def random_erase(self, image: jax.Array, key: jax.Array) -> jax.Array:
        """(H, W, 3) -> the same with noise in a random box, or unchanged where the box is empty."""
        size = jnp.array(image.shape[:2])
        draw_key, noise_key = jax.random.split(key)
        # One draw for all, as each compiles to much code.
        draws = jax.random.uniform(draw_key, (2 * TRIES + 3,))
        areas, aspects, corner = draws[:TRIES], draws[TRIES:-3], draws[-2:]
        areas = AREA[0] + (AREA[1] - AREA[0]) * areas
        aspects = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** aspects  # uniform in its logarithm
        sides = first_fitting(areas, aspects, image.shape[:2]) * (draws[-3] < self.erasing)
        corner = (corner * (size - sides + 1)).astype(jnp.int32)
        noise = jax.random.normal(noise_key, image.shape, image.dtype)
        return erase(image, jnp.concatenate([corner, corner + sides]), noise)

    def random_weights(self, key: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """The weight of an image against its partner's: of each pixel and of the targets.

        The first is (), the same for all pixels, or (1, H, W, 1).
        """
        if not self.cutmix:
            share = jax.random.beta(key, self.mixup, self.mixup)
            return share, share
        beta_key, draw_key = jax.random.split(key)
        choice, *center = jax.random.uniform(draw_key, (3,))
        cut = (choice < self.switch) | (self.mixup == 0)
        alpha = jnp.where(cut, self.cutmix, self.mixup)
        share = jax.random.beta(beta_key, alpha, alpha)
        center = (jnp.stack(center) * jnp.array(size)).astype(jnp.int32)
        outside = ~inside(box_of(share, center, size), size)
        weights = jnp.where(cut, outside, share)
        return weights[None, :, :, None], jnp.where(cut, outside.mean(), share)


def first_fitting(areas: jax.Array, aspects: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Height and width (2,) int32 of the first box smaller than the image, else 0, 0.

    Args:
      areas, aspects: (tries,) areas as fractions of the image and heights over widths.
    """
    areas = areas * (size[0] * size[1])
    sides = jnp.stack([jnp.sqrt(areas * aspects), jnp.sqrt(areas / aspects)], axis=1)
    sides = jnp.round(sides).astype(jnp.int32)
    fits = (sides < jnp.array([size])).all(axis=1)
    first = jnp.argmax(fits)
    return sides[first] * fits[first]


def inside(box: jax.Array, size: tuple[int, int]) -> jax.Array:
    """(H, W) bool: which pixels are in the box."""
    top, left, bottom, right = box
    rows, columns = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None, :]
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def erase(image: jax.Array, box: jax.Array, noise: jax.Array) -> jax.Array:
    """(H, W, 3) with the noise, of the same shape, in the box."""
    return jnp.where(inside(box, image.shape[:2])[..., None], noise, image)


def box_of(share: jax.Array, center: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The box of the image's shape, 1 - share of its area and this center; its part in the image.

    Args:
      share: ()
      center: (2,) int32, row and column.
    """
    size = jnp.array(size)
    sides = (size * jnp.sqrt(1 - share)).astype(jnp.int32)
    corners = jnp.stack([center - sides // 2, center + (sides + 1) // 2])
    return jnp.clip(corners, 0, size[None]).reshape(4)


def token_box(share: jax.Array, center: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """`box_of` as MixToken's code has it: half a side either way, so that odd sides lose one."""
    sides = (jnp.array(grid) * jnp.sqrt(1 - share)).astype(jnp.int32)
    corners = jnp.stack([center - sides // 2, center + sides // 2])
    return jnp.clip(corners, 0, jnp.array(grid)[None]).reshape(4)


def blend(batch: jax.Array, weights: jax.Array) -> jax.Array:
    """Mixes image 2j with 2j + 1 and the other way round, own values times `weights`.

    timm pairs the first with the last and so on; neighbors are mostly on one device.
    """
    partners = batch.reshape(-1, 2, *batch.shape[1:])[:, ::-1].reshape(batch.shape)
    return batch * weights + partners * (1 - weights)
