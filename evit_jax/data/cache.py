# SPDX-License-Identifier: Apache-2.0
"""Decoded images kept in memory, for sets small enough: each is read and decoded once."""

import os
import re
from pathlib import Path

import numpy as np

from evit_jax.data.augment import decode
from evit_jax.errors import InputError

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Cached:
    """A source whose images are uint8 arrays that stay in memory from their first use on.

    Threads share them (two that meet at an image both decode it, which is harmless). A worker
    process cannot: it starts without any and fills a copy of its own.
    """

    def __init__(self, source, *, copies: int = 1):
        """Raises InputError where `copies` of all images clearly need more memory than there is."""
        self.source, self.classes = source, source.classes
        self.elements = [None] * len(source)
        needed, there = copies * decoded_size(source), available_memory()
        if needed > there:
            times = f" in {copies} processes each" if copies > 1 else ""
            raise InputError(
                f"{len(source):,} decoded images would need about {needed / 1e9:,.1f} GB of memory"
                f"{times}, and there are {there / 1e9:,.1f} GB; open the data without a cache"
            )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        element = self.elements[index]
        if element is None:
            element = self.source[index]
            if not isinstance(element["image"], np.ndarray):
                try:
                    image = decode(element["image"], element["name"])
                except InputError:
                    return element  # damaged: for whoever decodes it to say or skip
                element = element | dict(image=np.asarray(image))
            self.elements[index] = element
        return element

    def __getstate__(self) -> dict:
        return self.__dict__ | dict(elements=[None] * len(self))


def decoded_size(source, samples: int = 8) -> int:
    """Bytes of all images, judged by some of them."""
    sizes = []
    for index in np.linspace(0, len(source) - 1, min(samples, len(source))).astype(int):
        element = source[int(index)]
        try:
            sizes.append(np.asarray(decode(element["image"], element["name"])).nbytes)
        except InputError:  # damaged; the pipeline decides what to do about it
            continue
    return round(np.mean(sizes or [0]) * len(source))


def available_memory() -> int:
    """Bytes that may still be taken, as Linux and its container say; elsewhere all there are."""
    try:
        text = Path("/proc/meminfo").read_text()
        memory = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", text)[1])
    except OSError:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [Path(file).read_text().strip() for file in LIMITS if Path(file).is_file()]
    return min([memory, *(int(limit) for limit in limits if limit.isdigit())])
