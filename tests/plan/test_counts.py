# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from evit_jax.errors import InputError
from evit_jax.plan.counts import quarter_layers, rate_within, round_up, token_counts, token_plan

FUSED = {
    0.9: (178, 162, 147),
    0.8: (158, 128, 104),
    0.7: (139, 99, 71),
    0.6: (119, 73, 45),
    0.5: (99, 51, 27),
}
DROPPED = {
    0.9: (177, 160, 144),
    0.8: (157, 126, 101),
    0.7: (138, 97, 68),
    0.6: (118, 71, 43),
    0.5: (98, 49, 25),
}


@pytest.mark.parametrize(("extra", "table"), [(1, FUSED), (0, DROPPED)])
@pytest.mark.parametrize("rate", FUSED)
def test_counts_of_deit_at_224_are_the_reference_codes(extra, table, rate):
    keep = token_plan(196, 12, keep_rate=rate, extra=extra)
    counts = token_counts(keep, 196, extra=extra)
    assert tuple(counts[layer] - 1 for layer in (3, 6, 9)) == table[rate]
    assert [block for block, count in enumerate(keep) if count is not None] == [3, 6, 9]


def test_keeping_everything_reduces_nowhere():
    assert token_plan(196, 12, keep_rate=1) == (None,) * 12
    assert token_plan(196, 12) == (None,) * 12


def test_a_count_that_rounds_up_to_all_is_no_reduction():
    assert token_plan(4, 2, keep_rate=0.9, layers=(0, 1), extra=1) == (None, None)


def test_rates_per_block_and_absolute_counts():
    keep = token_plan(36, 6, keep_rates=(1, 0.7, 1, 0.7, 1, 0.7), extra=1)
    assert keep == (None, 26, None, 19, None, 14)
    assert token_counts(keep, 36, extra=1) == (37, 28, 28, 21, 21, 16)
    assert token_plan(36, 6, tokens=(26, 19, 14), layers=(1, 3, 5), extra=1) == keep
    assert token_plan(36, 6, tokens=(None, 26, None, 19, None, 14), extra=1) == keep
    assert token_plan(36, 6, tokens=10, layers=(1, 3)) == (None, 10, None, None, None, None)


def test_layers_default_to_the_quarters_of_the_depth():
    assert quarter_layers(12) == (3, 6, 9)
    assert quarter_layers(16) == (4, 8, 12)
    assert quarter_layers(1) == (0,)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(keep_rate=70), "did you mean 0.7?"),
        (dict(keep_rate=0), "keep something"),
        (dict(keep_rate=-0.5), "got -0.5"),
        (dict(keep_rate=math.nan), "got nan"),
        (dict(keep_rate="0.7"), "must be a number"),
        (dict(keep_rate=True), "must be a number"),
        (dict(keep_rate=0.7, layers=(3, 12)), "0 to 11 for a model of depth 12, got 12"),
        (dict(keep_rate=0.7, layers=(-1,)), "got -1"),
        (dict(keep_rate=0.7, layers=(3, 3)), "must not repeat"),
        (dict(keep_rates=(1, 0.5)), "12 of them, got 2"),
        (dict(keep_rates=(0.5,) * 12, keep_rate=0.5), "not both"),
        (dict(keep_rate=0.5, tokens=7), "not both"),
        (dict(tokens=(200, 100, 50)), "block 3 has 196 patch tokens and can keep 1 to 196"),
        (dict(tokens=(100, 50)), "one count for each of the layers"),
        (dict(tokens=0), "whole numbers from 1 up"),
        (dict(tokens=0.5), "got 0.5"),
    ],
)
def test_bad_requests_say_what_to_do(settings, text):
    with pytest.raises(InputError, match=None) as error:
        token_plan(196, 12, **settings)
    assert text in str(error.value)


def half(n):
    return n - n // 2


def test_a_reducer_that_at_most_halves_bounds_the_plan():
    assert token_plan(8, 1, keep_rate=0.1, layers=(0,), smallest=half) == (4,)
    with pytest.raises(InputError, match="can keep 4 to 8"):
        token_plan(8, 1, tokens=3, layers=(0,), smallest=half)


