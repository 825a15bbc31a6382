# SPDX-License-Identifier: Apache-2.0
"""How fast: a clock for the training loop, and a comparison in which variants take turns."""

import time
from collections.abc import Callable

import jax
import numpy as np

from evit_jax.errors import InputError


def take_turns(
    variants: dict[str, Callable[[], object]],
    *,
    rounds: int = 10,
    seconds: float = 0.2,
    queued: bool = False,
    after_turn: Callable[[], object] = lambda: None,
) -> dict[str, np.ndarray]:
    """Times functions that return JAX arrays, after a call to compile and one to warm up.

    In each of `rounds` every variant has a turn, of as many calls as fit in about `seconds`; a
    round's figure is the mean of its calls. Every other round goes through them backwards, so that
    no variant always follows the same one and a slow drift of the machine favors none.

    Args:
      variants: name -> the function to time.
      queued: hand all calls of a turn to the device before awaiting any: what a device gets done
        while the host runs ahead. Else each is awaited before the next: how long one takes.
      after_turn: called after every turn, such as a progress bar's update.

    Returns:
      name -> (rounds,) float64, seconds a call.

    Raises:
      InputError: a result that cannot be awaited.
    """
    calls = {}
    for name, function in variants.items():
        await_result(name, function())
        calls[name] = max(1, round(seconds / time_calls(name, function)))
    figures = {name: [] for name in variants}
    for number in range(rounds):
        for name in reversed(variants) if number % 2 else variants:
            spent = time_calls(name, variants[name], calls[name], queued=queued)
            figures[name].append(spent)
            after_turn()
    return {name: np.asarray(values) for name, values in figures.items()}


def time_calls(
    name: str, function: Callable[[], object], calls: int = 1, *, queued: bool = False
) -> float:
    """Seconds a call, until the results are ready; arguments as in `take_turns`."""
    results = []
    start = time.perf_counter()
    for _ in range(calls):
        result = function()
        if queued:
            results.append(result)
        else:
            await_result(name, result)
    if queued:
        await_result(name, results)
    return (time.perf_counter() - start) / calls


def await_result(name: str, result: object) -> None:
    """Waits until all arrays of a result are there.

    Raises:
      InputError: it is not made of JAX arrays alone, or they were donated to another program; the
        clock could stop with the work unfinished.
    """
    leaves = jax.tree.leaves(result)
    wrong = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, jax.Array)]
    if wrong or not leaves:
        got = ", ".join(sorted(set(wrong))) or "nothing"
        raise InputError(f"{name} cannot be timed: it has to return JAX arrays, got {got}")
    if any(leaf.is_deleted() for leaf in leaves):
        raise InputError(
            f"{name} cannot be timed: it returned arrays that were donated to another program; "
            "return some that stay"
        )
    jax.block_until_ready(leaves)
