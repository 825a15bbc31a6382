# SPDX-License-Identifier: Apache-2.0
"""Images made on the spot, for dry runs, tests and timing: no download, no folder."""

import numpy as np

from evit_jax.errors import InputError

SIZE = 64


class Synthetic:
    """Ten classes, each a grating of its own direction and color, under noise."""

    def __init__(self, split: str):
        self.length = {"train": 512, "test": 100}[split]
        self.seed = {"train": 0, "test": 1}[split]
        self.classes = tuple(f"grating {number}" for number in range(10))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng((self.seed, index))
        label = index % len(self.classes)
        angle, phase = np.pi * label / len(self.classes), rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[:SIZE, :SIZE] * (2 * np.pi / 16)
        wave = np.sin(x * np.cos(angle) + y * np.sin(angle) + phase)
        color = 60 * np.cos(angle + np.array([0, 2, 4]) * np.pi / 3)
        image = 128 + wave[..., None] * color + rng.normal(0, 20, (SIZE, SIZE, 3))
        image = np.clip(image, 0, 255).astype(np.uint8)
        return {"image": image, "label": label, "name": f"synthetic image {index}"}


def source(split: str, folder: str = "") -> Synthetic:
    if folder:
        raise InputError(f"synthetic images have no folder: leave data.dir empty, got {folder!r}")
    return Synthetic(split)
