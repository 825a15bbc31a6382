# SPDX-License-Identifier: Apache-2.0
"""1,797 handwritten digits, built in: real images without a download.

digits.npz holds the 8x8 images (values 0 to 16) and labels that scikit-learn ships as
`load_digits`: the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0), unchanged.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from evit_jax.errors import InputError

SIZE = 32  # the side the 8x8 images are enlarged to


class Digits:
    """Every fifth image is for testing: 1,438 to train on, 359 to test with."""

    def __init__(self, split: str):
        with np.load(Path(__file__).with_name("digits.npz")) as file:
            images, labels = file["images"], file["labels"]
        test = np.arange(len(labels)) % 5 == 4
        chosen = test if split == "test" else ~test
        self.indices, self.labels = np.flatnonzero(chosen), labels[chosen]
        self.images = np.stack([enlarge(image) for image in images[chosen]])
        self.classes = tuple("0123456789")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        name = f"digit {self.indices[index]}"
        return {"image": self.images[index], "label": int(self.labels[index]), "name": name}


def enlarge(image: np.ndarray) -> np.ndarray:
    """(8, 8) with values 0 to 16 -> (SIZE, SIZE) uint8."""
    grey = np.round(image * (255 / 16)).astype(np.uint8)
    return np.asarray(Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def source(split: str, folder: str = "") -> Digits:
    if folder:
        raise InputError(f"digits are built in: leave data.dir empty, got {folder!r}")
    return Digits(split)
