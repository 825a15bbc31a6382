# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from configs import common
from evit_jax.errors import InputError
from evit_jax.models import build_model
from evit_jax.plan.counts import PLAN_FIELDS, token_plan
from evit_jax.plan.flops import macs
from evit_jax.plan.stages import (
    coarse_first,
    completes,
    open_table,
    sandwich,
    stage_at,
    stages,
    variants,
)

SIZES = dict(image_size=(16, 16), patch_size=4, width=8, depth=3, num_heads=2, num_classes=3)


def planner(left):
    return token_plan(196, 12, keep_rate=0.5, extra=1, remaining=left)


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
    table = stages(lambda left: token_plan(4, 1, keep_rate=0.5, layers=(0,), remaining=left), 0.5,
                   length=100, rungs=16)  # fmt: skip
    assert [stage.keep for stage in table] == [(None,), (3,), (2,)]


def test_counts_are_warmed_up_too():
    table = stages(lambda left: token_plan(100, 1, tokens=50, layers=(0,), remaining=left), None,
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


def run_of(**changes) -> tuple:
    """(model, its plan) of a small run at keep rate 0.5."""
    config = common.get_config().unlock()
    config.model.update(SIZES | dict(name="vit", keep_rate=0.5, layers=(1,)) | changes)
    return build_model(**config.model), {name: config.model[name] for name in PLAN_FIELDS}


def test_a_warm_up_falls_to_the_target():
    table = open_table(*run_of(), length=20, rungs=2)
    assert [stage.keep_rate for stage in table] == [1.0, 0.75, 0.5]
    assert [stage.keep[1] for stage in table] == [None, 12, 8]
    assert 0 < table[1].step < table[2].step <= 20


def test_a_run_planned_by_macs_logs_the_rate_that_it_found():
    model, plan = run_of(keep_rate=None)
    budget = macs(model.clone(keep=model.plan(keep_rate=0.5, layers=(1,))))
    model, plan = run_of(keep_rate=None, macs=float(budget))
    (stage,) = open_table(model, plan)
    assert stage.keep == model.keep == model.plan(keep_rate=0.5, layers=(1,))
    assert stage.keep_rate == pytest.approx(0.5, abs=0.07)  # the largest with the same counts
    assert model.plan(keep_rate=stage.keep_rate, layers=(1,)) == stage.keep


def test_a_sandwich_is_one_stage_for_each_rate_between_and_excludes_a_warm_up():
    table = open_table(*run_of(), rates=(1.0, 0.75, 0.5))
    assert [(stage.step, stage.keep[1]) for stage in table] == [(0, None)]
    assert [keep[1] for keep in table[0].others] == [12, 8]
    with pytest.raises(InputError, match="takes the place of keep_warmup"):
        open_table(*run_of(), rates=(1.0, 0.5), length=10)


@pytest.mark.parametrize(
    ("every", "ends"), [(0, [10]), (2.5, [3, 5, 8, 10]), (4, [4, 8, 10]), (99, [10])]
)
def test_stretches_end_at_the_step_that_fills_them(every, ends):
    assert [step for step in range(1, 11) if completes(step, every, total=10)] == ends


def test_what_is_compared_is_every_rate_trained_and_dense():
    assert list(variants(*run_of())) == ["reduced", "dense"]
    models = variants(*run_of(), (1.0, 0.75, 0.5))
    assert {name: any(model.keep) for name, model in models.items()} == {
        "0.5": True, "0.75": True, "dense": False,
    }  # fmt: skip
    assert models["0.5"].tokens_per_block == (17, 10, 10)


def test_coarse_patches_take_the_place_of_the_beginning():
    table = stages(planner, 0.5, start=10, length=100, rungs=4)
    found = coarse_first(table, (4, 2), 20)
    assert [(stage.step, stage.coarse) for stage in found[:2]] == [(0, 4), (20, 2)]
    assert all(stage.coarse == 1 for stage in found[2:])
    assert found[2].step == 40
    for step in range(40, 200):
        assert stage_at(found, step).keep == stage_at(table, step).keep
    assert coarse_first(table, (), 20) == coarse_first(table, (2,), 0) == table
    with pytest.raises(InputError, match="a sandwich begins with all of its rates"):
        coarse_first(sandwich(lambda rate: planner(rate), (1.0, 0.5)), (2,), 10)
