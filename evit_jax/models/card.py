# SPDX-License-Identifier: Apache-2.0
"""What a model expects of its images, and the part of it that runs on the device."""

import dataclasses

import jax
import jax.numpy as jnp

from evit_jax.errors import InputError, check_name

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")
# Mean and standard deviation of pixels go by the name of those who chose them.
STATISTICS = {
    "imagenet": dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "half": dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "clip": dict(
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
    ),
    "zero_one": dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    "satellite": dict(mean=(0.43, 0.411, 0.296), std=(0.213, 0.156, 0.143)),
}
IMAGENET = STATISTICS["imagenet"]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """A model's card, with timm's meaning of each field."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of RGB in [0, 1]
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    crop: float = 1.0  # evaluation: side of the center crop over the resized shorter side
    interpolation: str = "bicubic"  # "bicubic", "bilinear", "nearest" or "lanczos", antialiased
    squash: bool = False  # evaluation: both sides resized, so that the aspect is not kept

    def __post_init__(self):
        check_name("interpolation", self.interpolation, INTERPOLATIONS)
        if not 0 < self.crop <= 1:
            raise InputError(f"crop is a fraction in (0, 1], got {self.crop}")

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean as a uint8 color, for pixels that augmentation uncovers."""
        return tuple(min(round(255 * value), 255) for value in self.mean)

    @property
    def view(self) -> dict[str, float | str | bool]:
        """What `data.augment.center_crop` takes besides the size."""
        return dict(crop=self.crop, interpolation=self.interpolation, squash=self.squash)

    def normalize(self, images: jax.Array) -> jax.Array:
        """(..., 3) uint8 RGB -> float32 with the model's mean and standard deviation."""
        mean, std = self.per_channel(images.ndim)
        return (images.astype(jnp.float32) / 255 - mean) / std

    normalise = normalize  # its name in version 0.1

    def renormalize(self, images: jax.Array, other: "Preprocessing") -> jax.Array:
        """Images normalized with this card -> normalized with the other one's mean and std."""
        (mean, std), (mean_there, std_there) = (
            card.per_channel(images.ndim) for card in (self, other)
        )
        return (images * std + (mean - mean_there)) / std_there

    def per_channel(self, ndim: int) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation, shaped for images of so many dimensions."""
        ones = (1,) * (ndim - 1)
        return tuple(jnp.float32(value).reshape(*ones, 3) for value in (self.mean, self.std))
