# SPDX-License-Identifier: Apache-2.0
"""Which image is where in the endless global sequence of training batches.

A place is a number in that sequence: batch n of B images has the places n * B to (n + 1) * B - 1,
and each host shows a contiguous part of them. So neither the number of hosts nor where a run was
interrupted changes what is at a place.
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Order:
    """Endless reshuffled epochs of `length` images, in batches of `batch_size`.

    With `repeats` above 1 every image that is drawn comes so many times in a row, each to be
    augmented differently (repeated augmentation: Hoffer et al. 2020, 3 times in DeiT). An epoch is
    still `length` places, so one epoch shows a part of the images and the next ones the others. In
    a batch, repeats are kept apart from one another: the device mixes neighbors in pairs, and an
    image mixed with itself would not be mixed. Its two halves take turns instead.
    """

    length: int
    seed: int
    batch_size: int
    repeats: int = 1

    def __getitem__(self, place: int) -> int:
        """The image shown at this place: its number in the source."""
        half, odd = divmod(self.batch_size, 2)
        if self.repeats > 1 and not odd:
            batch, place = divmod(place, self.batch_size)
            place = batch * self.batch_size + place // 2 + place % 2 * half
        epoch, number = divmod(place // self.repeats, self.length)
        return int(shuffled(self.length, self.seed, epoch)[number])

    def generator(self, place: int) -> np.random.Generator:
        """What the augmentation at this place draws from."""
        return np.random.default_rng((self.seed, 0, place))


@functools.lru_cache(4)  # more than one, as threads work ahead into the next epoch
def shuffled(length: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers below `length` in this epoch's order."""
    return np.random.default_rng((seed, 1, epoch)).permutation(length)
