# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.plan.flops import block_macs, macs
from evit_jax.reducers import create_reducer
from tests.contracts.test_reducers import BATCH, PATCHES, example
from tests.reducers.test_topk import score_by_hand
from tests.support.by_hand import slopes


def groups_by_hand(x, received, size, prefix, removed, taus=(1, 20, 40), both_ways=True):
    """Members of each token that is left, by place; patch tokens (n, D) of one image."""

    def score(i, j):
        cos = x[i] @ x[j] / np.sqrt((x[i] @ x[i]) * (x[j] @ x[j]))
        u, v = 1 / received / max(1 / received), 1 / size / max(1 / size)
        return (
            ((cos + 1) / 2) ** (1 / taus[0])
            * (u[i] * u[j]) ** (1 / taus[1])
            * (v[i] * v[j]) ** (1 / taus[2])
        )

    even, odd = ([i for i in range(len(x)) if (prefix + i) % 2 == parity] for parity in (0, 1))
    members = {i: [i] for i in [*even, *odd]}

    def move(sources, targets, count):
        best = {i: max(targets, key=lambda j: (score(i, j), -j)) for i in sources}
        for i in sorted(sources, key=lambda i: (-score(i, best[i]), i))[:count]:
            members[best[i]] += members.pop(i)

    first = removed // 2 if both_ways else removed
    move(even, odd, first)
    if removed > first:
        move(odd, [i for i in even if i in members], removed - first)
    return list(members.values())


def means(x, share, groups):
    return np.stack([np.average(x[group], axis=0, weights=share[group]) for group in groups])


def sized(prefix=1):
    tokens, signals = example(prefix)
    size = np.ones(tokens.size.shape)
    size[:, prefix:] = np.random.default_rng(5).integers(1, 5, (BATCH, PATCHES))
    return tokens.replace(size=jnp.asarray(size, jnp.float32)), signals, size[:, prefix:]


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("removed", [1, 2, 5, 6])
@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("taus", [(1, 20, 40), (2, 1, 0.5)])
def test_merging_is_the_formula_by_hand(taus, both_ways, removed, prefix):
    tokens, signals, size = sized(prefix)
    names = ("tau_similarity", "tau_attention", "tau_size")
    settings = dict(zip(names, taus, strict=True))
    reducer = create_reducer(dict(name="mctf", both_ways=both_ways, **settings))
    after = reducer(tokens, signals, PATCHES - removed)
    for image in range(BATCH):
        x = np.asarray(tokens.x[image, prefix:], np.float64)
        received = score_by_hand("received", signals, image)[prefix:]
        groups = groups_by_hand(x, received, size[image], prefix, removed, taus, both_ways)
        expected = means(x, received * size[image], groups)
        np.testing.assert_allclose(after.x[image, prefix:], expected, rtol=1e-5, atol=1e-6)
        sizes = [size[image][group].sum() for group in groups]
        np.testing.assert_array_equal(after.size[image, prefix:], sizes)
        np.testing.assert_array_equal(after.weight[image], after.size[image])
        for place, group in enumerate(groups):
            np.testing.assert_array_equal(
                np.flatnonzero(np.asarray(after.owner[image]) == place), sorted(group)
            )


def test_what_an_odd_token_took_in_goes_with_it():
    found = 0
    for seed in range(20):
        tokens, signals = example(seed=seed)
        after = create_reducer("mctf")(tokens, signals, 6)
        found += int((np.asarray(after.size) == 3).sum())
        np.testing.assert_array_equal(after.size.sum(axis=1), 1 + PATCHES)
    assert found > 0


def test_gradients_reach_tokens_and_attention_as_in_the_formula():
    tokens, signals, size = sized()
    reducer = create_reducer("mctf")
    received = [score_by_hand("received", signals, image)[1:] for image in range(BATCH)]
    patches = [np.asarray(tokens.x[image, 1:], np.float64) for image in range(BATCH)]
    groups = [
        groups_by_hand(patches[image], received[image], size[image], 1, 5) for image in range(BATCH)
    ]

    def loss(x, k):
        after = reducer(tokens.replace(x=x), signals.replace(k=k), 7)
        return jnp.sum(jnp.sin(after.x))

    def by_hand(x, received):
        total = np.sin(x[:, 0]).sum()
        for image in range(BATCH):
            share = received[image] * size[image]
            total += np.sin(means(x[image, 1:], share, groups[image])).sum()
        return total

    of_tokens, of_keys = jax.grad(loss, argnums=(0, 1))(tokens.x, signals.k)
    expected = slopes(lambda x: by_hand(x, received), tokens.x)
    np.testing.assert_allclose(of_tokens, expected, atol=2e-6)

    x = np.asarray(tokens.x, np.float64)

    def of_one_head_and_channel(k):  # the others as they are
        keys = np.array(signals.k, np.float64)
        keys[:, 0, :, 0] = k
        moved = signals.replace(k=keys)
        return by_hand(x, [score_by_hand("received", moved, i)[1:] for i in range(BATCH)])

    expected = slopes(of_one_head_and_channel, signals.k[:, 0, :, 0], step=1e-5)
    np.testing.assert_allclose(of_keys[:, 0, :, 0], expected, atol=2e-6)


def test_it_works_before_attention_with_the_attention_of_the_block_before():
    model = build_model("vit", depth=4, reducer="mctf:r=16")
    assert model.tokens_per_block == (197, 181, 165, 149)
    pairs = sum(((n // 2) * (n - n // 2) + (1 + n) ** 2) * 384 for n in (196, 180, 164))
    blocks = sum(block_macs(n, n, 384, 1536) for n in model.tokens_per_block)
    assert macs(model) == model.stem_macs + model.head_macs + blocks + pairs
    small = build_model(
        "vit", image_size=16, patch_size=4, width=16, depth=2, num_heads=2, num_classes=3,
        reducer="mctf", keep_rate=0.7, layers=(0, 1),
    )  # fmt: skip
    with pytest.raises(InputError, match="leave block 0 out of its layers"):
        init_params(small, jax.random.key(0))


def test_schedules_leave_ten_tokens_and_half_of_the_patches():
    full = build_model("vit", reducer="mctf:r=16").tokens_per_block
    assert full == (197, 181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21)
    assert build_model("vit", reducer="mctf:r=40").tokens_per_block[3:] == (
        77, 39, 20, 11, *[10] * 5,
    )  # fmt: skip
    assert build_model("vit", reducer="mctf").tokens_per_block == (197,) * 12
    fast = build_model("vit", reducer="mctf", keep_rate=0.65, layers=(3, 6, 9))
    assert fast.tokens_per_block[::3] == (197, 129, 85, 56)


@pytest.mark.parametrize(
    ("field", "text"),
    [("r=-1", "mctf's r is a number"), ("tau_size=0.0", "mctf's tau_size must be above 0, got 0")],
)
def test_impossible_settings_are_refused(field, text):
    with pytest.raises(InputError, match=text):
        create_reducer(f"mctf:{field}")
