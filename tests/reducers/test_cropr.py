# SPDX-License-Identifier: Apache-2.0
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.measure.calibration import calibrate
from evit_jax.measure.chip_plan import fit_chip
from evit_jax.models import build_model, init_params
from evit_jax.models.block import Block
from evit_jax.plan.flops import macs
from evit_jax.reducers import create_reducer
from evit_jax.tokens import Signals, Tokens
from tests.contracts.test_reducers import BATCH, example
from tests.support.by_hand import slopes
from tests.support.learning import drawn, in_float64

REDUCER = create_reducer("cropr")
CLASSES = 4


def training_example(train=True):
    tokens, signals = example(prefix=2, train=train)
    return tokens, signals.replace(num_classes=CLASSES)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def normed(x, tree):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * tree["scale"] + tree["bias"]


def logits_by_hand(x, params):
    """One image's tokens (N, D) -> the training head's logits."""
    scores = np.array([row @ params["query"] for row in x]) / math.sqrt(x.shape[1])
    share = np.exp(scores - scores.max())
    pooled = sum(s * row for s, row in zip(share / share.sum(), x, strict=True))
    y = normed(pooled, params["mlp_norm"])
    y = gelu(y @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    y = pooled + y @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    return normed(y, params["norm"]) @ params["out"]["kernel"] + params["out"]["bias"]


@pytest.mark.parametrize("train", [False, True])
def test_the_highest_products_with_the_query_stay_in_order(train):
    tokens, signals = training_example(train)
    params = drawn(REDUCER, tokens, signals, 5)
    after = REDUCER.apply(params, tokens, signals, 5)
    assert list(after.aux) == (["logits"] if train else [])
    for image in range(BATCH):
        x = np.asarray(tokens.x[image, 2:], np.float64)
        order = np.argsort(-(x @ in_float64(params)["query"]))[:5]
        np.testing.assert_array_equal(after.x[image, 2:], tokens.x[image, 2:][order])


def test_the_training_heads_logits_and_their_gradients_are_those_by_hand():
    tokens, signals = training_example()
    params = drawn(REDUCER, tokens, signals, 5)
    after = REDUCER.apply(params, tokens, signals, 5)
    wide, x = in_float64(params), np.asarray(tokens.x, np.float64)
    expected = np.stack([logits_by_hand(image, wide) for image in x])
    np.testing.assert_allclose(after.aux["logits"][0], expected, rtol=1e-4, atol=1e-4)

    def loss(params, x):
        after = REDUCER.apply(params, tokens.replace(x=x), signals, 5)
        return jnp.sum(jnp.sin(after.aux["logits"][0]))

    grads, x_grad = jax.grad(loss, argnums=(0, 1))(params, tokens.x)
    np.testing.assert_array_equal(x_grad, 0)  # the head learns from the model, not it from the head

    def of(query):
        return sum(np.sin(logits_by_hand(image, wide | dict(query=query))).sum() for image in x)

    found = grads["params"]["query"]
    np.testing.assert_allclose(found, slopes(of, wide["query"]), rtol=1e-4, atol=1e-4)


def test_the_query_learns_from_its_head_alone():
    tokens, signals = training_example()
    params = drawn(REDUCER, tokens, signals, 5)

    def loss(params):
        return jnp.sum(jnp.sin(REDUCER.apply(params, tokens, signals, 5).x))

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.grad(loss)(params)))


def test_a_count_is_removed_in_each_block_and_one_more_in_the_first():
    model = build_model("vit", depth=5, reducer="cropr:r=8")
    assert model.tokens_per_block == (197, 188, 180, 172, 164)
    with pytest.raises(InputError, match="has a schedule of its own"):
        build_model("vit", depth=5, reducer="cropr:r=8", keep_rate=0.5)
    with pytest.raises(InputError, match="cropr's r is a number from 0 up"):
        build_model("vit", depth=5, reducer="cropr:r=-1")


def fused(**settings):
    """A model of five blocks whose removed tokens return, and its parameters."""
    sizes = dict(image_size=16, patch_size=4, width=16, depth=5, num_heads=2, num_classes=3)
    model = build_model("vit", **sizes, reducer="cropr:fusion=True", **settings)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    rng = np.random.default_rng(2)
    return model, jax.tree.map(lambda p: p + rng.normal(0, 0.1, p.shape).astype(np.float32), params)


