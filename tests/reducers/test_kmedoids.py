# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.reducers import create_reducer
from tests.contracts.test_reducers import BATCH, PATCHES, example, with_attention
from tests.reducers.test_topk import score_by_hand
from tests.support.by_hand import slopes


def medoids_by_hand(x, weight, keep, iterations=3, upstream=False):
    """Medoids of one image's patch tokens (n, D), loop by loop."""
    n = len(x)
    distance = np.array([[np.sqrt(np.sum((a - b) ** 2)) for b in x] for a in x])
    medoids = sorted(range(n), key=lambda i: (-weight[i], i))[:keep]
    for _ in range(iterations):
        members = {medoid: [] for medoid in medoids}
        for i in range(n):
            nearest = min(medoids, key=lambda m: (distance[i, m], medoids.index(m)))
            members[i if i in medoids else nearest].append(i)
        now = []
        for medoid in medoids:
            cluster = members[medoid]
            if upstream:
                cost = {i: weight[i] * sum(distance[i, j] for j in range(n)) for i in cluster}
            else:
                cost = {i: sum(weight[j] * distance[i, j] for j in cluster) for i in cluster}
            now.append(min(cluster, key=lambda i: (cost[i], i)))
        medoids = now
    return medoids


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("keep", [1, 4, 9])
@pytest.mark.parametrize("upstream", [False, True])
def test_medoids_are_the_formulas_by_hand(prefix, keep, upstream):
    tokens, signals = example(prefix)
    size = np.ones(tokens.size.shape)
    size[:, prefix:] = np.random.default_rng(5).integers(1, 5, (BATCH, PATCHES))
    tokens = tokens.replace(size=jnp.asarray(size, jnp.float32))
    after = create_reducer(f"kmedoids:upstream={upstream}")(tokens, signals, keep)
    for image in range(BATCH):
        weight = score_by_hand("class", signals, image)[prefix:]
        x = np.asarray(tokens.x[image, prefix:], np.float64)
        medoids = medoids_by_hand(x, weight, keep, upstream=upstream)
        np.testing.assert_array_equal(after.x[image, prefix:], tokens.x[image, prefix:][medoids, :])
        np.testing.assert_array_equal(after.size[image, prefix:], size[image, prefix:][medoids])
        owner = [medoids.index(patch) if patch in medoids else -1 for patch in range(PATCHES)]
        np.testing.assert_array_equal(after.owner[image], owner)


def test_gradients_are_those_of_the_medoids():
    tokens, signals = example()
    weights = [score_by_hand("class", signals, image)[1:] for image in range(BATCH)]

    def loss(x):
        return jnp.sum(jnp.sin(create_reducer("kmedoids")(tokens.replace(x=x), signals, 4).x))

    def by_hand(x):
        total = np.sin(x[:, 0]).sum()
        for image in range(BATCH):
            medoids = medoids_by_hand(x[image, 1:], weights[image], 4)
            total += np.sin(x[image, 1:][medoids]).sum()
        return total

    np.testing.assert_allclose(jax.grad(loss)(tokens.x), slopes(by_hand, tokens.x), atol=1e-6)


def test_without_iterations_it_is_topk():
    tokens, signals = example()
    jax.tree.map(
        np.testing.assert_array_equal,
        create_reducer("kmedoids:iterations=0")(tokens, signals, 4),
        create_reducer("topk")(tokens, signals, 4),
    )


def test_the_middle_of_a_cluster_is_found_from_its_edge():
    tokens, signals = example()
    # Two heaps on a line, of six patches each; attention is highest at an edge of each. On a line
    # a medoid is the weighted median: 0.08 + 2 * 0.07 is more than half of 0.43.
    line = jnp.asarray([-12.0, -11, -10, -9, -8.5, -8, 8, 8.5, 9, 10, 11, 12])
    x = tokens.x.at[:, 1:].set(line[None, :, None])
    weight = jnp.asarray([0.1, 0.08, *[0.07] * 5, *[0.07] * 5, 0.08])
    signals = with_attention(signals, jnp.broadcast_to(weight, (BATCH, 13)))
    tokens = tokens.replace(x=x)
    middles = create_reducer("kmedoids")(tokens, signals, 2)
    np.testing.assert_array_equal(np.flatnonzero(middles.owner[0] >= 0), [2, 9])
    edges = create_reducer("topk")(tokens, signals, 2)
    np.testing.assert_array_equal(np.flatnonzero(edges.owner[0] >= 0), [0, 11])


def test_tokens_in_the_same_place_are_medoids_once_each():
    tokens, signals = example()
    same = tokens.replace(x=jnp.broadcast_to(tokens.x[:, 1:2], tokens.x.shape))
    after = create_reducer("kmedoids")(same, signals, 5)
    for image in range(BATCH):
        owner = np.asarray(after.owner[image])
        assert sorted(owner[owner >= 0]) == [0, 1, 2, 3, 4]


def test_the_weight_is_one_of_the_scores():
    tokens, signals = example()
    after = create_reducer("kmedoids:by=received")(tokens, signals.replace(class_token=False), 4)
    for image in range(BATCH):
        weight = score_by_hand("received", signals, image)[1:]
        medoids = medoids_by_hand(np.asarray(tokens.x[image, 1:], np.float64), weight, 4)
        np.testing.assert_array_equal(after.x[image, 1:], tokens.x[image, 1:][medoids, :])
    with pytest.raises(InputError, match="the model has no class token"):
        create_reducer("kmedoids")(tokens, signals.replace(class_token=False), 4)
    with pytest.raises(InputError, match="unknown score 'key'"):
        create_reducer("kmedoids:by=key")
    with pytest.raises(InputError, match="iterations is a number from 0 up"):
        create_reducer("kmedoids:iterations=-1")


def test_distances_and_a_whole_map_are_counted():
    assert create_reducer("kmedoids").matching_macs(196, 98, 1, 384, 6) == 196**2 * 384
    by = create_reducer("kmedoids:by=received")
    assert by.matching_macs(196, 98, 1, 384, 6) == (196**2 + 197**2) * 384
