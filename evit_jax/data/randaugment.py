# SPDX-License-Identifier: Apache-2.0
"""RandAugment as timm's `rand-m9-mstd0.5-inc1` and torchvision's color jitter, in Pillow.

The operations are pure functions in one table; what is random is drawn by `draw` alone.
RandAugment: https://arxiv.org/abs/1909.13719.
"""

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from evit_jax.data.augment import INTERPOLATIONS

# Pillow has no Lanczos filter for affine maps.
FILTERS = INTERPOLATIONS | {"lanczos": Image.Resampling.BICUBIC}
JITTER = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color


def affine(image: Image.Image, warp: dict, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0) -> Image.Image:
    """The pixel at (x, y) is taken from (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), **warp)


def enhance(image: Image.Image, enhancer: type, level: float) -> Image.Image:
    """More of a property or less, down to a tenth of it; 0 changes nothing."""
    return enhancer(image).enhance(max(0.1, 1 + 0.9 * level))


def posterize(image: Image.Image, level: float) -> Image.Image:
    """Keeps four bits down to none; that, a black image, Pillow 13's own function refuses."""
    lost = 4 + int(4 * abs(level))
    return image.point([value >> lost << lost for value in range(256)] * 3)


def solarize_add(image: Image.Image, level: float) -> Image.Image:
    """Brightens the dark half of the values."""
    added = int(110 * abs(level))
    return image.point([value + added * (value < 128) for value in range(256)] * 3)


# name: (image, level in [-1, 1], warp) -> image. The first three ignore the level, all others grow
# with its size and some follow its sign. `warp` is how an affine map resamples and fills.
OPERATIONS = {
    "AutoContrast": lambda image, level, warp: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, warp: ImageOps.equalize(image),
    "Invert": lambda image, level, warp: ImageOps.invert(image),
    "Rotate": lambda image, level, warp: image.rotate(30 * level, **warp),
    "Posterize": lambda image, level, warp: posterize(image, level),
    "Solarize": lambda image, level, warp: ImageOps.solarize(image, 256 - int(256 * abs(level))),
    "SolarizeAdd": lambda image, level, warp: solarize_add(image, level),
    "Color": lambda image, level, warp: enhance(image, ImageEnhance.Color, level),
    "Contrast": lambda image, level, warp: enhance(image, ImageEnhance.Contrast, level),
    "Brightness": lambda image, level, warp: enhance(image, ImageEnhance.Brightness, level),
    "Sharpness": lambda image, level, warp: enhance(image, ImageEnhance.Sharpness, level),
    "ShearX": lambda image, level, warp: affine(image, warp, b=0.3 * level),
    "ShearY": lambda image, level, warp: affine(image, warp, d=0.3 * level),
    "TranslateX": lambda image, level, warp: affine(image, warp, c=0.45 * level * image.width),
    "TranslateY": lambda image, level, warp: affine(image, warp, f=0.45 * level * image.height),
}


def moved(name: str, level: float, width: int, height: int) -> tuple[float, ...] | None:
    """The affine map of an operation on an image of this size, as `affine` takes it.

    None of one that leaves every pixel where it is.
    """
    if name == "Rotate":  # about the center, as Pillow does it
        angle = math.radians(30 * level)
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = width / 2, height / 2
        return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y
    return {
        "ShearX": (1.0, 0.3 * level, 0.0, 0.0, 1.0, 0.0),
        "ShearY": (1.0, 0.0, 0.0, 0.3 * level, 1.0, 0.0),
        "TranslateX": (1.0, 0.0, 0.45 * level * width, 0.0, 1.0, 0.0),
        "TranslateY": (1.0, 0.0, 0.0, 0.0, 1.0, 0.45 * level * height),
    }.get(name)


def warp_of(interpolation: str, fill: tuple[int, int, int]) -> dict:
    """The argument `warp` of the operations.

    Args:
      fill: RGB of what comes into view from outside; timm takes the model's mean, rounded.
      interpolation: of the affine maps.
    """
    return dict(resample=FILTERS[interpolation], fillcolor=fill)


def draw(
    rng: np.random.Generator, *, magnitude: float, std: float, layers: int
) -> list[tuple[str, float]]:
    """Names and levels of up to `layers` random operations, each there with probability one half.

    Args:
      magnitude, std: of the normal distribution of an operation's magnitude, clipped to [0, 10].
    """
    names, drawn = list(OPERATIONS), []
    for _ in range(layers):
        name = names[rng.integers(len(names))]
        if rng.random() < 0.5:
            level = min(max(rng.normal(magnitude, std), 0.0), 10.0) / 10
            drawn.append((name, level if rng.random() < 0.5 else -level))
    return drawn


def rand_augment(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    magnitude: float,
    std: float,
    layers: int,
    fill: tuple[int, int, int],
    interpolation: str,
) -> Image.Image:
    """The operations that `draw` draws on an RGB image, the others as for `warp_of`."""
    warp = warp_of(interpolation, fill)
    for name, level in draw(rng, magnitude=magnitude, std=std, layers=layers):
        image = OPERATIONS[name](image, level, warp)
    return image


def color_jitter(image: Image.Image, rng: np.random.Generator, *, strength: float) -> Image.Image:
    """Brightness, contrast and saturation times factors in 1 +- `strength`, in random order."""
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, len(JITTER))
    return jitter(image, factors, rng.permutation(len(JITTER)))


def jitter(image: Image.Image, factors: np.ndarray, order: np.ndarray) -> Image.Image:
    """Multiplies the properties of `JITTER`, numbered by `order`, with their factors."""
    for number in order:
        image = JITTER[number](image).enhance(float(factors[number]))
    return image
