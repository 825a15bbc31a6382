# SPDX-License-Identifier: Apache-2.0
"""The search for a plan within a latency budget, on devices that are made up and on this one."""

import math

import jax
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.measure.latency import MOST, PROGRAMS, RATES, first_true, fit_latency, stopwatch
from evit_jax.models import build_model, init_params
from evit_jax.reducers.evit import EViT

MODEL = build_model("deit_small_patch16_224")
SMALL = build_model("vit", image_size=16, patch_size=4, width=16, depth=2, num_heads=2)
COUNTS = {
    keep: sum(MODEL.clone(keep=keep).tokens_per_block)
    for keep in (MODEL.plan(keep_rate=rate) for rate in RATES)
}


class Device:
    """Takes `milliseconds` of a model per batch, and remembers the plans it was asked for."""

    def __init__(self, milliseconds, model=MODEL):
        self.milliseconds, self.model, self.calls = milliseconds, model, []

    def __call__(self, keeps):
        self.calls.append(list(keeps))
        times = [self.milliseconds(self.model.clone(keep=keep)) for keep in keeps]
        return [np.array([0.9, 1, 1, 5]) * time / 1000 for time in times]


def fit(device, milliseconds, **settings):
    return fit_latency(
        device.model, {}, batch_size=8, milliseconds=milliseconds, measure=device, **settings
    )


def tiles(model, side=16):
    """Milliseconds of a device that computes whole tiles of tokens."""
    return float(sum(math.ceil(tokens / side) for tokens in model.tokens_per_block))


@pytest.mark.parametrize("milliseconds", [155.9, 150, 140, 124, 110, 99, 85, 70, 55])
@pytest.mark.parametrize("side", [1, 16, 64])
def test_on_a_device_of_tiles_no_candidate_that_fits_keeps_more_tokens(milliseconds, side):
    device = Device(lambda model: tiles(model, side) * side / 16)
    least = tiles(MODEL.clone(keep=MODEL.plan(keep_rate=0.01)), side) * side / 16
    if milliseconds < least:
        with pytest.raises(InputError, match="no plan with these layers was measured within"):
            fit(device, milliseconds)
        return
    model, rows = fit(device, milliseconds)
    fitting = [
        count
        for keep, count in COUNTS.items()
        if tiles(MODEL.clone(keep=keep), side) * side / 16 <= milliseconds
    ]
    assert sum(model.tokens_per_block) == max(fitting)
    assert len(rows) == len({keep for call in device.calls for keep in call}) <= PROGRAMS


def test_all_programs_take_turns_once_more_and_only_that_counts():
    device = Device(lambda model: tiles(model) * (1.02 if len(device.calls[-1]) > 1 else 1))
    model, rows = fit(device, 100)
    assert [row.keep for row in rows] == device.calls[-1]
    assert len(rows) >= PROGRAMS
    assert rows[0].keep == MODEL.plan(keep_rate=1)
    for row in rows:
        expected = tiles(MODEL.clone(keep=row.keep)) * 1.02
        assert (row.milliseconds, row.lowest) == pytest.approx((expected, 0.9 * expected))
        assert row.highest == pytest.approx(5 * expected)
    assert model.keep == next(row.keep for row in rows if row.milliseconds <= 100)
    assert tiles(model) * 1.02 <= 100


def test_a_plan_that_is_slower_than_a_larger_one_is_passed_over():
    slow = MODEL.plan(keep_rate=0.7)

    def milliseconds(model):
        return 100 * sum(model.tokens_per_block) / COUNTS[slow] + 5 * (model.keep == slow)

    model, rows = fit(Device(milliseconds), 102)
    assert model.keep == MODEL.plan(keep_rate=0.71)
    assert slow in [row.keep for row in rows]
    model, _ = fit(Device(milliseconds), 100)
    assert model.keep == MODEL.plan(keep_rate=0.69)


