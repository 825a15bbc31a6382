# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model
from evit_jax.plan.flops import macs
from evit_jax.reducers import create_reducer
from tests.contracts.test_reducers import BATCH, PATCHES, example
from tests.support.by_hand import slopes


def furthest(signals, image, prefix, keep):
    """Patch tokens by how far attention moved them, the furthest first."""
    before, after = (
        np.asarray(array[image, prefix:], np.float64) for array in (signals.before, signals.after)
    )
    moved = [np.sqrt(np.sum((after[j] - before[j]) ** 2)) for j in range(len(after))]
    return sorted(range(len(moved)), key=lambda patch: -moved[patch])[:keep]


@pytest.mark.parametrize("prefix", [1, 2])
def test_the_tokens_that_moved_furthest_are_kept(prefix):
    tokens, signals = example(prefix)
    after = create_reducer("shift")(tokens, signals, 5)
    for image in range(BATCH):
        kept = furthest(signals, image, prefix, 5)
        np.testing.assert_array_equal(after.x[image, prefix:], tokens.x[image, prefix:][kept, :])
        np.testing.assert_array_equal(after.size[image], np.ones(prefix + 5))
        owner = [kept.index(patch) if patch in kept else -1 for patch in range(PATCHES)]
        np.testing.assert_array_equal(after.owner[image], owner)


def test_gradients_are_those_of_the_kept_tokens_even_where_nothing_moved():
    tokens, signals = example()

    def loss(x, before):
        now = signals.replace(after=x, before=before)
        return jnp.sum(jnp.sin(create_reducer("shift")(tokens.replace(x=x), now, 5).x))

    def by_hand(x):
        total = 0
        for image in range(BATCH):
            kept = furthest(signals.replace(after=x), image, 1, 5)
            total += np.sin(x[image, [0, *(1 + patch for patch in kept)]]).sum()
        return total

    grad = jax.grad(loss)(tokens.x, signals.before)
    np.testing.assert_allclose(grad, slopes(by_hand, tokens.x), atol=1e-6)
    still = jax.grad(loss, argnums=(0, 1))(tokens.x, tokens.x)  # the norm has no slope at 0
    np.testing.assert_array_equal(np.isfinite(still), True)
    np.testing.assert_array_equal(np.any(still[0], axis=-1)[0], [True] * 6 + [False] * 7)


def test_it_needs_neither_a_class_token_nor_queries():
    tokens, signals = example()
    expected = create_reducer("shift")(tokens, signals, 5)
    signals = signals.replace(class_token=False, k=None, v=None)
    jax.tree.map(
        np.testing.assert_array_equal, create_reducer("shift")(tokens, signals, 5), expected
    )


def counts(spec, depth=12, **settings):
    return build_model("vit", depth=depth, reducer=spec, **settings).tokens_per_block


def test_by_default_blocks_1_4_7_of_12_drop_a_fifth():
    assert counts("shift") == (197, *[158] * 3, *[127] * 3, *[102] * 5)
    reducer = create_reducer("shift")
    assert reducer.default_layers(24) == (2, 8, 14)
    assert reducer.default_layers(4) == (0, 1, 2)
    assert reducer.default_layers(1) == (0,)


def test_rates_and_layers_can_be_given():
    assert counts("shift:rate=0.5", depth=2, layers=(1,)) == (197, 99)
    assert counts("shift:rate=1", depth=4, keep_rate=0.7, layers=(3,)) == (197, 197, 197, 139)
    assert counts("shift:rate=1", depth=4) == (197,) * 4
    assert counts("shift", depth=4, keep_rate=1) == (197,) * 4  # the dense model beside it
    with pytest.raises(InputError, match="has a schedule of its own"):
        counts("shift", keep_rate=0.7)
    for rate in (0, 1.5):
        with pytest.raises(InputError, match=r"shift's rate is in \(0, 1\]"):
            create_reducer(f"shift:rate={rate}")


def test_it_costs_nothing_in_pairs_of_tokens():
    model = build_model("vit", reducer="shift")
    assert macs(model) == macs(model.clone(reducer=create_reducer("topk")))
