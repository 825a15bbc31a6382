# SPDX-License-Identifier: Apache-2.0
"""From pictures to what a model takes, in one call."""

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from evit_jax.data.augment import centre_crop, decode
from evit_jax.errors import InputError
from evit_jax.models import preprocessing


def preprocess(
    name: str,
    images: Iterable[str | Path | np.ndarray],
    *,
    size: tuple[int, int] = (224, 224),
) -> jax.Array:
    """Files or uint8 arrays -> (B, height, width, 3) float32, as the named model was evaluated.

    Resized and centre cropped with the crop fraction and interpolation of the model's card, then
    normalised with its mean and standard deviation.

    Args:
      name: of the model, as for `create_model`.
      images: paths, or arrays (H, W, 3) or (H, W), uint8.
      size: `model.image_size`, if it is not 224.

    Raises:
      InputError: a file that is missing or no image.
    """
    card = preprocessing(name)
    views = []
    for number, image in enumerate(images):
        label = f"image {number}"
        if isinstance(image, (str, Path)):
            label, image = str(image), read(Path(image))
        picture = decode(image, label)
        view = centre_crop(picture, size=size, crop=card.crop, interpolation=card.interpolation)
        views.append(np.asarray(view))
    if not views:
        raise InputError("there are no images to preprocess")
    return card.normalise(jax.numpy.asarray(np.stack(views)))


def read(path: Path) -> bytes:
    """A file's content."""
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    return path.read_bytes()
