# SPDX-License-Identifier: Apache-2.0
import pytest

from evit_jax.plan.ramp import first_block, ramp, ramp_within


def test_each_block_keeps_the_rate_and_the_first_its_root():
    keep = ramp(100, range(6), 6, first=2, rate=0.64)
    assert keep == (None, None, 80, 51, 33, 21)  # 100 * 0.8, then * 0.64, rounded each time


def test_only_the_given_layers_reduce_and_the_last_may_end_in_less():
    assert ramp(100, (1, 3, 5), 6, first=0, rate=0.64, last=1) == (None, 80, None, 51, None, 1)
    assert ramp(100, (1, 3), 6, first=0, rate=0.64, last=1) == (None, 80, None, 51, None, None)


def test_no_block_keeps_less_than_the_method_can():
    assert ramp(16, range(3), 3, first=0, rate=0.01, smallest=lambda n: n - n // 2) == (8, 4, 2)
    assert ramp(16, range(3), 3, first=0, rate=1.0) == (None, None, None)


def test_a_budget_takes_the_largest_rate_within_it():
    def plan(rate):
        return ramp(100, range(4), 4, first=1, rate=rate)

    def cost(keep):
        total, n = 0, 100
        for entry in keep:
            n = n if entry is None else entry
            total += n
        return total

    best = max(cost(plan(rate / 1000)) for rate in range(1, 1001) if cost(plan(rate / 1000)) <= 300)
    assert cost(ramp_within(300, cost, plan)) == best
    assert ramp_within(99, cost, plan) is None


@pytest.mark.parametrize(
    ("share", "first"), [(0.4, 1), (0.5, 2), (0.64, 3), (0.8, 4), (0.2, 0), (1.0, 5)]
)
def test_the_first_block_is_later_for_larger_budgets(share, first):
    assert first_block(share, 12) == first
