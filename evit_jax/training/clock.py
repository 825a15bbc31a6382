# SPDX-License-Identifier: Apache-2.0
"""Where the time goes from the start of a process to the result of its first step."""

import contextlib
import os
import time
from pathlib import Path


def age() -> float:
    """Seconds since this process was started.

    Where the system does not say: seconds of work since then, which importing mostly is.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return time.process_time()


class Startup:
    """Seconds by part, in order."""

    def __init__(self):
        """Everything so far was importing."""
        self.last, self.parts = time.perf_counter() - age(), {}
        self.mark("imports")

    def mark(self, part: str) -> None:
        """Everything since the last mark was this part."""
        now = time.perf_counter()
        self.parts[part], self.last = now - self.last, now

    def line(self) -> str:
        """For the log."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        return f"first step done {sum(self.parts.values()):.1f} s after the start: {parts}"

    def figures(self) -> dict[str, float]:
        """`time_to_first_step` in seconds for the first log line, nothing for later ones."""
        parts, self.parts = self.parts, {}
        return dict(time_to_first_step=sum(parts.values())) if parts else {}


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
