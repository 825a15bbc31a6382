# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model
from evit_jax.reducers import create_reducer
from tests.contracts.test_reducers import BATCH, PATCHES, example
from tests.support.by_hand import slopes


def groups_by_hand(keys, removed, margin, protects):
    """Members of each token that is left, itself first: one image's keys (n, C), pair by pair."""
    n = len(keys)
    cos = np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in keys] for a in keys])

    def elu(value):
        return value if value > 0 else np.exp(value) - 1

    energy = [np.mean([elu(cos[i, j] - margin) for j in range(n)]) for i in range(n)]
    order = sorted(range(n), key=lambda i: (-energy[i], i))
    paired = order[: 2 * removed] if protects else order
    even, odd = paired[::2], paired[1::2]
    best = {a: max(odd, key=lambda b: (cos[a, b], -b)) for a in even}
    sources = sorted(even, key=lambda a: -cos[a, best[a]])[:removed]
    rest = [i for i in order if i not in odd and i not in sources]
    members = {i: [i] for i in [*rest, *odd]}
    for a in sources:
        members[best[a]].append(a)
    return list(members.values())


def means(x, size, groups):
    return np.stack([np.average(x[group], axis=0, weights=size[group]) for group in groups])


def in_block(prefix, layer, depth=5):
    tokens, signals = example(prefix)
    size = np.ones(tokens.size.shape)
    size[:, prefix:] = np.random.default_rng(5).integers(1, 5, (BATCH, PATCHES))
    tokens = tokens.replace(size=jnp.asarray(size, jnp.float32))
    return tokens, signals.replace(layer=layer, depth=depth), size[:, prefix:]


def keys_of(signals, image, prefix):
    return np.asarray(signals.k[image], np.float64).mean(axis=0)[prefix:]


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("removed", [1, 4, 6])
@pytest.mark.parametrize(
    ("spec", "layer", "margin", "protects"),
    [
        ("pitome", 0, 0.75, False),
        ("pitome", 2, 0.45, False),
        ("pitome", 3, 0.3, True),
        ("pitome:margin=0.9,falling=False", 4, 0.9, True),
        ("pitome:protect_last=False", 2, 0.45, True),
        ("pitome:protect_last=False", 3, 0.3, False),
    ],
)
def test_energy_and_merging_are_the_formulas_by_hand(
    spec, layer, margin, protects, prefix, removed
):
    tokens, signals, size = in_block(prefix, layer)
    after = create_reducer(spec)(tokens, signals, PATCHES - removed)
    for image in range(BATCH):
        groups = groups_by_hand(keys_of(signals, image, prefix), removed, margin, protects)
        x = np.asarray(tokens.x[image, prefix:], np.float64)
        expected = means(x, size[image], groups)
        np.testing.assert_allclose(after.x[image, prefix:], expected, rtol=1e-5, atol=1e-6)
        sizes = [size[image][group].sum() for group in groups]
        np.testing.assert_array_equal(after.size[image, prefix:], sizes)
        np.testing.assert_array_equal(after.weight[image], after.size[image])
        for place, group in enumerate(groups):
            np.testing.assert_array_equal(
                np.flatnonzero(np.asarray(after.owner[image]) == place), sorted(group)
            )


@pytest.mark.parametrize("layer", [0, 4])
def test_gradients_are_those_of_the_means(layer):
    tokens, signals, size = in_block(1, layer)
    margin, protects = 0.75 * (1 - layer / 5), layer == 4
    groups = [
        groups_by_hand(keys_of(signals, image, 1), 4, margin, protects) for image in range(BATCH)
    ]

    def loss(x):
        return jnp.sum(jnp.sin(create_reducer("pitome")(tokens.replace(x=x), signals, 8).x))

    def by_hand(x):
        total = np.sin(x[:, 0]).sum()
        for image in range(BATCH):
            total += np.sin(means(x[image, 1:], size[image], groups[image])).sum()
        return total

    np.testing.assert_allclose(jax.grad(loss)(tokens.x), slopes(by_hand, tokens.x), atol=1e-6)


def test_a_token_like_no_other_is_protected_in_deep_blocks():
    tokens, signals = example()
    keys = jnp.zeros((BATCH, 1, 1 + PATCHES, 8)).at[..., 0].set(1.0)
    alone = jnp.asarray([3, 9])  # tokens, that is patches 2 and 8
    keys = keys.at[:, :, alone].set(jax.nn.one_hot(jnp.asarray([5, 6]), 8)[None, None])
    signals = signals.replace(k=keys, layer=11, depth=12)
    after = create_reducer("pitome")(tokens, signals, 7)
    for patch in (2, 8):
        assert float(after.size[0, 1 + int(after.owner[0, patch])]) == 1
    assert float(after.size[0].max()) == 6  # equal ones all merge into the first


def test_the_paper_keeps_a_share_in_every_block():
    model = build_model("vit", reducer="pitome", keep_rate=0.9125)
    n, expected = 196, []
    for _ in range(12):
        n -= int(n * (1 - 0.9125))
        expected.append(1 + n)
    assert model.tokens_per_block == tuple(expected)
    assert build_model("vit", reducer="pitome").tokens_per_block == (197,) * 12
    halved = build_model("vit", depth=2, reducer="pitome", keep_rate=0.1)
    assert halved.tokens_per_block == (99, 50)  # halving is the most


def test_pairs_are_counted_by_keys():
    assert create_reducer("pitome").matching_macs(196, 178, 1, 384, 6) == 196**2 * 64


def test_margins_are_cosines():
    with pytest.raises(InputError, match="pitome's margin is a cosine from 0 to 1, got 75"):
        create_reducer("pitome:margin=75")
