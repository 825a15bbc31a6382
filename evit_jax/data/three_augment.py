# SPDX-License-Identifier: Apache-2.0
"""DeiT-III's 3-Augment in Pillow: one of three simple operations on every image.

https://arxiv.org/abs/2204.07118. Its color jitter comes after it, see `randaugment.color_jitter`.
"""

import numpy as np
from PIL import Image, ImageFilter, ImageOps

THRESHOLD = 128  # of solarization: values from it on are inverted
RADIUS = 0.1, 2.0  # range of the blur's, in pixels

# name: (image, blur's radius) -> image
OPERATIONS = {
    "grayscale": lambda image, radius: image.convert("L").convert("RGB"),
    "solarize": lambda image, radius: ImageOps.solarize(image, THRESHOLD),
    "blur": lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
}


def three_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """An RGB image in gray, solarized or blurred, each a third of the time."""
    operation = list(OPERATIONS.values())[rng.integers(len(OPERATIONS))]
    return operation(image, rng.uniform(*RADIUS))
