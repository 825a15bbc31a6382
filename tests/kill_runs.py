# SPDX-License-Identifier: Apache-2.0
"""Kills real runs at random moments and compares what they end with to a run left alone.

    python -m tests.kill_runs --count=20 [--signal=TERM] [--seed=0] [-- ARGUMENTS OF train.py]

Every run is killed once, at a time drawn uniformly between its first line and the undisturbed run's
end, and started again. All results, weights and figures but times, have to be bit-identical in the
end; with TERM the killed run also has to exit with status 0 and to have lost no step. The last line
of standard output is a JSON object. test_train.py does this a few times, this is for releases.
"""

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from evit_jax.checkpoint import Checkpoints
from tests.test_train import DIGITS, OFTEN, same_results, start


def state_of(workdir):
    """All arrays of a run's last checkpoint."""
    return Checkpoints(workdir / "checkpoints", read_only=True).load()


def finish(line):
    """(what the run printed, seconds from its first line to its end)"""
    process = start(*line)
    first, began = process.stdout.readline(), time.monotonic()
    out, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    return first + out, time.monotonic() - began


def kill_once(line, number, delay):
    """(exit status of the killed run, the step it said it stopped after, the resumed one's first).

    The steps are None where it was killed before it had any, or by SIGKILL.
    """
    process = start(*line)
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(number)
    out, _ = process.communicate()
    stopped = re.search(r"stopped after step (\d+)", out)
    resumed = re.search(r"going on from the checkpoint of step ([\d,]+)", finish(line)[0])
    steps = [int(found[1].replace(",", "")) if found else None for found in (stopped, resumed)]
    return process.returncode, *steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("rest", nargs="*", default=[DIGITS, *OFTEN, "--config.epochs=6"])
    flags = parser.parse_args()
    rng = random.Random(flags.seed)
    number = signal.Signals[f"SIG{flags.signal}"]
    folder = Path(tempfile.mkdtemp(prefix="kill_runs_"))
    try:
        whole = folder / "whole"
        _, length = finish([*flags.rest, f"--workdir={whole}"])
        expected = state_of(whole)
        late = 0
        for i in range(flags.count):
            workdir, delay = folder / str(i), rng.uniform(0, length)
            status, stopped, resumed = kill_once(
                [*flags.rest, f"--workdir={workdir}"], number, delay
            )
            late += status == 0 and stopped is None  # it had ended before it was killed
            if stopped is not None:
                assert status == 0
                assert resumed == stopped
            jax.tree.map(np.testing.assert_array_equal, state_of(workdir), expected)
            same_results(workdir, whole)
            print(
                f"{i + 1}/{flags.count}: after {delay:.1f} of {length:.1f} s status {status}, "
                f"stopped at {stopped}, went on from {resumed}: identical",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            shutil.rmtree(workdir)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(dict(signal=flags.signal, killed=flags.count - late, identical=flags.count)))


if __name__ == "__main__":
    main()
