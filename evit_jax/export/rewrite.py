# SPDX-License-Identifier: Apache-2.0
"""A function with some of its operations done otherwise, without touching the code it is of.

It is traced to a jaxpr, JAX's list of operations, and that is run with a rule for each operation
that is to be replaced.
"""

import contextlib
from collections.abc import Callable

import jax
from jax.extend.core import Literal

# Operations that call a list of operations once: their insides are run in their place.
CALLS = ("jit", "pjit", "closed_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")
NOTHING = contextlib.nullcontext()


def rewritten(function: Callable, rules: dict[str, Callable], *, plain: Callable = lambda x: x):
    """A function of arrays -> the same, with rules for some operations.

    Args:
      function: traced anew for each call's shapes and dtypes.
      rules: name of a primitive -> function(equation, inputs), which returns its results as a list,
        or None to leave it as it is.
      plain: a value as operations without a rule take it: arguments and what rules return may be of
        other kinds, as long as they have the shape and dtype of the array that they stand for.
    """

    def changed(*args):
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args, is_leaf=leaf)
        traced, out = jax.make_jaxpr(function, return_shape=True)(*shapes)
        flat = jax.tree.leaves(args, is_leaf=leaf)
        results = run(traced.jaxpr, traced.consts, flat, rules, plain)
        return jax.tree.unflatten(jax.tree.structure(out), map(plain, results))

    return changed


def constant(equation, inputs: list) -> bool:
    """Whether an operation has nothing but constants, and results of a size that is known."""
    sides = [side for variable in equation.outvars for side in variable.aval.shape]
    known = all(isinstance(side, int) for side in sides) and inputs  # the batch's size has none
    return bool(known) and not any(isinstance(value, jax.core.Tracer) for value in inputs)


def leaf(value) -> bool:
    """Whether something stands for an array."""
    return hasattr(value, "dtype")


def run(jaxpr, consts, args, rules: dict[str, Callable], plain: Callable, fold=False) -> list:
    """The results of a list of operations, of which those that no result needs are left out.

    Args:
      fold: operations on constants alone are done at once, and their results are constants.
    """
    needed, equations = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            equations.insert(0, equation)
            needed |= {v for v in equation.invars if not isinstance(v, Literal)}

    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def value(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in equations:
        inputs = [value(variable) for variable in equation.invars]
        name, results = equation.primitive.name, None
        if name in CALLS:
            inner = equation.params["jaxpr" if "jaxpr" in equation.params else "call_jaxpr"]
            constants = getattr(inner, "consts", ())
            results = run(getattr(inner, "jaxpr", inner), constants, inputs, rules, plain, fold)
        elif name in rules:
            results = rules[name](equation, inputs)
        if results is None:
            with jax.ensure_compile_time_eval() if fold and constant(equation, inputs) else NOTHING:
                results = equation.primitive.bind(*map(plain, inputs), **equation.params)
            results = results if equation.primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return [value(variable) for variable in jaxpr.outvars]
