# SPDX-License-Identifier: Apache-2.0
"""The pipeline: source -> batches of uint8 images, the same whoever prepares them.

However many threads, worker processes and hosts share the work, a batch is what it is: training is
an endless sequence of reshuffled epochs whose n-th batch is a function of (seed, n), so resuming at
step n needs no iterator state. Evaluation visits every image exactly once, padded to whole batches
with images that a mask leaves out.

A damaged image stops the run with its name, or is skipped: training then shows the next readable
image of the source instead, evaluation masks it, and both mark it as `damaged`.
"""

import dataclasses
import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image

from evit_jax.data.augment import center_crop, decode
from evit_jax.data.labels import LabelMaps
from evit_jax.data.loader import Part, prepare
from evit_jax.data.order import Order
from evit_jax.data.targets import Logits
from evit_jax.data.view import CROPS, View
from evit_jax.errors import InputError, check_name

# So many damaged images next to each other are more than damaged images.
MAX_CONSECUTIVE_DAMAGED = 100
HOST_ARRAYS = ("index", "damaged")  # of a batch; the devices have no use for them


@dataclasses.dataclass(frozen=True)
class TrainExample:
    """A place in the global order -> the example shown there."""

    source: object
    order: Order
    view: View
    skip: bool
    logits: Logits | None
    maps: LabelMaps | None

    def __call__(self, place: int) -> dict:
        index = self.order[place]
        image, element, shown = self.load(index)
        rng = self.order.generator(place)
        if self.maps is None:
            example = self.view(image, rng)
        else:
            example = self.view.labeled(image, self.maps(element), rng)
        example |= dict(
            label=np.int32(element["label"]),
            index=np.int32(index),
            damaged=np.bool_(shown != index),
        )
        return example if self.logits is None else example | dict(teacher=self.logits[shown])

    def load(self, index: int) -> tuple[Image.Image, dict, int]:
        """(decoded, element, its index) of this image or of the first readable one after it."""
        tries = min(MAX_CONSECUTIVE_DAMAGED, len(self.source))
        for number in range(index, index + tries):
            shown = number % len(self.source)
            element = self.source[shown]
            try:
                return decode(element["image"], element["name"]), element, shown
            except InputError as error:
                if not self.skip:
                    raise
                last = error
        raise InputError(f"{tries} images in a row cannot be read; the last: {last}")


@dataclasses.dataclass(frozen=True)
class EvalExample:
    """Index -> decoded center crop and mask; an index past the end is padding."""

    source: object
    size: tuple[int, int]
    crop: float
    interpolation: str
    squash: bool
    skip: bool

    def __call__(self, index: int) -> dict:
        image, label, mask, damaged = np.zeros((*self.size, 3), np.uint8), 0, False, False
        if index < len(self.source):
            element = self.source[index]
            label, mask = element["label"], True
            try:
                decoded = decode(element["image"], element["name"])
                image = np.asarray(
                    center_crop(
                        decoded,
                        size=self.size,
                        crop=self.crop,
                        interpolation=self.interpolation,
                        squash=self.squash,
                    )
                )
            except InputError:
                if not self.skip:
                    raise
                mask, damaged = False, True
        return dict(
            image=image,
            label=np.int32(label),
            index=np.int32(index),
            mask=np.bool_(mask),
            damaged=np.bool_(damaged),
        )


def check_damaged(damaged: str) -> None:
    """Raises InputError unless it is a way to treat damaged images."""
    if damaged not in ("stop", "skip"):
        raise InputError(f"data.damaged must be 'stop' or 'skip', got {damaged!r}")


