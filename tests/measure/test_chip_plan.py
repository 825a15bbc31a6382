# SPDX-License-Identifier: Apache-2.0
"""The search for a plan that a chip does best with, on chips that are made up."""

import itertools
import math

import pytest

from evit_jax.errors import InputError
from evit_jax.measure import chip_plan
from evit_jax.measure.chip_plan import attention_share, candidates, fit_chip, rank, with_counts
from evit_jax.models import build_model
from evit_jax.plan.flops import block_macs, macs
from tests.measure.test_chips import estimate

MODEL = build_model("deit_small_patch16_224")
BUDGET = 0.65 * macs(MODEL)


class Chip:
    """Computes whole tiles of so many tokens; `whole` overrides the cost of a program by name."""

    name = "tiles"

    def __init__(self, tile, surprise=lambda model: 0):
        self.tile, self.surprise, self.blocks, self.programs = tile, surprise, [], []

    def tiles(self, model, tokens):
        padded = math.ceil(tokens / self.tile) * self.tile
        return block_macs(padded, padded, model.width, model.hidden)

    def block_cost(self, model, tokens, batch_size):
        self.blocks.append(tokens)
        return batch_size * self.tiles(model, tokens)

    def logits(self, model, batch_size):
        self.programs.append(model.tokens_per_block)
        entering = (model.prefix + model.patches, *model.tokens_per_block)
        cost = model.stem_macs + model.head_macs
        for before, after in itertools.pairwise(entering):
            share = attention_share(model, before)
            cost += share * self.tiles(model, before) + (1 - share) * self.tiles(model, after)
        return estimate(cost=round(batch_size * cost) + self.surprise(model))


def counts_of(model):
    return [model.tokens_per_block[block] for block in (3, 6, 9)]


def test_a_chip_of_tiles_gets_full_tiles_within_the_budget():
    chip = Chip(16)
    model, rows = fit_chip(MODEL, chip, budget=BUDGET, batch_size=2)
    assert [row.name for row in rows] == ["dense", "plain", "tried"]
    dense, plain, tried = rows
    assert plain.keep == MODEL.plan(macs=BUDGET)
    assert counts_of(model.clone(keep=plain.keep)) == [138, 97, 69]
    assert model.keep == tried.keep
    assert all(count % 16 == 0 for count in counts_of(model))
    assert 0.95 * BUDGET <= macs(model) <= BUDGET
    assert tried.estimate.cost < plain.estimate.cost < dense.estimate.cost
    assert tried.macs / tried.estimate.cost > plain.macs / plain.estimate.cost
    # No plan of candidate counts within the band does more for its cost.
    best = rank(
        model.clone(keep=plain.keep),
        candidates(model.clone(keep=plain.keep)),
        lambda tokens: chip.tiles(MODEL, tokens),
        BUDGET,
    )[0]
    assert best.keep == model.keep
    assert len(chip.blocks) == len(set(chip.blocks)) < 20  # a program for each count
    assert chip.blocks == sorted(chip.blocks)
    assert 197 in chip.blocks


def test_on_a_chip_without_tiles_the_plain_plan_stays():
    model, rows = fit_chip(MODEL, Chip(1), budget=BUDGET, batch_size=1)
    assert model.keep == MODEL.plan(macs=BUDGET)
    assert [row.name for row in rows] == ["dense", "plain"]  # nothing is worth compiling


def test_whole_programs_decide():
    plain = MODEL.clone(keep=MODEL.plan(macs=BUDGET))

    def worse(model):  # than what its blocks promise
        return 10**10 if model.keep not in ((), plain.keep) else 0

    model, rows = fit_chip(MODEL, Chip(16, worse), budget=BUDGET, batch_size=1)
    assert model.keep == plain.keep
    assert [row.name for row in rows] == ["dense", "plain", "tried", "tried"]


def test_multiples_that_the_user_wants_stay():
    model, rows = fit_chip(MODEL, Chip(16), budget=BUDGET, batch_size=1, multiple_of=4)
    assert {row.name for row in rows} >= {"dense", "plain"}
    assert all(count % 4 == 0 for count in counts_of(model))
    assert macs(model) <= BUDGET


def test_a_budget_that_the_dense_model_meets_is_dense():
    chip = Chip(16)
    model, rows = fit_chip(MODEL, chip, budget=2 * macs(MODEL), batch_size=1)
    assert model.tokens_per_block == (197,) * 12
    assert [row.name for row in rows] == ["dense", "plain"]
    assert chip.blocks == []


def test_candidates_are_near_and_no_more_than_can_be_ranked(monkeypatch):
    plain = MODEL.clone(keep=MODEL.plan(macs=BUDGET))
    assert candidates(plain) == {
        3: [138, 136, 144, 128, 152],
        6: [97, 96, 104, 88],
        9: [69, 72, 64],
    }
    assert candidates(plain, 16)[3] == [138, 144, 128]
    monkeypatch.setattr(chip_plan, "MOST", 10)
    assert candidates(plain) == {3: [138, 136], 6: [97, 96], 9: [69, 72]}


def test_counts_that_the_reducer_cannot_have_are_no_plan():
    plain = MODEL.clone(keep=MODEL.plan(macs=BUDGET))
    found = with_counts(plain, {3: 128, 6: 96, 9: 72})
    assert counts_of(found) == [128, 96, 72]
    assert found.keep[3] == 126  # a class token and a fused one come on top
    assert with_counts(plain, {3: 96, 6: 104, 9: 72}) is None


def test_a_reducing_block_costs_by_its_parts():
    variant = with_counts(MODEL.clone(keep=MODEL.plan(macs=BUDGET)), {3: 128, 6: 96, 9: 72})
    exact = chip_plan.prices(
        variant, lambda tokens: block_macs(tokens, tokens, MODEL.width, MODEL.hidden)
    )
    entering = (197, *variant.tokens_per_block)
    expected = [block_macs(a, b, 384, 1536) for a, b in itertools.pairwise(entering)]
    assert exact == pytest.approx(expected, rel=1e-12)


def test_what_cannot_be_planned_is_one_line():
    with pytest.raises(InputError, match="batch_size must be a whole number"):
        fit_chip(MODEL, Chip(8), budget=BUDGET, batch_size=0)

    class Full(Chip):
        def logits(self, model, batch_size):
            return estimate(cost=None, fits=False)

    with pytest.raises(InputError, match="does not fit into a tiles at batch size 9"):
        fit_chip(MODEL, Full(8), budget=BUDGET, batch_size=9)
