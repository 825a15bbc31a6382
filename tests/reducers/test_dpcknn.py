# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model
from evit_jax.plan.flops import block_macs, macs
from evit_jax.reducers import create_reducer
from evit_jax.reducers.dpcknn import peaks, squared_distances
from tests.contracts.test_reducers import BATCH, PATCHES, example
from tests.support.by_hand import slopes


def clusters(x, keep, neighbors=5):
    """The members of each cluster, its center first; patch tokens (n, D) of one image."""
    n, width = x.shape
    distance = np.array([[np.sqrt(np.sum((a - b) ** 2) / width) for b in x] for a in x])
    density = [np.exp(-np.mean(np.sort(distance[i] ** 2)[:neighbors])) for i in range(n)]
    scores = []
    for i in range(n):
        denser = [j for j in range(n) if (density[j], -j) > (density[i], -i)]
        delta = min(distance[i, j] for j in denser) if denser else distance.max()
        scores.append(density[i] * delta)
    centers = sorted(range(n), key=lambda i: (-scores[i], i))[:keep]
    members = {center: [center] for center in centers}
    for i in set(range(n)) - set(centers):
        members[min(centers, key=lambda center: (distance[i, center], center))].append(i)
    return [members[center] for center in centers]


def means(x, size, groups):
    return np.stack([np.average(x[group], axis=0, weights=size[group]) for group in groups])


def sized(prefix=1, seed=5):
    tokens, signals = example(prefix)
    size = np.ones(tokens.size.shape)
    size[:, prefix:] = np.random.default_rng(seed).integers(1, 5, (BATCH, PATCHES))
    return tokens.replace(size=jnp.asarray(size, jnp.float32)), signals, size


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("keep", [1, 4, 9])
@pytest.mark.parametrize("equal", [False, True])
def test_clusters_and_means_are_the_formulas_by_hand(prefix, keep, equal):
    tokens, signals, size = sized(prefix)
    after = create_reducer(f"dpcknn:equal={equal}")(tokens, signals, keep)
    for image in range(BATCH):
        x = np.asarray(tokens.x[image, prefix:], np.float64)
        groups = clusters(x, keep)
        sizes = size[image, prefix:]
        expected = means(x, np.ones(PATCHES) if equal else sizes, groups)
        np.testing.assert_allclose(after.x[image, prefix:], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(
            after.size[image, prefix:], [sizes[group].sum() for group in groups]
        )
        for place, group in enumerate(groups):
            np.testing.assert_array_equal(
                np.flatnonzero(np.asarray(after.owner[image]) == place), sorted(group)
            )


def test_gradients_are_those_of_the_means():
    tokens, signals, size = sized()

    def loss(x):
        return jnp.sum(jnp.sin(create_reducer("dpcknn")(tokens.replace(x=x), signals, 4).x))

    def by_hand(x):
        total = np.sin(x[:, 0]).sum()
        for image in range(BATCH):
            patches = x[image, 1:]
            total += np.sin(means(patches, size[image, 1:], clusters(patches, 4))).sum()
        return total

    np.testing.assert_allclose(jax.grad(loss)(tokens.x), slopes(by_hand, tokens.x), atol=1e-6)


def test_equal_tokens_are_told_apart_by_their_index():
    tokens, signals = example()
    same = tokens.replace(x=jnp.broadcast_to(tokens.x[:, 1:2], tokens.x.shape))
    after = create_reducer("dpcknn")(same, signals, 3)
    np.testing.assert_array_equal(after.owner[0], [0, 1, 2, *[0] * (PATCHES - 3)])
    np.testing.assert_array_equal(after.size[0], [1, PATCHES - 2, 1, 1])


def test_far_tokens_keep_their_order_where_densities_underflow():
    tokens, _ = example()
    near, far = tokens.x[:, 1:], 1000 * tokens.x[:, 1:]
    assert float(jnp.exp(-squared_distances(far)[0, 0].mean())) == 0
    scores = peaks(squared_distances(far), 5)
    assert np.isfinite(scores).all()
    assert len(set(np.asarray(scores[0]))) == PATCHES
    # A constant vector on top changes no distance.
    np.testing.assert_allclose(
        squared_distances(near + 1000), squared_distances(near), rtol=1e-3, atol=1e-3
    )


def test_it_works_before_attention_and_needs_no_signals():
    sizes = dict(depth=4, layers=(0,), tokens=98)
    model = build_model("vit", reducer="dpcknn", **sizes)
    assert model.tokens_per_block == (99,) * 4
    assert block_macs(99, 99, 384, 1536) * 4 + 196**2 * 384 == macs(model) - (
        model.stem_macs + model.head_macs
    )
    tokens, signals = example()
    expected = create_reducer("dpcknn")(tokens, signals, 5)
    nothing = signals.replace(q=None, k=None, v=None, before=None, after=None, class_token=False)
    jax.tree.map(
        np.testing.assert_array_equal, create_reducer("dpcknn")(tokens, nothing, 5), expected
    )


def test_proportional_attention_is_a_choice():
    tokens, signals = example()
    assert create_reducer("dpcknn")(tokens, signals, 5).weight is None
    after = create_reducer("dpcknn:proportional")(tokens, signals, 5)
    np.testing.assert_array_equal(after.weight, after.size)


def test_more_neighbors_than_tokens_are_all_of_them_and_none_are_refused():
    tokens, signals = example()
    many, all_of_them = (
        create_reducer(f"dpcknn:neighbors={k}")(tokens, signals, 5) for k in (99, PATCHES)
    )
    jax.tree.map(np.testing.assert_array_equal, many, all_of_them)
    with pytest.raises(InputError, match="neighbors is a number from 1 up, got 0"):
        create_reducer("dpcknn:neighbors=0")
