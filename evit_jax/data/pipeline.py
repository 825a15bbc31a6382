# SPDX-License-Identifier: Apache-2.0
"""The Grain pipeline: source -> batches of uint8 images, the same for any number of threads.

Training is an endless sequence of reshuffled epochs whose n-th batch is a function of (seed, n):
resuming at step n needs no iterator state. Evaluation visits every image exactly once, padded to
whole batches with images that a mask leaves out.
"""

import dataclasses
import os
from collections.abc import Iterator

import grain
import numpy as np
from PIL import Image

from evit_jax.data.augment import centre_crop, decode, random_resized_crop


@dataclasses.dataclass(frozen=True)
class TrainTransform(grain.transforms.RandomMap):
    """Decode, random resized crop, flip."""

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    interpolation: str

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        image = random_resized_crop(
            decode(element["image"], element["name"]),
            rng,
            size=self.size,
            scale=self.scale,
            ratio=self.ratio,
            interpolation=self.interpolation,
        )
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"image": np.asarray(image), "label": np.int32(element["label"])}


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Index -> decoded centre crop and mask; an index past the end is padding."""

    source: object
    size: tuple[int, int]
    crop: float
    interpolation: str

    def __call__(self, index: int) -> dict:
        if index >= len(self.source):
            image = np.zeros((*self.size, 3), np.uint8)
            return {"image": image, "label": np.int32(0), "mask": np.False_}
        element = self.source[index]
        image = centre_crop(
            decode(element["image"], element["name"]),
            size=self.size,
            crop=self.crop,
            interpolation=self.interpolation,
        )
        label = np.int32(element["label"])
        return {"image": np.asarray(image), "label": label, "mask": np.True_}


def train_batches(
    source,
    *,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
    interpolation: str,
    seed: int,
    batch_size: int,
    start: int = 0,
    host: int = 0,
    hosts: int = 1,
    threads: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """This host's share of the training batches from step `start` on, without end.

    Args:
      source: random access, see `evit_jax.data`.
      size: height and width of the images.
      scale, ratio: range of area and aspect of the random crop.
      batch_size: global; each host yields batch_size // hosts images, with
        image (B, H, W, 3) uint8 and label (B,) int32.
      threads: that decode, one batch each; 0 is one per processor.
    """
    transform = TrainTransform(tuple(size), tuple(scale), tuple(ratio), flip, interpolation)
    images = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None).apply(transform)
    images = images[start * batch_size :][host::hosts]
    return iterate(images.batch(batch_size // hosts, drop_remainder=True), threads)


def eval_batches(
    source,
    *,
    size: tuple[int, int],
    crop: float,
    interpolation: str,
    batch_size: int,
    host: int = 0,
    hosts: int = 1,
    threads: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """This host's share of all images once, in order: image, label and mask (B,) bool."""
    padded = -(-len(source) // batch_size) * batch_size
    images = grain.MapDataset.range(padded).map(EvalTransform(source, size, crop, interpolation))
    return iterate(images[host::hosts].batch(batch_size // hosts), threads)


def iterate(batches: grain.MapDataset, threads: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches prepared ahead by threads (Pillow and NumPy release Python's lock)."""
    threads = threads or os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    return iter(batches.to_iter_dataset(options))
