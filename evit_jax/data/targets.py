# SPDX-License-Identifier: Apache-2.0
"""A teacher's logits, one row per image, which may stay in their file."""

import dataclasses
import mmap

import numpy as np


@dataclasses.dataclass(frozen=True)
class Logits:
    """(N, C) of any float dtype; [index] -> (C,) float32.

    An array of `np.load(file, mmap_mode="r")` is pickled as a reference to its file: NumPy would
    send all of its content to every worker process.
    """

    rows: np.ndarray

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self.rows[index], np.float32)

    def __reduce__(self):
        rows = self.rows
        if not isinstance(getattr(rows, "base", None), mmap.mmap):  # in memory, or a part of a file
            return Logits, (rows,)
        order = "C" if rows.flags.c_contiguous else "F"
        return reopen, (rows.filename, rows.dtype, rows.offset, rows.shape, order)


def reopen(file: str, dtype: np.dtype, offset: int, shape: tuple[int, int], order: str) -> Logits:
    return Logits(np.memmap(file, dtype, "r", offset, shape, order))
