# SPDX-License-Identifier: Apache-2.0
"""From pictures to what a model takes, in one call."""

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from evit_jax.data.augment import center_crop, decode
from evit_jax.errors import InputError
from evit_jax.models import check_size, find_model, preprocessing
from evit_jax.storage import read


def preprocess(
    name: str,
    images: str | Path | np.ndarray | Iterable[str | Path | np.ndarray],
    *,
    size: int | tuple[int, int] | None = None,
) -> jax.Array:
    """Files or uint8 arrays -> (B, height, width, 3) float32, as the named model was evaluated.

    Resized and center cropped with the crop fraction and interpolation of the model's card, then
    normalized with its mean and standard deviation.

    Args:
      name: of the model, as for `create_model`.
      images: paths or uint8 arrays (H, W, 3) or (H, W), several or a single one.
      size: `model.image_size`; default that of the name.

    Raises:
      InputError: a file that is missing or no image, or an array that is not uint8.
    """
    card = preprocessing(name)
    size = check_size("size", size or find_model(name)[1].get("image_size", 224))
    single = isinstance(images, (str, Path)) or getattr(images, "dtype", None) is not None
    if single and getattr(images, "ndim", 3) < 4:
        images = [images]
    views = []
    for number, image in enumerate(images):
        label = f"image {number}"
        if isinstance(image, (str, Path)):
            label, image = str(image), read(Path(image))
        elif getattr(image, "dtype", None) != np.uint8:
            raise InputError(f"{label} must be a path or a uint8 array, got {type(image).__name__}")
        picture = decode(image, label)
        view = center_crop(picture, size=size, **card.view)
        views.append(np.asarray(view))
    if not views:
        raise InputError("there are no images to preprocess")
    return card.normalize(jax.numpy.asarray(np.stack(views)))
