# SPDX-License-Identifier: Apache-2.0
"""Every chip's form is the same function; which one a program has depends on what it is for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import build_model, fused_gpu, fused_tpu, init_params
from evit_jax.models.attention import attention_branch
from evit_jax.models.layers import embed_patches, gelu
from evit_jax.runtime.forms import EXACT, HALF_PRECISION, SINGLE_PRECISION, Form
from evit_jax.tokens import pick

BATCH, WIDTH, HEADS = 2, 24, 3
FORMS = {
    "tpu": SINGLE_PRECISION["tpu"],
    "cuda": HALF_PRECISION["cuda"],
    "one head at a time": dataclasses.replace(SINGLE_PRECISION["tpu"], lanes=8),
    "two heads at a time": dataclasses.replace(SINGLE_PRECISION["tpu"], lanes=16),
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
@pytest.mark.parametrize("length", [5, 8, 11, 17])  # within, at and beyond the forms' limits
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


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("first", [None, 1])
def test_cudnns_kernel_takes_whole_blocks_without_weights(monkeypatch, first, weighted):
    taken = []

    def kernel(q, k, v, _):
        taken.append(q.shape)
        return jax.nn.dot_product_attention(q, k, v, scale=1.0)

    monkeypatch.setattr(fused_gpu, "kernel", kernel)
    monkeypatch.setattr(fused_gpu, "has_cudnn", lambda x, num_heads: True)
    x, kernels, biases, weight = inputs(9)
    weight = weight if weighted else None
    got, others = branch(Form(cudnn=True), first)(x, kernels, biases, weight)
    expected, parts = branch(EXACT, first)(x, kernels, biases, weight)
    assert taken == ([(BATCH, 9, HEADS, WIDTH // HEADS)] if first is None and not weighted else [])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)
    for name, part in parts.items():
        np.testing.assert_allclose(others[name], part, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_pallas_kernel_takes_blocks_of_models_that_ask_for_it(monkeypatch, weighted):
    interpreted = functools.partial(fused_tpu.attend.__wrapped__, interpret=True)
    monkeypatch.setattr(fused_tpu, "attend", interpreted)
    rng = np.random.default_rng(0)
    width, heads = 128, 2  # that fill the lanes of a TPU
    sides = (BATCH, 9, width), (width, 3 * width), (width, width), (3 * width,), (width,)
    x, *rest = (jnp.asarray(rng.normal(size=side), jnp.float32) for side in sides)
    kernels, biases = (rest[0] / 11, rest[1] / 11), tuple(rest[2:])
    weight = jnp.asarray(rng.choice([0, 0.5, 1, 3], (BATCH, 9)), jnp.float32) if weighted else None
    args = x, kernels, biases, weight
    settings = dict(num_heads=heads, first=None)
    expected, parts = attention_branch(*args, **settings)
    got, others = attention_branch(*args, **settings, pallas=True, form=Form(pallas=True))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)
    for name, part in parts.items():
        np.testing.assert_allclose(others[name], part, rtol=1e-5, atol=2e-5)
    without, _ = attention_branch(*args, **settings, pallas=False, form=Form(pallas=True))
    np.testing.assert_array_equal(without, expected)


@pytest.mark.parametrize("asked", [False, True])
def test_a_model_has_pallas_kernels_on_a_tpu_where_it_asks_for_them(asked):
    sizes = dict(image_size=32, patch_size=8, width=128, depth=3, num_heads=2, num_classes=10)
    model = build_model("vit", **sizes, keep_rate=0.5, layers=(1,), dtype="bfloat16", pallas=asked)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    logits = jax.jit(lambda params, images: model.apply({"params": params}, images)[0])
    lowered = logits.trace(params, images).lower(lowering_platforms=("tpu",)).as_text()
    # Not in the last block, in which the class token alone asks.
    assert lowered.count("tpu_custom_call") == (2 if asked else 0)


def shapes_of_exps(jaxpr):
    """The shapes of all exponentials, those inside of called functions too."""
    shapes = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "exp":
            shapes += [v.aval.shape for v in eqn.outvars]
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda value: hasattr(value, "eqns")):
            shapes += shapes_of_exps(inner) if hasattr(inner, "eqns") else []
    return shapes


def test_the_gradient_through_a_long_map_is_taken_from_its_rounded_form():
    x, kernels, biases, _ = inputs(11)
    form = dataclasses.replace(SINGLE_PRECISION["tpu"], lanes=8)

    def gradient(dtype, form):
        def loss(x):
            parts = jax.tree.map(lambda a: a.astype(dtype), (x, kernels, biases))
            y, _ = attention_branch(*parts, None, num_heads=HEADS, first=None, form=form)
            return jnp.sum(jnp.sin(y.astype(jnp.float32)))

        return np.asarray(jax.grad(loss)(x))

    exact = gradient(jnp.float32, EXACT)
    np.testing.assert_allclose(gradient(jnp.float32, form), exact, rtol=2e-5, atol=2e-5)
    # In half precision rounding the map costs little beside rounding everything else.
    plain = np.linalg.norm(gradient(jnp.bfloat16, EXACT) - exact)
    rounded = np.linalg.norm(gradient(jnp.bfloat16, form) - exact)
    assert 0 < plain < 0.05 * np.linalg.norm(exact)
    assert rounded < 1.5 * plain


@pytest.mark.parametrize(("lanes", "maps"), [(11, 1), (128, 1), (8, 3), (10, 3)])
def test_as_many_heads_attend_at_a_time_as_fill_the_lanes_where_tokens_exceed_them(lanes, maps):
    x, kernels, biases, _ = inputs(11)  # heads have a width of 8
    form = dataclasses.replace(SINGLE_PRECISION["tpu"], lanes=lanes)
    maps_made = shapes_of_exps(jax.make_jaxpr(branch(form))(x, kernels, biases, None))
    assert maps_made == [(BATCH, HEADS // maps, 11, 11)] * maps


def test_heads_that_do_not_divide_into_groups_leave_a_smaller_one():
    x, kernels, biases, _ = inputs(17)
    form = dataclasses.replace(SINGLE_PRECISION["tpu"], lanes=16)
    maps_made = shapes_of_exps(jax.make_jaxpr(branch(form))(x, kernels, biases, None))
    assert maps_made == [(BATCH, 2, 17, 17), (BATCH, 1, 17, 17)]
    expected, _ = branch(EXACT)(x, kernels, biases, None)
    got, _ = branch(form)(x, kernels, biases, None)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("size", "patch"), [((12, 8), (4, 4)), ((6, 12), (3, 6))])
def test_a_convolution_of_patches_is_their_linear_layer(size, patch):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(BATCH, *size, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3 * patch[0] * patch[1], WIDTH)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=WIDTH), jnp.float32)
    got = embed_patches(images, kernel, bias, patch, SINGLE_PRECISION["tpu"])
    expected = embed_patches(images, kernel, bias, patch)
    assert got.shape == (BATCH, size[0] // patch[0] * (size[1] // patch[1]), WIDTH)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_one_hot_product_picks_exactly_what_a_gather_does(fused):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, 9, WIDTH)), jnp.bfloat16)
    index = jnp.asarray([rng.permutation(9)[:5] for _ in range(BATCH)])
    shares = jnp.asarray(rng.random((BATCH, 9)), jnp.float32) if fused else None
    form = HALF_PRECISION["tpu"]
    got, expected = pick(x, index, shares, form), pick(x, index, shares)
    assert got.shape == (BATCH, 5 + fused, WIDTH)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[:, :5], expected[:, :5])
    if fused:  # summed in float32, in another order, then rounded to bfloat16
        a, b = (np.asarray(some[:, 5], np.float32) for some in (got, expected))
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-6)

    def loss(form):
        return lambda x: jnp.sum(jnp.sin(pick(x, index, shares, form).astype(jnp.float32)))

    a, b = (np.asarray(jax.grad(loss(f))(x), np.float32) for f in (form, EXACT))
    np.testing.assert_allclose(a, b, atol=0.03)  # gradients are bfloat16, too


def test_a_product_does_not_round_the_shares_of_the_fused_token():
    # In bfloat16 both shares are 0.1001, and nothing would be left of their difference.
    x = jnp.asarray([[[3.0], [1.0], [-1.0]]], jnp.bfloat16)
    shares = jnp.asarray([[0.0, 0.1003, 0.1001]], jnp.float32)
    index = jnp.zeros((1, 1), jnp.int32)
    got = jax.jit(pick, static_argnames="form")(x, index, shares, HALF_PRECISION["tpu"])
    np.testing.assert_allclose(np.asarray(got[0, :, 0], np.float32), [3, 2e-4], rtol=1e-2)

    def fused(x, shares):
        return jnp.sum(pick(x, index, shares, HALF_PRECISION["tpu"])[:, 1].astype(jnp.float32))

    # On a TPU float32 alone is not enough: its products are of bfloat16 unless told otherwise.
    program = jax.jit(jax.value_and_grad(fused, (0, 1))).trace(x, shares)
    text = program.lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all("precision = [HIGH, HIGH]" in line for line in products)


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
