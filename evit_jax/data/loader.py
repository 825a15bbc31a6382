# SPDX-License-Identifier: Apache-2.0
"""Batches of examples, prepared ahead by Grain in threads and processes."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from absl import flags

from evit_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Part:
    """Number -> that batch's contiguous part of this host, or the error that prevents it.

    The error is handed over like a batch: raised in a thread or process of Grain it would reach the
    main one with the last batches in its traceback, memory shared with a worker among them.
    """

    example: Callable  # place in the global sequence -> dict of arrays
    batch_size: int
    start: int = 0
    host: int = 0
    hosts: int = 1

    def __call__(self, number: int) -> dict[str, np.ndarray] | Exception:
        part = self.batch_size // self.hosts
        first = (self.start + number) * self.batch_size + self.host * part
        try:
            examples = [self.example(place) for place in range(first, first + part)]
        except (InputError, OSError) as error:
            return error
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def prepare(part: Part, count: int, threads: int, workers: int) -> Iterator[dict[str, np.ndarray]]:
    """The first `count` batches, prepared ahead by threads, of worker processes or of this one.

    Threads are enough for a few processors, as Pillow and NumPy release Python's lock. Each makes
    one batch at a time; 0 means one per processor in all.

    The first call imports Grain, which takes a while and replaces Python's `__import__` meanwhile:
    make it before other threads run, as what they import just then would be a stand-in.
    """
    import grain

    threads = threads or max(1, processors() // max(1, workers))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    batches = grain.MapDataset.range(count).map(part).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags of its own before it starts processes
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        batches = batches.mp_prefetch(options, follow_main)
    return opened(batches)


def opened(batches: Iterable) -> Iterator[dict[str, np.ndarray]]:
    """The batches; Grain starts its threads and processes with the first one."""
    with contextlib.closing(iter(batches)) as prepared:
        yield from map(received, prepared)


def received(batch: dict[str, np.ndarray] | Exception) -> dict[str, np.ndarray]:
    """The batch, copied where it is in memory shared with a worker, so that this is given back."""
    if isinstance(batch, Exception):
        raise batch
    return {
        name: array if type(array) is np.ndarray else np.array(array)
        for name, array in batch.items()
    }


def follow_main(*_) -> None:
    """In a worker process: ends with the main process, however that ends, and not before.

    Ctrl-C and what a scheduler sends go to all processes of a run; the main one decides about them.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: what a job scheduler grants
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
