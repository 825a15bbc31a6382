# SPDX-License-Identifier: Apache-2.0
"""Token counts within a latency budget, which only measuring on the device can tell.

Latency is a step function of the tokens: a tile of the device that is nearly empty costs as much as
a full one, and some counts are slower than larger ones. So no formula is asked, and plans beside
the one that just fits are measured too. Every plan is a program to compile, which takes most of the
time: ten of them are made, up to sixteen on a machine that is not steady.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from evit_jax.errors import InputError
from evit_jax.measure.programs import cast, inference
from evit_jax.measure.timing import take_turns
from evit_jax.plan.counts import Keep
from evit_jax.plan.flops import macs
from evit_jax.runtime.parallel import DataParallel

RATES = tuple(percent / 100 for percent in range(100, 0, -1))
PROGRAMS = 10  # compiled on a steady machine: dense, the halvings of RATES, and neighbors
MOST = 16  # where plans took another time in turns than alone

# Plans -> for each of them the seconds of several runs, in which the plans took turns.
Measure = Callable[[Sequence[Keep]], Sequence[np.ndarray]]


class Measured(NamedTuple):
    """A plan and how long a batch takes with it."""

    keep_rate: float
    keep: Keep  # also what `tokens` of create_model takes
    tokens: tuple[int, ...]  # after each block, prefix included
    macs: int  # of one image
    milliseconds: float  # of a batch, the median
    lowest: float
    highest: float


def fit_latency(
    model,
    params: dict,
    *,
    batch_size: int,
    milliseconds: float,
    layers: Sequence[int] | None = None,
    multiple_of: int = 1,
    measure: Measure | None = None,
):
    """The plan that keeps the most tokens of those that were measured within the budget.

    Candidates are the different plans at whole percents of the keep rate. The dense model is
    measured first; halving finds about where the budget is met, as if fewer tokens never took
    longer; then the plans around that place are compiled, most of them with more tokens, and all
    programs take turns. Only what they take there counts. On a steady machine the next larger
    candidate is always among them.

    Args:
      model: a model of this package; what it keeps so far does not matter.
      params: its parameters; their values do not matter.
      batch_size: images at a time.
      milliseconds: the budget, for one batch, its result awaited.
      layers: reducing blocks; default the reducer's own.
      multiple_of: rounds tokens up to a multiple, see `plan.round_up`.
      measure: how plans are timed; default `stopwatch` on the first device.

    Returns:
      (model with that plan, a `Measured` for every plan that was timed, most tokens first).

    Raises:
      InputError: a budget that no candidate meets, or an argument out of range.
    """
    if isinstance(milliseconds, bool) or not milliseconds > 0:
        raise InputError(f"the latency budget must be above 0 milliseconds, got {milliseconds}")
    rates: dict[Keep, float] = {}
    for rate in RATES:
        keep = model.plan(keep_rate=rate, layers=layers, multiple_of=multiple_of)
        rates.setdefault(keep, rate)
    plans = list(rates)
    measure = measure or stopwatch(model, params, batch_size=batch_size)
    seen: dict[int, Measured] = {}

    def look(*indices: int) -> None:
        runs = measure([plans[index] for index in indices])
        for index, seconds in zip(indices, runs, strict=True):
            variant = model.clone(keep=plans[index])
            figures = (1000 * float(of(seconds)) for of in (np.median, np.min, np.max))
            about = rates[variant.keep], variant.keep, variant.tokens_per_block, macs(variant)
            seen[index] = Measured(*about, *figures)

    def fits(index: int) -> bool:
        look(index)
        return seen[index].milliseconds <= milliseconds

    first = first_true(fits, -1, len(plans))
    near = (first, first + 1, *reversed(range(first)))
    new = [index for index in near if index < len(plans) and index not in seen]
    look(*sorted([*seen, *new[: max(PROGRAMS - len(seen), 0)]]))
    while True:
        fitting = (index for index in seen if seen[index].milliseconds <= milliseconds)
        best = min(fitting, default=len(plans))
        above = max((index for index in seen if index < best), default=-1)
        if best - above == 1 or len(seen) >= MOST:
            break
        # The machine was slower or faster when the plans were alone: halve what is open now.
        look(*(index for index in (above, (above + best) // 2, best) if index < len(plans)))
    if best < len(plans):
        return model.clone(keep=plans[best]), tuple(seen[index] for index in sorted(seen))
    fastest = min(seen.values(), key=lambda row: row.milliseconds)
    raise InputError(
        f"no plan with these layers was measured within {milliseconds:g} ms at batch size "
        f"{batch_size}; the fastest took {fastest.milliseconds:.4g} ms, at keep rate "
        f"{fastest.keep_rate:g}"
    )


def first_true(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The first index between low and high, both excluded, from which on it holds; else high.

    The first one is asked first, then halving goes on as if it held for no index before one for
    which it does not.
    """
    middle = low + 1
    while high - low > 1:
        low, high = (low, middle) if holds(middle) else (middle, high)
        middle = (low + high) // 2
    return high


def stopwatch(
    model, params: dict, *, batch_size: int, rounds: int = 10, seconds: float = 0.2
) -> Measure:
    """Times plans of a model on the first device, with the programs that the benchmark times.

    Each plan is compiled once, when first asked for. Each call is awaited before the next one.
    Images are random, normalized and on the device.

    Args:
      model, params, batch_size: as for `fit_latency`.
      rounds, seconds: as for `timing.take_turns`.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(f"batch_size must be a whole number from 1 up, got {batch_size!r}")
    devices = DataParallel(jax.devices()[:1])
    shape = (batch_size, *model.image_size, 3)
    params = cast(params, model.dtype, devices)
    images = devices.init(lambda key: jax.random.normal(key, shape), jax.random.key(0))

    @functools.cache
    def program(keep: Keep) -> Callable[[], object]:
        return inference(model.clone(keep=keep), params, images, devices).call

    def measure(keeps: Sequence[Keep]) -> list[np.ndarray]:
        variants = {str(keep): program(keep) for keep in keeps}
        return list(take_turns(variants, rounds=rounds, seconds=seconds).values())

    return measure
