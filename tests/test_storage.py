# SPDX-License-Identifier: Apache-2.0
import importlib.util
import os
from pathlib import Path

import pytest

from evit_jax.errors import InputError
from evit_jax.storage import Lines, as_path, explained, in_bucket, read, write_whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_whole(path, "old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_lines_are_there_when_append_returns(tmp_path):
    lines = Lines(tmp_path / "metrics.jsonl", ["kept"])
    lines.append("new")
    assert read(tmp_path / "metrics.jsonl") == b"kept\nnew\n"
    lines.close()


def test_paths_on_disks_become_absolute_and_those_in_buckets_stay(monkeypatch):
    assert as_path("~/run") == Path.home() / "run"
    assert as_path("run") == Path.cwd() / "run"
    assert in_bucket("gs://bucket/run")
    assert not in_bucket("/gs/bucket")
    assert str(as_path("gs://bucket/run")) == "gs://bucket/run"
    assert str(as_path("gs://bucket/run") / "a") == "gs://bucket/run/a"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'needs the extra "gcs": pip install "evit_jax\[gcs\]"'):
        as_path("gs://bucket/run")


def test_only_what_a_bucket_answers_is_put_in_other_words():
    said = r"gs://b/x cannot be used \(RuntimeError: 403 for you\)"
    with pytest.raises(InputError, match=said), explained("gs://b/x"):
        raise RuntimeError("403 for\nyou")
    with pytest.raises(PermissionError), explained("/disk/x"):
        raise PermissionError("no")
