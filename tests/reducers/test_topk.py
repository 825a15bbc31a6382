# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.plan.flops import macs
from evit_jax.reducers import create_reducer
from tests.contracts.test_reducers import BATCH, PATCHES, example
from tests.support.by_hand import attention, slopes, value_norms


def score_by_hand(by, signals, image):
    """(N,): every score from its definition, token by token."""
    maps, norms = attention(signals, image), value_norms(signals, image)
    heads, tokens = norms.shape
    before, after = (
        np.asarray(array[image], np.float64) for array in (signals.before, signals.after)
    )
    score = {
        "class": lambda j: np.mean([maps[h, 0, j] for h in range(heads)]),
        "received": lambda j: np.mean([maps[h, i, j] for h in range(heads) for i in range(tokens)]),
        "value": lambda j: np.sqrt(sum(norms[h, j] ** 2 for h in range(heads))),
        "class_value": lambda j: np.mean([maps[h, 0, j] * norms[h, j] for h in range(heads)]),
        "shift": lambda j: np.sqrt(np.sum((after[j] - before[j]) ** 2)),
        "key_norm": lambda j: np.sqrt(np.sum(np.asarray(signals.k[image, :, j], np.float64) ** 2)),
        "mean": lambda j: by_mean_query(signals, image)[j],
    }[by]
    return np.array([score(j) for j in range(tokens)])


def by_mean_query(signals, image):
    """(N,): softmax of the patches' mean logits, mean over heads."""
    q, k = (np.asarray(array[image], np.float64) for array in (signals.q, signals.k))
    logits = np.einsum("hqc,hkc->hqk", q[:, signals.prefix :], k).mean(axis=1)
    exp = np.exp(logits)
    return (exp / exp.sum(axis=1, keepdims=True)).mean(axis=0)


SCORES = ["class", "received", "value", "class_value", "shift", "key_norm", "mean"]


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("by", SCORES)
def test_the_highest_scores_are_kept_in_descending_order(by, prefix):
    tokens, signals = example(prefix)
    rng = np.random.default_rng(3)
    size = np.ones(tokens.size.shape)
    size[:, prefix:] = rng.integers(1, 5, (BATCH, PATCHES))
    tokens = tokens.replace(size=jnp.asarray(size, jnp.float32))
    after = create_reducer(f"topk:by={by}")(tokens, signals, 5)
    for image in range(BATCH):
        scores = score_by_hand(by, signals, image)[prefix:]
        kept = sorted(range(PATCHES), key=lambda patch: -scores[patch])[:5]
        np.testing.assert_array_equal(after.x[image, prefix:], tokens.x[image, prefix:][kept, :])
        np.testing.assert_array_equal(after.size[image, prefix:], size[image, prefix:][kept])
        owner = [kept.index(patch) if patch in kept else -1 for patch in range(PATCHES)]
        np.testing.assert_array_equal(after.owner[image], owner)


def test_gradients_are_those_of_the_kept_tokens():
    tokens, signals = example()

    def loss(x):
        return jnp.sum(jnp.sin(create_reducer("topk")(tokens.replace(x=x), signals, 5).x))

    def by_hand(x):
        total = 0
        for image in range(BATCH):
            scores = score_by_hand("class", signals, image)[1:]
            kept = sorted(range(PATCHES), key=lambda patch: -scores[patch])[:5]
            total += np.sin(x[image, [0, *(1 + patch for patch in kept)]]).sum()
        return total

    np.testing.assert_allclose(jax.grad(loss)(tokens.x), slopes(by_hand, tokens.x), atol=1e-6)


def test_ties_go_to_the_lower_index():
    tokens, signals = example()
    after = create_reducer("topk")(tokens, signals.replace(q=signals.q * 0), 3)
    np.testing.assert_array_equal(after.owner[0], [0, 1, 2, *[-1] * (PATCHES - 3)])


def test_only_scores_with_class_attention_need_a_class_token():
    tokens, signals = example()
    signals = signals.replace(class_token=False)
    for by in ("received", "value", "shift", "mean", "key_norm"):
        create_reducer(f"topk:by={by}")(tokens, signals, 3)
    for by in ("class", "class_value"):
        with pytest.raises(InputError, match="the model has no class token"):
            create_reducer(f"topk:by={by}")(tokens, signals, 3)


def test_unknown_scores_are_refused():
    with pytest.raises(InputError, match="unknown score 'recieved'; did you mean 'received'"):
        create_reducer("topk:by=recieved")


def test_only_a_whole_attention_map_costs_anything():
    def extra(by):
        model = build_model("vit", depth=1, layers=(0,), tokens=98, reducer=f"topk:by={by}")
        return macs(model) - macs(model.clone(reducer=create_reducer("topk")))

    assert extra("received") == 197**2 * 384
    assert extra("value") == extra("shift") == extra("class_value") == extra("mean") == 0


def test_it_is_evit_without_the_fused_token():
    tokens, signals = example()
    expected = create_reducer("evit:fuse=False")(tokens, signals, 5)
    after = create_reducer("topk")(tokens, signals, 5)
    jax.tree.map(np.testing.assert_array_equal, after, expected)


def test_the_probe_asks_tokens_as_it_will_after_the_last_block():
    """In the last block, with an MLP that adds nothing, it is what the pooling itself looks at."""
    sizes = dict(image_size=24, patch_size=6, width=16, depth=1, num_heads=2, registers=1)
    kind = dict(class_token=False, no_embed_class=True, pool="map")
    model = build_model("vit", **sizes, **kind, reducer="topk:by=probe", tokens=7, layers=(0,))
    params = init_params(model, jax.random.key(0))
    params = jax.tree.map(
        lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    params["blocks_0"]["mlp"]["fc2"] = jax.tree.map(
        jnp.zeros_like, params["blocks_0"]["mlp"]["fc2"]
    )
    images = jax.random.normal(jax.random.key(1), (2, 24, 24, 3))
    _, dense = model.clone(keep=()).apply({"params": params}, images)
    _, reduced = model.apply({"params": params}, images)
    order = np.argsort(-dense["pool_attention"], axis=1)
    for image in range(2):
        owner = np.asarray(reduced["owner"][0][image])
        np.testing.assert_array_equal(owner[order[image][:7]], range(7))
    tokens, signals = example()
    with pytest.raises(InputError, match="the probe of map pooling, and the model has none"):
        create_reducer("topk:by=probe")(tokens, signals, 3)
