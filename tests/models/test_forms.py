# SPDX-License-Identifier: Apache-2.0
"""Every chip's form is the same function; which one a program has depends on what it is for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models.attention import attention_branch
from evit_jax.models.layers import gelu
from evit_jax.runtime.forms import EXACT, HALF_PRECISION, SINGLE_PRECISION, Form

BATCH, WIDTH, HEADS = 2, 24, 3
FORMS = {
    "tpu": SINGLE_PRECISION["tpu"],
    "cuda": HALF_PRECISION["cuda"],
    "halved": dataclasses.replace(HALF_PRECISION["tpu"], halved=(5, 11)),
    "tiled": Form(tile=8),
}


def inputs(length):
    """x, kernels, biases and weights of keys, far from uniform attention."""
    rng = np.random.default_rng(length)
    sides = (BATCH, length, WIDTH), (WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (3 * WIDTH,), (WIDTH,)
    x, *rest = (jnp.asarray(rng.normal(size=side), jnp.float32) for side in sides)
    weight = jnp.asarray(rng.choice([0, 0.5, 1, 3], (BATCH, length)), jnp.float32)
    return x, (rest[0] / 3, rest[1] / 3), tuple(rest[2:]), weight


def branch(form, first=None):
    return functools.partial(attention_branch, num_heads=HEADS, first=first, form=form)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("first", [None, 1])
@pytest.mark.parametrize("length", [5, 8, 11, 12])  # within, at and beyond the forms' limits
@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_the_exact_attention(name, length, first, weighted):
    x, kernels, biases, weight = inputs(length)
    weight = weight if weighted else None
    expected, parts = branch(EXACT, first)(x, kernels, biases, weight)
    got, others = branch(FORMS[name], first)(x, kernels, biases, weight)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)
    for part in ("q", "k", "v"):
        np.testing.assert_allclose(others[part], parts[part], rtol=1e-5, atol=2e-6)
    row, exact = (jax.nn.softmax(some["row"]) for some in (others, parts))
    np.testing.assert_allclose(row, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_has_the_exact_gradient(name):
    x, kernels, biases, _ = inputs(9)

    def loss(form, *args):
        y, parts = branch(form)(*args, None)
        row = jax.nn.softmax(parts["row"])
        return jnp.sum(jnp.sin(y)) + jnp.sum(row**2) + jnp.sum(jnp.cos(parts["v"]))

    args = x, kernels, biases
    exact, got = (jax.grad(loss, (1, 2, 3))(form, *args) for form in (EXACT, FORMS[name]))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(got), strict=True):
        # Sums of a few hundred terms of size 1, in another order.
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4)


def test_half_of_the_heads_attend_at_a_time_only_where_that_pays():
    for length, maps in ((5, 1), (6, 2), (11, 2), (12, 1)):
        x, kernels, biases, _ = inputs(length)
        jaxpr = jax.make_jaxpr(branch(FORMS["halved"]))(x, kernels, biases, None)
        exponentials = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "exp"]
        assert len(exponentials) == maps, length


def test_the_gelu_by_tanh_differs_by_less_than_half_precision_shows():
    x = jnp.linspace(-6, 6, 2001)
    assert np.abs(jax.nn.gelu(x, approximate=True) - gelu(x)).max() < 5e-4


@pytest.mark.parametrize(
    ("platform", "dtype", "tanh"),
    [
        ("cpu", "bfloat16", False),
        ("tpu", "bfloat16", True),
        ("cuda", "bfloat16", True),
        ("tpu", "float32", False),
        ("cuda", "float32", False),
    ],
)
def test_a_program_has_the_form_of_the_chip_that_it_is_for(platform, dtype, tanh):
    x = jax.ShapeDtypeStruct((4, 8), dtype)
    lowered = jax.jit(gelu).trace(x).lower(lowering_platforms=(platform,))
    assert ("stablehlo.tanh" in lowered.as_text()) == tanh


def test_a_program_for_any_platform_keeps_every_form():
    x = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    text = jax.jit(gelu).trace(x).lower(lowering_platforms=("cpu", "tpu")).as_text()
    assert "stablehlo.tanh" in text
    assert "stablehlo.case" in text