@pytest.mark.parametrize(
    ("multiple_of", "totals"),
    [
        (1, (140, 100, 72)),
        (8, (144, 104, 72)),
        (16, (144, 112, 80)),
        (64, (192, 128, 128)),
        (128, (197, 128, 128)),
        (256, (197, 197, 197)),
    ],
)
@pytest.mark.parametrize(("prefix", "extra"), [(1, 1), (2, 0)])
def test_all_tokens_after_a_reducing_block_are_rounded_up_once(multiple_of, totals, prefix, extra):
    counts = dict(prefix=prefix, extra=extra)
    keep = token_plan(196, 12, tokens=(140 - prefix - extra, 100 - prefix - extra,
                      72 - prefix - extra), multiple_of=multiple_of, **counts)  # fmt: skip
    dense = 196 + prefix
    after = token_counts(keep, 196, **counts)
    assert after == tuple(
        dense if total == 197 else total for total in (197, *totals) for _ in range(3)
    )
    # A block that is left with what it gets does not reduce.
    assert [keep[block] is None for block in (3, 6, 9)] == [
        after[block] == after[block - 1] for block in (3, 6, 9)
    ]


def test_the_papers_rate_in_multiples_of_eight():
    keep = token_plan(196, 12, keep_rate=0.7, extra=1, multiple_of=8)
    assert [count for count in keep if count] == [142, 102, 70]
    assert token_counts(keep, 196, extra=1)[3::3] == (144, 104, 72)


def test_rounding_respects_what_a_reducer_can_do():
    # 17, 9, 5, 3 tokens by halving become 20, where the next block can go no lower than 11.
    keep = token_plan(32, 4, keep_rate=0.1, layers=range(4), smallest=half, multiple_of=5)
    assert token_counts(keep, 32) == (20, 15, 10, 10)
    assert keep == (19, 14, 9, None)
    assert round_up((None, 3), 4, multiple_of=1, extra=1) == (None, 3)
    for wrong in (0, -8, 8.0, True):
        with pytest.raises(InputError, match="multiple_of must be a whole number from 1 up"):
            token_plan(196, 12, keep_rate=0.7, multiple_of=wrong)


@pytest.mark.parametrize("settings", [
    dict(extra=1), dict(extra=0, multiple_of=4), dict(smallest=half, layers=range(6)),
])  # fmt: skip
def test_a_budget_finds_the_costliest_plan_within_it_and_misses_none(settings):
    def cost(rate):
        keep = token_plan(36, 6, keep_rate=rate, **settings)
        return sum(n * n for n in token_counts(keep, 36, extra=settings.get("extra", 0)))

    steps = [k / n for n in range(1, 38) for k in range(1, n + 1)]  # where any count can change
    rates = [math.nextafter(rate, to) for rate in steps for to in (0, rate, min(2 * rate, 1))]
    costs = sorted({cost(rate) for rate in [*rates, 1e-9, 1.0]})
    assert len(costs) > 5
    for below, exact in zip([None, *costs], [*costs, math.inf], strict=True):
        if below is not None:
            assert cost(rate_within(exact - 1, cost)) == below
        if exact < math.inf:
            assert cost(rate_within(exact, cost)) == exact
    with pytest.raises(InputError, match=f"fewest possible are macs={costs[0]}"):
        rate_within(costs[0] - 1, cost)


@pytest.mark.parametrize("wrong", [0, -1.0, math.nan, True, "3e9"])
def test_a_budget_is_a_number_above_zero(wrong):
    with pytest.raises(InputError, match=r"per image, such as 3\.0e9, got"):
        rate_within(wrong, lambda rate: 1)


def test_where_patches_return_the_last_block_has_them_all_again():
    keep = token_plan(16, 5, keep_rate=0.5, layers=(1, 2), returns=True)
    assert keep == (None, 8, 4, None, 16)
    assert token_plan(16, 5, tokens=keep, returns=True) == keep
    assert token_counts(keep, 16) == (17, 9, 5, 5, 17)
    assert token_plan(16, 5, keep_rate=1.0, returns=True) == (None,) * 5
    assert token_plan(16, 5, keep_rate=0.5, layers=(1,), multiple_of=4, returns=True)[-1] == 16
    with pytest.raises(InputError, match="return before the last block, 4, which so cannot reduce"):
        token_plan(16, 5, keep_rate=0.5, layers=(4,), returns=True)
    with pytest.raises(InputError, match="block 4 has 4 patch tokens"):
        token_plan(16, 5, tokens=keep)
