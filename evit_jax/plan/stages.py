# SPDX-License-Identifier: Apache-2.0
"""Which token plan is trained when: a table of few stages, one compiled program each.

Nothing here knows of JAX; a plan comes from a function of the keep rate, or from a model's `plan`.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from evit_jax.errors import InputError
from evit_jax.plan.counts import Keep, check_rate


class Stage(NamedTuple):
    """From `step` on, until the next stage, each block keeps `keep`.

    `keep_rate` is the nominal rate for logs, None where counts were given instead of rates.
    `others` are further plans trained in the same steps, see `sandwich`. `coarse` is how many times
    as high and wide patches are, see `coarse_first`.
    """

    step: int
    keep_rate: float | None
    keep: Keep
    others: tuple[Keep, ...] = ()
    coarse: int = 1


def stages(
    planner: Callable[[float], Keep],
    keep_rate: float | None,
    *,
    start: int = 0,
    length: int = 0,
    rungs: int = 8,
) -> tuple[Stage, ...]:
    """The keep-rate warm-up as a table: few rows, one compiled program each.

    EViT lowers the rate from 1 (before step `start`) to its target (from `start + length` on) along
    a cosine, with a new rate every step (helpers.py:7-18). Followed exactly that would be up to 218
    programs, so the curve is rounded to `rungs` equal falls between 1 and the target, switching
    where the curve passes the middle between two of them. Rungs with equal counts are one stage.

    Args:
      planner: `remaining` -> what each block keeps, as `token_plan` takes it.
      keep_rate: the target rate, for the logs.
      start: first step of the fall.
      length: steps of the fall; 0 falls to the target at `start`.
      rungs: number of equal falls, at least 1.
    """
    if rungs < 1 or start < 0 or length < 0:
        raise InputError(
            "the keep-rate warm-up needs rungs >= 1, start >= 0 and length >= 0, "
            f"got {rungs}, {start} and {length}"
        )
    table: list[Stage] = []
    for rung in range(rungs + 1):
        step, remaining = 0, 1 - rung / rungs
        if rung:
            # (1 + cos(pi t / length)) / 2 is what remains of the fall after t steps.
            middle = 1 - (rung - 0.5) / rungs
            step = start + math.ceil(length * math.acos(2 * middle - 1) / math.pi)
        if table and table[-1].step == step:
            table.pop()  # it would not run for a single step
        rate = None if keep_rate is None else keep_rate + (1 - keep_rate) * remaining
        stage = Stage(step, rate, planner(remaining))
        if not table or table[-1].keep != stage.keep:
            table.append(stage)
    return tuple(table)


def sandwich(planner: Callable[[float], Keep], rates: Sequence[float]) -> tuple[Stage, ...]:
    """Every step trains the largest rate, the smallest and one of those between, drawn at random.

    That is the sandwich rule of universally slimmable networks (Yu and Huang 2019); afterwards one
    checkpoint serves all the rates. There is a stage, and a compiled program, for each rate between
    the two, all from step 0.

    Args:
      planner: keep rate -> what each block keeps.
      rates: at least two different keep rates.
    """
    rates = sorted({check_rate(rate) for rate in rates}, reverse=True)
    if len(rates) < 2:
        raise InputError(f"sandwich needs at least two different keep rates, got {rates}")
    largest, *between, smallest = rates
    return tuple(
        Stage(0, rate, planner(largest), tuple(planner(r) for r in dict.fromkeys((rate, smallest))))
        for rate in between or [smallest]
    )


def coarse_first(table: tuple[Stage, ...], factors: Sequence[int], steps: int) -> tuple[Stage, ...]:
    """The table with stages of larger patches, all kept, in the place of its beginning.

    Args:
      factors: how many times as high and wide patches are in each stage, such as (4, 2).
      steps: of each.

    Raises:
      InputError: a sandwich, which trains all of its rates from the first step.
    """
    if not factors or not steps:
        return table
    if table[0].others:
        raise InputError("a sandwich begins with all of its rates: set progressive.factors to ()")
    coarse = [Stage(i * steps, 1.0, (), coarse=factor) for i, factor in enumerate(factors)]
    end = len(factors) * steps
    later = (stage for stage in table if stage.step > end)
    return (*coarse, stage_at(table, end)._replace(step=end), *later)


def stage_at(table: tuple[Stage, ...], step: int, seed: int = 0) -> Stage:
    """The stage in which `step` (counted from 0) is taken.

    Among several that begin together it is drawn at random, as a function of seed and step.
    """
    latest = max(stage.step for stage in table if stage.step <= step)
    rows = [stage for stage in table if stage.step == latest]
    return rows[random.Random(f"{seed} {step}").randrange(len(rows))]


def open_table(
    model,
    plan: Mapping,
    *,
    start: int = 0,
    length: int = 0,
    rungs: int = 8,
    rates: Sequence[float] = (),
) -> tuple[Stage, ...]:
    """Which tokens are kept from which step on: a sandwich of rates, or the keep-rate warm-up.

    Args:
      model: as evaluated; its method `plan` counts tokens.
      plan: `counts.PLAN_FIELDS` -> their values, the arguments of that method.
      start, length, rungs: of the warm-up, see `stages`.
      rates: of a sandwich, see `sandwich`; () for none.

    Raises:
      InputError: a sandwich beside settings whose place it takes, or rates that change for a method
        that learns for one plan.
    """
    if plan["macs"] is not None:
        budget = {name: plan[name] for name in ("macs", "layers", "multiple_of")}
        keep_rate = model.rate_within(**budget)
    elif plan["keep_rates"] or plan["keep_rate"] or not any(model.keep):
        keep_rate = min(plan["keep_rates"] or [plan["keep_rate"] or 1.0])
    else:
        keep_rate = None  # counts decide
    warmup = stages(
        lambda remaining: model.plan(**plan, remaining=remaining),
        keep_rate,
        start=start,
        length=length,
        rungs=rungs,
    )
    if model.reducer.one_plan and (rates or len(warmup) > 1):
        raise InputError(
            f"what {type(model.reducer).__name__} learns is for one plan, so rates cannot change "
            "while it trains; leave out sandwich and keep_warmup (config.sandwich=(), "
            "config.keep_warmup.epochs=0, start_epoch=0)"
        )
    if not rates:
        return warmup
    if len(warmup) > 1 or any(plan[name] for name in ("keep_rates", "tokens", "macs")):
        raise InputError("a sandwich takes the place of keep_warmup, keep_rates, tokens, macs")
    return sandwich(lambda rate: plan_at(model, plan, rate), rates)


def plan_at(model, plan: Mapping, rate: float) -> Keep:
    """The run's plan with another keep rate."""
    return model.plan(**{**plan, "keep_rate": rate})


def completes(step: int, every: float, *, total: int) -> bool:
    """Whether this step ends a stretch of `every` steps, not always a whole number, or the run.

    With 0 only the run has an end.
    """
    return step == total or (every > 0 and step // every > (step - 1) // every)


def variants(model, plan: Mapping, rates: Sequence[float] = ()) -> dict:
    """Name -> model over the same parameters: each rate trained, or the one plan, and dense."""
    plans = {f"{rate:g}": plan_at(model, plan, rate) for rate in sorted(rates)}
    plans = plans or dict(reduced=model.keep)
    reduced = {name: model.clone(keep=keep) for name, keep in plans.items() if any(keep)}
    return reduced | dict(dense=model.clone(keep=()))
