# SPDX-License-Identifier: Apache-2.0
import jax
import pytest

from evit_jax import tables
from evit_jax.models import build_model, init_params
from evit_jax.plan import stages
from evit_jax.reducers import create_reducer
from evit_jax.training import report

MODEL = build_model("deit_small_patch16_224", keep_rate=0.7)


def test_runs_of_equal_counts_are_shortened():
    assert tables.runs(MODEL.tokens_per_block) == "197 x3, 140 x3, 100 x3, 72 x3"
    assert tables.runs((5, 4, 4)) == "5, 4 x2"


def test_the_parameter_table_adds_up():
    params = jax.eval_shape(lambda key: init_params(MODEL, key), jax.random.key(0))
    text = report.parameter_table(params)
    assert "blocks (x12)  21,293,568" in text
    assert text.splitlines()[-1].split() == ["all", "22,050,664"]


def test_the_stage_table_shows_epochs_tokens_and_macs():
    table = stages.stages(
        lambda r: MODEL.plan(keep_rate=0.7, remaining=r),
        0.7,
        start=1000,
        length=1000,
        rungs=1,
    )
    lines = report.stage_table(MODEL, table, steps_per_epoch=1000).splitlines()
    assert lines[2].split() == ["0", "1", "197", "x12", "4.599"]
    assert lines[3].split()[:2] == ["1.5", "0.7"]
    assert lines[3].split()[-1] == "3.029"


ROWS = dict(
    reduced=dict(
        tokens=(65, 33), macs=1_000_000_000, test_top1=0.75, test_top5=0.9, test_loss=1.0,
        images_per_second=[200.0, 300.0, 210.0],
    ),
    dense=dict(
        tokens=(65, 65), macs=1_500_000_000, test_top1=0.76, test_top5=0.9, test_loss=1.1,
        images_per_second=[100.0, 140.0, 110.0],
    ),
)  # fmt: skip


def test_the_result_table_compares_round_by_round():
    lines = [line.split() for line in report.result_table(ROWS).splitlines()]
    assert lines[2] == ["reduced", "65,", "33", "1", "75.00", "%", "210", "(200", "to", "300)"]
    assert lines[3] == ["dense", "65", "x2", "1.5", "76.00", "%", "110", "(100", "to", "140)"]
    assert lines[4] == ["reduced", "over", "dense", "1/1.500", "-1.00", "x2.00"]


def test_the_summary_has_both_for_programs():
    figures = report.summary(ROWS)
    assert figures["speedup"] == pytest.approx(2.0)
    assert (figures["test_top1"], figures["dense_top1"]) == (0.75, 0.76)
    assert (figures["images_per_second"], figures["dense_images_per_second"]) == (210, 110)


def test_a_dense_run_has_one_row_and_no_ratio():
    rows = dict(dense=ROWS["dense"])
    assert len(report.result_table(rows).splitlines()) == 3
    assert report.summary(rows)["speedup"] == 1


def test_log_lines_leave_out_what_is_unknown():
    line = report.line(dict(step=5, epoch=0.25, train_loss=1.5, images_per_second=None), 10)
    assert line == "step 5/10  epoch 0.2  loss 1.5000"


def test_what_to_try_next_is_what_the_method_can_do():
    assert "--keep_rate=1,0.9,0.7,0.5" in report.what_next("run", create_reducer("evit"))
    assert "keep_rate" not in report.what_next("run", create_reducer("sit"))
    lines = report.what_next("run", create_reducer("diffrate_search")).splitlines()
    assert lines[1].endswith("learned_plan --workdir=run --out=plan.json")
    assert lines[2].endswith("evaluate --workdir=run --plan=plan.json")