def split_host_arrays(batch: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
    """A batch -> (what goes to the devices, what stays on the host: index and damaged)."""
    host = {name: batch[name] for name in HOST_ARRAYS}
    return {name: array for name, array in batch.items() if name not in HOST_ARRAYS}, host


def train_batches(
    source,
    *,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
    randaugment_magnitude: float,
    randaugment_std: float,
    randaugment_layers: int,
    color_jitter: float,
    repeats: int,
    interpolation: str,
    fill: tuple[int, int, int],
    seed: int,
    batch_size: int,
    start: int = 0,
    host: int = 0,
    hosts: int = 1,
    threads: int = 0,
    workers: int = 0,
    damaged: str = "stop",
    logits: np.ndarray | None = None,
    maps: LabelMaps | None = None,
    crop: str = "resized",
    three_augment: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """This host's share of the training batches from step `start` on, without end.

    Args:
      source: random access, see `evit_jax.data`.
      size: height and width of the images.
      scale, ratio: range of area and aspect of the random crop.
      randaugment_magnitude, randaugment_std, randaugment_layers: see `randaugment.draw`;
        magnitude 0 is off.
      color_jitter: strength; 0 is off, and so is any where RandAugment is on, as in timm.
      repeats: how often in a row each drawn image comes, see `Order`.
      fill: RGB of what rotations and shifts uncover.
      batch_size: global; a host yields batch_size // hosts images at a time, the host-th part.
      threads: of each process, that make one batch each; 0 is one per processor in all.
      workers: processes that make the batches instead of this one, for hosts whose many processors
        threads do not keep busy; they start by importing the main module of the program.
      damaged: "stop" raises InputError, "skip" shows the next readable image instead.
      logits: (images of the source, C) any float dtype, a teacher's, in the source's order.
      maps: label maps of the images, see `evit_jax.data.labels`.
      crop: "resized", a random box of the image, or "simple", see `augment.simple_crop`.
      three_augment: DeiT-III's, see `evit_jax.data.three_augment`.

    Yields:
      image (B, height, width, 3) uint8; label (B,) int32; index (B,) int32, the image's number in
      the source; damaged (B,) bool, whether that image could not be read and another one is shown;
      and with logits those of the image shown as teacher (B, C) float32. With maps what
      `View.labeled` has of them besides: label_logits, label_ids and label_box.

    Raises:
      InputError: unknown ways to crop or to treat damaged images, or what does not fit together.
    """
    check_damaged(damaged)
    check_name("crop", crop, CROPS)
    if maps is not None and (crop != "resized" or three_augment):
        raise InputError(
            "label maps follow the resized crop and RandAugment; set augment.crop to 'resized' and "
            "augment.three_augment to False, or labels.dir to ''"
        )
    if logits is not None and len(logits) != len(source):
        raise InputError(f"there are {len(logits):,} teacher's logits for {len(source):,} images")
    view = View(
        size=tuple(size),
        crop=crop,
        scale=tuple(scale),
        ratio=tuple(ratio),
        flip=flip,
        three_augment=three_augment,
        randaugment_magnitude=randaugment_magnitude,
        randaugment_std=randaugment_std,
        randaugment_layers=randaugment_layers,
        color_jitter=color_jitter,
        interpolation=interpolation,
        fill=tuple(fill),
    )
    example = TrainExample(
        source,
        Order(len(source), seed, batch_size, repeats),
        view,
        skip=damaged == "skip",
        logits=None if logits is None else Logits(logits),
        maps=maps,
    )
    part = Part(example, batch_size, start, host, hosts)
    return prepare(part, sys.maxsize, threads, workers)


def eval_batches(
    source,
    *,
    size: tuple[int, int],
    crop: float,
    interpolation: str,
    squash: bool = False,
    batch_size: int,
    host: int = 0,
    hosts: int = 1,
    threads: int = 0,
    workers: int = 0,
    damaged: str = "stop",
) -> Iterator[dict[str, np.ndarray]]:
    """This host's share of all images once, in order; arguments as for `train_batches`.

    Yields:
      image, label, index as in training, mask (B,) bool, False for padding and damaged images, and
      damaged (B,) bool.
    """
    check_damaged(damaged)
    example = EvalExample(source, tuple(size), crop, interpolation, squash, damaged == "skip")
    part = Part(example, batch_size, host=host, hosts=hosts)
    return prepare(part, -(-len(source) // batch_size), threads, workers)
