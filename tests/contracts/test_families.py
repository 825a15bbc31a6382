# SPDX-License-Identifier: Apache-2.0
"""What every family of Vision Transformers keeps to when its tokens are reduced.

A model of each, as small as it goes, with all parameters random.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import build_model, init_params
from evit_jax.tokens import Reducer, drop

NAMES = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_siglip_224",
    "vit_little_patch16_reg1_gap_256",
    "aimv2_large_patch14_224",
    "beit3_base_patch16_224",
    "eva02_base_patch14_224",
    "vit_small_plus_patch16_dinov3",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_pe_core_tiny_patch16_384",
    "beit_base_patch16_224",
    "lvvit_t",
    "t2t_vit_7",
)
SIZES = dict(image_size=(16, 20), patch_size=4, width=32, depth=2, num_heads=2, num_classes=0)
OTHER_SIZES = dict(t2t_vit_7=dict(image_size=(64, 80), patch_size=16, token_width=8))
PATCHES, BATCH = 20, 2
# Method -> its spec, and that for models without a class token.
METHODS = dict(
    evit=("evit", "evit:by=mean"),
    tome=("tome", "tome"),
    ward=("ward", "ward:by=received"),
    topk=("topk:by=received", "topk:by=received"),
    shift=("shift:rate=1", "shift:rate=1"),
)
every_family = pytest.mark.parametrize("name", NAMES)


def build(name, **settings):
    return build_model(name, **SIZES | OTHER_SIZES.get(name, {}) | settings)


def apply(model, params):
    """What a model computes of the same random images."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(BATCH, *model.image_size, 3)).astype(np.float32)
    return jax.jit(model.apply)({"params": params}, images)


@functools.cache
def family(name):
    """The dense model of a name, its parameters, and what it computes."""
    model = build(name)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    leaves = [leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    params = jax.tree.unflatten(tree, leaves)
    return model, params, apply(model, params)


@pytest.mark.parametrize(
    ("name", "method"),
    [  # each family with one method, and each method with a few families, are the quick ones
        pytest.param(name, method, marks=[pytest.mark.slow] * (i % len(METHODS) != j))
        for i, name in enumerate(NAMES)
        for j, method in enumerate(METHODS)
    ],
)
def test_the_planned_tokens_come_out_and_the_prefix_is_untouched(name, method):
    dense, params, (_, expected) = family(name)
    spec = METHODS[method][0 if dense.class_token else 1]
    model = build(name, reducer=spec, tokens=(12, 7), layers=(0, 1))
    pooled, out = apply(model, params)
    prefix = model.prefix
    assert [x.shape[1] for x in out["blocks"]] == list(model.tokens_per_block)
    extra = model.reducer.extra
    assert model.tokens_per_block == (prefix + 12 + extra, prefix + 7 + extra)
    # Up to where the first block reduces nothing differs, and each token has its MLP to itself.
    scale = np.abs(expected["blocks"][0]).max()
    np.testing.assert_allclose(
        out["blocks"][0][:, :prefix], expected["blocks"][0][:, :prefix], atol=1e-6 * scale
    )
    np.testing.assert_array_equal(out["size"][:, :prefix], 1)
    owner = np.asarray(out["owner"][-1])
    np.testing.assert_array_equal(
        out["size"][:, prefix:].sum(axis=1) + (owner < 0).sum(axis=1), PATCHES
    )
    assert pooled.shape == (BATCH, 32)
    assert np.isfinite(pooled).all()
    assert out["dense"].shape == (BATCH, PATCHES, 32)
    np.testing.assert_array_equal((out["dense"] == 0).all(axis=-1), owner < 0)
    if model.pool == "map":
        np.testing.assert_allclose(out["pool_attention"].sum(axis=1), 1, rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Reorder(Reducer):
    """Keeps all there is, in another order in each block."""

    @property
    def extra(self) -> int:  # a plan never keeps all
        return 1

    def __call__(self, tokens, signals, keep):
        order = np.random.default_rng(signals.layer).permutation(keep + 1)
        return drop(tokens, jnp.broadcast_to(jnp.asarray(order), (len(tokens.x), keep + 1)))


@every_family
def test_the_order_of_patches_makes_no_difference(name):
    dense, params, (expected, out) = family(name)
    model = dense.clone(reducer=Reorder(), keep=(PATCHES - 1,) * 2)
    pooled, reordered = apply(model, params)
    assert (np.asarray(reordered["owner"][0]) != np.arange(PATCHES)).any()
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(
        reordered["dense"], out["dense"], rtol=0, atol=1e-5 * np.abs(out["dense"]).max()
    )
