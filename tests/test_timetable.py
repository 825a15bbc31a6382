# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from evit_jax.errors import InputError
from evit_jax.plan import token_plan
from evit_jax.timetable import sandwich, stage_at, stages


def planner(left):
    return token_plan(196, 12, keep_rate=0.5, extra=1, left=left)


def test_without_a_warm_up_there_is_one_stage():
    table = stages(planner, 0.5)
    assert [(stage.step, stage.keep_rate, stage.keep) for stage in table] == [(0, 0.5, planner(0))]


def test_a_later_start_has_a_dense_stage_before_it():
    table = stages(planner, 0.5, start=100)
    assert [(stage.step, stage.keep_rate) for stage in table] == [(0, 1.0), (100, 0.5)]
    assert table[0].keep == (None,) * 12


@pytest.mark.parametrize("rungs", [1, 4, 8, 16])
def test_stages_follow_the_papers_cosine_within_half_a_rung(rungs):
    start, length, target = 626, 6260, 0.5
    table = stages(planner, target, start=start, length=length, rungs=rungs)
    assert len(table) <= rungs + 1
    assert table[-1].keep == planner(0)
    rung = (1 - target) / rungs
    for step in range(0, 2 * (start + length), 97):
        t = min(max(step - start, 0), length)
        cosine = target + (1 - target) * 0.5 * (math.cos(math.pi * t / length) + 1)
        assert abs(stage_at(table, step).keep_rate - cosine) <= rung / 2 + 1e-9
    assert [stage.step for stage in table] == sorted({stage.step for stage in table})


def test_rungs_with_equal_counts_are_one_stage():
    table = stages(lambda left: token_plan(4, 1, keep_rate=0.5, layers=(0,), left=left), 0.5,
                   length=100, rungs=16)  # fmt: skip
    assert [stage.keep for stage in table] == [(None,), (3,), (2,)]


def test_counts_are_warmed_up_too():
    table = stages(lambda left: token_plan(100, 1, tokens=50, layers=(0,), left=left), None,
                   length=10, rungs=2)  # fmt: skip
    assert [(stage.keep_rate, stage.keep) for stage in table] == [
        (None, (None,)),
        (None, (75,)),
        (None, (50,)),
    ]


def test_a_warm_up_of_negative_length_is_refused():
    with pytest.raises(InputError, match="length >= 0"):
        stages(planner, 0.5, length=-1)


def at_rate(rate):
    return token_plan(196, 12, keep_rate=rate, extra=1)


def test_a_sandwich_trains_the_largest_the_smallest_and_one_between():
    table = sandwich(at_rate, (0.5, 0.9, 1.0, 0.7))
    assert [stage.keep_rate for stage in table] == [0.9, 0.7]
    for stage in table:
        assert stage.step == 0
        assert stage.keep == at_rate(1.0)
        assert stage.others == (at_rate(stage.keep_rate), at_rate(0.5))
    drawn = [stage_at(table, step, seed=3).keep_rate for step in range(1000)]
    assert drawn == [stage_at(table, step, seed=3).keep_rate for step in range(1000)]
    assert drawn != [stage_at(table, step, seed=4).keep_rate for step in range(1000)]
    assert 430 < drawn.count(0.9) < 570
    assert sandwich(at_rate, (1, 0.5))[0].others == (at_rate(0.5),)
    with pytest.raises(InputError, match="at least two different"):
        sandwich(at_rate, (0.5, 0.5))
