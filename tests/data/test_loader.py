# SPDX-License-Identifier: Apache-2.0
"""Batches prepared by threads and processes, and how those end."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from evit_jax.data.loader import Part, prepare, processors


def example(place):
    if place == 99:
        raise FileNotFoundError(2, "No such file or directory", "gone.jpg")
    return dict(place=np.int32(place), image=np.full((4, 4), place, np.uint8))


def test_a_part_is_the_same_share_of_every_batch():
    part = Part(example, batch_size=12, start=5, host=2, hosts=3)
    batch = part(1)
    np.testing.assert_array_equal(batch["place"], 12 * 6 + np.array([8, 9, 10, 11]))
    assert batch["image"].shape == (4, 4, 4)


@pytest.mark.parametrize(("count", "workers"), [(7, 0), (7, 2), (1, 2)])
def test_batches_come_in_order_and_then_end(count, workers):
    places = [batch["place"] for batch in prepare(Part(example, 2), count, 3, workers)]
    np.testing.assert_array_equal(places, np.arange(2 * count).reshape(-1, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanished_is_named(workers):
    with pytest.raises(FileNotFoundError, match=r"No such file.*gone\.jpg"):
        list(prepare(Part(example, 1, start=98), 9, 1, workers))


def test_worker_processes_heed_no_signals_but_end_with_the_main_process():
    program = """
import multiprocessing
from evit_jax.data.loader import Part, prepare
from tests.data.test_loader import example
batches = prepare(Part(example, 2), 10**9, 1, 1)
next(batches)
print(multiprocessing.active_children()[0].pid, flush=True)
input()
print(sum(int(next(batches)["place"][0] >= 0) for _ in range(20)), flush=True)
input()
"""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    main = subprocess.Popen([sys.executable, "-c", program], text=True, **pipes)
    worker = int(main.stdout.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
    main.stdin.write("\n")
    main.stdin.flush()
    assert main.stdout.readline() == "20\n"
    main.kill()
    main.communicate(timeout=20)  # the worker has the other end of the pipe, and closes it


def test_nothing_replaces_pythons_import_while_batches_are_prepared():
    """Threads that import something at such a moment get a stand-in, and fail when they use it."""
    program = """
from etils import epy
from etils.epy import lazy_imports_utils

replace, places = lazy_imports_utils.lazy_imports, []
def noted(*args, **kwargs):
    places.append(place)
    return replace(*args, **kwargs)
lazy_imports_utils.lazy_imports = epy.lazy_imports = noted

place = "import"
from evit_jax.data.loader import Part, prepare
from tests.data.test_loader import example
batches = prepare(Part(example, 4), 3, threads=1, workers=0)
place = "batches"
print(len(list(batches)), *places)
"""
    result = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    count, *places = result.stdout.split()
    assert count == "3", result.stderr
    assert set(places) <= {"import"}


def test_processors_are_those_that_a_scheduler_grants(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6}, raising=False)
    assert processors() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processors() == os.cpu_count()
