# SPDX-License-Identifier: Apache-2.0
"""How fast: a clock for the training loop, and a comparison in which variants take turns."""

import contextlib
import time
from collections.abc import Callable

import jax
import numpy as np


def take_turns(
    variants: dict[str, Callable[[], object]], *, rounds: int = 10, seconds: float = 0.2
) -> dict[str, np.ndarray]:
    """Times functions that return JAX arrays, after one call each to compile and warm up.

    In each of `rounds` every variant runs in turn, as often as fits in about `seconds`; a round's
    figure is the mean of its calls, counted until the results are ready.

    Returns:
      name -> (rounds,) float64, seconds a call.
    """
    calls = {}
    for name, function in variants.items():
        jax.block_until_ready(function())
        start = time.perf_counter()
        jax.block_until_ready(function())
        calls[name] = max(1, round(seconds / (time.perf_counter() - start)))
    figures = {name: [] for name in variants}
    for _ in range(rounds):
        for name, function in variants.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                result = function()
            jax.block_until_ready(result)
            figures[name].append((time.perf_counter() - start) / calls[name])
    return {name: np.asarray(values) for name, values in figures.items()}


class Clock:
    """Images per second and the share of time spent waiting for data, since the last reading."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted so far."""
        self.start, self.images, self.waited = time.perf_counter(), 0, 0.0

    @contextlib.contextmanager
    def waiting(self):
        """The loop stands still for want of data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        """Something else than training goes on."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def read(self) -> dict[str, float | None]:
        """The figures for the log (None if nothing was counted), and starts again."""
        seconds, images, waited = time.perf_counter() - self.start, self.images, self.waited
        self.restart()
        if not images:
            return dict(images_per_second=None, data_wait=None)
        return dict(images_per_second=images / seconds, data_wait=waited / seconds)
