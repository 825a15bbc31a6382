# SPDX-License-Identifier: Apache-2.0
"""Plans that lose a fixed share of the tokens per block, from some block on.

One number, the first block that reduces, then decides the shape, and the budget the share. Counts
learned on ImageNet have this shape (DiffRate), and such plans are as good as they are.
"""

import bisect
from collections.abc import Callable, Sequence

from evit_jax.plan.counts import Keep, rate_within

# Share of the dense model's multiply-accumulates -> first reducing block over depth: what changed
# the outputs of two ViT-Ti least (DeiT and AugReg), 1 to 4 of 12.
FIRST = ((0.4, 1 / 12), (0.5, 2 / 12), (0.64, 3 / 12), (0.8, 4 / 12))


def ramp(
    patches: int,
    layers: Sequence[int],
    depth: int,
    *,
    first: int,
    rate: float,
    last: int | None = None,
    smallest: Callable[[int], int] = lambda n: 1,
) -> Keep:
    """The counts of all blocks; each reducing one keeps `rate` of what it gets, the first its root.

    Args:
      patches: patch tokens that enter block 0.
      layers: blocks that may reduce; those before `first` do not.
      depth: number of blocks.
      rate: in (0, 1].
      last: what block depth - 1 keeps at most; None: no other than the others.
      smallest: n -> the fewest patch tokens the method can keep of n.
    """
    keep, n, power = [], patches, 0.5
    for block in range(depth):
        count = n
        if block in layers and block >= first:
            count = max(round(n * rate**power), smallest(n), 1)
            power = 1.0
        if block == depth - 1 and last is not None and block in layers:
            count = max(min(count, last), smallest(n))
        keep.append(count if count < n else None)
        n = count
    return tuple(keep)


def ramp_within(
    macs: float, cost: Callable[[Keep], int], plan: Callable[[float], Keep]
) -> Keep | None:
    """The plan of the largest rate that costs at most so much, None where none does.

    Args:
      macs: the budget, multiply-accumulates of one image.
      cost: plan -> those of it.
      plan: rate -> plan, such as `ramp` of all but the rate.
    """
    if cost(plan(1e-9)) > macs:
        return None
    return plan(rate_within(macs, lambda rate: cost(plan(rate))))


def first_block(share: float, depth: int) -> int:
    """Where to begin for a share of the dense model's multiply-accumulates: see FIRST."""
    shares = [share for share, _ in FIRST]
    at = min(max(bisect.bisect(shares, share), 1), len(FIRST) - 1)
    (low, begin), (high, end) = FIRST[at - 1], FIRST[at]
    begin = begin + (share - low) / (high - low) * (end - begin)
    return min(max(round(depth * begin), 0), depth // 2)
