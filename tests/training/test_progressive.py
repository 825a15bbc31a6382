# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.plan.stages import Stage
from evit_jax.training import report, steps
from evit_jax.training.progressive import (
    check_factors,
    coarse_images,
    coarse_model,
    coarse_params,
    stage_models,
)
from tests.training.test_steps import OPTIMIZER, make_batch, make_recipe

SIZES = dict(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, num_classes=3)
MODEL = build_model("vit", **SIZES, keep_rate=0.5)


def test_a_coarse_patch_is_every_nth_pixel_of_a_larger_one_through_the_same_kernel():
    """A model of patches of 8 pixels with the dilated kernel, and means of four positions."""
    params = init_params(MODEL, jax.random.key(0))
    coarse = coarse_model(MODEL, 2)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    seen = coarse_params(params, coarse)
    logits, out = coarse.apply(dict(params=seen), coarse_images(images, coarse))

    kernel = params["patch_embed"]["kernel"]
    dilated = np.zeros((8, 8, 3, 16), np.float32)
    dilated[::2, ::2] = kernel.reshape(4, 4, 3, 16)
    embed = params["patch_embed"] | dict(kernel=dilated.reshape(-1, 16))
    positions = np.asarray(params["pos_embed"])
    means = positions[:, 1:].reshape(1, 2, 2, 2, 2, 16).mean(axis=(2, 4)).reshape(1, 4, 16)
    np.testing.assert_allclose(means[0, 2], positions[0, [9, 10, 13, 14]].mean(axis=0), rtol=1e-6)
    large = build_model("vit", **SIZES | dict(patch_size=8))
    whole = params | dict(patch_embed=embed)
    whole["pos_embed"] = np.concatenate([positions[:, :1], means], axis=1)
    expected, other = large.apply(dict(params=whole), images)
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    np.testing.assert_allclose(out["dense"], other["dense"], rtol=1e-4, atol=1e-5)
    assert coarse_params(params, MODEL) is params


@pytest.mark.parametrize("backbone", ["vit", pytest.param("lvvit", marks=pytest.mark.slow)])
def test_a_stage_of_coarse_patches_trains_all_weights_on_fewer_tokens(backbone):
    more = dict(filters=4) if backbone == "lvvit" else {}
    model = build_model(backbone, **SIZES, **more, keep_rate=0.5, layers=(1,))
    stage = Stage(0, 1.0, (), coarse=2)
    (trained,) = stage_models(model, stage)
    assert trained.tokens_per_block == (5, 5)
    assert report.stage_line(model, stage) == "tokens 5 x2"
    state = steps.init_state(init_params(model, jax.random.key(0)), OPTIMIZER, ema=False)
    step = jax.jit(
        lambda state, batch: steps.train_step(
            state, batch, {}, models=(trained,), recipe=make_recipe(ema_decay=0.0)
        )
    )
    after, figures = step(state, make_batch())
    assert np.isfinite(float(figures["loss"]))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state["params"], after["params"])
    assert moved["pos_embed"]
    assert moved["patch_embed"]["kernel" if backbone == "vit" else "conv1"]


def test_factors_that_do_not_fit_are_refused():
    check_factors(MODEL, (2, 4), epochs=1.0, token_loss=0.0)
    check_factors(MODEL, (), epochs=0.0, token_loss=1.0)
    with pytest.raises(InputError, match="must divide the grid of patches"):
        check_factors(MODEL, (3,), epochs=1.0, token_loss=0.0)
    for factor in (1, 0.5):
        with pytest.raises(InputError, match="whole numbers above 1"):
            check_factors(MODEL, (factor,), epochs=1.0, token_loss=0.0)
    bias = build_model("beit", **SIZES)
    with pytest.raises(InputError, match="other weights for coarse patches"):
        check_factors(bias, (2,), epochs=1.0, token_loss=0.0)
    for factors, epochs in (((2,), 0.0), ((), 1.0)):
        with pytest.raises(InputError, match="go together"):
            check_factors(MODEL, factors, epochs=epochs, token_loss=0.0)
    with pytest.raises(InputError, match=r"distill\.tokens compares every patch"):
        check_factors(MODEL, (2,), epochs=1.0, token_loss=0.5)
