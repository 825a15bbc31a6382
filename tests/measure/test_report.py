# SPDX-License-Identifier: Apache-2.0
"""The benchmark's words: noise, accuracies, the table and the lines of the plot."""

import json

import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.measure.report import (
    judge,
    lines_of,
    markdown,
    noisy,
    read_accuracies,
    spread,
    text,
    variation,
)


def row(reducer="dense", keep_rate=1.0, *, speed=100.0, top1=None, macs=4e9, **changes):
    """A row of `comparison.rows_of`, with what the tool adds."""
    figures = dict(
        model="deit", reducer=reducer, keep_rate=keep_rate, batch_size=8, dtype="float32",
        mode="inference", images_per_second=speed, images_per_second_range=[speed - 1, speed + 2],
        latency_ms=8000 / speed, speedup=speed / 100, speedup_range=[speed / 100] * 2, macs=macs,
        macs_ratio=4e9 / macs, flops=16 * macs, xla_flops=17 * macs, peak_share=0.5, top1=top1,
        flops_per_second=2 * macs * speed, compile_seconds=1.25, peak_memory_bytes=2**20,
    )  # fmt: skip
    return figures | changes


def figures(rows):
    machine = dict(device="X", platform="gpu", python="3", jax="1", jaxlib="2", flax="3")
    peaks = dict(float32=2e12)
    noise = dict(dense_model=0.02, matrix_product=None)
    return machine | dict(rounds=5, peak_flops_per_second=peaks, noise=noise, results=rows)


def test_spread_is_median_lowest_and_highest():
    assert spread("ms", np.array([3.0, 1.0, 8.0])) == dict(ms=3.0, ms_range=[1.0, 8.0])


def test_variation_is_the_middle_half_over_the_median():
    assert variation(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(2 / 3)
    assert variation(np.array([2.0, 2.0, 2.0, 2.0, 9.0])) == 0  # one outlier does not matter
    assert variation(np.array([1.0, 5.0, 9.0])) is None


def test_a_quiet_machine_is_quiet_and_a_noisy_one_is_told_so():
    noise, warning = judge(dict(dense_model=[0.01, 0.03], matrix_product=[0.02]))
    assert noise == dict(dense_model=0.03, matrix_product=0.02)
    assert warning == ""
    assert not noisy(noise)

    noise, warning = judge(dict(dense_model=[0.01, 0.03], matrix_product=[0.24]))
    assert "the same matrix product spreads over 24% of their median, more than 10%" in warning
    assert "\n" not in warning
    assert noisy(noise)

    noise, warning = judge(dict(dense_model=[None], matrix_product=[None]))
    assert noise == dict(dense_model=None, matrix_product=None)
    assert "too few rounds to say how noisy the machine is" in warning
    assert not noisy(noise)


def test_accuracies_come_from_what_evaluate_printed(tmp_path):
    evit, tome = tmp_path / "evit.json", tmp_path / "tome.json"
    rows = [dict(keep_rate=1.0, reducer="evit", top1=0.8), dict(keep_rate=0.7, top1=0.79)]
    evit.write_text(json.dumps(dict(model="a", dtype="float32", results=rows)))
    tome.write_text(json.dumps(dict(results=[dict(keep_rate=None, reducer="tome:r=8", top1=0.7)])))
    assert read_accuracies(f"{evit},{tome}", ["b", "a"]) == {
        ("a", "dense", 1.0): 0.8,
        ("a", "evit", 0.7): 0.79,
        ("b", "tome:r=8", None): 0.7,
    }
    assert read_accuracies("", ["a"]) == {}


def test_accuracies_of_other_layers_and_multiples_are_of_another_plan(tmp_path):
    path = tmp_path / "evit.json"
    rows = [
        dict(keep_rate=rate, reducer="evit", layers=layers, multiple_of=multiple_of, top1=top1)
        for rate, layers, multiple_of, top1 in (
            (1.0, [2, 4], 8, 0.8), (0.7, [2, 4], 1, 0.5), (0.7, None, 1, 0.7), (0.7, None, 8, 0.6),
            (0.5, [2, 4], 1, 0.4),
        )
    ]  # fmt: skip
    path.write_text(json.dumps(dict(model="a", results=rows)))
    dense, evit = ("a", "dense", 1.0), ("a", "evit", 0.7)
    assert read_accuracies(str(path), ["a"]) == {dense: 0.8, evit: 0.7}
    assert read_accuracies(str(path), ["a"], multiple_of=8) == {dense: 0.8, evit: 0.6}
    expected = {dense: 0.8, evit: 0.5, ("a", "evit", 0.5): 0.4}
    assert read_accuracies(str(path), ["a"], layers=(2, 4)) == expected
    assert read_accuracies(str(path), ["a"], layers=(2, 3)) == {dense: 0.8}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"results": [{"keep_rate": 1}]}', "3"])
