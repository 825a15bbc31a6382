# SPDX-License-Identifier: Apache-2.0
"""What is done while the devices work: programs compiled and batches fetched ahead."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor


class Prefetch:
    """The next item of an iterator, fetched and handed to a function in the background."""

    def __init__(self, items: Iterator, function: Callable):
        self.items, self.function = items, function
        self.pool = ThreadPoolExecutor(1)
        self.fetch()

    def fetch(self) -> None:
        self.future = self.pool.submit(lambda: self.function(next(self.items)))

    @property
    def ready(self) -> bool:
        """Whether the next item is there."""
        return self.future.done()

    def __next__(self):
        item = self.future.result()
        self.fetch()
        return item

    def close(self) -> None:
        """Waits for the item that is being fetched, and closes the iterator."""
        self.pool.shutdown()
        self.items.close()


class Programs:
    """Compiled programs by key, made one at a time in the background before they are needed."""

    def __init__(self, compile: Callable):
        """`compile(key)` returns the program."""
        self.compile, self.pool, self.started = compile, ThreadPoolExecutor(1), {}

    def start(self, key) -> None:
        """Begins to compile, unless that has begun before."""
        if key not in self.started:
            self.started[key] = self.pool.submit(self.timed, key)

    def timed(self, key) -> tuple[Callable, float]:
        start = time.perf_counter()
        return self.compile(key), time.perf_counter() - start

    def wait(self, key) -> str:
        """Returns when the program is there, and how long it took, in words."""
        start = time.perf_counter()
        self.start(key)
        _, seconds = self.started[key].result()
        waited = time.perf_counter() - start
        return f"compiled in {seconds:.1f} s (blocked {waited:.1f} s)"

    def __getitem__(self, key) -> Callable:
        self.start(key)
        return self.started[key].result()[0]

    def close(self) -> None:
        """Begins no further ones."""
        self.pool.shutdown(wait=False, cancel_futures=True)
