# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import build_model
from evit_jax.plan.flops import block_macs, macs
from evit_jax.reducers import create_reducer
from tests.contracts.test_reducers import BATCH, PATCHES, example, with_attention
from tests.reducers.test_topk import score_by_hand
from tests.support.by_hand import slopes


def squeezed(x, score, keep):
    """Tokens and members of one image, from patch tokens (n, D), token by token."""
    order = sorted(range(len(x)), key=lambda i: (-score[i], i))
    kept, pruned = order[:keep], order[keep:]
    sums, weights = [np.e * x[k] for k in kept], [np.e for _ in kept]
    members = [[k] for k in kept]
    for p in pruned:
        cosines = [x[p] @ x[k] / np.sqrt((x[p] @ x[p]) * (x[k] @ x[k])) for k in kept]
        host = int(np.argmax(cosines))
        sums[host] = sums[host] + np.exp(cosines[host]) * x[p]
        weights[host] += np.exp(cosines[host])
        members[host].append(p)
    return np.stack([s / w for s, w in zip(sums, weights, strict=True)]), members


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("keep", [1, 5, 11])
def test_squeezing_is_the_formula_by_hand(prefix, keep):
    tokens, signals = example(prefix)
    size = np.ones(tokens.size.shape)
    size[:, prefix:] = np.random.default_rng(5).integers(1, 5, (BATCH, PATCHES))
    tokens = tokens.replace(size=jnp.asarray(size, jnp.float32))
    after = create_reducer("tps")(tokens, signals, keep)
    assert after.weight is None
    for image in range(BATCH):
        x = np.asarray(tokens.x[image, prefix:], np.float64)
        score = score_by_hand("class", signals, image)[prefix:]
        expected, members = squeezed(x, score, keep)
        np.testing.assert_allclose(after.x[image, prefix:], expected, rtol=1e-5, atol=1e-6)
        for place, group in enumerate(members):
            assert after.size[image, prefix + place] == size[image, prefix:][group].sum()
            np.testing.assert_array_equal(
                np.flatnonzero(np.asarray(after.owner[image]) == place), sorted(group)
            )


def test_gradients_pass_through_the_cosines():
    tokens, signals = example()
    scores = [score_by_hand("class", signals, image)[1:] for image in range(BATCH)]

    def loss(x):
        return jnp.sum(jnp.sin(create_reducer("tps")(tokens.replace(x=x), signals, 5).x))

    def by_hand(x):
        total = np.sin(x[:, 0]).sum()
        for image in range(BATCH):
            total += np.sin(squeezed(x[image, 1:], scores[image], 5)[0]).sum()
        return total

    np.testing.assert_allclose(jax.grad(loss)(tokens.x), slopes(by_hand, tokens.x), atol=2e-6)


def test_of_equally_similar_tokens_the_more_attended_takes_all():
    tokens, signals = example()
    same = tokens.replace(x=jnp.broadcast_to(tokens.x[:, 1:2], tokens.x.shape))
    order = jnp.tile(jnp.arange(1.0, 2 + PATCHES), (BATCH, 1))
    signals = with_attention(signals, order / order.sum(axis=1, keepdims=True))
    after = create_reducer("tps")(same, signals, 3)
    np.testing.assert_array_equal(after.size[0], [1, PATCHES - 2, 1, 1])
    np.testing.assert_array_equal(after.owner[0], [*[0] * (PATCHES - 3), 2, 1, 0])
    np.testing.assert_allclose(after.x, same.x[:, :4], rtol=1e-6)


def test_tokens_of_zeros_have_finite_gradients():
    tokens, signals = example()

    def loss(x):
        return jnp.sum(jnp.sin(create_reducer("tps")(tokens.replace(x=x), signals, 5).x))

    assert np.isfinite(jax.grad(loss)(tokens.x.at[:, 3:8].set(0))).all()


def test_counts_are_those_of_the_rates_and_pairs_are_counted():
    model = build_model("vit", reducer="tps", keep_rate=0.7)
    assert model.tokens_per_block == (*[197] * 3, *[139] * 3, *[98] * 3, *[69] * 3)
    pairs = sum((n - k) * k * 384 for n, k in ((196, 138), (138, 97), (97, 68)))
    before = (197, *model.tokens_per_block)
    blocks = sum(
        block_macs(n, k, 384, 1536) for n, k in zip(before, model.tokens_per_block, strict=False)
    )
    assert macs(model) == model.stem_macs + model.head_macs + blocks + pairs
