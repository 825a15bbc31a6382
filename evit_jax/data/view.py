# SPDX-License-Identifier: Apache-2.0
"""What a training image is shown as: the host's part of augmentation, drawn from one generator."""

import dataclasses

import numpy as np
from PIL import Image

from evit_jax.data.augment import INTERPOLATIONS, random_box, random_resized_crop, simple_crop
from evit_jax.data.labels import LabelMap
from evit_jax.data.randaugment import OPERATIONS, color_jitter, draw, moved, rand_augment, warp_of
from evit_jax.data.three_augment import three_augment

CROPS = "resized", "simple"


@dataclasses.dataclass(frozen=True)
class View:
    """Settings of the augmentation; `pipeline.train_batches` explains them."""

    size: tuple[int, int]
    crop: str
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    three_augment: bool
    randaugment_magnitude: float
    randaugment_std: float
    randaugment_layers: int
    color_jitter: float
    interpolation: str
    fill: tuple[int, int, int]

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """image (height, width, 3) uint8: cropped, flipped, then augmented, timm's order."""
        crop = dict(size=self.size, interpolation=self.interpolation)
        if self.crop == "simple":
            image = simple_crop(image, rng, **crop)
        else:
            image = random_resized_crop(image, rng, **crop, scale=self.scale, ratio=self.ratio)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.randaugment_magnitude:
            look = dict(fill=self.fill, interpolation=self.interpolation)
            image = rand_augment(image, rng, **self.randaugment, **look)
        return dict(image=self.recolored(image, rng))

    def labeled(
        self, image: Image.Image, labels: LabelMap, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """The same with the whole image's label map, which the devices crop.

        So that a map is moved as a whole, flip and RandAugment come before the crop here, as in
        token labeling's code.

        Returns:
          image (height, width, 3) uint8, label_logits and label_ids (K, h, w) of the whole image,
          and label_box (4,) float32, top, left, bottom and right of the crop as fractions of it.
        """
        if self.flip and rng.random() < 0.5:
            image, labels = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), labels.flipped()
        warp = warp_of(self.interpolation, self.fill)
        drawn = draw(rng, **self.randaugment) if self.randaugment_magnitude else ()
        for operation, level in drawn:
            image = OPERATIONS[operation](image, level, warp)
            if matrix := moved(operation, level, *image.size):
                labels = labels.warped(matrix, *image.size)
        width, height = image.size
        box = left, top, right, bottom = random_box(width, height, rng, self.scale, self.ratio)
        image = image.crop(box).resize(self.size[::-1], INTERPOLATIONS[self.interpolation])
        fractions = top / height, left / width, bottom / height, right / width
        return dict(
            image=self.recolored(image, rng),
            label_logits=labels.logits,
            label_ids=labels.ids,
            label_box=np.array(fractions, np.float32),
        )

    @property
    def randaugment(self) -> dict[str, float]:
        """The settings of RandAugment's draws."""
        return dict(
            magnitude=self.randaugment_magnitude,
            std=self.randaugment_std,
            layers=self.randaugment_layers,
        )

    def recolored(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """What changes colors alone, besides RandAugment: 3-Augment and color jitter."""
        if self.three_augment:
            image = three_augment(image, rng)
        if self.color_jitter and not self.randaugment_magnitude:
            image = color_jitter(image, rng, strength=self.color_jitter)
        return np.asarray(image)
