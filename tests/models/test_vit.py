# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest

from evit_jax.models import build_model, init_params

SIZES = dict(image_size=24, patch_size=6, width=16, depth=4, num_heads=2, num_classes=5)
IMAGES = np.random.default_rng(0).normal(size=(12, 24, 24, 3)).astype(np.float32)


def tiny(**settings):
    """create_model("vit") with its parameters drawn in one compiled program."""
    model = build_model("vit", **SIZES | settings)
    return model, jax.jit(lambda key: init_params(model, key))(jax.random.key(0))


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(keep_rate=0.5, distilled=True),
        dict(keep_rates=(1, 0.7, 1, 0.6)),
        dict(reducer="tome:r=3"),
    ],
    ids=["dense", "distilled", "reducing last", "tome"],
)
def test_the_logits_are_those_of_the_last_blocks_tokens(settings):
    model, params = tiny(**settings)
    _, out = jax.jit(model.apply)({"params": params}, IMAGES)
    last = out["blocks"][-1]
    assert last.shape[1] == model.tokens_per_block[-1]
    tokens = last[:, : model.prefix]
    centerd = tokens - tokens.mean(-1, keepdims=True)
    normed = centerd / np.sqrt((centerd**2).mean(-1, keepdims=True) + 1e-6)
    expected = normed * params["norm"]["scale"][None, None] + params["norm"]["bias"][None, None]
    np.testing.assert_allclose(out["features"], expected, atol=1e-5)


def test_logits_alone_cost_less_than_all_there_is():
    model, params = tiny(keep_rate=0.5)

    def flops(function):
        return jax.jit(function).lower(params, IMAGES).compile().cost_analysis()["flops"]

    logits = flops(lambda params, images: model.apply({"params": params}, images)[0])
    everything = flops(lambda params, images: model.apply({"params": params}, images))
    mlp = 2 * len(IMAGES) * model.tokens_per_block[-1] * 2 * model.width * model.hidden
    assert everything - logits > 0.8 * mlp  # the last block's MLP, but for the class token
