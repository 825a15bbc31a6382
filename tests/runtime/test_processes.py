# SPDX-License-Identifier: Apache-2.0
"""train.py as several processes of one run, and as another number of them afterwards."""

import re
import signal
import time

import pytest

from tests.data.test_sources import make_folder
from tests.runtime.test_parallel import free_address
from tests.test_train import DIGITS, figures, rest_of, start, train, wait_for


@pytest.mark.slow
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
    (code, out, err), (other_code, *_) = rest_of(first), rest_of(second)
    assert (code, other_code) == (0, 0), err
    stopped = re.search(r"stopped after step (\d+), and saved", out)[1]

    code, out, err = train(*line)
    assert code == 0, err
    assert f"resuming from the checkpoint of step {stopped} in" in out
    assert "2 cpu device(s) of 1 process(es)" in out
    assert [entry["step"] for entry in figures(tmp_path) if "lr" in entry] == list(range(5, 46, 5))


@pytest.mark.slow
def test_one_process_that_fails_takes_the_others_with_it(tmp_path):
    root = make_folder(tmp_path / "data", count=8)
    line = ["--config=configs/cifar10.py:debug", "--config.data.name=folder",
            f"--config.data.dir={root}", "--config.batch_size=8", "--config.epochs=50"]  # fmt: skip
    address = free_address()
    both = [
        start(*line, f"--workdir={tmp_path / 'run'}", f"--processes={address},2,{number}")
        for number in range(2)
    ]
    wait_for(both[0], "parameters")
    for photo in (root / "train").rglob("*.jpg"):
        photo.write_bytes(b"no photo")
    began = time.monotonic()
    ends = [rest_of(process) for process in both]
    assert time.monotonic() - began < 100
    assert all(code != 0 for code, *_ in ends)
    assert any("cannot be read as an image" in err for *_, err in ends)


@pytest.mark.parametrize("text", ["all", "auto", "127.0.0.1:1,2"])
def test_a_wrong_description_of_processes_is_one_line(text, tmp_path):
    code, _, err = train(DIGITS, f"--workdir={tmp_path}", f"--processes={text}")
    assert code == 1
    assert err.count("\n") == 1
    assert "HOST:PORT,COUNT,NUMBER" in err
