# SPDX-License-Identifier: Apache-2.0
"""A run whose files are in a bucket: killed, resumed, refused."""

import json
import pickle
import signal

import jax
import numpy as np
import pytest

from evit_jax import storage
from evit_jax.data import open_source
from evit_jax.errors import InputError
from evit_jax.training.checkpoint import Checkpoints
from tests.support.bucket import BUCKET, emulator
from tests.test_train import DIGITS, OFTEN, rest_of, start, train, wait_for

RUN = f"gs://{BUCKET}/runs/one"


@pytest.fixture
def bucket(monkeypatch):
    """The environment of programs that find the bucket, in this process too."""
    with emulator() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield environment


def lines(workdir):
    text = (storage.as_path(workdir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def untimed(figures):
    times = ("images_per_second", "data_wait", "speedup", "time_to_first_step")
    return [{k: v for k, v in line.items() if not k.endswith(times)} for line in figures]


@pytest.mark.slow
def test_a_run_killed_in_a_bucket_ends_as_one_left_alone_on_a_disk(bucket, tmp_path):
    code, _, err = train(DIGITS, f"--workdir={tmp_path}", *OFTEN)
    assert code == 0, err
    process = start(DIGITS, f"--workdir={RUN}", *OFTEN)
    wait_for(process, "step 28/")
    process.send_signal(signal.SIGKILL)
    rest_of(process)
    code, out, err = train(DIGITS, f"--workdir={RUN}", *OFTEN)
    assert code == 0, err
    assert "resuming from the checkpoint of step" in out
    assert untimed(lines(RUN)) == untimed(lines(tmp_path))
    there, here = (
        Checkpoints(storage.as_path(folder) / "checkpoints", read_only=True).load()
        for folder in (RUN, tmp_path)
    )
    jax.tree.map(np.testing.assert_array_equal, there, here)
    files = {path.name for path in storage.as_path(RUN).iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "tensorboard"} <= files
    events = list((storage.as_path(RUN) / "tensorboard").iterdir())
    assert len(events) == 2  # of the killed run and of the one that resumed
    code, _, err = train(DIGITS, f"--workdir={RUN}", *OFTEN, "--config.seed=1")
    assert code == 1
    assert "belongs to a run with another configuration: seed is 0 there and 1 here" in err
    assert "Traceback" not in err


def test_a_bucket_that_is_not_there_is_one_line(bucket):
    code, _, err = train(DIGITS, "--workdir=gs://somebody-elses/run")
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 1
    assert len(errors) == 1
    assert "gs://somebody-elses/run" in errors[0]
    assert "Traceback" not in err


def test_what_was_written_stays_where_a_later_write_is_refused(bucket, monkeypatch):
    path = storage.as_path(f"gs://{BUCKET}/metrics.jsonl")
    file = storage.Lines(path, ["first"])
    file.append("second")
    assert path.read_text() == "first\nsecond\n"

    def refuse(*_, **__):
        raise PermissionError("403: no")

    monkeypatch.setattr(type(path), "write_bytes", refuse)
    with pytest.raises(
        InputError, match=r"metrics.jsonl cannot be used \(PermissionError: 403: no"
    ):
        file.append("third")
    monkeypatch.undo()
    with emulator():
        pass  # nothing of it is left on disk


def test_array_records_are_read_from_a_bucket(bucket, tmp_path):
    from tests.support import tiny_dataset

    tiny_dataset.Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    there = f"gs://{BUCKET}/sets"
    for file in tmp_path.glob("tiny/*/*"):
        storage.write_whole(f"{there}/{file.relative_to(tmp_path).as_posix()}", file.read_bytes())
    for folder, split in ((f"{there}/tiny", "train"), (f"{there}/tiny/1.0.0", "test")):
        source = open_source("tfds", split, folder)
        local = open_source("tfds", split, str(tmp_path / "tiny"))
        assert len(source) == len(local) == dict(train=6, test=4)[split]
        for index in (3, 0, 3):
            assert source[index] == local[index]
        assert pickle.loads(pickle.dumps(source))[1] == local[1]  # as worker processes get it
    with pytest.raises(InputError, match="no prepared TFDS set"):
        open_source("tfds", "train", f"gs://{BUCKET}/none")


def test_a_folder_is_uploaded_file_by_file(bucket, tmp_path):
    (tmp_path / "events").write_bytes(b"1")
    target = storage.as_path(f"gs://{BUCKET}/run/tensorboard")
    storage.upload(tmp_path, target)
    (tmp_path / "events").write_bytes(b"12")
    storage.upload(tmp_path, target)
    assert storage.read(target / "events") == b"12"
    with pytest.raises(InputError, match="is not a file"):
        storage.read(target / "others")
