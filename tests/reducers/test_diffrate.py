# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model
from evit_jax.plan.flops import macs
from evit_jax.reducers import create_reducer
from evit_jax.reducers.diffrate import PUBLISHED
from tests.contracts.test_reducers import BATCH, PATCHES, example, with_attention
from tests.reducers.test_topk import score_by_hand
from tests.support.by_hand import slopes

# 10^9 multiply-accumulates as the authors print them.
PRINTED = {
    "deit_tiny": (0.65, 0.73, 0.81, 0.90, 1.00),
    "deit_small": (2.33, 2.50, 2.71, 2.90, 3.11),
    "deit_base": (8.73, 9.99, 10.43, 11.52, 12.52),
}


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def by_hand(x, score, weight, prune_to, merge_to, size=None):
    """Tokens, weights and members of one image, from patch tokens (n, D), token by token."""
    order = sorted(range(len(x)), key=lambda i: (-score[i], i))[:prune_to]
    hosts = order[:merge_to]
    members, weights = [[host] for host in hosts], [weight[host] for host in hosts]
    for source in order[merge_to:]:
        scores = [cosine(x[source], x[host]) for host in hosts]
        best = int(np.argmax(scores))
        members[best].append(source)
        weights[best] += weight[source] * scores[best]
    share = np.ones(len(x)) if size is None else size
    means = [np.average(x[group], axis=0, weights=share[group]) for group in members]
    return np.stack(means), np.maximum(weights, 1), members


def sized(prefix):
    """Tokens of several sizes, and with weights from an earlier block."""
    tokens, signals = example(prefix)
    rng = np.random.default_rng(5)
    size, weight = np.ones((2, *tokens.size.shape))
    size[:, prefix:] = rng.integers(1, 5, (BATCH, PATCHES))
    weight[:, prefix:] = rng.uniform(1, 4, (BATCH, PATCHES))
    of = dict(size=jnp.asarray(size, jnp.float32), weight=jnp.asarray(weight, jnp.float32))
    return tokens.replace(**of), signals, size[:, prefix:], weight[:, prefix:]


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("keep", [5, 11, (9, 4), (12, 7), (8, 8), (3, 1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_pruning_and_merging_are_the_formulas_by_hand(prefix, keep, weighted):
    tokens, signals, size, weight = sized(prefix)
    after = create_reducer(f"diffrate:weighted={weighted}")(tokens, signals, keep)
    prune_to, merge_to = keep if isinstance(keep, tuple) else (PATCHES, keep)
    for image in range(BATCH):
        x = np.asarray(tokens.x[image, prefix:], np.float64)
        score = score_by_hand("class", signals, image)[prefix:]
        means, weights, members = by_hand(
            x, score, weight[image], prune_to, merge_to, size[image] if weighted else None
        )
        np.testing.assert_allclose(after.x[image, prefix:], means, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(after.weight[image, prefix:], weights, rtol=1e-5)
        np.testing.assert_array_equal(after.weight[image, :prefix], 1)
        sizes = [size[image][group].sum() for group in members]
        np.testing.assert_array_equal(after.size[image, prefix:], sizes)
        owner = np.full(PATCHES, -1)
        for place, group in enumerate(members):
            owner[group] = place
        np.testing.assert_array_equal(after.owner[image], owner)


def test_gradients_are_those_of_the_means():
    tokens, signals = example()
    scores = [score_by_hand("class", signals, image)[1:] for image in range(BATCH)]

    def loss(x):
        return jnp.sum(jnp.sin(create_reducer("diffrate")(tokens.replace(x=x), signals, (9, 4)).x))

    def in_numpy(x):
        total = np.sin(x[:, 0]).sum()
        for image in range(BATCH):
            total += np.sin(by_hand(x[image, 1:], scores[image], np.ones(PATCHES), 9, 4)[0]).sum()
        return total

    np.testing.assert_allclose(jax.grad(loss)(tokens.x), slopes(in_numpy, tokens.x), atol=1e-6)


def test_weights_stay_finite_where_what_is_merged_points_the_other_way():
    tokens, signals = example()
    direction = jnp.ones(tokens.x.shape).at[:, 3:].multiply(-1.0)  # patches 0 and 1, the others
    order = jnp.tile(jnp.arange(1.0 + PATCHES, 0, -1), (BATCH, 1))
    signals = with_attention(signals, order / order.sum(axis=1, keepdims=True))
    after = create_reducer("diffrate")(tokens.replace(x=direction), signals, 2)
    np.testing.assert_array_equal(after.size[0], [1, 1 + PATCHES - 2, 1])
    np.testing.assert_array_equal(after.weight[0], [1, 1, 1])  # 1 - 10 in public code
    alike = create_reducer("diffrate")(tokens.replace(x=abs(direction)), signals, 2)
    np.testing.assert_allclose(alike.weight[0], alike.size[0], rtol=1e-6)


def test_without_proportional_attention_nothing_gets_a_weight():
    tokens, signals = example()
    assert create_reducer("diffrate:proportional=False")(tokens, signals, (9, 4)).weight is None


def published(size, budget, **settings):
    name = f"deit_{size}"
    return build_model(
        f"{name}_patch16_224", reducer=f"diffrate:budget={name}@{budget}", **settings
    )


def test_published_counts_are_cut_down_to_what_is_left():
    model = published("tiny", "1.0")
    assert model.tokens_per_block == (197, 197, 196, 190, 186, 154, 148, 148, 145, 135, 125, 21)
    assert model.keep[2:5] == ((195, 195), (193, 189), (187, 185))
    assert model.keep[6:8] == ((153, 147), None)  # 163 and 155 of the 147 that are left
    assert published("tiny", "0.6").keep[1] == (195, 186)
    assert published("tiny", "0.6").keep[-1] == (2, 2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_cost_what_their_authors_print(name):
    size, budget = name.removeprefix("deit_").split("@")
    among = [key for key in PUBLISHED if key.startswith(f"deit_{size}")]
    printed = PRINTED[f"deit_{size}"][among.index(name)]
    model = published(size, budget)
    own, n = 0, 196
    for entry in model.keep:
        if entry is not None:
            own += model.reducer.matching_macs(n, entry, 1, model.width, model.num_heads)
            n = entry[-1]
    assert abs((macs(model) - own) / 1e9 - printed) < 0.03
    assert own < 0.01 * macs(model)  # of pairs of tokens, which they leave out


def test_published_counts_fit_other_images_and_layers_but_not_other_depths():
    larger = published("tiny", "0.6", image_size=384)
    assert larger.tokens_per_block[1] == 1 + -(-186 * 576 // 196)
    later = published("tiny", "0.6", layers=(3, 5))
    assert later.tokens_per_block == (*[197] * 3, *[139] * 2, *[90] * 7)
    with pytest.raises(InputError, match="has counts for 12 blocks and the model has 4"):
        published("tiny", "0.6", depth=4)
    with pytest.raises(InputError, match=r"unknown budget of diffrate 'deit_tiny@0\.5'; did you"):
        create_reducer("diffrate:budget=deit_tiny@0.5")


def test_without_a_budget_rates_decide_and_the_first_block_keeps_all():
    assert build_model("vit", reducer="diffrate").tokens_per_block == (197,) * 12
    model = build_model("vit", depth=3, reducer="diffrate", keep_rate=0.5)
    assert model.tokens_per_block == (197, 99, 50)
    pairs = create_reducer("diffrate").matching_macs
    assert pairs(196, (180, 150), 1, 384, 6) == 30 * 150 * 384
    assert pairs(196, 150, 1, 384, 6) == 46 * 150 * 384
