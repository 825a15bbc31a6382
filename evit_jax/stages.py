# SPDX-License-Identifier: Apache-2.0
"""What a training run trains and compares, from its config: stages, stretches, variants."""

from collections.abc import Callable

from evit_jax import plan
from evit_jax.errors import InputError


def open_table(model, config, to_steps: Callable[[float], int]) -> tuple[plan.Stage, ...]:
    """Which tokens are kept from which step on: a sandwich of rates, or the keep-rate warm-up.

    Args:
      model: as trained in the end; its method `plan` counts tokens.
      config: a run's, see configs/common.py.
      to_steps: epochs -> steps.

    Raises:
      InputError: a sandwich beside settings whose place it takes.
    """
    rates = {name: config.model[name] for name in ("keep_rate", "layers", "keep_rates", "tokens")}
    by_rate = rates["keep_rates"] or rates["keep_rate"] or not any(model.keep)  # else by counts
    warmup = plan.stages(
        lambda left: model.plan(**rates, left=left),
        min(rates["keep_rates"] or [rates["keep_rate"] or 1.0]) if by_rate else None,
        start=to_steps(config.keep_warmup.start_epoch),
        length=to_steps(config.keep_warmup.epochs),
        rungs=config.keep_warmup.rungs,
    )
    if not config.sandwich:
        return warmup
    if len(warmup) > 1 or rates["keep_rates"] or rates["tokens"]:
        raise InputError("a sandwich takes the place of keep_warmup, keep_rates and tokens")
    layers = config.model.layers
    return plan.sandwich(lambda rate: model.plan(keep_rate=rate, layers=layers), config.sandwich)


def completes(step: int, every: float, *, total: int) -> bool:
    """Whether this step ends a stretch of `every` steps, not always a whole number, or the run.

    With 0 only the run has an end.
    """
    return step == total or (every > 0 and step // every > (step - 1) // every)


def variants(model, config) -> dict:
    """Name -> model over the same parameters: each rate trained, or the one plan, and dense."""
    layers = config.model.layers
    plans = {f"{r:g}": model.plan(keep_rate=r, layers=layers) for r in sorted(config.sandwich)}
    plans = plans or dict(reduced=model.keep)
    reduced = {name: model.clone(keep=keep) for name, keep in plans.items() if any(keep)}
    return reduced | dict(dense=model.clone(keep=()))
