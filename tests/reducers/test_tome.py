# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.plan.stages import stages
from evit_jax.reducers import create_reducer
from evit_jax.tokens import Signals, Tokens, unmerge
from tests.contracts.test_reducers import BATCH, PATCHES, example


def by_hand(x, size, keys, prefix, removed):
    """One image, token by token: the formulas of the paper in float64."""
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    even, odd = range(0, len(x), 2), range(1, len(x), 2)
    best = {}
    for a in even:
        scores = {b: keys[a] @ keys[b] for b in odd if b >= prefix}
        if a >= prefix:
            b = max(scores, key=lambda b: (scores[b], -b))
            best[a] = (scores[b], b)
    sources = sorted(best, key=lambda a: -best[a][0])[:removed]
    members = {i: [i] for i in range(len(x)) if i not in sources}
    for a in sources:
        members[best[a][1]].append(a)
    left = [i for i in members if i < prefix]
    left += [i for i in even if i in members and i >= prefix] + [i for i in odd if i >= prefix]
    merged = np.stack([np.average(x[members[i]], axis=0, weights=size[members[i]]) for i in left])
    return merged, np.array([size[members[i]].sum() for i in left]), [members[i] for i in left]


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("removed", [1, 4, 6])
def test_merging_is_the_formula_by_hand(prefix, removed):
    tokens, signals = example(prefix)
    rng = np.random.default_rng(5)
    size = np.ones(tokens.size.shape)
    size[:, prefix:] = rng.integers(1, 5, (BATCH, PATCHES))
    after = create_reducer("tome")(
        tokens.replace(size=jnp.asarray(size, jnp.float32)), signals, PATCHES - removed
    )
    for image in range(BATCH):
        x, keys = (np.asarray(a[image], np.float64) for a in (tokens.x, signals.keys()))
        merged, sizes, members = by_hand(x, size[image], keys, prefix, removed)
        np.testing.assert_allclose(after.x[image], merged, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(after.size[image], sizes, rtol=1e-6)
        np.testing.assert_array_equal(after.weight[image], after.size[image])
        for place, group in enumerate(members[prefix:]):
            owned = np.flatnonzero(np.asarray(after.owner[image]) == place) + prefix
            assert sorted(group) == sorted(owned)


def test_sizes_are_conserved_through_all_blocks_and_owners_agree():
    model = build_model(
        "vit", image_size=32, patch_size=4, width=32, depth=4, num_heads=4, num_classes=3,
        reducer="tome:r=12",
    )  # fmt: skip
    assert model.tokens_per_block == (53, 41, 29, 17)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    _, out = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images)
    np.testing.assert_allclose(out["size"].sum(axis=1), 65, rtol=1e-6)
    for image in range(2):
        counts = np.bincount(out["owner"][-1][image], minlength=16)
        np.testing.assert_allclose(out["size"][image, 1:], counts, rtol=1e-6)


def test_proportional_attention_can_be_left_out():
    tokens, signals = example()
    assert create_reducer("tome:proportional=False")(tokens, signals, 8).weight is None


def counts(spec, depth=12, **settings):
    model = build_model("vit", depth=depth, reducer=spec, **settings)
    return model.tokens_per_block


def test_schedules_are_constant_linear_or_a_list():
    assert counts("tome:r=8") == tuple(range(189, 100, -8))
    assert counts("tome:r=16")[-2:] == (21, 11)  # at most half of the patches each time
    assert counts("tome:r=5,linear=1.0", depth=3) == (197, 192, 182)
    assert counts(dict(name="tome", r=(3, 0, 7)), depth=4) == (194, 194, 187, 187)
    assert counts("tome:r=8", depth=4, layers=(1, 3)) == (197, 189, 189, 181)
    assert counts("tome") == (197,) * 12


def test_rates_and_counts_replace_a_schedule():
    assert counts("tome", depth=2, keep_rate=0.75) == (148, 112)
    assert counts("tome:r=8", depth=2, keep_rate=1) == (197, 197)  # the dense model beside it
    for settings in (dict(keep_rate=0.7), dict(tokens=(150, 120)), dict(keep_rates=(1, 0.7))):
        with pytest.raises(InputError, match="has a schedule of its own"):
            counts("tome:r=8", depth=2, **settings)
    assert counts("tome", depth=2, keep_rate=0.1) == (99, 50)  # halving is the most


def test_a_schedule_can_be_warmed_up():
    model = build_model("vit", reducer="tome:r=16")
    table = stages(lambda left: model.plan(remaining=left), None, length=100, rungs=4)
    assert table[0].keep == (None,) * 12
    assert table[-1].keep == model.keep
    last = [model.clone(keep=stage.keep).tokens_per_block[-1] for stage in table]
    assert last == sorted(last, reverse=True)


def test_layers_may_be_given_in_any_order():
    assert counts("tome:r=8", depth=4, layers=(3, 1, 2, 0)) == counts("tome:r=8", depth=4)


def test_keys_of_zeros_merge_no_prefix():
    tokens, signals = example()
    after = create_reducer("tome")(tokens, signals.replace(k=signals.k * 0), 8)
    np.testing.assert_array_equal(after.x[:, 0], tokens.x[:, 0])
    assert (np.asarray(after.owner) >= 0).all()


@pytest.mark.parametrize("r", [-1, (1, 2, 3)])
def test_impossible_schedules_are_refused(r):
    with pytest.raises(InputError, match="tome's r is a number from 0 up"):
        build_model("vit", depth=2, reducer=dict(name="tome", r=r))


def test_unmerge_is_exact_for_kept_patches():
    tokens, signals = example(prefix=2)
    for spec, empty in (("evit", False), ("evit:fuse=False", True), ("tome", False)):
        after = create_reducer(spec)(tokens, signals, 8)
        dense = np.asarray(unmerge(after.x, after.owner, prefix=2))
        assert dense.shape == (BATCH, PATCHES, tokens.x.shape[-1])
        for image in range(BATCH):
            owner = np.asarray(after.owner[image])
            alone = [p for p in range(PATCHES) if owner[p] >= 0 and (owner == owner[p]).sum() == 1]
            assert len(alone) >= 4
            np.testing.assert_array_equal(dense[image, alone], tokens.x[image, 2 + np.array(alone)])
            together = [p for p in range(PATCHES) if owner[p] >= 0]
            np.testing.assert_array_equal(
                dense[image, together], after.x[image, 2 + owner[together]]
            )
            dropped = np.flatnonzero(owner < 0)
            assert bool(len(dropped)) == empty
            np.testing.assert_array_equal(dense[image, dropped], 0)


def test_similarity_is_taken_in_float32_of_bfloat16_keys():
    keys = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 4)), jnp.bfloat16)
    x = jnp.ones((1, 9, 3), jnp.bfloat16)
    tokens = Tokens(x=x, size=jnp.ones((1, 9)), owner=jnp.arange(8)[None])
    keys = keys[:, None]  # of one head
    after = create_reducer("tome")(tokens, Signals(q=keys, k=keys), 5)
    keys = keys.astype(jnp.float32)
    exact = create_reducer("tome")(tokens, Signals(q=keys, k=keys), 5)
    assert after.x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(after.owner, exact.owner)