def test_with_fusion_the_plan_ends_with_all_patches():
    model, _ = fused(keep_rate=0.5)
    assert model.kept == (None, 8, 4, 2, 16)
    assert model.tokens_per_block == (17, 9, 5, 3, 17)
    assert model.plan(tokens=model.keep) == model.keep  # as a file brings it
    assert model.plan(keep_rate=1) == (None,) * 5
    by_count = build_model("vit", depth=5, reducer="cropr:fusion=True,r=8")
    assert by_count.tokens_per_block == (197, 188, 180, 172, 197)
    # A block's queries, keys, values and projection, its attention's two products, and its MLP.
    blocks = sum(4 * n * 16**2 + 2 * n**2 * 16 + 8 * n * 16**2 for n in (17, 9, 5, 3, 17))
    assert macs(model) == 16 * 48 * 16 + blocks + 16 * 3
    within = model.plan(macs=macs(model))
    assert macs(model.clone(keep=within)) == macs(model)


def test_with_fusion_the_last_block_sees_every_patch_as_it_was_when_it_was_removed():
    model, params = fused(layers=(1, 3), tokens=(10, 4))
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    _, out = jax.jit(model.apply)({"params": params}, images)
    dense = model.clone(keep=())
    _, plain = jax.jit(dense.apply)({"params": params}, images)

    def block(number, x):
        """The tokens after a block of the dense model."""
        module = Block(**dense.block_settings(number))
        tokens = Tokens(x, jnp.ones(x.shape[:2]), jnp.zeros((len(x), 16), jnp.int32))
        weights = {k: v for k, v in params[f"blocks_{number}"].items() if k != "reduction"}
        return jax.jit(
            lambda x: module.apply({"params": weights}, tokens.replace(x=x), Signals(), None)[0].x
        )(x)

    for image in range(2):
        x = plain["blocks"][0][image : image + 1]
        waiting, places = [], [np.arange(16)]
        for number, count in ((1, 10), (2, None), (3, 4)):
            if count is not None:
                query = params[f"blocks_{number}"]["reduction"]["query"]
                order = np.argsort(-np.asarray(x[0, 1:] @ query))
                waiting.append(x[:, 1:][:, order[count:]])
                left = places.pop()[order]
                places += [left[count:], left[:count]]
                x = x[:, np.concatenate([[0], 1 + order[:count]])]
            x = block(number, x)
        x = block(4, jnp.concatenate([x, *waiting], axis=1))
        patches = np.concatenate([places[-1], *places[:-1]])  # of each token behind the first
        np.testing.assert_array_equal(out["owner"][-1][image], np.argsort(patches))
        np.testing.assert_allclose(out["blocks"][-1][image], x[0], rtol=0, atol=1e-5)
    assert len(out["owner"]) == 3
    np.testing.assert_array_equal(out["size"], 1)
    # Every patch has a feature of its own.
    assert len(np.unique(np.round(out["dense"][0], 4), axis=0)) == 16


@pytest.mark.parametrize("name", ["vit", "eva"])
def test_with_fusion_everything_that_was_removed_is_learned_from(name):
    positions = dict(absolute_positions=False) if name == "eva" else {}
    sizes = dict(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, num_classes=3)
    model = build_model(name, **sizes, **positions, reducer="cropr:fusion=True", keep_rate=0.5)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    def loss(images):
        logits, out = model.apply({"params": params}, images, train=True)
        return jnp.sum(logits * jnp.arange(3)[None]), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(images)
    assert len(out["aux"]["logits"]) == 1
    each = np.abs(grads).reshape(2, 4, 4, 4, 4, 3).sum(axis=(2, 4, 5))
    assert (each > 0).all(), "a patch is not seen"


def test_with_fusion_the_last_block_cannot_reduce_and_plans_are_not_searched_for():
    with pytest.raises(InputError, match="all patches return before the last block, 4"):
        fused(layers=(1, 4), keep_rate=0.5)
    model, params = fused(keep_rate=0.5)
    refused = r"cropr:\S*fusion=True\S* brings .* plans are searched for methods that keep fewer"
    with pytest.raises(InputError, match=refused):
        calibrate(model, params, np.zeros((32, 16, 16, 3), np.float32), share=0.5)
    with pytest.raises(InputError, match=refused):
        fit_chip(model, None, budget=1e6, batch_size=8)


def test_a_model_has_its_heads_parameters_and_no_head_where_there_are_no_classes():
    sizes = dict(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, reducer="cropr:r=2")
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    for classes in (3, 0):
        model = build_model("vit", num_classes=classes, **sizes)
        params = jax.jit(lambda key, model=model: init_params(model, key))(jax.random.key(0))
        names = set(params["blocks_1"]["reduction"])
        assert names == (
            {"query", "mlp_norm", "fc1", "fc2", "norm", "out"} if classes else {"query"}
        )
        _, out = jax.jit(functools.partial(model.apply, train=True))({"params": params}, images)
        assert [logits.shape for logits in out["aux"].get("logits", ())] == [(2, 3)] * bool(
            classes
        ) * 2
