# SPDX-License-Identifier: Apache-2.0
"""One contract for every file in reducers/, and for a small method for each part of the seam.

A new file is tested by being there.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.reducers import create_reducer, known_reducers
from evit_jax.tokens import Signals, Tokens, follow
from tests.support.reducers import THROWN_IN

BATCH, PATCHES, WIDTH, HEADS = 3, 12, 5, 2

# Exceptions from contracts, by file name, each with its reason.
FIXED_COUNT = {"window": "halves an even grid, so neither 3 x 4 patches nor another count will do"}
STANDS_FOR_OTHERS = {
    "tofu": "in early blocks a token takes over a patch and nothing of its content"
}
SPREADS = {"gtp": "gives a part of a dropped token to each of its neighbors, one of which owns it"}
SOFT = dict.fromkeys(("patchmerger", "sit", "stvit"), "each token is made of all patches")
MASKS = dict.fromkeys(("diffrate_search", "dynamicvit"), "hides tokens in training, and learns how")
OWN_WEIGHT = {"diffrate": "what is merged adds to the weight by how similar it is, not by its size"}


def file_name(reducer):
    return type(reducer).__module__.rpartition(".")[2]


def variants():
    """Every method with its defaults, and with each of its switches turned."""
    for name in known_reducers():
        reducer = create_reducer(name)
        yield pytest.param(reducer, id=name)
        for field in dataclasses.fields(reducer):
            if isinstance(field.default, bool):
                turned = dataclasses.replace(reducer, **{field.name: not field.default})
                yield pytest.param(turned, id=f"{name}:{field.name}={not field.default}")
    for reducer in THROWN_IN:
        yield pytest.param(reducer, id=type(reducer).__name__)


def but_for(exceptions):
    """Parametrizes with every variant of the methods that are not among the exceptions."""
    params = [p for p in variants() if file_name(p.values[0]) not in exceptions]
    return pytest.mark.parametrize("reducer", params)


every_reducer = but_for({})
every_free_one = but_for(FIXED_COUNT)  # in what it keeps
every_prefix = pytest.mark.parametrize("prefix", [1, 2])


def example(prefix=1, seed=0, batch=BATCH, train=False, grid=(3, 4)):
    rng = np.random.default_rng(seed)
    patches = grid[0] * grid[1]
    length = prefix + patches
    tokens = Tokens(
        x=jnp.asarray(rng.normal(size=(batch, length, WIDTH)), jnp.float32),
        size=jnp.ones((batch, length)),
        owner=jnp.tile(jnp.arange(patches), (batch, 1)),
        prefix=prefix,
    )
    q, k, v = jnp.asarray(rng.normal(size=(3, batch, HEADS, length, 4)), jnp.float32)
    signals = Signals(
        q=q,
        k=k,
        v=v,
        before=jnp.asarray(rng.normal(size=tokens.x.shape), jnp.float32),
        after=tokens.x,
        rng=jax.random.split(jax.random.key(seed), batch) if train else None,
        grid=grid,
        prefix=prefix,
        train=train,
    )
    return tokens, signals


def with_attention(signals, attention):
    """The same signals, with this class attention (batch, length) in every head."""
    length = attention.shape[1]
    k = jnp.broadcast_to(jnp.log(attention)[:, None, :, None], (len(attention), HEADS, length, 1))
    return signals.replace(q=jnp.ones_like(k), k=k)


def signals_of(signals, index):
    """The signals of some tokens, in this order; an index or a slice."""
    heads = {name: getattr(signals, name)[:, :, index] for name in "qkv"}
    streams = {name: getattr(signals, name)[:, index] for name in ("before", "after")}
    return signals.replace(**heads, **streams)


def call(reducer, tokens, signals, keep):
    """The reducer's result; parameters, where it has some, are drawn."""
    if not isinstance(reducer, nn.Module):
        return reducer(tokens, signals, keep)
    params = reducer.init(jax.random.key(3), tokens, signals, keep)
    params = jax.tree.map(lambda p: 5 * p, params)  # else some score all tokens alike at the start
    return reducer.apply(params, tokens, signals, keep)


