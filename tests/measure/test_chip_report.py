# SPDX-License-Identifier: Apache-2.0
"""The benchmark's table of chips that are not there."""

import jax.numpy as jnp
import pytest

from evit_jax.measure import chip_report
from evit_jax.measure.chip_report import add_estimates, cost, markdown, text
from evit_jax.measure.comparison import comparisons_of, describe
from evit_jax.training.trained import spec_of_name
from tests.measure.test_chips import estimate

TINY = "vit:image_size=16,patch_size=4,width=16,depth=2,num_heads=2,num_classes=5"


class Chip:
    """Costs as many cycles, or bytes, as the program has tokens, a hundred of each."""

    def __init__(self, unit, **figures):
        self.unit, self.figures, self.asked = unit, figures, []

    def logits(self, model, batch_size, times=100):
        self.asked.append((model.tokens_per_block, batch_size, times))
        tokens = sum(model.tokens_per_block)
        operations = dict(product=75 * tokens, norm=25 * tokens)
        figures = dict(cost=times * tokens, operations=operations) | self.figures
        return estimate(self.unit, **figures)

    def training_step(self, model, batch_size, card):
        assert card.crop == chip_report.preprocessing("vit").crop
        return self.logits(model, batch_size, times=300)


def comparisons(**changes):
    settings = dict(
        dtypes=[jnp.dtype("float32")], modes=["inference", "training"], batch_sizes=(8,),
        reducers=["evit"], keep_rates=(0.5,),
    )  # fmt: skip
    return comparisons_of([spec_of_name(TINY)], **settings | changes)


def rows_of(held):
    rows = [describe(one, variant) for one in held for variant in one.variants]
    return [row | dict(top1=None) for row in rows]


def test_every_row_gets_its_chips_and_the_speed_up_over_its_own_dense_model():
    held = comparisons()
    rows, chips = rows_of(held), dict(v5e=Chip("cycles"), h200=Chip("bytes"))
    add_estimates(rows, held, chips, operations=1)
    assert [list(row["chips"]) for row in rows] == [["v5e", "h200"]] * 4
    dense, reduced = 17 + 17, 10 + 7
    assert [row["chips"]["v5e"]["cycles"] for row in rows] == [
        100 * dense, 100 * reduced, 300 * dense, 300 * reduced
    ]  # fmt: skip
    for row in rows[1::2]:
        assert row["chips"]["h200"]["speedup"] == pytest.approx(dense / reduced)
    assert rows[0]["chips"]["h200"]["operations"] == [dict(name="product", bytes=75 * dense)]
    assert {size for _, size, _ in chips["v5e"].asked} == {8}


def test_what_was_not_measured_is_not_estimated_either():
    held = comparisons(modes=["inference"], batch_sizes=(8, 1))
    rows, chip = rows_of(held)[2:], Chip("cycles")  # a batch of 8 did not fit here
    add_estimates(rows, held, dict(v5e=chip))
    assert [size for _, size, _ in chip.asked] == [1, 1]


def test_the_table_says_what_is_estimated_and_what_is_not_in_it():
    held = comparisons(modes=["inference"])
    rows = rows_of(held)
    chips = dict(v5e=Chip("cycles"), h200=Chip("bytes", fits=False, needed_bytes=3 * 2**30))
    add_estimates(rows, held, chips, operations=2)
    lines = text(rows).splitlines()
    assert lines[0] == f"model {TINY}, mode inference, dtype float32, batch 8"
    heading, *cells = ([cell.strip() for cell in line.split("  ") if cell] for line in lines[1:7])
    assert heading[:6] == ["chip", "reducer", "keep rate", "estimated", "speed-up", "MACs ratio"]
    assert cells[1][:5] == ["v5e", "dense", "1", "3.4 kcycles", "1.00"]
    assert cells[2][:5] == ["v5e", "evit", "0.5", "1.7 kcycles", "2.00"]
    assert cells[4][:5] == ["h200", "evit", "0.5", "1.7 kB", "2.00"]
    assert (cells[1][-1], cells[4][-2:]) == ("yes", ["3", "no"])
    assert "Estimated by the compiler, not measured" in text(rows)
    assert chip_report.LOOPED not in text(rows)
    assert "reducer evit, keep rate 0.5, chip h200" in text(rows)
    assert lines[-2].split() == ["product", "1.27", "kB", "75.0%"]
    page = markdown(rows)
    assert "| v5e | evit | 0.5 | 1.7 kcycles | 2.00 |" in page
    assert "Estimated by the compiler, not measured" in page
    rows[0]["chips"]["v5e"]["loops"] = 1
    assert chip_report.LOOPED in text(rows)


def test_a_cost_has_the_unit_that_reads_best():
    values = (0, 999, 1e3, 18_280_799, 8.86e9, 2e12)
    assert [cost(dict(cycles=value)) for value in values] == [
        "0 cycles", "999 cycles", "1 kcycles", "18.3 Mcycles", "8.86 Gcycles", "2 Tcycles"
    ]  # fmt: skip
    assert cost(dict(bytes=8_863_253_520)) == "8.86 GB"
    assert cost(dict(bytes=None)) == ""
