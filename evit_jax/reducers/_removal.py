# SPDX-License-Identifier: Apache-2.0
"""The schedule of methods that remove as many patches in every block (r, as in ToMe)."""

from collections.abc import Callable

from evit_jax.errors import InputError
from evit_jax.plan.counts import Keep


def check_removal(name: str, r: int) -> None:
    """Raises InputError for a number of tokens that no block can remove."""
    if r < 0:
        raise InputError(f"{name}'s r is a number of tokens from 0 up, got {r}")


def remove_each(
    r: int, patches: int, layers: tuple[int, ...], depth: int, smallest: Callable[[int], int]
) -> Keep:
    """What each block keeps when each of `layers` removes r tokens.

    Args:
      patches: patch tokens that enter block 0.
      smallest: n -> the fewest patch tokens that a block may keep of n.
    """
    keep, n = [], patches
    for block in range(depth):
        count = max(n - r, min(smallest(n), n)) if block in layers else n
        keep.append(count if count < n else None)
        n = count
    return tuple(keep)