def count_to_keep(reducer, n, prefix):
    return max(n * 5 // 6, reducer.smallest(n, prefix))


def reduce_twice(reducer, prefix, train=False):
    """Two reducing blocks in a row; the second sees what the first appended."""
    tokens, signals = example(prefix, train=train)
    once = call(reducer, tokens, signals, count_to_keep(reducer, tokens.patches, prefix))
    _, signals = example(prefix, seed=1, train=train)
    signals = signals_of(signals, slice(once.x.shape[1])).replace(weight=once.weight)
    keep = count_to_keep(reducer, once.patches, prefix)
    return tokens, once, call(reducer, once, signals, keep), keep


def masks(reducer, train):
    """Whether it keeps all tokens in training and hides some of them."""
    return train and (file_name(reducer) in MASKS or type(reducer).__name__ == "Predictor")


@every_prefix
@every_free_one
@pytest.mark.parametrize("train", [False, True])
def test_prefix_comes_back_untouched_and_the_count_is_the_planned_one(reducer, prefix, train):
    tokens, _, twice, keep = reduce_twice(reducer, prefix, train)
    np.testing.assert_array_equal(twice.x[:, :prefix], tokens.x[:, :prefix])
    np.testing.assert_array_equal(twice.size[:, :prefix], 1)
    length = prefix + (PATCHES if masks(reducer, train) else keep + reducer.extra)
    assert twice.x.shape == (BATCH, length, WIDTH)
    assert twice.size.shape == (BATCH, length)
    assert twice.owner.shape == (BATCH, PATCHES)
    assert twice.owner.dtype == jnp.int32
    assert twice.prefix == prefix
    assert twice.x.dtype == tokens.x.dtype


@every_prefix
@but_for(FIXED_COUNT | SOFT)
def test_owner_says_where_every_patch_is(reducer, prefix):
    tokens, _, twice, _ = reduce_twice(reducer, prefix)
    for image in range(BATCH):
        owner = np.asarray(twice.owner[image])
        assert set(owner) <= set(range(-1, twice.patches))
        # As many patches say that they are in a token as it says it stands for.
        owned = np.bincount(owner[owner >= 0], minlength=twice.patches)
        np.testing.assert_array_equal(owned, twice.size[image, prefix:])
        if file_name(reducer) in SPREADS:
            continue
        # A token that stands for one patch is that patch.
        alone = [
            patch for patch in range(PATCHES) if owner[patch] >= 0 and owned[owner[patch]] == 1
        ]
        assert alone
        for patch in alone:
            now, before = twice.x[image, prefix + owner[patch]], tokens.x[image, prefix + patch]
            np.testing.assert_array_equal(now, before)


@but_for(FIXED_COUNT | SOFT)
def test_size_never_grows_and_is_conserved_where_nothing_is_dropped(reducer):
    tokens, once, twice, _ = reduce_twice(reducer, 1)
    before, middle, after = (np.asarray(t.size.sum(axis=1)) for t in (tokens, once, twice))
    assert (middle <= before).all()
    assert (after <= middle).all()
    dropped = np.asarray((twice.owner < 0).sum(axis=1))
    np.testing.assert_array_equal(after, before - dropped)


@every_free_one
def test_gradients_are_finite_and_reach_what_was_kept(reducer):
    tokens, signals = example()
    keep = count_to_keep(reducer, PATCHES, 1)

    def loss(x, k):
        after = call(reducer, tokens.replace(x=x), signals.replace(k=k), keep)
        return jnp.sum(jnp.sin(after.x))

    grads = jax.grad(loss, argnums=(0, 1))(tokens.x, signals.k)
    assert all(bool(jnp.isfinite(grad).all()) for grad in grads)
    owner = call(reducer, tokens, signals, keep).owner
    reached = np.asarray(jnp.abs(grads[0][:, 1:]).sum(axis=-1) > 0)
    if file_name(reducer) in STANDS_FOR_OTHERS:
        assert not reached[np.asarray(owner < 0)].any()
        return
    np.testing.assert_array_equal(reached, np.asarray(owner >= 0))


@every_free_one
def test_each_image_is_treated_alone(reducer):
    tokens, signals = example()
    keep = count_to_keep(reducer, PATCHES, 1)
    together = call(reducer, tokens, signals, keep)
    for image in range(BATCH):
        one = jax.tree.map(lambda array: array[image : image + 1], (tokens, signals))  # noqa: B023
        alone = call(reducer, *one, keep)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            # Products of other batch sizes may be summed in another order.
            np.testing.assert_allclose(a[0], b[image], rtol=1e-6, atol=1e-6)


@but_for(FIXED_COUNT | SPREADS)
def test_weights_stay_with_their_tokens(reducer):
    tokens, signals = example()
    weight = jnp.tile(1.0 + jnp.arange(1.0 + PATCHES), (BATCH, 1))
    after = call(reducer, tokens.replace(weight=weight), signals, 10)
    assert after.weight.shape == after.size.shape
    if reducer.weights_at_least_one:
        assert jnp.min(after.weight) >= 1
    if getattr(reducer, "proportional", False) and file_name(reducer) not in OWN_WEIGHT:
        np.testing.assert_array_equal(after.weight, after.size)
        return
    for image in range(BATCH):
        for patch, owner in enumerate(np.asarray(after.owner[image])):
            if owner >= 0 and after.size[image, 1 + owner] == 1:
                assert after.weight[image, 1 + owner] == weight[image, 1 + patch]


@every_prefix
@every_free_one
def test_positions_stay_with_their_tokens(reducer, prefix):
    tokens, signals = example(prefix)
    grid = jnp.stack(jnp.divmod(jnp.arange(PATCHES), 4), axis=-1).astype(jnp.float32)
    positions = jnp.tile(jnp.pad(grid, ((prefix, 0), (0, 0)))[None], (BATCH, 1, 1))
    after = call(reducer, tokens.replace(positions=positions), signals, 9)
    if type(reducer).__name__ == "TwoSteps":  # joins without them; a method may
        return
    assert after.positions.shape == (*after.size.shape, 2)
    low, high = after.positions[:, prefix:].min((0, 1)), after.positions[:, prefix:].max((0, 1))
    assert (low >= 0).all()
    assert (high <= jnp.asarray([2.0, 3.0])).all()
    for image in range(BATCH):
        for patch, owner in enumerate(np.asarray(after.owner[image])):
            if owner >= 0 and after.size[image, prefix + owner] == 1:
                now = after.positions[image, prefix + owner]
                np.testing.assert_array_equal(now, grid[patch])


@every_reducer
def test_keeping_everything_is_the_dense_model_to_the_last_bit(reducer):
    sizes = dict(image_size=16, patch_size=4, width=16, depth=4, num_heads=2, num_classes=3)
    dense = build_model("vit", **sizes)
    params = init_params(dense, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    expected, _ = jax.jit(dense.apply)({"params": params}, images)
    reduced = build_model("vit", reducer=reducer, keep_rate=1, **sizes)
    logits, out = jax.jit(reduced.apply)({"params": params}, images)
    np.testing.assert_array_equal(logits, expected)
    assert out["owner"] == ()


@every_reducer
def test_reducers_are_part_of_the_compile_key(reducer):
    again = reducer.clone() if isinstance(reducer, nn.Module) else dataclasses.replace(reducer)
    assert hash(reducer) == hash(again)
    assert reducer == again


def test_evit_keeps_the_most_attended_in_descending_order_and_fuses_the_rest():
    tokens, signals = example()
    after = create_reducer("evit")(tokens, signals, 4)
    for image in range(BATCH):
        attention = np.asarray(signals.class_attention()[image, 1:], np.float64)
        patches = np.asarray(tokens.x[image, 1:], np.float64)
        order = np.argsort(-attention)
        np.testing.assert_array_equal(after.x[image, 1:5], tokens.x[image, 1:][order[:4]])
        fused = attention[order[4:]] @ patches[order[4:]]  # not divided by the sum of attention
        np.testing.assert_allclose(after.x[image, 5], fused, rtol=1e-5, atol=1e-6)
        assert after.size[image, 5] == PATCHES - 4
        np.testing.assert_array_equal(np.asarray(after.owner[image])[order[:4]], range(4))
        np.testing.assert_array_equal(np.asarray(after.owner[image])[order[4:]], 4)


def test_evit_breaks_ties_towards_the_lower_index():
    tokens, signals = example()
    even = with_attention(signals, jnp.full((BATCH, 1 + PATCHES), 1 / (1 + PATCHES)))
    after = create_reducer("evit:fuse=False")(tokens, even, 3)
    np.testing.assert_array_equal(after.owner[0], [0, 1, 2, *[-1] * (PATCHES - 3)])


def test_a_fused_token_selected_again_keeps_its_patches():
    tokens, signals = example()
    reducer = create_reducer("evit")
    once = reducer(tokens, signals, 4)  # patch tokens 0 to 3 and the fused one, 4
    attention = jnp.tile(jnp.asarray([0.05, 0.1, 0.2, 0.1, 0.05, 0.5]), (BATCH, 1))
    twice = reducer(once, with_attention(signals, attention), 2)
    expected = {0: 2, 1: 1, 2: 2, 3: 2, 4: 0}  # the fused token is now the first one
    moved = [[expected[int(token)] for token in row] for row in once.owner]
    np.testing.assert_array_equal(twice.owner, moved)
    np.testing.assert_array_equal(twice.size[0], [1, PATCHES - 4, 1, 3])


def test_a_fused_token_gets_the_plain_weight():
    tokens, signals = example()
    weighted = tokens.replace(weight=jnp.full((BATCH, 1 + PATCHES), 3.0))
    after = create_reducer("evit")(weighted, signals, 4)
    np.testing.assert_array_equal(after.weight[0], [3, 3, 3, 3, 3, 1])


def test_random_draws_anew_in_training_and_once_in_evaluation():
    reducer = create_reducer("random")
    tokens, signals = example(train=True)
    first = reducer(tokens, signals, 6).owner
    second = reducer(
        tokens, signals.replace(rng=jax.random.split(jax.random.key(9), BATCH)), 6
    ).owner
    assert (first != second).any()
    assert (first[0] != first[1]).any()  # every image its own
    tokens, signals = example()
    fixed = reducer(tokens, signals, 6).owner
    np.testing.assert_array_equal(fixed[0], fixed[1])
    assert (fixed != reducer(tokens, signals.replace(layer=1), 6).owner).any()
    assert (fixed != create_reducer("random:seed=1")(tokens, signals, 6).owner).any()


def test_follow_leaves_dropped_patches_dropped():
    owner, destination = jnp.asarray([[0, -1, 2, 1]]), jnp.asarray([[5, -1, 3]])
    np.testing.assert_array_equal(follow(owner, destination), [[5, -1, 3, -1]])


def test_specs_are_words_or_dicts():
    assert create_reducer("evit:fuse=False") == create_reducer(dict(name="evit", fuse=False))
    assert create_reducer("evit").extra == 1
    with pytest.raises(InputError, match="unknown reducer 'evti'; did you mean 'evit'"):
        create_reducer("evti")
    with pytest.raises(InputError, match="unknown field of evit 'fused'; did you mean 'fuse'"):
        create_reducer("evit:fused=False")
    with pytest.raises(InputError, match="evit's fuse must be of type bool, got 'no'"):
        create_reducer("evit:fuse=no")
    with pytest.raises(InputError, match=r"tome's r must be of type int or tuple, got 4\.5"):
        create_reducer("tome:r=4.5")
    assert hash(create_reducer(dict(name="tome", r=[3, 1]))) is not None
    with pytest.raises(InputError, match="needs a name"):
        create_reducer(dict(fuse=False))


def test_evit_by_another_score_fuses_a_mean_that_needs_no_class_token():
    tokens, signals = example()
    signals = signals.replace(class_token=False)
    after = create_reducer("evit:by=value")(tokens, signals, 4)
    for image in range(BATCH):
        norms = np.asarray(signals.v[image], np.float64)
        scores = np.sqrt((norms**2).sum(axis=(0, 2)))[1:]
        order = np.argsort(-scores)
        np.testing.assert_array_equal(after.x[image, 1:5], tokens.x[image, 1:][order[:4]])
        share = scores[order[4:]] / scores[order[4:]].sum()
        fused = share @ np.asarray(tokens.x[image, 1:], np.float64)[order[4:]]
        np.testing.assert_allclose(after.x[image, 5], fused, rtol=1e-5, atol=1e-6)


def test_a_model_without_a_class_token_names_the_methods_that_do_without():
    sizes = dict(image_size=16, patch_size=4, width=16, depth=4, num_heads=2)
    kind = dict(class_token=False, pool="avg")
    for name in known_reducers():
        reducer = create_reducer(name)
        grid, keep = ((2, 6), 3) if name in FIXED_COUNT else ((3, 4), 10)
        tokens, signals = example(grid=grid)
        signals = signals.replace(class_token=False)
        if not reducer.reads_class_token:
            call(reducer, tokens, signals, keep)
            continue
        build_model("vit", **sizes, **kind, reducer=reducer, keep_rate=1)  # dense, so it may
        with pytest.raises(InputError) as error:
            build_model("vit", **sizes, **kind, reducer=reducer, tokens=(8, 6, 5), layers=(0, 1, 2))
        text = str(error.value)
        assert all(other in text for other in ("tome", "shift", "topk", "by=received"))
        assert name in text.partition("do without, and")[2]
        again = dataclasses.replace(reducer, by="received")
        assert not again.reads_class_token
        call(again, tokens, signals, keep)
