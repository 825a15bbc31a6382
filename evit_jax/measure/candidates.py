# SPDX-License-Identifier: Apache-2.0
"""Reduction methods by budgets and plans: the models to compare, and what cannot be one."""

import dataclasses
from collections.abc import Sequence

from evit_jax.errors import InputError, check_name
from evit_jax.models import build_model
from evit_jax.plan.counts import PLAN_FIELDS, Keep
from evit_jax.plan.files import read_plan
from evit_jax.plan.flops import macs
from evit_jax.reducers import create_reducer, known_reducers, written
from evit_jax.training.trained import ModelSpec, reduces

PLANS = ("own", "constant")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A method with a plan within a budget; without a model where there is no such plan."""

    method: str  # the reducer, as a user writes it
    plan: str  # one of PLANS, or a plan file's path
    budget: float | None  # multiply-accumulates of an image; None: a file's plan exceeds them all
    model: object | None = None  # Linen module; the dense one where nothing has to be reduced
    reason: str = ""  # why there is no model, in one line

    @property
    def name(self) -> str:
        return f"{self.method} {self.plan} {self.budget}"

    def refuse(self, error: InputError) -> "Candidate":
        """The same without a model."""
        return dataclasses.replace(self, model=None, reason=" ".join(str(error).split()))


def sizes(spec: ModelSpec) -> dict:
    """The settings of a model without those of its plan."""
    return {name: value for name, value in spec.settings.items() if name not in PLAN_FIELDS}


def dense_twin(spec: ModelSpec):
    """The model that reduces nothing, with a reducer that has no parameters."""
    return build_model(**sizes(spec) | dict(reducer="evit", keep_rate=1))


def candidates(
    spec: ModelSpec,
    dense,
    *,
    methods: Sequence[str] = (),
    budgets: Sequence[float],
    plans: Sequence[str] = PLANS,
    files: Sequence[str] = (),
    layers: Sequence[int] | None = None,
) -> tuple[list[Candidate], list[str]]:
    """Every method with every plan at every budget, then the plan files'.

    Args:
      dense: from `dense_twin`.
      methods: reducers; default all known ones but those that meet no budget by any plan.
      budgets: multiply-accumulates of one image.
      layers: reducing blocks; default each reducer's own, or the run's for the run's reducer.

    Returns:
      (the candidates, the methods that were left out).

    Raises:
      InputError: an unknown method or plan, or a plan file that does not fit the model.
    """
    for plan in plans:
        check_name("plan", plan, PLANS)
    found, left_out = [], []
    for method in methods or known_reducers():
        tried = [
            candidate(spec, dense, method, plan, budget, layers)
            for budget in budgets
            for plan in plans
        ]
        if methods or any(one.model is not None for one in tried):
            found += tried
        else:
            left_out.append(method)
    return found + [of_file(spec, dense, path, budgets) for path in files], left_out


def candidate(
    spec: ModelSpec, dense, method: str, plan: str, budget: float, layers: Sequence[int] | None
) -> Candidate:
    """One of them; arguments as for `candidates`."""
    base = dense.clone(reducer=create_reducer(method))
    if layers is None and method == spec.reducer:
        layers = spec.layers
    one = Candidate(method, plan, budget)
    try:
        keep = plan_within(base, plan, budget, layers)
    except InputError as error:
        return one.refuse(error)
    return dataclasses.replace(one, model=reduced(dense, base.clone(keep=keep)))


def plan_within(model, plan: str, budget: float, layers: Sequence[int] | None) -> Keep:
    """The plan of a method, one of PLANS, that costs at most the budget."""
    if plan == "own":
        return model.plan(macs=budget, layers=layers)
    return model.plan(keep_rate=model.rate_within(budget, layers=layers), layers=layers)


def reduced(dense, model):
    """The model, or the dense one if it keeps everything: so that equal models compare as equal."""
    return model if reduces(model) else dense


def of_file(spec: ModelSpec, dense, path: str, budgets: Sequence[float]) -> Candidate:
    """The plan in a JSON file, in the smallest budget that holds it.

    Raises:
      InputError: no such file, something else in it, or counts that do not fit the model.
    """
    plan = read_plan(path)
    try:
        model = build_model(**sizes(spec) | plan)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    holding = [budget for budget in budgets if macs(model) <= budget]
    model = reduced(dense, model)
    return Candidate(written(plan["reducer"]), path, min(holding, default=None), model)
