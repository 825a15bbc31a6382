# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evit_jax.training import clock
from evit_jax.training.clock import Startup, age

ROOT = Path(__file__).parents[2]


def test_a_process_knows_its_age():
    before = age()
    time.sleep(0.1)
    assert 0.09 <= age() - before < 60
    code = "import time; time.sleep(1.5); from evit_jax.training.clock import age; print(age())"
    began = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 1.5 <= float(run.stdout) <= time.perf_counter() - began + 0.02


def test_where_the_process_cannot_be_looked_up_its_work_counts(monkeypatch):
    monkeypatch.setattr(clock.Path, "read_text", lambda path: (_ for _ in ()).throw(OSError))
    assert age() == pytest.approx(time.process_time(), abs=0.5)


def test_parts_add_up_and_are_reported_once(monkeypatch):
    now = iter([10.0, 10.0, 12.5, 13.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(clock, "age", lambda: 1.5)
    start = Startup()
    start.mark("state")
    start.mark("first step")
    assert start.line() == (
        "first step done 4.5 s after the start: imports 1.5, state 2.5, first step 0.5"
    )
    assert start.figures() == dict(time_to_first_step=4.5)
    assert start.figures() == {}


def test_what_is_not_needed_yet_is_not_imported():
    code = (
        "import sys; import {}; "
        "print(*sorted({{'orbax', 'grain', 'tensorboardX', 'tensorflow'}} & sys.modules.keys()))"
    )
    for module in ("evit_jax", "train", "evit_jax.tools.evaluate", "evit_jax.tools.visualize"):
        run = subprocess.run(
            [sys.executable, "-c", code.format(module)], cwd=ROOT, capture_output=True, text=True
        )
        assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr
