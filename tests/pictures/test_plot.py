# SPDX-License-Identifier: Apache-2.0
"""The plot, by its pixels."""

import numpy as np
import pytest

from evit_jax.pictures.plot import COLORS, GRID, SIZE, Line, axis_of, free_box, place, plot

LABELS = dict(title="deit on a device", x_label="images per second", y_label="top-1 accuracy, %")


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([140, 260], (120, 140, 160, 180, 200, 220, 240, 260, 280)),
        ([0.69, 0.81], (0.68, 0.7, 0.72, 0.74, 0.76, 0.78, 0.8, 0.82)),
        ([5], (4.9, 5, 5.1)),
        ([0, 0], (-0.2, 0, 0.2)),
    ],
)
def test_ticks_are_round_and_enclose_all_values(values, ticks):
    axis = axis_of(values)
    assert axis.ticks[0] < min(values)
    assert axis.ticks[-1] > max(values)
    assert not axis.log
    if len(values) == 2 and values[0]:
        assert axis.ticks == pytest.approx(ticks)
    steps = np.diff(axis.ticks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert len(axis.ticks) <= 11


def test_values_far_apart_get_equal_ratios():
    axis = axis_of([13, 260])
    assert axis.log
    assert axis.ticks == (10, 20, 50, 100, 200, 500)
    assert axis.at(10) == 0
    assert axis.at(500) == 1
    assert axis.at(20) - axis.at(10) == pytest.approx(axis.at(200) - axis.at(100))
    assert axis_of([13, 260], even=True).ticks == (0, 50, 100, 150, 200, 250, 300)


def test_points_and_lines_are_where_their_values_are():
    first = [(140.0, 81.0, "dense"), (190.0, 79.0, "0.7"), (251.0, 69.0, "0.5")]
    second = [(140.0, 81.0, "dense"), (195.0, 76.7, "r=13")]
    lines = [Line("evit", first), Line("tome", second)]
    pixels = np.asarray(plot(lines, **LABELS)).astype(int)
    assert pixels.shape[1] == SIZE[0]
    assert pixels.shape[0] > SIZE[1]  # the legend

    x_axis, y_axis = axis_of([140, 251, 195]), axis_of([81, 69, 76.7])

    def color_at(x, y):
        column, row = place(x_axis, y_axis, x, y)
        return pixels[round(row), round(column)]

    for x, y, _ in first[1:]:
        np.testing.assert_allclose(color_at(x, y), COLORS[0], atol=12)
    for x, y, _ in second:  # the later line is on top where both have a point
        np.testing.assert_allclose(color_at(x, y), COLORS[1], atol=12)
    np.testing.assert_allclose(color_at(220.5, 74), COLORS[0], atol=60)  # halfway between two
    assert np.array_equal(color_at(x_axis.ticks[0] + 5, y_axis.ticks[0] + 1), (255, 255, 255))
    column, row = map(round, place(x_axis, y_axis, 170, y_axis.ticks[1]))
    assert pixels[row - 1 : row + 2, column].min() < (GRID[0] + 255) / 2  # a grid line

    legend = pixels[SIZE[1] :]
    for color in COLORS[:2]:
        assert (np.abs(legend - color).max(axis=-1) < 12).sum() > 40  # its marker
    assert (np.abs(legend - COLORS[2]).max(axis=-1) < 12).sum() == 0


def test_bars_reach_from_the_lowest_to_the_highest_value():
    line = Line("evit", [(10.0, 50.0, "0.7"), (20.0, 60.0, "")], {(10.0, 50.0): (40.0, 55.0)})
    pixels = np.asarray(plot([line], **LABELS)).astype(int)
    x_axis, y_axis = axis_of([10, 20]), axis_of([40, 55, 50, 60])

    def colored(y):
        """How far pixels are from the paper where a bar at x = 10 would be."""
        column, row = (round(c) for c in place(x_axis, y_axis, 10, y))
        return 255 - pixels[row, column - 1 : column + 2].min()

    assert colored(42) > 100
    assert colored(54) > 100
    assert colored(39) < 60
    assert colored(56.5) < 60
    column, row = (round(c) for c in place(x_axis, y_axis, 10, 40))
    across = 255 - pixels[row - 1 : row + 2, column - 3 : column + 4].min(axis=(0, 2))
    assert (across > 60).all(), "the stroke across its end"


def test_a_label_goes_where_nothing_is():
    above_right = free_box((300, 200), 30, [], [])
    assert above_right == (306, 181, 336, 194)
    lines = [(x, 187) for x in range(300, 340)]  # something runs through there
    assert free_box((300, 200), 30, lines, []) == (264, 181, 294, 194)
    assert free_box((300, 200), 30, [], [above_right])[2] <= 300
    assert free_box((SIZE[0] - 20, 200), 30, [], [])[2] < SIZE[0] - 20  # not over the edge


def test_a_long_legend_takes_more_rows():
    few = plot([Line("a", [(100.0, 80.0, "x")])], **LABELS)
    many = [Line(f"a line with a long name {i}", [(100.0 + i, 80.0, "x")]) for i in range(9)]
    assert plot(many, **LABELS).size == (few.width, few.height + 2 * 20)
