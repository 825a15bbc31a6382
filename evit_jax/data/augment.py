# SPDX-License-Identifier: Apache-2.0
"""Decoding and the host's part of augmentation, in Pillow with timm's kernels: uint8 in and out."""

import io
import math

import numpy as np
from PIL import Image

from evit_jax.errors import InputError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
PADDING = 4  # pixels, of the simple random crop


def decode(image: bytes | np.ndarray, name: str) -> Image.Image:
    """Encoded bytes or a uint8 array -> an RGB image; raises InputError naming a broken file."""
    if isinstance(image, np.ndarray):
        grey = image.ndim == 3 and image.shape[2] == 1
        return Image.fromarray(image[..., 0] if grey else image).convert("RGB")
    try:
        decoded = Image.open(io.BytesIO(image))
        if decoded.mode.startswith("I"):  # 16 bit grey, which Pillow would clip, not scale
            decoded = Image.fromarray((np.asarray(decoded) >> 8).astype(np.uint8))
        decoded.load()
        return decoded if decoded.mode == "RGB" else decoded.convert("RGB")
    except Exception as error:  # every format's decoder raises its own
        reason = str(error).partition(" <_io.")[0] or type(error).__name__
        raise InputError(f"{name} cannot be read as an image: {reason}") from error


def random_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """A crop of random area and aspect: (left, top, right, bottom).

    Ten tries at an area uniform in `scale` of the image and an aspect log-uniform in `ratio`; then
    the largest center crop within `ratio`, as in torchvision and timm.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            left, top = rng.integers(width - wide + 1), rng.integers(height - high + 1)
            return int(left), int(top), int(left + wide), int(top + high)
    wide, high = width, height
    if width / height < ratio[0]:
        high = round(width / ratio[0])
    elif width / height > ratio[1]:
        wide = round(height * ratio[1])
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def random_resized_crop(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: str,
) -> Image.Image:
    """A random box of the image, resized to `size` (height, width)."""
    cropped = image.crop(random_box(*image.size, rng, scale, ratio))
    return cropped.resize(size[::-1], INTERPOLATIONS[interpolation])


def simple_crop(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    size: tuple[int, int],
    interpolation: str,
) -> Image.Image:
    """DeiT-III's simple random crop: most of the image at its own aspect, moved by a little.

    The image is resized to cover `size` (height, width), padded by 4 pixels that mirror it, and a
    window of `size` is cut out anywhere.
    """
    image = image.resize(covering(image.size, size), INTERPOLATIONS[interpolation])
    pixels = np.asarray(image)
    pixels = np.pad(pixels, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)), "reflect")
    top, left = (
        rng.integers(there - side + 1) for there, side in zip(pixels.shape[:2], size, strict=True)
    )
    return Image.fromarray(pixels[top : top + size[0], left : left + size[1]])


def covering(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (width, height) of this aspect, rounded down, that covers (height, width)."""
    (width, height), (high, wide) = image, size
    if height * wide >= width * high:  # the width binds
        return wide, max(high, wide * height // width)
    return max(wide, high * width // height), high


def center_crop(
    image: Image.Image,
    *,
    size: tuple[int, int],
    crop: float,
    interpolation: str,
    squash: bool = False,
) -> Image.Image:
    """The evaluation view: resized to cover size / crop, then its center of `size`.

    For a square `size` the shorter side becomes floor(size / crop) and the longer keeps the aspect,
    rounded down; to squash makes both sides that, as timm's crop mode of this name.
    """
    high, wide = (math.floor(side / crop) for side in size)
    resized = (wide, high) if squash else covering(image.size, (high, wide))
    image = image.resize(resized, INTERPOLATIONS[interpolation])
    left, top = round((resized[0] - size[1]) / 2), round((resized[1] - size[0]) / 2)
    return image.crop((left, top, left + size[1], top + size[0]))
