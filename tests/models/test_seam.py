# SPDX-License-Identifier: Apache-2.0
"""What the seam carries through a whole model, each by a small method of tests/support."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params, load_params
from evit_jax.models.card import Preprocessing
from evit_jax.plan.flops import block_macs, macs
from evit_jax.training import steps
from evit_jax.training.mix import Mix
from evit_jax.weights.files import write_safetensors
from evit_jax.weights.names import tensors_from_params
from tests.support.reducers import THROWN_IN, AtInput, AtOutput, Predictor, Slots, TwoSteps

SIZES = dict(image_size=16, patch_size=4, width=16, depth=4, num_heads=2, num_classes=3)
IMAGES = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)


def tiny(reducer, **settings):
    model = build_model("vit", reducer=reducer, **SIZES | settings)
    return model, jax.jit(lambda key: init_params(model, key))(jax.random.key(0))


def run(model, params, **settings):
    return jax.jit(functools.partial(model.apply, **settings))({"params": params}, IMAGES)


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reducer", THROWN_IN, ids=lambda reducer: type(reducer).__name__)
def test_the_planned_tokens_come_out_and_the_logits_are_those_of_the_last_block(reducer, remat):
    layers = (1, 3) if reducer.site != "output" else None
    model, params = tiny(reducer, keep_rate=0.5, layers=layers, remat=remat)
    logits, out = run(model, params)
    assert tuple(x.shape[1] for x in out["blocks"]) == model.tokens_per_block
    assert len(out["owner"]) == (2 if layers else 1)
    last = np.asarray(out["blocks"][-1][:, 0])
    normed = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
    expected = normed @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    np.testing.assert_allclose(logits, expected, atol=1e-5)

    def loss(params):
        rngs = dict(dropout=jax.random.key(1))
        return jnp.sum(jnp.sin(model.apply({"params": params}, IMAGES, train=True, rngs=rngs)[0]))

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_every_reducing_block_has_parameters_of_its_own():
    model, params = tiny(Predictor(), keep_rate=0.5, layers=(1, 2))
    with_some = [name for name in params if "blocks" in name and "reduction" in params[name]]
    assert with_some == ["blocks_1", "blocks_2"]
    first, second = (params[name]["reduction"]["in"]["kernel"] for name in with_some)
    assert first.shape == (16, 4)
    assert (first != second).any()
    dense, _ = tiny("evit")
    shared = {
        name: {key: value for key, value in tree.items() if key != "reduction"}
        if "blocks" in name
        else tree
        for name, tree in params.items()
    }
    assert jax.tree.structure(shared) == jax.tree.structure(tiny("evit")[1])
    whole, _ = run(dense, shared)
    np.testing.assert_array_equal(run(model.clone(keep=()), params)[0], whole)


def test_a_reducers_loss_is_reported_trained_and_left_out_of_evaluation():
    model, params = tiny(Predictor(), keep_rate=0.5, layers=(1, 2))
    _, out = run(model, params)
    assert [loss.shape for loss in out["aux"]["loss"]] == [(4,), (4,)]
    recipe = steps.Recipe(Preprocessing(), optax.sgd(1.0), Mix())
    state = steps.init_state(params, recipe.optimizer, ema=False)
    batch = dict(
        image=np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), np.uint8),
        label=np.arange(4, dtype=np.int32) % 3,
    )
    step = jax.jit(functools.partial(steps.train_step, models=(model,), recipe=recipe))
    after, figures = step(state, batch, {})
    images = Preprocessing().normalize(jnp.asarray(batch["image"]))
    rngs = dict(dropout=jax.random.key(0))  # it draws nothing
    logits, out = model.apply({"params": params}, images, train=True, rngs=rngs)
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    added = sum(loss.mean() for loss in out["aux"]["loss"])
    assert added > 1e-3
    np.testing.assert_allclose(figures["loss"], plain + added, rtol=1e-5)
    moved = after["params"]["blocks_1"]["reduction"]["out"]["bias"]
    assert (moved != params["blocks_1"]["reduction"]["out"]["bias"]).all()
    masked = batch | dict(mask=np.ones(4, bool))
    sums = jax.jit(functools.partial(steps.eval_step, model=model, preprocessing=Preprocessing()))(
        params, masked
    )
    logits, _ = model.apply({"params": params}, images)
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    np.testing.assert_allclose(sums["loss"], plain.sum(), rtol=1e-5)


def test_weights_without_the_reducers_parameters_start_them_and_trained_ones_come_back(tmp_path):
    _, dense = tiny("evit")
    model, drawn = tiny(Predictor(), keep_rate=0.5, layers=(1,))
    file = str(tmp_path / "dense.safetensors")
    write_safetensors(file, tensors_from_params(dense, model))
    loaded = load_params(file, model, key=jax.random.key(7))
    np.testing.assert_array_equal(loaded["head"]["kernel"], dense["head"]["kernel"])
    assert loaded["blocks_1"]["reduction"]["in"]["kernel"].shape == (16, 4)
    write_safetensors(file, tensors_from_params(drawn, model))
    again = load_params(file, model, key=jax.random.key(8))
    jax.tree.map(np.testing.assert_array_equal, again, drawn)


def test_at_the_input_of_a_block_its_attention_already_has_fewer_tokens():
    model, params = tiny(AtInput(), keep_rate=0.5, layers=(2,))
    _, out = run(model, params)
    assert [row.shape[1] for row in out["cls_attention"]] == [17, 17, 9, 9]
    # It is what a model without the other patches would have done from there on.
    kept = np.flatnonzero(np.asarray(out["owner"][0][0]) >= 0)
    assert len(kept) == 8
    with pytest.raises(InputError, match="leave block 0 out of its layers"):
        model.clone(keep=(8, None, None, None)).apply({"params": params}, IMAGES)


def test_after_the_encoder_only_the_last_block_reduces():
    model, params = tiny(AtOutput(), keep_rate=0.5)
    assert model.tokens_per_block == (17, 17, 17, 9)
    dense, _ = tiny("evit")
    logits, out = run(model, params)
    expected, whole = run(dense, params)
    np.testing.assert_array_equal(logits, expected)  # the class token is untouched
    for image in range(4):
        kept = np.flatnonzero(np.asarray(out["owner"][0][image]) >= 0)
        order = np.asarray(out["owner"][0][image])[kept]
        patches = np.asarray(whole["blocks"][-1][image, 1:])
        np.testing.assert_allclose(out["blocks"][-1][image, 1 + order], patches[kept], atol=1e-6)
    with pytest.raises(InputError, match="the only one that can be in its layers, got 1"):
        build_model("vit", reducer=AtOutput(), keep_rate=0.5, layers=(1,), **SIZES)


def test_where_a_method_works_decides_what_it_saves():
    def cost(reducer, layer):
        return macs(build_model("vit", reducer=reducer, tokens=8, layers=(layer,), **SIZES))

    width, hidden = 16, 64
    dense = block_macs(17, 17, width, hidden)
    assert cost(TwoSteps(), 3) - cost(AtInput(), 3) == block_macs(
        17, 9, width, hidden
    ) - block_macs(9, 9, width, hidden)
    assert cost(AtOutput(), 3) - cost(TwoSteps(), 3) == dense - block_macs(17, 9, width, hidden)


def test_empty_slots_are_seen_by_nobody():
    model, params = tiny(Slots(), tokens=12, layers=(1,))
    logits, out = run(model, params)
    full = np.asarray(out["size"][:, 1:] > 0).sum(axis=1)
    assert (full < 12).all()
    assert len(set(full)) > 1  # not the same number for every image
    for image in range(4):  # the same as with just so many kept tokens
        alone, _ = tiny("evit:fuse=False", tokens=int(full[image]), layers=(1,))
        expected, _ = run(alone, params)
        np.testing.assert_allclose(logits[image], expected[image], atol=1e-5)


def test_a_block_may_have_two_counts():
    model, params = tiny(TwoSteps(), tokens=((14, 10), (9, 6)), layers=(1, 2))
    assert model.keep == (None, (14, 10), (9, 6), None)
    assert model.tokens_per_block == (17, 11, 7, 7)
    _, out = run(model, params)
    assert out["blocks"][-1].shape[1] == 7
    gone = np.asarray(out["owner"][0] < 0).sum(axis=1)
    np.testing.assert_array_equal(gone, 2)  # 16 pruned to 14; merging loses none
    tiled = model.plan(tokens=((14, 10), (9, 6)), layers=(1, 2), multiple_of=4)
    assert tiled == (None, (14, 11), (9, 7), None)
    halfway = model.plan(tokens=((14, 10), (9, 6)), layers=(1, 2), remaining=0.5)
    assert halfway == (None, (15, 13), (11, 10), None)
    with pytest.raises(InputError, match="tuples of them that do not rise"):
        model.plan(tokens=((10, 14),), layers=(1,))
    with pytest.raises(InputError, match=r"has 16 patch tokens and can keep 1 to 16"):
        model.plan(tokens=((17, 10),), layers=(1,))
