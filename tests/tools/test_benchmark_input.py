# SPDX-License-Identifier: Apache-2.0
"""The comparison of the input pipeline with a plain loop."""

import contextlib

import numpy as np
import pytest
from PIL import Image

from evit_jax.data import open_source
from evit_jax.tools.benchmark_input import images_per_second, pipeline_batches, plain_batches
from tests.tools.test_evaluate import tool


@pytest.fixture
def photos(tmp_path):
    """Five images of noise, in two class folders."""
    rng = np.random.default_rng(0)
    for number in range(5):
        path = tmp_path / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50, 60, 3), np.uint8)).save(path)
    return tmp_path


def test_the_plain_loop_makes_the_very_images_of_the_pipeline(photos):
    source = open_source("folder", "test", str(photos))
    settings = dict(size=24, batch_size=8, magnitude=9)
    plain = list(plain_batches(source, count=3, **settings))
    with contextlib.closing(pipeline_batches(source, threads=2, **settings)) as batches:
        for images in plain:
            np.testing.assert_array_equal(next(batches)["image"], images)
    assert len(np.unique(np.concatenate(plain), axis=0)) == 24


def test_whole_rows_of_batches_are_timed_after_two_to_warm_up(monkeypatch):
    seen, clock = [], iter([10.0, 12.0])

    def batches():
        while True:
            seen.append("batch")
            yield

    monkeypatch.setattr("time.perf_counter", lambda: seen.append("clock") or next(clock))
    assert images_per_second(batches(), batch_size=4, images=5, cores=3) == 3 * 8 / 2
    assert seen == ["batch"] * 6 + ["clock"] + ["batch"] * 6 + ["clock"]


def test_the_tool_reports_all_variants(photos):
    code, figures, err = tool(
        "benchmark_input", f"--data={photos}", "--images=4", "--size=16", "--batch_size=2",
        "--rounds=2",
    )  # fmt: skip
    assert code == 0, err
    cores = figures["cores"]
    names = ["plain loop", "1 thread", f"{cores} threads", f"{cores} workers"]
    assert list(figures["results"]) == names
    for values in (*figures["results"].values(), figures["ratio"], *figures["scaling"].values()):
        assert 0 < values["lowest"] <= values["median"] <= values["highest"]
    assert (figures["size"], figures["batch_size"], figures["magnitude"]) == (16, 2, 9)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--data=/nowhere", "/nowhere is not a folder"),
        ("--rounds=0", "--rounds must be 1 or more"),
        ("--image=3", "unrecognized arguments: --image=3"),
    ],
)
def test_bad_input_is_answered_in_one_line(argument, text, photos):
    code, _, err = tool("benchmark_input", f"--data={photos}", argument)
    assert code == 1
    assert text in err
    assert err.count("\n") == 1
