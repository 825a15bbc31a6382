# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.models.layers import embed_patches
from evit_jax.plan.flops import block_macs, macs
from evit_jax.reducers import create_reducer
from tests.contracts.test_reducers import BATCH, PATCHES, example, signals_of
from tests.support.by_hand import attention, slopes


def graph_by_hand(x, grid, neighbors=8, spatial=True, semantic=True):
    """G of one image from patch tokens (n, D) of the embedding, pair by pair."""
    n = len(x)
    joined = np.zeros((n, n), bool)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        cos = {j: x[i] @ x[j] / np.sqrt((x[i] @ x[i]) * (x[j] @ x[j])) for j in others}
        for rank, j in enumerate(sorted(others, key=lambda j: (-cos[j], j))):
            (r, c), (s, d) = divmod(i, grid[1]), divmod(j, grid[1])
            around = abs(r - s) <= 1 and abs(c - d) <= 1
            joined[i, j] = (spatial and around) or (semantic and rank < neighbors)
    degree = joined.sum(axis=1)
    graph = [[joined[i, j] / np.sqrt(degree[i] * degree[j]) for j in range(n)] for i in range(n)]
    return np.array(graph)


def kept_by_hand(signals, image, prefix, keep):
    maps = attention(signals, image)
    score = {
        i: max(m[i, i] for m in maps) * max(m[:, i].sum() for m in maps)
        for i in range(prefix, maps.shape[1])
    }
    best = sorted(score, key=lambda i: (-score[i], i))
    return sorted(i - prefix for i in best[:keep]), sorted(i - prefix for i in best[keep:])


def propagated(x, kept, dropped, graph, alpha):
    return np.stack([x[k] + alpha * sum(graph[k, p] * x[p] for p in dropped) for k in kept])


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(alpha=0.4),
        dict(neighbors=2),
        dict(spatial=False, neighbors=3),
        dict(semantic=False),
    ],
)
def test_two_blocks_are_the_formulas_by_hand(settings, prefix):
    tokens, first = example(prefix)
    reducer = create_reducer(dict(name="gtp", proportional=True, **settings))
    once = reducer(tokens, first, 8)
    _, second = example(prefix, seed=1)
    second = signals_of(second, slice(prefix + 8)).replace(weight=once.weight)
    # Attention by hand knows no weights; what it is in the second block is not what is tested.
    twice = reducer(once, second.replace(weight=None), 5)
    alpha = settings.get("alpha", 0.1)
    of_graph = {name: settings[name] for name in settings if name != "alpha"}
    for image in range(BATCH):
        before = np.asarray(first.before[image, prefix:], np.float64)
        graph = graph_by_hand(before, (3, 4), **of_graph)
        x = np.asarray(tokens.x[image, prefix:], np.float64)
        scale, owner = np.ones((PATCHES, 1)), np.arange(PATCHES)
        for after, signals, keep in ((once, first, 8), (twice, second, 5)):
            kept, dropped = kept_by_hand(signals, image, prefix, keep)
            x = propagated(x, kept, dropped, graph, alpha)
            scale = propagated(scale, kept, dropped, graph, alpha)
            heirs = {k: kept.index(k) for k in kept}
            for p in dropped:
                given = [graph[k, p] for k in kept]
                heirs[p] = int(np.argmax(given)) if max(given) > 0 else -1
            owner = np.array([heirs[token] if token >= 0 else -1 for token in owner])
            graph = graph[kept][:, kept]  # never normalized again
            np.testing.assert_allclose(after.x[image, prefix:], x, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(after.weight[image, prefix:], scale[:, 0], rtol=1e-5)
            np.testing.assert_array_equal(after.weight[image, :prefix], 1)
            np.testing.assert_array_equal(after.owner[image], owner)
            sizes = np.bincount(owner[owner >= 0], minlength=keep)
            np.testing.assert_array_equal(after.size[image, prefix:], sizes)


def test_gradients_are_those_of_the_sums():
    tokens, signals = example()
    graphs = [
        graph_by_hand(np.asarray(signals.before[image, 1:], np.float64), (3, 4))
        for image in range(BATCH)
    ]
    parts = [kept_by_hand(signals, image, 1, 7) for image in range(BATCH)]

    def loss(x):
        return jnp.sum(jnp.sin(create_reducer("gtp")(tokens.replace(x=x), signals, 7).x))

    def by_hand(x):
        total = np.sin(x[:, 0]).sum()
        for image in range(BATCH):
            after = propagated(x[image, 1:], *parts[image], graphs[image], 0.1)
            total += np.sin(after).sum()
        return total

    np.testing.assert_allclose(jax.grad(loss)(tokens.x), slopes(by_hand, tokens.x), atol=1e-6)


def test_a_patch_without_a_neighbor_that_stays_is_dropped():
    tokens, signals = example()
    reducer = create_reducer("gtp:semantic=False")
    after = reducer(tokens, signals, 1)
    for image in range(BATCH):
        (kept,), dropped = kept_by_hand(signals, image, 1, 1)
        near = [
            p for p in dropped
            if max(abs(p // 4 - kept // 4), abs(p % 4 - kept % 4)) == 1
        ]  # fmt: skip
        np.testing.assert_array_equal(
            np.flatnonzero(np.asarray(after.owner[image]) == 0), sorted([kept, *near])
        )
        assert after.size[image, 1] == 1 + len(near)


def test_the_graph_of_a_model_is_that_of_its_embedding():
    model = build_model(
        "vit", image_size=16, patch_size=4, width=16, depth=3, num_heads=2, num_classes=3,
        reducer="gtp", layers=(0, 2), tokens=(15, 12),
    )  # fmt: skip
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    _, out = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images)
    first, last = out["aux"]["gtp_graph"]
    assert (first.shape, last.shape) == ((2, 15, 15), (2, 12, 12))
    layer = params["patch_embed"]
    x = embed_patches(images, layer["kernel"], layer["bias"], patch_size=(4, 4))
    x = np.asarray(x + params["pos_embed"][:, 1:], np.float64)
    for image in range(2):
        whole = graph_by_hand(x[image], (4, 4))
        without = [np.delete(np.delete(whole, p, 0), p, 1) for p in range(16)]
        assert sum(np.allclose(graph, first[image], atol=1e-6) for graph in without) == 1


def test_it_removes_r_tokens_per_block_or_what_rates_say_and_pairs_are_counted():
    model = build_model("vit", depth=3, reducer="gtp:r=8")
    assert model.tokens_per_block == (189, 181, 173)
    before = (197, *model.tokens_per_block)
    blocks, pairs = 0, 0
    for n, k in zip(before, model.tokens_per_block, strict=False):
        blocks += block_macs(n, k, 384, 1536)
        pairs += n**2 * 384 + (k - 1) * 8 * 384
    assert macs(model) == model.stem_macs + model.head_macs + blocks + pairs
    assert build_model("vit", depth=2, reducer="gtp").tokens_per_block == (197, 197)
    assert build_model("vit", depth=2, reducer="gtp", keep_rate=0.5).tokens_per_block == (99, 50)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ("r=-1", "gtp's r is a number of tokens from 0 up"),
        ("spatial=False,semantic=False", "gtp's graph needs spatial=True, semantic=True or both"),
        ("neighbors=0", "gtp's neighbors is a number from 1 up, got 0"),
    ],
)
def test_impossible_settings_are_refused(fields, text):
    with pytest.raises(InputError, match=text):
        create_reducer(f"gtp:{fields}")
