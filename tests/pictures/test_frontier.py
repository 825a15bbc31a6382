# SPDX-License-Identifier: Apache-2.0
"""The two plots of a comparison, by their pixels."""

import numpy as np
import pytest

from evit_jax.pictures.frontier import (
    BAND,
    MARKERS,
    MORE_COLORS,
    MOST_LABELED,
    Series,
    clear_box,
    cost_axis,
    log_axis,
    picture,
)
from evit_jax.pictures.plot import BOTTOM, LEFT, SIZE, TOP, place

LABELS = dict(title="deit", x_label="GMACs", y_labels=("top-1 accuracy, %", "KL, nats"))


def test_losses_are_in_equal_ratios_even_if_they_are_close():
    axis = log_axis([0.11, 0.13])
    assert axis.log
    assert axis.ticks == pytest.approx((0.1, 0.2))
    assert log_axis([0.004, 0.3]).ticks == pytest.approx((0.002, 0.005, *log_ticks()))


def log_ticks():
    return (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def test_the_costs_of_one_budget_stay_close():
    axis = cost_axis([0.6286, 0.6297])
    assert axis.ticks[-1] - axis.ticks[0] > 0.06
    assert 0.4 < axis.at(0.629) < 0.6


def test_points_and_the_frontier_are_where_their_values_are():
    series = [
        Series("a", [(0.5, 75.0, 0.3), (0.7, 80.0, 0.05)], look=0),
        Series("b", [(0.5, 70.0, 0.5), (0.7, 72.0, 0.0)], look=1, plan=1),
    ]
    drawn = picture(series, [(0.5, 0.3), (0.7, 0.05)], dense=81.0, **LABELS)
    pixels = np.asarray(drawn).astype(int)
    assert drawn.width == SIZE[0]  # few lines are named where they are
    x_axis, y_axis = cost_axis([0.5, 0.7]), log_axis([0.3, 0.05, 0.5])
    down = SIZE[1] - BOTTOM + 26 - (TOP - 24)  # of the lower plot

    def color_at(x, y, right=0):
        column, row = place(x_axis, y_axis, x, y)
        return pixels[round(row + down), round(column + right)]

    for x, y in [(0.5, 0.3), (0.7, 0.05)]:
        np.testing.assert_allclose(color_at(x, y), MORE_COLORS[0], atol=12)
        np.testing.assert_allclose(color_at(x, y, 8), BAND, atol=20)
    assert color_at(0.5, 0.5).min() > 230  # hollow: another plan of a method
    assert drawn.height > 1.7 * (SIZE[1] - BOTTOM)


def test_many_methods_have_a_legend_beside_the_axes_and_looks_of_their_own():
    few, many = (
        [Series(f"method {i}", [(0.5, 70.0 + i, 0.1 + i)], look=i) for i in range(count)]
        for count in (MOST_LABELED, MOST_LABELED + 1)
    )
    assert picture(few, [], **LABELS).width == SIZE[0]
    assert picture(many, [], **LABELS).width > SIZE[0] + 60
    looks = [(i % len(MORE_COLORS), i % len(MARKERS)) for i in range(60)]
    assert len(set(looks)) == len(looks)


def test_labels_at_one_spot_do_not_overlap():
    boxes = []
    for _ in range(6):
        boxes.append(clear_box((LEFT + 300.0, TOP + 200.0), 40.0, [], boxes))
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            apart = one[2] <= other[0] or other[2] <= one[0]
            assert apart or one[3] <= other[1] or other[3] <= one[1]