def test_a_dense_model_within_the_budget_is_the_answer():
    device = Device(tiles)
    model, rows = fit(device, 156)
    assert model.keep == (None,) * 12
    assert [row.keep_rate for row in rows] == [1, 0.99]


@pytest.mark.parametrize("change", [1.5, 0.7])
def test_a_machine_that_was_slower_or_faster_at_first_does_not_mislead(change):
    device = Device(lambda model: tiles(model) * (change if max(map(len, device.calls)) > 1 else 1))
    model, rows = fit(device, 100)
    fitting = [n for keep, n in COUNTS.items() if change * tiles(MODEL.clone(keep=keep)) <= 100]
    assert sum(model.tokens_per_block) == max(fitting)
    chosen = next(row for row in rows if row.keep == model.keep)
    assert chosen.milliseconds == pytest.approx(change * tiles(model))


def test_noise_ends_the_search_too():
    rng = np.random.default_rng(0)
    for _ in range(20):
        device = Device(lambda model: tiles(model) * rng.lognormal(0, 0.3))
        model, rows = fit(device, 100)
        assert len(rows) <= MOST
        chosen = next(row for row in rows if row.keep == model.keep)
        assert chosen.milliseconds <= 100
        assert all(row.milliseconds > 100 for row in rows[: rows.index(chosen)])


def test_layers_and_multiples_reach_the_plan():
    model, rows = fit(Device(tiles), 110, layers=(2, 5), multiple_of=8)
    assert [block for block, keep in enumerate(model.keep) if keep] == [2, 5]
    assert all(tokens == 197 or tokens % 8 == 0 for row in rows for tokens in row.tokens)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(milliseconds=0), "above 0 milliseconds, got 0"),
        (dict(milliseconds=math.nan), "above 0 milliseconds, got nan"),
        (dict(milliseconds=20), "within 20 ms at batch size 8; the fastest took 48 ms, at keep"),
        (dict(milliseconds=90, layers=(12,)), "0 to 11 for a model of depth 12"),
        (dict(milliseconds=90, multiple_of=0), "multiple_of must be a whole number"),
    ],
)
def test_what_cannot_be_met_says_so(settings, text):
    with pytest.raises(InputError) as error:
        fit(Device(tiles), **settings)
    assert text in str(error.value)


def test_halving_finds_the_first_index_and_asks_the_first_one_first():
    for answer in range(9):
        asked = []

        def holds(index, asked=asked, answer=answer):
            asked.append(index)
            return index >= answer

        assert first_true(holds, -1, 8) == answer
        assert asked[0] == 0
        assert len(asked) == len(set(asked)) <= 4
    assert first_true(lambda index: True, 7, 8) == 8


class Counted(EViT):
    """Remembers what it was traced with."""

    traced = []  # noqa: RUF012

    def __call__(self, tokens, signals, keep):
        self.traced.append(keep)
        return super().__call__(tokens, signals, keep)


def test_the_stopwatch_compiles_a_plan_once_and_returns_seconds():
    params, model = init_params(SMALL, jax.random.key(0)), SMALL.clone(reducer=Counted())
    measure = stopwatch(model, params, batch_size=2, rounds=3, seconds=0)
    plans = [SMALL.plan(keep_rate=1), SMALL.plan(keep_rate=0.5)]
    runs = [*measure(plans[1:]), *measure(plans)]
    assert Counted.traced == [8, 5]
    assert [values.shape for values in runs] == [(3,)] * 3
    assert all(0 < value < 60 for values in runs for value in values)
    with pytest.raises(InputError, match="batch_size must be a whole number"):
        stopwatch(SMALL, params, batch_size=0)


def test_a_generous_budget_on_this_device_is_met_by_the_dense_model():
    params = init_params(SMALL, jax.random.key(0))
    model, rows = fit_latency(SMALL, params, batch_size=2, milliseconds=1e6)
    assert model.keep == (None, None)
    assert rows[0].tokens == (17, 17)
    assert all(0 < row.lowest <= row.milliseconds <= row.highest < 1e6 for row in rows)
