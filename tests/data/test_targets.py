# SPDX-License-Identifier: Apache-2.0
import pickle

import numpy as np
import pytest

from evit_jax.data.targets import Logits


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(1000, 40)).astype(np.float16)


def assert_rows(logits, rows):
    row = logits[7]
    assert row.dtype == np.float32
    np.testing.assert_array_equal(row, rows[7])


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_mapped_file_is_sent_by_its_name(rows, tmp_path, order):
    np.save(tmp_path / "logits.npy", np.asarray(rows, order=order))
    sent = pickle.dumps(Logits(np.load(tmp_path / "logits.npy", mmap_mode="r")))
    assert len(sent) < 1000
    assert_rows(pickle.loads(sent), rows)


def test_an_array_and_a_part_of_a_file_are_sent_whole(rows, tmp_path):
    np.save(tmp_path / "logits.npy", rows)
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    for logits, expected in [(rows, rows), (mapped[5:, 1:], rows[5:, 1:])]:
        assert_rows(Logits(logits), expected)
        assert_rows(pickle.loads(pickle.dumps(Logits(logits))), expected)
