# SPDX-License-Identifier: Apache-2.0
"""Positions follow tokens, in a model of every family whose attention asks where a token is."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import build_model, init_params
from evit_jax.models.block import Block
from evit_jax.tokens import Reducer, Signals, Tokens, drop
from tests.contracts.test_reducers import (
    FIXED_COUNT,
    SOFT,
    but_for,
    call,
    every_prefix,
    example,
)

TINY = dict(image_size=(16, 12), patch_size=4, width=16, depth=2, num_heads=2, num_classes=3)
PATCHES, BATCH = 12, 2
GATED = dict(mlp="swiglu_packed", activation="silu", qkv_bias="qv", rope="cat")
FAMILIES = dict(
    eva02=("eva", GATED | dict(pool="avg", rope_reference=(16, 16))),
    eva02_clip=("eva", dict(qkv_bias="qv", inner_norm=True, rope="cat", rope_reference=(16, 16))),
    dinov3=("eva", dict(rope="dinov3", rope_temperature=100, absolute_positions=False)
            | dict(registers=4, pool="avg", fc_norm=False, layer_scale=0.5, qkv_bias=False)),
    mixed=("eva", dict(rope="mixed", rope_grid="xy", rope_temperature=10, no_embed_class=True)),
    pe=("eva", dict(rope="cat", rope_grid="xy", rope_offset=1, pool="map", pool_prefix=True)
        | dict(pre_norm=True, rope_reference=(14, 14))),
    reg_gap=("eva", dict(rope="cat", class_token=False, registers=1, pool="avg")),
    beit=("beit", dict(layer_scale=0.5)),
)  # fmt: skip
REDUCERS = ("evit", "evit:fused_at=strongest", "tome", "ward", "topk:by=received", "shift:rate=1")
every_family = pytest.mark.parametrize("family", FAMILIES)


def tiny(family, **settings):
    """A model of the family, and random values for all of its parameters."""
    backbone, own = FAMILIES[family]
    model = build_model(backbone, **TINY | own | settings)
    like = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        norm = path[-1].key == "scale"
        return norm + rng.normal(size=leaf.shape, scale=0.3).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(drawn, like)


def images():
    shape = BATCH, *TINY["image_size"], 3
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Reorder(Reducer):
    """Leaves out the first patch, and puts the others in another order."""

    seed: int | None = None  # None keeps them as they are
    lost: bool = False  # leave positions where they were, which is wrong

    def __call__(self, tokens: Tokens, signals: Signals, keep: int) -> Tokens:
        kept = np.arange(1, tokens.patches)
        if self.seed is not None:
            kept = np.random.default_rng(self.seed).permutation(kept)
        kept = jnp.broadcast_to(jnp.asarray(kept, jnp.int32)[None], (len(tokens.x), keep))
        reduced = drop(tokens, kept)
        if self.lost:
            return reduced.replace(positions=drop(tokens, jnp.sort(kept)).positions)
        return reduced


@every_family
def test_another_order_of_the_tokens_gives_the_same_features(family):
    answers = []
    for reducer in (Reorder(), Reorder(3), Reorder(3, lost=True)):
        keep = PATCHES - 1, None
        model, params = tiny(family, reducer=reducer)
        model = model.clone(keep=keep, num_classes=0)
        answers.append(jax.jit(lambda p, x, model=model: model.apply(p, x)[0]))
        answers[-1] = np.asarray(answers[-1]({"params": params}, images()))
    size = np.abs(answers[0]).max()
    np.testing.assert_allclose(answers[1], answers[0], rtol=0, atol=1e-5 * size)
    assert np.abs(answers[2] - answers[0]).max() > 1e-3 * size


def watched(model, params):
    """What leaves every block of the model: (B, P) owners aside, its tokens."""
    left = []

    def intercept(function, args, settings, context):
        result = function(*args, **settings)
        block = isinstance(context.module, Block) and context.method_name == "__call__"
        if block and args[3] is None:
            left.append(result[0])
        return result

    @jax.jit
    def run(params, images):
        left.clear()
        with nn.intercept_methods(intercept):
            logits, out = model.apply({"params": params}, images)
        return logits, out, tuple(left)

    return run(params, images())


@pytest.mark.parametrize(
    ("family", "reducer"),
    [
        pytest.param(family, reducer, marks=[pytest.mark.slow] * (reducer != "tome" and i % 6 != j))
        for i, family in enumerate(FAMILIES)
        for j, reducer in enumerate(REDUCERS)
    ],
)
def test_a_reduced_model_knows_where_its_tokens_are(family, reducer):
    model, params = tiny(family, reducer=reducer)
    if reducer in ("evit", "evit:fused_at=strongest", "ward") and not model.class_token:
        pytest.skip("ranks by the class token's attention")
    model = model.clone(keep=model.plan(tokens=(9, 5)))
    logits, _, left = watched(model, params)
    assert np.isfinite(logits).all()
    assert [tokens.x.shape[1] for tokens in left] == [*model.tokens_per_block]
    rows, columns = np.divmod(np.arange(PATCHES), model.grid[1])
    places = np.stack([rows, columns], axis=-1).astype(np.float32)
    for tokens in left:
        at, owners = np.asarray(tokens.positions), np.asarray(tokens.owner)
        assert at.shape == (BATCH, tokens.x.shape[1], 2)
        for image in range(BATCH):
            for token in range(tokens.patches):
                members = places[owners[image] == token]
                if len(members) == 1:
                    np.testing.assert_array_equal(at[image, model.prefix + token], members[0])
                elif len(members):
                    low, high = members.min(axis=0), members.max(axis=0)
                    assert (at[image, model.prefix + token] >= low - 1e-5).all()
                    assert (at[image, model.prefix + token] <= high + 1e-5).all()


@every_family
@pytest.mark.parametrize("weighted", [False, True])
def test_signals_are_those_of_the_attention_that_was_used(family, weighted):
    """The map that follows from them, times the values, is what leaves attention."""
    model, params = tiny(family)
    inner = []

    def intercept(function, args, settings, context):
        if isinstance(context.module, Block) and context.method_name == "__call__" and weighted:
            size = jnp.arange(1, args[0].x.shape[1] + 1, dtype=jnp.float32)[None]
            weight = jnp.tile(size % 3, (BATCH, 1)).at[:, 0].set(1)
            args = (args[0].replace(weight=weight), *args[1:])
        result = function(*args, **settings)
        if isinstance(context.module, Block) and context.method_name == "__call__":
            inner.append((result[1], context.module.path))
        return result

    @jax.jit
    def run(params, images):
        inner.clear()
        with nn.intercept_methods(intercept):
            model.apply({"params": params}, images)
        signals, _ = inner[0]
        seen = signals.attention() @ signals.v
        keys = jnp.mean(signals.k if signals.plain_k is None else signals.plain_k, axis=1)
        rows = signals.class_rows() if model.class_token else signals.attention()[:, :, 0]
        return signals.before, signals.after, seen, rows, signals.attention(), keys, signals.keys()

    before, after, seen, rows, whole, keys, ours = run(params, images())
    np.testing.assert_allclose(rows, whole[:, :, 0], atol=1e-6)
    np.testing.assert_allclose(whole.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(keys, ours)
    block = jax.tree.map(np.asarray, params["blocks_0"])
    y = np.asarray(seen).transpose(0, 2, 1, 3).reshape(BATCH, -1, TINY["width"])
    if "norm" in block["attn"]:
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + model.norm_eps)
        y = y * block["attn"]["norm"]["scale"] + block["attn"]["norm"]["bias"]
    y = y @ block["attn"]["proj"]["kernel"] + block["attn"]["proj"].get("bias", 0)
    y = y * block.get("gamma_1", 1)
    np.testing.assert_allclose(y, after - before, rtol=0, atol=2e-5 * np.abs(y).max())


@every_family
def test_merging_compares_keys_before_positions_are_in_them(family):
    """Equal tokens have equal keys, wherever they are."""
    if family in ("eva02_clip", "mixed"):
        pytest.skip("has absolute positions besides")
    model, params = tiny(family, **({} if family == "beit" else dict(absolute_positions=False)))

    @jax.jit
    def run(params, images):
        seen = []

        def intercept(function, args, settings, context):
            result = function(*args, **settings)
            if isinstance(context.module, Block) and context.method_name == "__call__":
                seen.append(result[1])
            return result

        with nn.intercept_methods(intercept):
            model.apply({"params": params}, images)
        return seen[0].keys(), seen[0].k

    keys, turned = run(params, np.ones_like(images()))
    keys = keys[:, model.prefix :]
    np.testing.assert_allclose(keys, np.tile(keys[:, :1], (1, PATCHES, 1)), rtol=1e-5, atol=1e-6)
    if family != "beit":
        turned = turned[:, :, model.prefix :]
        assert np.abs(turned - turned[:, :, :1]).max() > 1e-2


@every_prefix
@but_for(FIXED_COUNT | SOFT)
def test_positions_between_patches_stay_exactly_where_they_are(reducer, prefix):
    tokens, signals = example(prefix)
    positions = jax.random.uniform(jax.random.key(5), (*tokens.size.shape, 2), maxval=7)
    sizes = jax.random.randint(jax.random.key(6), tokens.size.shape, 1, 7).astype(jnp.float32)
    tokens = tokens.replace(positions=positions, size=sizes.at[:, :prefix].set(1))
    after = call(reducer, tokens, signals, 9)
    if type(reducer).__name__ == "TwoSteps":  # joins without them; a method may
        return
    np.testing.assert_array_equal(after.positions[:, :prefix], positions[:, :prefix])
    for image in range(len(positions)):
        owner, patches = np.asarray(after.owner[image]), positions[image, prefix:]
        for token in range(after.patches):
            members = np.flatnonzero(owner == token)
            now = after.positions[image, prefix + token]
            if len(members) == 1:
                np.testing.assert_array_equal(now, patches[members[0]])
            elif len(members):
                assert (now >= patches[members].min(axis=0) - 1e-6).all()
                assert (now <= patches[members].max(axis=0) + 1e-6).all()