def test_other_files_are_no_accuracies(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"x\.json is not what evit_jax\.tools\.evaluate prints"):
        read_accuracies(str(path), ["a"])


def test_the_table_says_once_what_all_rows_share():
    rows = [row(), row("evit", 0.7, speed=150.0, macs=2.5e9, xla_flops=None)]
    shared, blank, heading, rule, dense, reduced, *_ = markdown(figures(rows), "").splitlines()
    assert (shared, blank) == ("model deit, mode inference, dtype float32, batch 8", "")
    cells = dict(zip(heading.split(" | "), reduced.split(" | "), strict=True))
    assert rule.count("|") == heading.count("|") == dense.count("|")
    assert "top-1" not in cells
    assert cells["keep rate"] == "0.7"
    assert cells["images/s"] == "150 (149 to 152)"
    assert cells["speed-up"] == "1.50 (1.50 to 1.50)"
    assert (cells["MACs ratio"], cells["GMACs"], cells["by XLA"]) == ("1.60", "2.5", "")
    assert (cells["TFLOP/s"], cells["of peak"], cells["ms"]) == ("0.75", "50%", "53.3")
    dense = dict(zip(heading.split(" | "), dense.split(" | "), strict=True))
    assert (dense["GMACs"], dense["by XLA"]) == ("4", "4.25")


def test_what_differs_is_a_column_and_a_warning_is_not_hidden():
    rows = [row(), row(batch_size=16, top1=0.8)]
    page = markdown(figures(rows), "too noisy")
    assert page.startswith("model deit, mode inference, dtype float32\n")
    assert "| batch | reducer | keep rate | top-1 |" in page
    assert "80.00%" in page
    assert page.endswith("**too noisy**\n")
    assert "2 TFLOP/s in float32" in page
    assert "dense model 2.0%, matrix product not known" in text(figures(rows))


def test_every_reducer_has_a_line_from_the_dense_model():
    rows = [
        row(top1=0.8),
        row("evit", 0.5, speed=200.0, top1=0.7, macs=2e9),
        row("evit", 0.7, speed=150.0, top1=0.79, macs=3e9),
        row("tome:r=13", None, speed=140.0, top1=0.76, macs=2.5e9),
        row("tome:r=8", None, speed=120.0, top1=0.78, macs=3.5e9),
        row("random", 0.7, top1=None),
        row("evit", 0.7, top1=0.79, mode="training"),
    ]
    evit, tome = lines_of(rows)
    assert (evit.label, tome.label) == ("evit", "tome")
    assert evit.points == [
        (100.0, 80.0, "dense"), (150.0, pytest.approx(79.0), "0.7"), (200.0, 70.0, "0.5")
    ]  # fmt: skip
    assert [(x, label) for x, _, label in tome.points] == [
        (100.0, "dense"), (120.0, "r=8"), (140.0, "r=13")
    ]  # fmt: skip


def test_lines_are_named_by_what_differs():
    rows = []
    for model, size in (("a", 1), ("a", 8), ("b", 1), ("b", 8)):
        setting = dict(model=model, batch_size=size, top1=0.8)
        rows += [row(**setting), row("evit", 0.7, **setting)]
    labels = [line.label for line in lines_of(rows)]
    assert labels == ["a evit batch 1", "a evit batch 8", "b evit batch 1", "b evit batch 8"]
