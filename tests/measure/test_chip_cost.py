# SPDX-License-Identifier: Apache-2.0
"""What plans cost on a chip that is made up, and a search with it."""

import jax
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.measure.calibration import calibrate
from evit_jax.measure.chip_cost import ChipCost
from evit_jax.measure.chip_plan import prices
from evit_jax.models import build_model, init_params
from evit_jax.reducers import create_reducer
from tests.measure.test_chip_plan import Chip
from tests.measure.test_chips import estimate

SIZES = dict(image_size=24, patch_size=4, width=16, depth=4, num_heads=2, num_classes=5)
MODEL = build_model("vit", **SIZES, reducer="ward")  # 37 tokens
PLAN = (23, None, 15, 7)


class Blocks(Chip):
    """Whole programs cost what their blocks do, and the stem, the heads and `surprise`."""

    def logits(self, model, batch_size):
        inside = sum(prices(model, lambda tokens: self.tiles(model, tokens)))
        cost = batch_size * (model.stem_macs + model.head_macs + inside)
        return estimate(cost=round(cost) + self.surprise(model))


def test_the_dense_model_and_the_reduced_one_cost_what_the_compiler_says():
    chip = Blocks(8, lambda model: 5000 if model.keep else 0)  # what the method does by itself
    done = []
    reduced = MODEL.clone(keep=PLAN)
    cost = ChipCost(MODEL, chip, 2, reduced=reduced, progress=lambda *numbers: done.append(numbers))
    assert cost(MODEL) == pytest.approx(chip.logits(MODEL.clone(keep=()), 2).cost)
    assert cost(reduced) == pytest.approx(chip.logits(reduced, 2).cost)
    assert chip.blocks == [8, 16, 24, 32, 37]  # each tile once, the last as far as it is needed
    assert done == [(number, 7) for number in range(8)]


def test_a_tile_that_is_partly_filled_costs_as_much_as_a_full_one_and_more_tokens_never_less():
    class Odd(Chip):
        def block_cost(self, model, tokens, batch_size):
            return 900.0 if tokens == 24 else 10.0 * tokens

    cost = ChipCost(MODEL, Odd(8), 1)
    assert [cost.price(tokens) for tokens in (1, 8, 9, 16)] == [80.0, 80.0, 160.0, 160.0]
    assert [cost.price(tokens) for tokens in (17, 24, 25, 32, 37)] == [900.0] * 5


def test_the_method_costs_as_much_more_as_it_gets_more_tokens():
    chip = Blocks(8, lambda model: 6000 if model.keep else 0)
    alone, whole = (
        ChipCost(MODEL, chip, 1),
        ChipCost(MODEL, chip, 1, reduced=MODEL.clone(keep=PLAN)),
    )
    for keep, tokens in ((PLAN, 77), ((None, None, None, 7), 37)):
        planned = MODEL.clone(keep=keep)
        assert whole(planned) - alone(planned) == pytest.approx(6000 * tokens / 77, abs=1)


def test_a_calibrated_plan_fills_tiles_within_the_share_of_the_chip():
    cost = ChipCost(MODEL, Chip(8), 4)
    model = MODEL.clone(reducer=create_reducer("evit"))
    params = jax.tree.map(lambda a: 3 * a, init_params(model, jax.random.key(0)))
    images = np.asarray(jax.random.normal(jax.random.key(1), (8, 24, 24, 3)))
    settings = dict(share=0.7, layers=(1, 2), batch_size=8)
    found = calibrate(model, params, images, cost=cost, multiple_of=8, **settings)
    for tried in found.tried:
        assert cost(model.clone(keep=tried.keep)) <= 0.7 * cost(model)
        reducing = [entry is not None for entry in tried.keep]
        assert all(n % 8 == 0 for n, yes in zip(tried.tokens, reducing, strict=True) if yes)
    # By multiply-accumulates the same share allows other counts.
    assert found.best.keep != calibrate(model, params, images, sweeps=0, **settings).best.keep


def test_a_model_that_does_not_fit_says_what_to_do():
    class Small(Chip):
        def logits(self, model, batch_size):
            return estimate(cost=None)

    with pytest.raises(InputError, match="does not fit into a tiles at batch size 64; try a small"):
        ChipCost(MODEL, Small(8), 64)
