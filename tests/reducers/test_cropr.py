# SPDX-License-Identifier: Apache-2.0
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.reducers import create_reducer
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
