# SPDX-License-Identifier: Apache-2.0
"""Kills real runs at random moments and compares what they end with to a run left alone.

python -m tests.scripts.kill_runs --count=20 [--signal=TERM] [--seed=0] [-- FLAGS]

FLAGS are those of train.py.

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

from evit_jax.training.checkpoint import Checkpoints
from tests.test_train import DIGITS, OFTEN, rest_of, same_results, start, wait_for


def state_of(workdir):
    """All arrays of a run's last checkpoint."""
    return Checkpoints(workdir / "checkpoints", read_only=True).load()


def finish(line):
    """(what the run printed, seconds from its first line to its end)"""
    process = start(*line)
    wait_for(process)
    began = time.monotonic()
    code, out, err = rest_of(process)
    assert code == 0, err[-2000:]
    return out, time.monotonic() - began


def kill(line, number, delay):
    """(exit status, the step it said it stopped after or None)"""
    process = start(*line)
    wait_for(process)
    time.sleep(delay)
    process.send_signal(number)
    status, out, _ = rest_of(process)
    stopped = re.search(r"stopped after step (\d+)", out)
    return status, stopped and stopped[1]


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
        killed, saving = 0, 0
        while killed < flags.count:
            workdir, delay = folder / "killed", rng.uniform(0, length)
            line = [*flags.rest, f"--workdir={workdir}"]
            status, stopped = kill(line, number, delay)
            if status == 0 and stopped is None:  # it had ended before
                shutil.rmtree(workdir)
                continue
            killed += 1
            saving += any((workdir / "checkpoints").glob("*tmp*"))
            out, _ = finish(line)
            if number == signal.SIGTERM:
                assert status == 0
                assert f"resuming from the checkpoint of step {stopped} in" in out, (stopped, out)
            jax.tree.map(np.testing.assert_array_equal, state_of(workdir), expected)
            same_results(workdir, whole)
            shutil.rmtree(workdir)
            said = f"after {delay:.1f} of {length:.1f} s, stopped at step {stopped}: identical"
            print(f"{killed}/{flags.count}: {said}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(dict(signal=flags.signal, killed=killed, saving=saving, identical=killed)))


if __name__ == "__main__":
    main()
