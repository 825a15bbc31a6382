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


def groups_by_hand(keys, prefix, removed):
    """Members of each token that is left, the destination first; keys (N, C) of all tokens."""
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    patches = range(prefix, len(keys))
    even, odd = ([i for i in patches if i % 2 == parity] for parity in (0, 1))
    best = {a: max(odd, key=lambda b: (keys[a] @ keys[b], -b)) for a in even}
    sources = sorted(even, key=lambda a: -(keys[a] @ keys[best[a]]))[:removed]
    members = {i: [i - prefix] for i in [*even, *odd] if i not in sources}
    for a in sources:
        members[best[a]].append(a - prefix)
    return list(members.values())


def fused(x, groups, size=None, late=True, upstream=False):
    """Tokens of one image from patch tokens (n, D): pruned, or merged to the longest length."""
    after = []
    for group in groups:
        token = x[group[0]]
        if late and len(group) > 1:
            lengths = [np.sqrt(np.sum(x[i] ** 2)) for i in group]
            share = np.ones(len(group)) if size is None else size[group]
            token = np.average(x[group], axis=0, weights=share)
            divisor = lengths[0] if upstream else np.sqrt(np.sum(token**2))
            token = token * max(lengths) / divisor
        after.append(token)
    return np.stack(after)


def in_block(layer, prefix=1):
    """Blocks 0 to 3 of 6 are early."""
    tokens, signals = example(prefix)
    size = np.ones(tokens.size.shape)
    size[:, prefix:] = np.random.default_rng(5).integers(1, 5, (BATCH, PATCHES))
    tokens = tokens.replace(size=jnp.asarray(size, jnp.float32))
    return tokens, signals.replace(layer=layer, depth=6), size[:, prefix:]


def groups_of(signals, image, prefix, removed):
    return groups_by_hand(np.asarray(signals.k[image], np.float64).mean(axis=0), prefix, removed)


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("removed", [1, 4, 6])
@pytest.mark.parametrize("layer", [0, 3, 4, 5])
@pytest.mark.parametrize("switch", ["", "weighted", "upstream"])
def test_pruning_and_merging_are_the_formulas_by_hand(switch, layer, removed, prefix):
    tokens, signals, size = in_block(layer, prefix)
    after = create_reducer(f"tofu:{switch}")(tokens, signals, PATCHES - removed)
    for image in range(BATCH):
        groups = groups_of(signals, image, prefix, removed)
        x = np.asarray(tokens.x[image, prefix:], np.float64)
        share = size[image] if switch == "weighted" else None
        expected = fused(x, groups, share, late=layer > 3, upstream=switch == "upstream")
        np.testing.assert_allclose(after.x[image, prefix:], expected, rtol=1e-5, atol=1e-6)
        sizes = [size[image][group].sum() for group in groups]
        np.testing.assert_array_equal(after.size[image, prefix:], sizes)
        np.testing.assert_array_equal(after.weight[image], after.size[image])
        for place, group in enumerate(groups):
            np.testing.assert_array_equal(
                np.flatnonzero(np.asarray(after.owner[image]) == place), sorted(group)
            )


@pytest.mark.parametrize("layer", [0, 4])
@pytest.mark.parametrize("upstream", [False, True])
def test_gradients_are_those_of_the_formulas(layer, upstream):
    tokens, signals, _ = in_block(layer)
    groups = [groups_of(signals, image, 1, 4) for image in range(BATCH)]
    reducer = create_reducer(f"tofu:upstream={upstream}")

    def loss(x):
        return jnp.sum(jnp.sin(reducer(tokens.replace(x=x), signals, 8).x))

    def by_hand(x):
        total = np.sin(x[:, 0]).sum()
        for image in range(BATCH):
            after = fused(x[image, 1:], groups[image], late=layer > 3, upstream=upstream)
            total += np.sin(after).sum()
        return total

    np.testing.assert_allclose(jax.grad(loss)(tokens.x), slopes(by_hand, tokens.x), atol=2e-6)


def test_lengths_are_kept_in_late_blocks_and_tokens_in_early_ones():
    tokens, signals, _ = in_block(0)
    early = create_reducer("tofu")(tokens, signals, 7)
    for image in range(BATCH):
        before = {tuple(token) for token in np.asarray(tokens.x[image])}
        assert {tuple(token) for token in np.asarray(early.x[image])} <= before
    unit = tokens.x / jnp.linalg.norm(tokens.x, axis=-1, keepdims=True)
    late = create_reducer("tofu")(tokens.replace(x=unit), signals.replace(layer=4), 7)
    np.testing.assert_allclose(jnp.linalg.norm(late.x, axis=-1), 1, rtol=1e-6)


def test_it_removes_r_tokens_per_block_or_what_rates_say():
    assert build_model("vit", depth=4, reducer="tofu:r=16").tokens_per_block == (181, 165, 149, 133)
    some = build_model("vit", depth=4, reducer="tofu:r=16", layers=(1, 3))
    assert some.tokens_per_block == (197, 181, 181, 165)
    most = build_model("vit", depth=3, reducer="tofu:r=150")
    assert most.tokens_per_block == (99, 50, 26)
    assert build_model("vit", depth=2, reducer="tofu").tokens_per_block == (197, 197)
    rated = build_model("vit", depth=2, reducer="tofu", keep_rate=0.75)
    assert rated.tokens_per_block == (148, 112)
    with pytest.raises(InputError, match="tofu's r is a number of tokens from 0 up, got -1"):
        create_reducer("tofu:r=-1")
    with pytest.raises(InputError, match="has a schedule of its own"):
        build_model("vit", reducer="tofu:r=16", keep_rate=0.7)


def test_pairs_are_counted_by_keys():
    assert create_reducer("tofu").matching_macs(196, 178, 1, 384, 6) == 99 * 98 * 64
