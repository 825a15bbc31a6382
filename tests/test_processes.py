# SPDX-License-Identifier: Apache-2.0
"""train.py as several processes of one run, and as another number of them afterwards."""

import re
import signal

import pytest

from tests.test_parallel import free_address
from tests.test_train import DIGITS, figures, start, train


def wait_for(process, text):
    """Reads what a process prints until a line with this text."""
    while text not in (line := process.stdout.readline()):
        assert line, process.stderr.read()[-2000:]


def test_processes_that_are_asked_to_end_save_together_and_one_goes_on(tmp_path):
    line = [DIGITS, f"--workdir={tmp_path}", "--config.run.log_every=5", "--config.epochs=1"]
    address = free_address()
    first, second = (
        start(*line, "--config.run.parallel=pmap", f"--processes={address},2,{number}",
              JAX_NUM_CPU_DEVICES="2")
        for number in range(2)
    )  # fmt: skip
    wait_for(first, "step 5/45")
    second.send_signal(signal.SIGTERM)  # one of them is enough
    out, err = first.communicate(timeout=120)
    second.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (0, 0), err
    stopped = re.search(r"stopped after step (\d+), and saved", out)[1]

    code, out, err = train(*line)
    assert code == 0, err
    assert f"going on from the checkpoint of step {stopped} in" in out
    assert "2 cpu device(s) of 1 process(es)" in out
    assert [entry["step"] for entry in figures(tmp_path) if "lr" in entry] == list(range(5, 46, 5))


@pytest.mark.parametrize("text", ["all", "127.0.0.1:1,2"])
def test_a_wrong_description_of_processes_is_one_line(text, tmp_path):
    code, _, err = train(DIGITS, f"--workdir={tmp_path}", f"--processes={text}")
    assert code == 1
    assert err.count("\n") == 1
    assert "HOST:PORT,COUNT,NUMBER" in err
