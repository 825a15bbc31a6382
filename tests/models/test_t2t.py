# SPDX-License-Identifier: Apache-2.0
"""T2T-ViT against its authors' code, in files of tests/scripts/t2t_fixtures.py, and its parts."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, create_model, init_params, preprocessing
from evit_jax.models.likeness import looks_like
from evit_jax.models.t2t import VARIANTS, orthogonal, sinusoids, windows
from evit_jax.plan.flops import macs
from evit_jax.weights.files import read_tensors
from evit_jax.weights.names import tensors_from_params

FILES = Path(__file__).parents[1] / "fixtures" / "t2t"
SIZES = dict(image_size=64, width=16, depth=4, num_heads=2, num_classes=5, token_width=6)
FIXED = ("pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w")
every_layer = pytest.mark.parametrize("layer", ["performer", "transformer"])


def load(layer, **settings):
    settings = SIZES | dict(token_layer=layer) | settings
    return create_model("t2t", weights=str(FILES / f"{layer}.pth.tar"), **settings)


def images():
    return np.load(FILES / "images.npy").astype(np.float32)


def close(value, reference, tolerance):
    """As vectors, relative to the length of the reference."""
    return np.linalg.norm(value - reference) <= tolerance * np.linalg.norm(reference)


@every_layer
@pytest.mark.parametrize("keep_rate", [1, 0.7])
def test_logits_gradients_and_kept_tokens_are_those_of_the_authors_code(layer, keep_rate):
    model, params = load(layer, keep_rate=keep_rate)
    with np.load(FILES / f"{layer}.npz") as file:
        evit = "evit/" if keep_rate < 1 else ""
        expected = {k.removeprefix(evit): v for k, v in file.items() if k.startswith(evit)}

    @jax.jit
    def run(params):
        def loss_of(params):
            logits, out = model.apply({"params": params}, images())
            return jnp.sum(logits**2), (logits, out)

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    (_, (logits, out)), grads = run(params)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)
    grads = tensors_from_params(grads, model)
    for name, gradient in grads.items():
        if name in FIXED:
            assert not gradient.any()
        else:
            assert close(gradient, expected[f"grad/{name}"], 1e-5), name
    for block in (1, 2, 3) if evit else ():
        order = np.argsort(-out["cls_attention"][block][:, 1:], axis=1, kind="stable")
        kept = expected[f"kept_{block}"]
        np.testing.assert_array_equal(order[:, : kept.shape[1]], kept)


@every_layer
def test_files_of_the_authors_come_out_as_they_went_in(layer):
    model, params = load(layer)
    saved, file = tensors_from_params(params, model), read_tensors(FILES / f"{layer}.pth.tar")
    assert saved.keys() == file.keys()
    for name, array in saved.items():
        np.testing.assert_array_equal(array, file[name].astype(np.float32), err_msg=name)
    assert looks_like(saved, model) == ""


def test_fixed_positions_are_the_authors():
    expected = np.load(FILES / "positions.npy")
    np.testing.assert_allclose(sinusoids(197, 384)[:, ::14, :24], expected, atol=1e-6)


def test_positions_of_another_size_are_resized():
    model, params = load("performer", image_size=(64, 96))
    assert params["pos_embed"].shape == (1, 25, 16)
    logits, _ = jax.jit(model.apply)({"params": params}, jnp.ones((1, 64, 96, 3)))
    assert np.isfinite(logits).all()


def test_windows_overlap_and_have_channels_slowest():
    x = jnp.arange(2 * 6 * 4 * 3.0).reshape(2, 6, 4, 3)
    got = windows(x, 3, 2, 1)
    assert got.shape == (2, 3, 2, 27)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = padded[:, 2:5, 2:5].transpose(0, 3, 1, 2).reshape(2, 27)
    np.testing.assert_array_equal(got[:, 1, 1], expected)


def test_random_features_are_orthogonal():
    w = orthogonal(jax.random.key(0), (8, 16))
    np.testing.assert_allclose(w @ w.T, 8 * np.eye(8), atol=1e-5)


@pytest.mark.parametrize(
    "layer", ["performer", pytest.param("transformer", marks=pytest.mark.slow)]
)
def test_half_precision_changes_little_and_recomputing_nothing(layer):
    model = build_model("t2t", **SIZES | dict(image_size=32, token_layer=layer, depth=1))
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    pixels = images()[:, :32, :32]

    @functools.partial(jax.jit, static_argnums=0)
    def trained(model, params):
        def loss_of(params):
            rngs = dict(dropout=jax.random.key(0))
            logits, _ = model.apply({"params": params}, pixels, train=True, rngs=rngs)
            return jnp.sum(logits), logits

        return jax.grad(loss_of, has_aux=True)(params)

    (grads, logits), again = trained(model, params), trained(model.clone(remat=True), params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, again, (grads, logits))
    evaluate = jax.jit(lambda model, p: model.apply({"params": p}, pixels)[0], static_argnums=0)
    exact, half = (evaluate(m, params) for m in (model, model.clone(dtype=jnp.bfloat16)))
    # A performer drops while training, whatever the rates of the blocks.
    assert np.allclose(logits, exact) == (layer == "transformer")
    # bfloat16 has 8 bits of mantissa, so a relative error of 2^-8 per operation is its nature.
    np.testing.assert_allclose(half, exact, atol=0.03)
    assert half.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("t2t_vit_7", 1.1e9),
        ("t2t_vit_10", 1.5e9),
        ("t2t_vit_12", 1.8e9),
        ("t2t_vit_14", 4.8e9),
        ("t2t_vit_19", 8.5e9),
        ("t2t_vit_24", 13.8e9),
        ("t2t_vit_t_14", 6.1e9),
        ("t2t_vit_t_19", 9.8e9),
        ("t2t_vit_t_24", 15.0e9),
    ],
)
def test_published_sizes_and_costs(name, cost):
    model, one = build_model(name), build_model(name, depth=1)
    params = jax.eval_shape(lambda key: init_params(one, key), jax.random.key(0))
    whole, block = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, params["blocks_0"])
    )
    assert whole + (model.depth - 1) * block == VARIANTS[name]["parameters"]
    assert macs(model) == pytest.approx(cost, rel=0.02, abs=5e7)  # as rounded there
    assert preprocessing(name).crop == 0.9


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(patch_size=8), "patch_size is 16"),
        (dict(token_layer="former"), "did you mean"),
        (dict(token_width=1), "from 2 up"),
    ],
)
def test_what_cannot_be_made_is_refused(changes, text):
    with pytest.raises(InputError, match=text):
        build_model("t2t", **SIZES | changes)
